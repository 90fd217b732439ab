"""Gram matrix and sign counts of the vectors of a family, over one block of a tensor.

With the vectors v = (θ_pre, τ_instr, τ_1 … τ_K), where τ_instr = θ_pre − θ_base and τ_t = θ_ft,t −
θ_pre:

    G[i, j] = Σ_x v_i[x] v_j[x]
    agree[s, t] = #{x : τ_s[x] τ_t[x] > 0}      support[s, t] = #{x : τ_s[x] ≠ 0 and τ_t[x] ≠ 0}

This basis avoids the cancellation of ⟨τ_instr + τ_t, τ_instr⟩ computed from the complex vector
(DESIGN §2). Sums run over `CHUNK` elements counted from the start of the tensor, so that neither
threads nor block sizes change a bit: within a chunk in stretches of `STRETCH` elements held in the
first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec.kernels.convert import widen
from taskvec.kernels.jit import jit, jit_reduction
from taskvec.streaming import CHUNK

STRETCH = 2_048

Array = np.ndarray[Any, Any]


@jit_reduction
def dot(a: Array, b: Array, count: int) -> Any:
    """Σ a[i] b[i] over the first `count` elements, in the type of the arrays."""
    total = a[0] * b[0]
    for i in range(1, count):
        total += a[i] * b[i]
    return total


@jit
def count_signs(a: Array, b: Array, count: int) -> Any:
    """How many elements have the same sign in both, and how many are non-zero in both."""
    agree = np.int32(0)
    support = np.int32(0)
    for i in range(count):
        both = (a[i] != 0) & (b[i] != 0)
        support += np.int32(both)
        agree += np.int32(both & ((a[i] > 0) == (b[i] > 0)))
    return agree, support


@jit
def count_nonzero(a: Array, count: int) -> Any:
    """How many of the first `count` elements are not zero."""
    total = np.int32(0)
    for i in range(count):
        total += np.int32(a[i] != 0)
    return total


@jit
def gram(
    addresses: Array, codes: Array, count: int, scratch: Array, products: Array, signs: Array
) -> None:
    """Gram matrices and sign counts of a block that starts at a multiple of `CHUNK` elements.

    Args:
        addresses: Where the block begins in θ_pre, θ_base (0 if there is none), θ_ft,1 …: shape (2
            + K,), int64.
        codes: Element types (`taskvec.dtypes`), shape (2 + K,), int64.
        count: Elements in the block.
        scratch: Working space, shape (2 + K, STRETCH), float32, or float64 for float64 accuracy.
        products: Receives one Gram matrix a chunk, shape (chunks, 2 + K, 2 + K), float64, upper
            triangles.
        signs: Receives agreement and support a chunk, shape (chunks, K, K, 2), int64, upper
            triangles.
    """
    vectors = addresses.shape[0]
    products[:] = 0.0
    signs[:] = 0
    if addresses[1] == 0:
        scratch[1, :] = 0
    for start in range(0, count, STRETCH):
        length = min(STRETCH, count - start)
        chunk = start // CHUNK
        for v in range(vectors):
            if addresses[v] != 0:
                widen(codes[v], addresses[v], start, length, scratch[v])
        anchor = scratch[0]
        if addresses[1] != 0:
            instruction = scratch[1]
            for i in range(length):
                instruction[i] = anchor[i] - instruction[i]
        for v in range(2, vectors):
            task = scratch[v]
            for i in range(length):
                task[i] = task[i] - anchor[i]
        for v in range(vectors):
            for w in range(v, vectors):
                products[chunk, v, w] += np.float64(dot(scratch[v], scratch[w], length))
        for v in range(2, vectors):
            nonzero = count_nonzero(scratch[v], length)
            signs[chunk, v - 2, v - 2, 0] += nonzero
            signs[chunk, v - 2, v - 2, 1] += nonzero
            for w in range(v + 1, vectors):
                agree, support = count_signs(scratch[v], scratch[w], length)
                signs[chunk, v - 2, w - 2, 0] += agree
                signs[chunk, v - 2, w - 2, 1] += support
