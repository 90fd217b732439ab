"""MAGPRUNE: drop entries at random, the smaller ones of a row more often.

The entry of rank r (from 0, by growing magnitude) among the n of its row is kept with probability

    q = density + ε (r / (n − 1) − 1/2)

and is then divided by q, so that its expectation stays. Equal entries share the mean of their
ranks, a row of one entry is kept with probability `density`.
Source: DELLA-Merging, arXiv:2406.11617, which gives the drop probability 1 − q.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec.kernels.jit import jit
from taskvec.kernels.randomness import draw
from taskvec.streaming import CHUNK

Array = np.ndarray[Any, Any]

CACHED = 262_144  # entries worked on at once, so that what is made of them stays in cache


def prune(
    values: Array, density: float, epsilon: float, rescale: bool, key: np.uint64, first: int
) -> None:
    """As `magprune`, ranks included, some rows at a time."""
    columns = values.shape[1]
    step = max(1, CACHED // max(1, columns))
    for row in range(0, len(values), step):
        some = values[row : row + step]
        magprune(some, growing(some), density, epsilon, rescale, key, first + row * columns)


def growing(values: Array) -> Array:
    """Columns of each row by growing magnitude, int64; of equal entries any is first.

    A float32's magnitude grows as its bits do: sorting them with the column below is two and a half
    times as fast as `argsort`.

    >>> growing(np.array([[0.5, -2.0, 1.0]], np.float32)).tolist()
    [[0, 2, 1]]
    """
    magnitudes = np.abs(values)
    if values.dtype != np.float32:
        return np.argsort(magnitudes, axis=1)
    keys = magnitudes.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(values.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(2**32 - 1)
    return keys.view(np.int64)


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
        order: Columns of each row by growing magnitude, the same shape, int64.
        density: Mean probability of being kept.
        epsilon: Difference of the probabilities of the largest and the smallest entry of a row; a
            density of 1 keeps all, whatever it is.
        rescale: Whether what is kept is divided by its probability.
        key: What draws depend on besides the entry's index.
        first: Index of the first entry in its tensor.
    """
    rows, columns = values.shape
    epsilon = epsilon if density < 1 else 0.0
    none = values.dtype.type(0)
    places = np.empty(columns)  # ranks as shares of the largest
    magnitudes = np.empty(columns, values.dtype)
    begins = np.empty(columns, np.int64)  # first rank of the equal entries around a rank
    for row in range(rows):
        for i in range(columns):
            magnitudes[i] = abs(values[row, order[row, i]])
        begin = 0
        for i in range(columns):
            begin = begin if i > 0 and magnitudes[i] == magnitudes[i - 1] else i
            begins[i] = begin
        end = columns - 1
        for i in range(columns - 1, -1, -1):
            end = end if i < columns - 1 and magnitudes[i] == magnitudes[i + 1] else i
            place = 0.5 * (begins[i] + end) / (columns - 1) if columns > 1 else 0.5
            places[order[row, i]] = place
        line, offset = values[row], np.uint64(first + row * columns)
        for i in range(columns):  # in the order of memory, so that several are worked out at once
            keep = density + epsilon * (places[i] - 0.5)
            bound = np.uint64(np.rint(keep * 2.0**32))
            kept = line[i] / keep if rescale else line[i]
            line[i] = kept if draw(key, offset + np.uint64(i)) < bound else none


@jit
def add_magnitudes(values: Array, sums: Array) -> None:
    """Add Σ |x| over each chunk of a block, in order, to `sums`, shape (chunks,), float64."""
    for i in range(len(values)):
        sums[i // CHUNK] += abs(np.float64(values[i]))
