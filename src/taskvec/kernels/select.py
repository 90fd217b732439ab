"""Selection by magnitude: the magnitude of the k-th largest entry of a vector, without sorting.

The magnitudes of float32 have the order of their bits without the sign. Two counts over the vector
find the k-th largest exactly: first of the upper 16 of these 31 bits, then of the lower 15 bits
among entries with the upper bits of the k-th largest. A third count, of the entries in every chunk
that equal it, selects which of them to keep if not all may be kept: the first ones.

A vector is w (θ_ft − θ_pre), in float32: differences are rounded once, then multiplied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec.kernels.convert import bits_from_float, difference, widen
from taskvec.kernels.gram import STRETCH
from taskvec.kernels.jit import jit
from taskvec.kernels.randomness import draw
from taskvec.streaming import CHUNK

Array = np.ndarray[Any, Any]

UPPER, LOWER = 1 << 16, 1 << 15  # bins of the two counts
MAGNITUDE = np.uint32(0x7FFFFFFF)


@jit
def load_vector(
    addresses: Array,
    codes: Array,
    is_difference: bool,
    weight: Any,
    start: int,
    length: int,
    rows: Array,
    row: int,
) -> None:
    """Elements [start, start + length) of w τ into `rows[row]`; `rows[0]` receives θ_pre.

    Args:
        addresses: Where the block begins in θ_pre and θ_ft (or τ), shape (2,), int64.
        codes: Element types, shape (2,), int64.
        is_difference: Whether the second address is τ itself.
        weight: w, in the type of the rows.
        start: First element.
        length: Number of elements, at most STRETCH.
        rows: Shape (> row, STRETCH), float32 or float64.
        row: Index of the row, not 0.
    """
    if is_difference:
        widen(codes[1], addresses[1], start, length, rows[row])
    else:
        widen(codes[0], addresses[0], start, length, rows[0])
        difference(codes[1], addresses[1], start, length, rows, row, 1)
    if weight != 1:
        for i in range(length):
            rows[row, i] = weight * rows[row, i]


@jit
def count_magnitudes(
    addresses: Array,
    codes: Array,
    is_difference: bool,
    weight: np.float32,
    count: int,
    upper: int,
    rows: Array,
    histogram: Array,
) -> None:
    """Add the magnitudes of a block to a histogram.

    Args:
        addresses: See `load_vector`.
        codes: See `load_vector`.
        is_difference: See `load_vector`.
        weight: See `load_vector`.
        count: Elements of the block.
        upper: Count the lower bits of entries with these upper bits; −1: count upper bits.
        rows: Working space, shape (2, STRETCH), float32 or float64.
        histogram: Shape (UPPER,) or (LOWER,), int64; added to.
    """
    for start in range(0, count, STRETCH):
        length = min(STRETCH, count - start)
        load_vector(addresses, codes, is_difference, weight, start, length, rows, 1)
        for i in range(length):
            magnitude = bits_from_float(np.float32(rows[1, i])) & MAGNITUDE
            high = np.int64(magnitude >> np.uint32(15))
            if upper < 0:
                histogram[high] += 1
            elif high == upper:
                histogram[np.int64(magnitude & np.uint32(LOWER - 1))] += 1


@jit
def count_equal(
    addresses: Array,
    codes: Array,
    is_difference: bool,
    weight: np.float32,
    count: int,
    magnitude: np.uint32,
    rows: Array,
    equal: Array,
) -> None:
    """Count the entries with exactly this magnitude in each chunk of a block.

    Args:
        addresses: See `load_vector`.
        codes: See `load_vector`.
        is_difference: See `load_vector`.
        weight: See `load_vector`.
        count: Elements of the block.
        magnitude: Bits without the sign.
        rows: Working space, shape (2, STRETCH), float32 or float64.
        equal: Receives the counts, shape (chunks,), int64.
    """
    equal[:] = 0
    for start in range(0, count, STRETCH):
        length = min(STRETCH, count - start)
        load_vector(addresses, codes, is_difference, weight, start, length, rows, 1)
        found = np.int32(0)
        for i in range(length):
            found += np.int32((bits_from_float(np.float32(rows[1, i])) & MAGNITUDE) == magnitude)
        equal[start // CHUNK] += found


@jit
def sum_magnitudes(
    addresses: Array,
    codes: Array,
    is_difference: bool,
    weight: np.float32,
    count: int,
    bound: np.uint64,
    key: np.uint64,
    first: int,
    rows: Array,
    sums: Array,
) -> None:
    """Σ |x| over each chunk of a block, for all entries and for those that a draw keeps.

    Args:
        addresses: See `load_vector`.
        codes: See `load_vector`.
        is_difference: See `load_vector`.
        weight: See `load_vector`.
        count: Elements of the block.
        bound: An entry is kept if its draw is below this bound.
        key: Key of the draws, which also depend on the entry's index.
        first: Index of the first entry in its tensor, at the start of a chunk.
        rows: Working space, shape (2, STRETCH), float32 or float64.
        sums: Receives the sums, shape (chunks, 2), float64.
    """
    sums[:] = 0
    for start in range(0, count, STRETCH):
        length = min(STRETCH, count - start)
        load_vector(addresses, codes, is_difference, weight, start, length, rows, 1)
        total, kept = 0.0, 0.0
        for i in range(length):
            magnitude = abs(np.float64(rows[1, i]))
            total += magnitude
            if draw(key, np.uint64(first + start + i)) < bound:
                kept += magnitude
        sums[start // CHUNK, 0] += total
        sums[start // CHUNK, 1] += kept
