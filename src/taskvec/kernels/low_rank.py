"""A range of s · B A, or of its transpose: the change that a LoRA adapter makes to a weight.

    out[i, j] = s · (… ((L[i, 0] R[0, j]) + L[i, 1] R[1, j]) + … + L[i, r − 1] R[r − 1, j])

For a weight stored as (out, in), L is B and R is A. For a weight stored as (in, out), as in an
embedding or in GPT-2, L is Aᵀ and R is Bᵀ. Each element is summed over k in that order, with a
fused multiply-add at each step, and then multiplied by s once. So no bit depends on the requested
range, on threads, or on the vector width of the machine.

`WIDTH` columns of R and `PANEL` rows of L are widened into scratch that fits the second-level
cache. Four rows of the result take four steps of k at once, so loaded values serve sixteen
multiply-adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from taskvec.kernels.convert import widen
from taskvec.kernels.jit import jit

WIDTH = 512
PANEL = 512
STEPS = 4  # of k, and rows of the result, at once
TILE = 16  # rows that are turned into columns at once: a cache line of float32

Array = np.ndarray[Any, Any]


@intrinsic  # type: ignore[untyped-decorator]
def fused(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """The sum x · y + z, rounded once; all three float32 or all three float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.DoubleType() if signature.return_type == types.float64 else ir.FloatType()
        multiply_add = builder.module.declare_intrinsic(
            "llvm.fma", [kind], ir.FunctionType(kind, [kind, kind, kind])
        )
        return builder.call(multiply_add, arguments)

    return z(x, y, z), generate


