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

Array = np.ndarray[Any, Any]


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
        epsilon: Difference of the probabilities of the largest and the smallest entry of a row.
        rescale: Whether what is kept is divided by its probability.
        key: What draws depend on besides the entry's index.
        first: Index of the first entry in its tensor.
    """
    rows, columns = values.shape
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
