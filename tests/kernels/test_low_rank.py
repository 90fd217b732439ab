"""Stretches of s · B A against the product in float64, and the same bits however it is cut."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.conftest import from_bf16, to_bf16

from taskvec.dtypes import BF16, F16, F32, F64
from taskvec.kernels.low_rank import PANEL, WIDTH, low_rank, low_rank_scratch

Array = np.ndarray[Any, Any]
SCALING = 0.3


def matrices(rank: int, outs: int, ins: int, seed: int = 0) -> tuple[Array, Array]:
    """A (rank, ins) and B (outs, rank), float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (rank, ins)), rng.normal(0, 1, (outs, rank))


def product(
    a: Array, b: Array, start: int = 0, stop: int | None = None, *, transposed: bool = False,
    codes: tuple[int, int] = (F32, F32), dtype: Any = np.float32, scaling: float = SCALING,
) -> Array:  # fmt: skip
    """What the kernel gives for stored A and B, by default all of it."""
    rank, ins, outs = a.shape[0], a.shape[1], b.shape[0]
    shape = (ins, outs) if transposed else (outs, ins)
    out = np.full((outs * ins if stop is None else stop) - start, np.nan, dtype)
    low_rank(
        (codes[0], a.ctypes.data), (codes[1], b.ctypes.data), (rank, *shape), transposed,
        dtype(scaling), start, out, low_rank_scratch(rank, shape[1], dtype),
    )  # fmt: skip
    return out


def formula(a: Array, b: Array, transposed: bool = False) -> Array:
    exact = SCALING * (b.astype(np.float64) @ a.astype(np.float64))
    return (exact.T if transposed else exact).ravel()


def bound(a: Array, b: Array, step: float, transposed: bool = False) -> Array:
    """Roundings of a sum of `rank` products and of its scaling, element by element."""
    size = abs(SCALING) * (abs(b.astype(np.float64)) @ abs(a.astype(np.float64)))
    return (a.shape[0] + 2) * step * (size.T if transposed else size).ravel()


SHAPES = [(1, 1, 1), (1, 7, 5), (3, 5, 9), (4, 4, 4), (5, 13, WIDTH + 3), (8, PANEL + 6, 3),
          (16, 3, 2 * WIDTH), (130, 9, 21)]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_product(shape: tuple[int, int, int], transposed: bool) -> None:
    a, b = (m.astype(np.float32) for m in matrices(*shape))
    got = product(a, b, transposed=transposed)
    error = abs(got - formula(a, b, transposed))
    assert (error <= bound(a, b, 2.0**-24, transposed)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_float64_is_worked_out_in_float64(transposed: bool) -> None:
    a, b = matrices(6, 11, 17)
    got = product(a, b, transposed=transposed, codes=(F64, F64), dtype=np.float64)
    assert (abs(got - formula(a, b, transposed)) <= bound(a, b, 2.0**-53, transposed)).all()


def test_half_precision_is_widened_exactly() -> None:
    a, b = matrices(6, 11, 17)
    brain, half = to_bf16(a), b.astype(np.float16)
    got = product(brain, half.view(np.uint16), codes=(BF16, F16))
    same = product(from_bf16(brain), half.astype(np.float32))
    assert got.tobytes() == same.tobytes()


def test_each_step_is_fused_and_in_order() -> None:
    """Element by element: Σ over k in order, each step rounded once, then the scaling."""
    a, b = (m.astype(np.float32) for m in matrices(7, 6, 10))
    total = np.zeros((6, 10), np.float32)
    for k in range(7):  # a float64 holds a product of two float32 exactly, and nearly the sum
        total = (np.outer(b[:, k].astype(np.float64), a[k].astype(np.float64)) + total).astype("f4")
    expected = np.float32(SCALING) * total
    assert product(a, b).tobytes() == expected.tobytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_any_stretch_has_the_same_bits(transposed: bool) -> None:
    a, b = (m.astype(np.float32) for m in matrices(6, PANEL + 9, WIDTH + 37))
    a, b = (a, b) if not transposed else (np.ascontiguousarray(b.T), np.ascontiguousarray(a.T))
    whole = product(a, b, transposed=transposed)
    rng = np.random.default_rng(1)
    columns = b.shape[0] if transposed else a.shape[1]
    ends = [(0, 1), (1, columns), (columns - 1, columns + 1), (3 * columns, 7 * columns),
            (columns + 5, 6 * columns - 3), (whole.size - 1, whole.size)]  # fmt: skip
    ends += [tuple(sorted(pair)) for pair in rng.integers(0, whole.size + 1, (30, 2))]  # type: ignore[misc]
    for start, stop in ends:
        if start < stop:
            part = product(a, b, int(start), int(stop), transposed=transposed)
            assert part.tobytes() == whole[start:stop].tobytes(), (start, stop)


def test_transposed_has_the_same_bits() -> None:
    a, b = (m.astype(np.float32) for m in matrices(10, 23, 41))
    straight = product(a, b).reshape(23, 41)
    assert product(a, b, transposed=True).tobytes() == straight.T.tobytes()


def test_threads_have_the_same_bits() -> None:
    a, b = (m.astype(np.float32) for m in matrices(5, 64, 300))
    whole = product(a, b)
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda i: product(a, b, 600 * i, 600 * (i + 1)), range(32)))
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_nan_and_infinity_are_seen() -> None:
    a, b = (m.astype(np.float32) for m in matrices(4, 5, 6))
    a[1, 2], b[3, 0] = np.nan, np.inf
    finite = np.isfinite(product(a, b).reshape(5, 6))
    expected = np.ones((5, 6), bool)
    expected[:, 2] = expected[3] = False
    assert (finite == expected).all()