def low_rank_scratch(
    rank: int, columns: int, dtype: type[np.floating[Any]]
) -> tuple[Array, Array, Array]:
    """Working space of `low_rank`: rows of L, columns of R, and one stored row or column."""
    steps = -(-rank // STEPS) * STEPS
    width = (
        min(columns, WIDTH) + TILE
    )  # rows that begin powers of two apart would share cache lines
    left, right = np.zeros((PANEL, steps), dtype), np.zeros((steps, width), dtype)
    return left, right, np.empty(max(TILE * steps, PANEL), dtype)


@jit
def four_rows(
    left: Array, i: int, right: Array, scaling: Any, out: Array, at: int, stride: int, width: int
) -> None:
    """Rows i … i + 3 of the product in the first `width` columns, to `out[at]` in strides."""
    o0 = out[at : at + width]
    o1 = out[at + stride : at + stride + width]
    o2 = out[at + 2 * stride : at + 2 * stride + width]
    o3 = out[at + 3 * stride : at + 3 * stride + width]
    l0, l1, l2, l3 = left[i], left[i + 1], left[i + 2], left[i + 3]
    for j in range(width):
        o0[j] = o1[j] = o2[j] = o3[j] = 0
    for k in range(0, right.shape[0], STEPS):
        p0, p1, p2, p3 = l0[k], l0[k + 1], l0[k + 2], l0[k + 3]
        q0, q1, q2, q3 = l1[k], l1[k + 1], l1[k + 2], l1[k + 3]
        u0, u1, u2, u3 = l2[k], l2[k + 1], l2[k + 2], l2[k + 3]
        v0, v1, v2, v3 = l3[k], l3[k + 1], l3[k + 2], l3[k + 3]
        r0, r1, r2, r3 = right[k], right[k + 1], right[k + 2], right[k + 3]
        for j in range(width):
            x0, x1, x2, x3 = r0[j], r1[j], r2[j], r3[j]
            o0[j] = fused(p3, x3, fused(p2, x2, fused(p1, x1, fused(p0, x0, o0[j]))))
            o1[j] = fused(q3, x3, fused(q2, x2, fused(q1, x1, fused(q0, x0, o1[j]))))
            o2[j] = fused(u3, x3, fused(u2, x2, fused(u1, x1, fused(u0, x0, o2[j]))))
            o3[j] = fused(v3, x3, fused(v2, x2, fused(v1, x1, fused(v0, x0, o3[j]))))
    for j in range(width):
        o0[j] = scaling * o0[j]
        o1[j] = scaling * o1[j]
        o2[j] = scaling * o2[j]
        o3[j] = scaling * o3[j]


@jit
def one_row(line: Array, right: Array, first: int, scaling: Any, out: Array) -> None:
    """One row of the product, from the column `first`, as many columns as `out` has."""
    out[:] = 0
    for k in range(right.shape[0]):
        x, row = line[k], right[k, first:]
        for j in range(out.shape[0]):
            out[j] = fused(x, row[j], out[j])
    for j in range(out.shape[0]):
        out[j] = scaling * out[j]


@jit
def lay_rows(
    code: int, address: int, length: int, first: int, count: int, line: Array, out: Array
) -> None:
    """Rows of a stored matrix whose rows have `length` elements, widened."""
    for i in range(count):
        widen(code, address, (first + i) * length, length, line)
        for k in range(length):
            out[i, k] = line[k]


@jit
def lay_columns_as_rows(
    code: int, address: int, length: int, rank: int, first: int, count: int, line: Array, out: Array
) -> None:
    """Columns of a stored matrix of `rank` rows of `length`, as rows of `out`."""
    for k in range(rank):
        widen(code, address, k * length + first, count, line)
        for i in range(count):
            out[i, k] = line[i]


@jit
def lay_as_columns(
    code: int, address: int, rank: int, first: int, count: int, line: Array, out: Array
) -> None:
    """Rows [first, first + count) of B, as columns of `out`."""
    for j in range(0, count, TILE):
        w = min(TILE, count - j)
        widen(code, address, (first + j) * rank, w * rank, line)
        for k in range(rank):
            for i in range(w):
                out[k, j + i] = line[i * rank + k]


@jit
def low_rank(
    a: tuple[int, int],
    b: tuple[int, int],
    sizes: tuple[int, int, int],
    transposed: bool,
    scaling: Any,
    start: int,
    out: Array,
    scratch: tuple[Array, Array, Array],
) -> None:
    """Elements [start, start + len(out)) of s · B A or, where `transposed`, of s · (B A)ᵀ.

    Args:
        a: Element type (`taskvec.dtypes`) and address of A, shape (rank, columns), or (rank, rows)
            if transposed.
        b: Element type and address of B, shape (rows, rank), or (columns, rank) if transposed.
        sizes: rank, and rows and columns of the result.
        transposed: Whether the weight is stored as (in, out).
        scaling: s, of the type of `out`.
        start: First element, in row-major order of the result.
        out: Receives them, float32 or float64.
        scratch: From `low_rank_scratch`, of the type of `out`.
    """
    rank, rows, columns = sizes
    left, right, line = scratch
    stop = start + out.shape[0]
    for top in range(start // columns, (stop - 1) // columns + 1, PANEL):
        count = min(PANEL, (stop - 1) // columns + 1 - top)
        if transposed:
            lay_columns_as_rows(a[0], a[1], rows, rank, top, count, line, left)
        else:
            lay_rows(b[0], b[1], rank, top, count, line, left)
        for c in range(0, columns, WIDTH):
            width = min(WIDTH, columns - c)
            if transposed:
                lay_as_columns(b[0], b[1], rank, c, width, line, right)
            else:
                for k in range(rank):
                    widen(a[0], a[1], k * columns + c, width, right[k])
            i = 0
            while i < count:
                at = (top + i) * columns + c - start
                if i + STEPS <= count and at >= 0 and at + 3 * columns + width <= out.shape[0]:
                    four_rows(left, i, right, scaling, out, at, columns, width)
                    i += STEPS
                    continue
                low, high = max(0, -at), min(width, out.shape[0] - at)
                if low < high:
                    one_row(left[i], right, low, scaling, out[at + low : at + high])
                i += 1
