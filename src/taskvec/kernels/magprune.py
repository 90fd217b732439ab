"""MAGPRUNE: drop entries at random, the smaller ones of a row more often.

The entry of rank r (from 0, by growing magnitude) among the n of its row is kept with probability

    q = density + ε (r / (n − 1) − 1/2)

and is then divided by q, which preserves its expectation. Equal entries share the mean of their
ranks. The entry of a row with one entry is kept with probability `density`.
Source: DELLA-Merging, arXiv:2406.11617, which gives the drop probability 1 − q.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec.kernels.jit import jit
from taskvec.kernels.randomness import draw
from taskvec.kernels.select import MAGNITUDE
from taskvec.streaming import CHUNK

Array = np.ndarray[Any, Any]

COLUMN = np.uint64(2**32 - 1)  # the bits of a result of `growing` that hold its column
CACHED = 131_072  # entries worked on at once, so that what is made of them stays in cache


def prune(
    values: Array, density: float, epsilon: float, rescale: bool, key: np.uint64, first: int
) -> None:
    """As `magprune`, including the ranks, in groups of rows."""
    columns = values.shape[1]
    step = max(1, CACHED // max(1, columns))
    for row in range(0, len(values), step):
        some = values[row : row + step]
        magprune(some, growing(some), density, epsilon, rescale, key, first + row * columns)


def growing(values: Array) -> Array:
    """Columns of each row by increasing magnitude, in the lower half of uint64.

    Equal entries may have any order. The magnitude of a float32 increases with its bits; sorting
    the bits with the column in the lower half is two and a half times as fast as `argsort`.

    >>> (growing(np.array([[0.5, -2.0, 1.0]], np.float32)) & COLUMN).tolist()
    [[0, 2, 1]]
    """
    if values.dtype != np.float32:
        return np.argsort(np.abs(values), axis=1).astype(np.uint64)
    keys = np.empty(values.shape, np.uint64)
    _number(np.ascontiguousarray(values).view(np.uint32), keys)
    keys.sort(axis=1)
    return keys


@jit
def _number(bits: Array, keys: Array) -> None:
    """Magnitudes of float32 above, columns below."""
    for row in range(len(bits)):
        for i in range(bits.shape[1]):
            magnitude = np.uint64(bits[row, i] & MAGNITUDE)
            keys[row, i] = (magnitude << np.uint64(32)) | np.uint64(i)


@jit
def magprune(
    values: Array,
    order: Array,
    density: float,
    epsilon: float,
    rescale: bool,
    key: np.uint64,
    first: int,
) -> None:
    """Drop and rescale entries of whole rows, in place.

    Args:
        values: Shape (rows, columns), float32 or float64.
        order: The result of `growing` for them.
        density: Mean probability of being kept.
        epsilon: Difference in probability between the largest and the smallest entry of a row; a
            density of 1 keeps all entries for any epsilon.
        rescale: Whether kept entries are divided by their probability.
        key: Key of the draws, which also depend on the entry's index.
        first: Index of the first entry in its tensor.
    """
    rows, columns = values.shape
    epsilon = epsilon if density < 1 else 0.0
    none, last = values.dtype.type(0), np.float64(columns - 1)
    begins = np.empty(columns, np.int32)  # first rank of the equal entries around a rank
    doubled = np.empty(columns, np.int32)  # twice the rank of each column
    draws = np.empty(columns, np.uint32)
    for row in range(rows):
        line, offset = values[row], np.uint64(first + row * columns)
        _rank(line, order[row], begins, doubled)
        for i in range(columns):  # in the order of memory, so that it is vectorized
            draws[i] = np.uint32(draw(key, offset + np.uint64(i)))
        for i in range(columns):
            place = 0.5 * doubled[i] / last if columns > 1 else 0.5
            keep = density + epsilon * (place - 0.5)
            kept = line[i] / keep if rescale else line[i]
            line[i] = kept if np.float64(draws[i]) < np.rint(keep * 2.0**32) else none


@jit
def _rank(line: Array, order: Array, begins: Array, doubled: Array) -> None:
    """Twice the rank of each column of a row; equal entries share the mean of their ranks.

    The code selects values instead of branching: with many equal entries, as in 16 bits, branches
    could not be predicted.
    """
    count = len(line)
    begin, before = np.int32(0), line.dtype.type(-1)
    for i in range(count):
        magnitude = abs(line[np.int64(order[i] & COLUMN)])
        begin = begin if magnitude == before else np.int32(i)
        before = magnitude
        begins[i] = begin
    end, after = np.int32(count - 1), np.int32(-1)
    for i in range(count - 1, -1, -1):
        end = end if begins[i] == after else np.int32(i)
        after = begins[i]
        doubled[np.int64(order[i] & COLUMN)] = after + end


@jit
def add_magnitudes(values: Array, sums: Array) -> None:
    """Add Σ |x| over each chunk of a block, in order, to `sums`, shape (chunks,), float64."""
    for i in range(len(values)):
        sums[i // CHUNK] += abs(np.float64(values[i]))
