"""Sparsify, scale, elect signs, combine: one block of the merged tensor.

For every task, with the pure vector x_t = w_t (θ_ft,t − θ_pre) and a mask m_t:

    y_t = λ_t · rescale_t · m_t ⊙ x_t

    m_t keeps an entry if lower_t ≤ |x_t| ≤ upper_t and its draw is below a bound

    sign  = sgn(Σ_t y_t)  (mass)   or   sgn(Σ_t sgn(y_t))  (count)   or none
    agree = {t : y_t ≠ 0 and sgn(y_t) = sign}, all tasks if no sign is elected

    θ = θ_target + Σ_{t ∈ agree} y_t          (sum)
    θ = θ_target + Σ_{t ∈ agree} y_t / |agree|   (mean, where |agree| > 0)
    θ = θ_target + Σ_{t ∈ agree} y_t / Σ_{t ∈ agree, y_t ≠ 0} |λ_t|   (weighted, where |agree| > 0)

Of the entries with exactly the lower magnitude, the first `ties` of the tensor are kept. Arithmetic
is float32 (or float64 if the working space is), in the written order, tasks by name, with one
rounding at the end.
Sources: TIES, arXiv:2306.01708, algorithm 1; DARE, arXiv:2311.03099, section 3.2; Model
Breadcrumbs, arXiv:2312.06795, section 3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec.kernels.combine import probe
from taskvec.kernels.convert import bits_from_float, settle, widen
from taskvec.kernels.gram import STRETCH
from taskvec.kernels.jit import jit
from taskvec.kernels.randomness import ALWAYS, draw
from taskvec.kernels.select import MAGNITUDE, load_vector

Array = np.ndarray[Any, Any]

NONE, MASS, COUNT = 0, 1, 2  # how signs are elected
SUM, MEAN, WEIGHTED = 0, 1, 2
ALL = np.int64(2**62)  # ties: keep every one


@jit
def mask(
    rows: Array,
    row: int,
    length: int,
    lower: np.uint32,
    upper: np.uint32,
    ties: int,
    bound: np.uint64,
    key: np.uint64,
    first: int,
) -> int:
    """Set the entries of a row that are not kept to zero; return the ties that remain to keep.

    Args:
        rows: Float32 or float64; magnitudes are always those of the nearest float32.
        row: Index of the row.
        length: Number of its entries.
        lower: Bits of the smallest magnitude that is kept.
        upper: Bits of the largest magnitude that is kept.
        ties: How many entries of magnitude `lower` may still be kept.
        bound: An entry is kept if its draw is below this bound.
        key: Key of the draws, which also depend on the entry's index.
        first: Index of the first entry in its tensor.
    """
    none = rows.dtype.type(0)
    if lower > 0 or upper < MAGNITUDE:
        if ties == 0 or ties >= ALL:
            floor = lower if ties else lower + np.uint32(1)
            for i in range(length):  # a choice of values, not of paths: no branch to mispredict
                magnitude = bits_from_float(np.float32(rows[row, i])) & MAGNITUDE
                kept = (magnitude >= floor) & (magnitude <= upper)
                rows[row, i] = rows[row, i] if kept else none
        else:
            for i in range(length):
                magnitude = bits_from_float(np.float32(rows[row, i])) & MAGNITUDE
                if magnitude == lower and ties > 0 and magnitude <= upper:
                    ties -= 1
                elif magnitude <= lower or magnitude > upper:
                    rows[row, i] = 0
    if bound < ALWAYS:
        for i in range(length):
            kept = draw(key, np.uint64(first + i)) < bound
            rows[row, i] = rows[row, i] if kept else none
    return ties


@jit
def elect(
    addresses: Array,
    codes: Array,
    differences: Array,
    weights: Array,
    scales: Array,
    bounds: Array,
    ties: Array,
    keys: Array,
    election: int,
    merge: int,
    first: int,
    count: int,
    rows: Array,
    out_address: int,
    out_code: int,
    stored_as: int,
) -> bool:
    """Compute one block of the merged tensor; return False if a result or input is not finite.

    Args:
        addresses: Where the block begins in target, anchor, tasks: shape (2 + T,), int64.
        codes: Element types (`taskvec.dtypes`), shape (2 + T,), int64.
        differences: Whether a task's block holds τ_t itself, shape (2 + T,), bool.
        weights: w_t, shape (T,), type of the rows.
        scales: λ_t · rescale_t, type of the rows, shape (T,); if merge is WEIGHTED, followed by
            |λ_t|, shape (2 T,).
        bounds: Lower and upper magnitude (bits), bound of the draw: shape (T, 3), uint64.
        ties: Entries of the lower magnitude still to be kept when the block begins, shape (T,),
            int64; not changed.
        keys: Keys of the draws, shape (T,), uint64.
        election: NONE, MASS or COUNT.
        merge: SUM, MEAN or WEIGHTED.
        first: Index of the block's first element in its tensor.
        count: Elements in the block.
        rows: Working space, shape (3 + T, STRETCH), float32 or float64.
        out_address: Where the result goes; may not overlap an input.
        out_code: Element type that the result is rounded to.
        stored_as: Element type that it then is stored as.
    """
    tasks = len(weights)
    left = ties.copy()
    both = np.zeros(2, np.int64)
    kinds = np.zeros(2, np.int64)
    both[0], kinds[0] = addresses[1], codes[1]
    total, sign = rows.shape[0] - 1, rows.shape[0] - 2
    finite = True
    for start in range(0, count, STRETCH):
        length = min(STRETCH, count - start)
        widen(codes[0], addresses[0], start, length, rows[total])
        for i in range(length):
            rows[sign, i] = 0
        for t in range(tasks):
            both[1], kinds[1] = addresses[2 + t], codes[2 + t]
            load_vector(both, kinds, differences[2 + t], weights[t], start, length, rows, 1 + t)
            if probe(rows[1 + t], length) != 0:  # a mask or an election may hide it
                finite = False
            left[t] = mask(
                rows, 1 + t, length, np.uint32(bounds[t, 0]), np.uint32(bounds[t, 1]), left[t],
                bounds[t, 2], keys[t], first + start,
            )  # fmt: skip
            for i in range(length):
                rows[1 + t, i] = scales[t] * rows[1 + t, i]
            if election == MASS:
                for i in range(length):
                    rows[sign, i] += rows[1 + t, i]
            elif election == COUNT:
                for i in range(length):
                    rows[sign, i] += np.sign(rows[1 + t, i])
        combine_rows(rows, scales, tasks, length, election, merge)
        if not settle(out_code, stored_as, rows[total], out_address, start, length):
            finite = False
    return finite


@jit
def combine_rows(
    rows: Array, scales: Array, tasks: int, length: int, election: int, merge: int
) -> None:
    """Add the entries that agree to the last row; the row before it has the votes.

    Args:
        rows: y_t in rows 1 to T, shape (3 + T, ≥ length); the first row is working space.
        scales: From index T on |λ_t|, if merge is WEIGHTED.
        tasks: T.
        length: Entries of each row.
        election: NONE, MASS or COUNT.
        merge: SUM, MEAN or WEIGHTED.
    """
    merged, sign, total = rows[0], rows[rows.shape[0] - 2], rows[rows.shape[0] - 1]
    one, none = rows.dtype.type(1), rows.dtype.type(0)
    agreeing = np.zeros(length, rows.dtype)
    merged[:length] = none
    for t in range(tasks):  # a loop a task, without branches that random entries would mispredict
        y = rows[1 + t]
        share = scales[tasks + t] if merge == WEIGHTED else one
        if election == NONE:
            for i in range(length):
                merged[i] += y[i]
                agreeing[i] += share if y[i] != 0 else none
        else:
            for i in range(length):
                agrees = ((sign[i] > 0) & (y[i] > 0)) | ((sign[i] < 0) & (y[i] < 0))
                merged[i] += y[i] if agrees else none
                agreeing[i] += share if agrees else none
    if merge != SUM:
        for i in range(length):
            merged[i] /= agreeing[i] if agreeing[i] > 0 else one
    for i in range(length):
        total[i] = total[i] + merged[i] if merged[i] != 0 else total[i]  # −0 stays what it is
