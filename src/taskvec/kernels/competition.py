"""Scores of PCB-Merging: importance of an entry to its task, times agreement between tasks.

    a_t = |x_t| held between two bounds,  ν_t = (a_t − smallest_t) / (largest_t − smallest_t)
    β_t = exp(N ν_t²) · tanh(x_t Σ_u x_u)
    σ_t = (β_t − cut_t) / (top_t − cut_t), at least 0
    θ = θ_target + Σ_t |λ_t| σ_t sgn(x_t) a_t / Σ_t σ_t

Scores are computed in float64 and rounded to float32. With the sign bit flipped, the bits of a
float32 have the order of the scores, so two counts find the k-th largest score.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from taskvec.kernels.convert import bits_from_float
from taskvec.kernels.jit import jit

Array = np.ndarray[Any, Any]

BINS = 1 << 16  # of each of the two counts
_SIGN, _ALL = np.uint32(0x80000000), np.uint32(0xFFFFFFFF)


@jit
def score(vectors: Array, smallest: Array, largest: Array, out: Array) -> None:
    """β_t of a block.

    Args:
        vectors: x_t, shape (N, n), float32 or float64.
        smallest: Lower bound of magnitude of each task, shape (N,), float64.
        largest: Upper bound of magnitude of each task, shape (N,), float64.
        out: Receives β_t, shape (N, n), float32.
    """
    tasks, count = vectors.shape
    for i in range(count):
        total = 0.0
        for t in range(tasks):
            total += np.float64(vectors[t, i])
        for t in range(tasks):
            value = np.float64(vectors[t, i])
            size = min(max(abs(value), smallest[t]), largest[t])
            spread = largest[t] - smallest[t]
            place = (size - smallest[t]) / spread if spread > 0 else 0.0
            # + 0: there is one zero only
            out[t, i] = np.float32(math.exp(tasks * place * place) * math.tanh(value * total)) + 0


@jit
def weigh(
    vectors: Array,
    scores: Array,
    scales: Array,
    smallest: Array,
    largest: Array,
    cut: Array,
    top: Array,
    merged: Array,
) -> None:
    """Add the weighted mean of a block.

    Args:
        vectors: x_t, shape (N, n), float32 or float64.
        scores: β_t, shape (N, n), float32.
        scales: |λ_t|, shape (N,), type of the vectors.
        smallest: See `score`.
        largest: See `score`.
        cut: Smallest score of kept entries, shape (N,), float64.
        top: Largest score, shape (N,), float64; if it equals the cut, kept entries have weight 1.
        merged: θ_target, shape (n,), type of the vectors; receives θ.
    """
    tasks, count = vectors.shape
    for i in range(count):
        total, shares = 0.0, 0.0
        for t in range(tasks):
            above, spread = np.float64(scores[t, i]) - cut[t], top[t] - cut[t]
            if above < 0:
                continue
            share = min(above / spread, 1.0) if spread > 0 else 1.0
            value = np.float64(vectors[t, i])
            size = min(max(abs(value), smallest[t]), largest[t])
            total += scales[t] * share * np.sign(value) * size
            shares += share
        if shares > 0 and total != 0:  # −0 stays what it is
            merged[i] += total / shares


@jit
def count_scores(scores: Array, upper: int, histogram: Array) -> None:
    """Add scores to a histogram of their ordered bits.

    Args:
        scores: Shape (n,), float32.
        upper: Count the lower bits of scores with these upper bits; −1: count upper bits.
        histogram: Shape (BINS,), int64; added to.
    """
    for i in range(len(scores)):
        bits = bits_from_float(scores[i])
        ordered = bits ^ (_ALL if bits & _SIGN else _SIGN)
        high = np.int64(ordered >> np.uint32(16))
        if upper < 0:
            histogram[high] += 1
        elif high == upper:
            histogram[np.int64(ordered & np.uint32(BINS - 1))] += 1


def score_of(upper: int, lower: int) -> float:
    """The score that has these ordered bits.

    >>> score_of(0x8000, 0), score_of(0xBF80, 0), score_of(0x407F, 0xFFFF)
    (0.0, 1.0, -1.0)
    """
    ordered = np.uint32(upper << 16 | lower)
    bits = ordered ^ (_SIGN if ordered & _SIGN else _ALL)
    return float(bits.view(np.float32))
