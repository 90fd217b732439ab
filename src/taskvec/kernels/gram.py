"""Gram matrix and sign counts of the vectors of a family, over one block of a tensor.

With the vectors v = (θ_pre, τ_instr, τ_1 … τ_K), where τ_instr = θ_pre − θ_base and τ_t = θ_ft,t −
θ_pre:

    G[i, j] = Σ_x v_i[x] v_j[x]
    agree[s, t] = #{x : τ_s[x] τ_t[x] > 0}      support[s, t] = #{x : τ_s[x] ≠ 0 and τ_t[x] ≠ 0}

This basis avoids the cancellation of ⟨τ_instr + τ_t, τ_instr⟩ computed from the complex vector.
Sums run over `CHUNK` elements counted from the start of the tensor, so threads and block sizes do
not change a bit. Within a chunk they run over `STRETCH` elements that fit the first-level cache,
and there over pairs of rows, so a row is loaded once for several products.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec.kernels.convert import difference, widen
from taskvec.kernels.jit import jit, jit_reduction
from taskvec.streaming import CHUNK

STRETCH = 1_024

Array = np.ndarray[Any, Any]


def gram_scratch(members: int, dtype: type[np.floating[Any]]) -> Array:
    """Working space of `gram`: one row for each member, and a row of zeros if the number is odd."""
    return np.zeros((members + members % 2, STRETCH), dtype)


@jit_reduction
def within(rows: Array, v: int, count: int) -> Any:
    """Products of rows v and v + 1: ⟨v, v⟩, ⟨v, v + 1⟩, ⟨v + 1, v + 1⟩."""
    aa = rows[v, 0] * rows[v, 0]
    ab = rows[v, 0] * rows[v + 1, 0]
    bb = rows[v + 1, 0] * rows[v + 1, 0]
    for i in range(1, count):
        a, b = rows[v, i], rows[v + 1, i]
        aa += a * a
        ab += a * b
        bb += b * b
    return aa, ab, bb


@jit_reduction
def between(rows: Array, v: int, w: int, count: int) -> Any:
    """Products of rows v and v + 1 with rows w and w + 1."""
    ac = rows[v, 0] * rows[w, 0]
    ad = rows[v, 0] * rows[w + 1, 0]
    bc = rows[v + 1, 0] * rows[w, 0]
    bd = rows[v + 1, 0] * rows[w + 1, 0]
    for i in range(1, count):
        a, b, c, d = rows[v, i], rows[v + 1, i], rows[w, i], rows[w + 1, i]
        ac += a * c
        ad += a * d
        bc += b * c
        bd += b * d
    return ac, ad, bc, bd


@jit_reduction
def count_signs(rows: Array, v: int, w: int, count: int) -> Any:
    """Elements in which both rows are non-zero, and how many more agree in sign than disagree.

    Counted in float32, which is exact up to 2^24: LLVM needs half as many instructions for this as
    for integer counters.
    """
    one, none = np.float32(1), np.float32(0)
    support = none
    balance = none
    for i in range(count):
        a, b = rows[v, i], rows[w, i]
        sign_a = np.float32(np.copysign(one, a)) if a != 0 else none
        sign_b = np.float32(np.copysign(one, b)) if b != 0 else none
        product = sign_a * sign_b
        support += product * product
        balance += product
    return support, balance


@jit_reduction
def count_nonzero(rows: Array, v: int, count: int) -> Any:
    """Elements of a row that are not zero, counted as in `count_signs`."""
    one, none = np.float32(1), np.float32(0)
    total = none
    for i in range(count):
        total += one if rows[v, i] != 0 else none
    return total


@jit
def gram(
    addresses: Array,
    codes: Array,
    differences: Array,
    count: int,
    scratch: Array,
    products: Array,
    signs: Array,
) -> None:
    """Gram matrices and sign counts of a block that starts at a multiple of `CHUNK` elements.

    Args:
        addresses: Where the block begins in θ_pre, θ_base, θ_ft,1 …; 0 without a base, or if a
            task does not change the tensor: shape (2 + K,), int64.
        codes: Element types (`taskvec.dtypes`), shape (2 + K,), int64.
        differences: Whether a task's block holds τ_t itself, shape (2 + K,), bool.
        count: Elements in the block.
        scratch: From `gram_scratch`; float64 for float64 accuracy.
        products: Receives one Gram matrix per chunk, shape (chunks, 2 + K, 2 + K), float64, upper
            triangles.
        signs: Receives agreement and support per chunk, shape (chunks, K, K, 2), int64, upper
            triangles.
    """
    members = addresses.shape[0]
    products[:] = 0.0
    signs[:] = 0
    for v in range(scratch.shape[0]):
        if v >= members or addresses[v] == 0:
            scratch[v] = 0
    for start in range(0, count, STRETCH):
        length = min(STRETCH, count - start)
        chunk = start // CHUNK
        widen(codes[0], addresses[0], start, length, scratch[0])
        for v in range(1, members):
            if addresses[v] == 0:
                continue
            if differences[v]:
                widen(codes[v], addresses[v], start, length, scratch[v])
            else:
                sign = 1 if v > 1 else -1  # the base is what the instruction vector starts from
                difference(codes[v], addresses[v], start, length, scratch, v, sign)
        for v in range(0, scratch.shape[0], 2):
            aa, ab, bb = within(scratch, v, length)
            products[chunk, v, v] += aa
            if v + 1 < members:
                products[chunk, v, v + 1] += ab
                products[chunk, v + 1, v + 1] += bb
            for w in range(v + 2, scratch.shape[0], 2):
                ac, ad, bc, bd = between(scratch, v, w, length)
                products[chunk, v, w] += ac
                products[chunk, v + 1, w] += bc
                if w + 1 < members:
                    products[chunk, v, w + 1] += ad
                    products[chunk, v + 1, w + 1] += bd
        for v in range(2, members):
            nonzero = int(count_nonzero(scratch, v, length))
            signs[chunk, v - 2, v - 2, 0] += nonzero
            signs[chunk, v - 2, v - 2, 1] += nonzero
            for w in range(v + 1, members):
                support, balance = count_signs(scratch, v, w, length)
                signs[chunk, v - 2, w - 2, 0] += int(support + balance) // 2
                signs[chunk, v - 2, w - 2, 1] += int(support)
