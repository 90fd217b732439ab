"""A ≈ L R of low rank, by a randomized singular value decomposition.

A is multiplied by a random matrix with a few more columns than the requested rank. A few power
iterations, with orthogonalization after each, turn the result toward the largest singular vectors.
Then only a small matrix is decomposed. The rank is given, or is the smallest that preserves a share
of the energy Σ σ_i².

Source: Halko, Martinsson, Tropp, Finding Structure with Randomness, arXiv:0909.4061, algorithms 4.4
and 5.1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xxhash

Array = np.ndarray[Any, Any]

OVERSAMPLE = 16  # columns besides those that are wanted
POWER_ITERATIONS = 4  # task vectors have flat spectra, in which one or two are too few
_FIRST_GUESS = 64  # rank at which the search for a share of the energy starts
_ROWS = 4_000_000  # elements of A that are widened at once


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers for one tensor, independent of all other computations."""
    key = xxhash.xxh3_128_intdigest(f"{seed}\0{name}".encode())
    return np.random.Generator(np.random.Philox(key=key))


def factors(
    matrix: Array,
    *,
    rank: int | None = None,
    energy: float | None = None,
    random: np.random.Generator,
) -> tuple[Array, Array]:
    """L and R with A ≈ L R, each with the square roots of the singular values.

    Give one of `rank` and `energy`.

    Args:
        matrix: A, shape (m, n), float32 or float64, finite.
        rank: Columns of L; fewer if A has fewer rows or columns.
        energy: Share of ‖A‖² to preserve, in (0, 1]; the smallest sufficient rank is used.
        random: Source of random numbers.

    Returns:
        L of shape (m, r) and R of shape (r, n), of A's type; r = 0 for a matrix of zeros.
    """
    small = min(matrix.shape)
    if not matrix.any():
        return np.zeros((len(matrix), 0), matrix.dtype), np.zeros(
            (0, matrix.shape[1]), matrix.dtype
        )
    if rank is not None:
        left, values, right = decompose(matrix, min(rank, small), random)
    else:
        assert energy is not None
        wanted = energy * squared_norm(matrix)
        guess = min(_FIRST_GUESS, small)
        while True:
            left, values, right = decompose(matrix, guess, random)
            kept = np.cumsum(values.astype(np.float64) ** 2)
            if kept[-1] >= wanted or guess == small:
                break
            guess = min(2 * guess, small)
        count = min(int(np.searchsorted(kept, wanted)) + 1, guess)
        left, values, right = left[:, :count], values[:count], right[:count]
    root = np.sqrt(values)
    return left * root, root[:, None] * right


def decompose(matrix: Array, rank: int, random: np.random.Generator) -> tuple[Array, Array, Array]:
    """The `rank` largest singular values with their vectors: U (m, rank), σ (rank,), Vᵀ (rank, n).

    If a random projection would not be much smaller than the matrix, the matrix itself is
    decomposed.
    """
    columns = rank + OVERSAMPLE
    if 2 * columns >= min(matrix.shape):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = random.standard_normal((matrix.shape[1], columns), dtype=matrix.dtype)
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(matrix.T @ basis)[0]
        basis = np.linalg.qr(matrix @ basis)[0]
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]


def squared_norm(matrix: Array) -> float:
    """‖A‖², summed in float64."""
    return squared_error(matrix, matrix[:, :0], matrix[:0])


def squared_error(matrix: Array, left: Array, right: Array) -> float:
    """‖A − L R‖², in float64, a few rows at a time."""
    step = max(1, _ROWS // max(1, matrix.shape[1]))
    right = right.astype(np.float64)
    return math.fsum(
        float(
            np.square(
                matrix[i : i + step].astype(np.float64)
                - left[i : i + step].astype(np.float64) @ right
            ).sum()
        )
        for i in range(0, len(matrix), step)
    )
