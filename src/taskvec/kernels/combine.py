"""The merged block: θ = c_target θ_target + Σ_t c_t (θ_ft,t − θ_pre), rounded once.

c_t is the scaling coefficient times the layer weight, λ_t w_t. Without an anchor the sum is over
the θ_ft,t themselves, which gives a weighted average of models. Arithmetic is float32 (or float64
if the scratch is), in the written order, so threads and block sizes do not change a bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from taskvec.dtypes import BF16
from taskvec.kernels.convert import float_from_bits, pointer, settle, widen
from taskvec.kernels.gram import STRETCH
from taskvec.kernels.jit import jit, jit_reduction

Array = np.ndarray[Any, Any]

TARGET, ANCHOR, TASKS = 0, 1, 2  # rows of `addresses`, `codes` and `coefficients`


@jit_reduction
def probe(values: Array, count: int) -> Any:
    """Zero if every element is finite, NaN otherwise."""
    total = values[0] * values.dtype.type(0)
    for i in range(1, count):
        total += values[i] * values.dtype.type(0)
    return total


@jit
def combine(
    addresses: Array,
    codes: Array,
    differences: Array,
    coefficients: Array,
    count: int,
    scratch: Array,
    out_address: int,
    out_code: int,
    stored_as: int,
) -> bool:
    """Compute one block of the merged tensor; return False if an element is not finite.

    Args:
        addresses: Where the block begins in target, anchor (0: none), tasks: shape (2 + T,), int64.
        codes: Element types (`taskvec.dtypes`), shape (2 + T,), int64.
        differences: Whether a task's block holds τ_t itself, shape (2 + T,), bool.
        coefficients: c_target, unused, c_t …: shape (2 + T,), type of the scratch.
        count: Elements in the block.
        scratch: Working space, shape (3, STRETCH), float32 or float64.
        out_address: Where the result goes; may not overlap an input.
        out_code: Element type that the result is rounded to.
        stored_as: Element type that it then is stored as.
    """
    total, anchor, task = scratch[0], scratch[1], scratch[2]
    finite = True
    for start in range(0, count, STRETCH):
        length = min(STRETCH, count - start)
        if addresses[ANCHOR] == 0:
            anchor[:length] = 0
        else:
            widen(codes[ANCHOR], addresses[ANCHOR], start, length, anchor)
        begun = False  # whether the first task goes onto the anchor itself
        if coefficients[TARGET] == 0:
            total[:length] = 0
        elif addresses[TARGET] == addresses[ANCHOR]:
            if coefficients[TARGET] == 1 and addresses.shape[0] > TASKS and not differences[TASKS]:
                begun = True
            else:
                for i in range(length):  # many times as fast as an assignment of slices
                    total[i] = anchor[i]
        else:
            widen(codes[TARGET], addresses[TARGET], start, length, total)
        if coefficients[TARGET] != 0 and coefficients[TARGET] != 1:
            for i in range(length):
                total[i] = coefficients[TARGET] * total[i]
        for t in range(TASKS, addresses.shape[0]):
            coefficient = coefficients[t]
            if differences[t]:
                widen(codes[t], addresses[t], start, length, task)
                for i in range(length):
                    total[i] = total[i] + coefficient * task[i]
            elif begun and t == TASKS:
                begin(codes[t], addresses[t], start, length, coefficient, scratch)
            else:
                add_difference(codes[t], addresses[t], start, length, coefficient, scratch)
        if not settle(out_code, stored_as, total, out_address, start, length):
            finite = False
    return finite


@jit
def begin(
    code: int, address: int, first: int, count: int, coefficient: float, scratch: Array
) -> None:
    """Anchor + coefficient · (x − anchor) as the total, for elements [first, first + count) of x.

    This is not `add_difference` with an argument for the row: that made both twice as slow, because
    the compiler must then assume that rows may be the same.
    """
    total, anchor, task = scratch[0], scratch[1], scratch[2]
    if code == BF16:
        brain = carray(pointer(address + 2 * first), (count,), np.uint16)
        for i in range(count):
            value = float_from_bits(np.uint32(brain[i]) << np.uint32(16))
            total[i] = anchor[i] + coefficient * (value - anchor[i])
    else:
        widen(code, address, first, count, task)
        for i in range(count):
            total[i] = anchor[i] + coefficient * (task[i] - anchor[i])


@jit
def add_difference(
    code: int, address: int, first: int, count: int, coefficient: float, scratch: Array
) -> None:
    """Coefficient · (x − anchor) onto the total, for elements [first, first + count) of x."""
    total, anchor, task = scratch[0], scratch[1], scratch[2]
    if code == BF16:
        brain = carray(pointer(address + 2 * first), (count,), np.uint16)
        for i in range(count):
            value = float_from_bits(np.uint32(brain[i]) << np.uint32(16))
            total[i] = total[i] + coefficient * (value - anchor[i])
    else:
        widen(code, address, first, count, task)
        for i in range(count):
            total[i] = total[i] + coefficient * (task[i] - anchor[i])
