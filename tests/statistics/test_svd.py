"""Low-rank factors against NumPy's full decomposition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from taskvec.statistics import svd
from taskvec.statistics.svd import factors, generator, squared_error, squared_norm


def with_spectrum(values, m, n, seed=0):
    """A float32 matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(m, len(values))))[0]
    right = np.linalg.qr(rng.normal(size=(n, len(values))))[0]
    return (left * values @ right.T).astype(np.float32)


def error(matrix, left, right):
    exact = matrix.astype(np.float64)
    return np.linalg.norm(exact - left.astype(np.float64) @ right.astype(np.float64))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (24, 1000), (7, 5)])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_matrix_of_exact_rank_is_recovered_to_rounding(shape, rank):
    matrix = with_spectrum(np.linspace(1, 0.2, rank), *shape)
    left, right = factors(matrix, rank=rank, random=generator(0, "w"))
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    assert left.dtype == right.dtype == np.float32
    assert error(matrix, left, right) < 2e-6 * np.linalg.norm(matrix)


def test_float64_stays_float64():
    matrix = with_spectrum([3.0, 2.0], 120, 90).astype(np.float64)
    left, right = factors(matrix, rank=8, random=generator(0, "w"))
    assert left.dtype == np.float64
    # The matrix is rank 2 but for float32's rounding of its elements.
    assert error(matrix, left, right) < 1e-6 * np.linalg.norm(matrix)


def test_a_flat_spectrum_is_cut_nearly_as_well_as_can_be():
    matrix = np.random.default_rng(1).normal(size=(400, 300)).astype(np.float32)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best = np.sqrt((values[20:] ** 2).sum())
    left, right = factors(matrix, rank=20, random=generator(0, "w"))
    assert best <= error(matrix, left, right) * (1 + 1e-6)
    assert error(matrix, left, right) < 1.005 * best


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("columns", [40, 500])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy, columns):
    matrix = with_spectrum(0.93 ** np.arange(40.0), 450, columns)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    kept = np.cumsum(values) / values.sum()
    left, right = factors(matrix, energy=energy, random=generator(0, "w"))
    if energy == 1:  # what is left is float32's rounding
        assert len(right) >= 40
        assert error(matrix, left, right) < 2e-6 * np.linalg.norm(matrix)
        return
    assert kept[len(right) - 2] < energy <= kept[len(right) - 1]
    lost = error(matrix, left, right) ** 2 / values.sum()
    assert lost == pytest.approx(1 - kept[len(right) - 1], rel=1e-3)


def test_energy_beyond_the_first_guess():
    matrix = np.random.default_rng(2).normal(size=(600, 700)).astype(np.float32)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    smallest = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.5)) + 1
    assert smallest > svd._FIRST_GUESS
    _, right = factors(matrix, energy=0.5, random=generator(0, "w"))
    assert smallest <= len(right) <= smallest + 2


def test_tiny_elements_are_not_lost():
    matrix = with_spectrum([1.0, 0.5], 200, 100) * np.float32(1e-25)  # squares are below float32
    left, right = factors(matrix, rank=2, random=generator(0, "w"))
    assert error(matrix, left, right) < 2e-6 * np.linalg.norm(matrix.astype(np.float64))


def test_zeros_have_no_rank():
    left, right = factors(np.zeros((4, 3), np.float32), rank=2, random=generator(0, "w"))
    assert left.shape == (4, 0)
    assert right.shape == (0, 3)


def test_rank_is_at_most_what_there_is():
    matrix = np.random.default_rng(3).normal(size=(5, 9)).astype(np.float32)
    left, right = factors(matrix, rank=64, random=generator(0, "w"))
    assert left.shape == (5, 5)
    assert error(matrix, left, right) < 1e-5


def test_random_numbers_are_by_seed_and_name():
    matrix = np.random.default_rng(4).normal(size=(300, 200)).astype(np.float32)

    def made(seed, name):
        return factors(matrix, rank=3, random=generator(seed, name))[0].tobytes()

    assert made(0, "a") == made(0, "a")
    assert made(0, "a") != made(1, "a")
    assert made(0, "a") != made(0, "b")


def test_norms_are_added_in_float64(monkeypatch):
    matrix = np.random.default_rng(5).normal(size=(50, 30)).astype(np.float32)
    left, right = matrix[:, :2] * np.float32(0.1), matrix[:2]
    expected = np.square(matrix.astype(np.float64)).sum()
    assert squared_norm(matrix) == pytest.approx(expected, rel=1e-14)
    monkeypatch.setattr(svd, "_ROWS", 7 * 30)  # several pieces, the last one short
    assert squared_error(matrix, left, right) == pytest.approx(
        error(matrix, left, right) ** 2, rel=1e-12
    )
