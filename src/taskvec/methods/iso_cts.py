"""Iso-CTS: directions that tasks share and directions of each task, all with one singular value.

    U_c, V_c    the k largest singular directions of Σ_t λ_t τ'_t     k ≈ common_share · r
    U_t, V_t    the s largest of λ_t τ'_t − U_c U_cᵀ λ_t τ'_t         s = (r − k)/K
    U, V = [U_1 … U_K U_c], [V_1 … V_K V_c]       θ = θ_target + σ̄ U⊥ V⊥ᵀ

σ̄ is the mean of all the singular values, r = min(m, n), A⊥ the nearest matrix with orthonormal
columns. k is raised or lowered so that K divides r − k.

Source: No Task Left Behind, arXiv:2502.04959 (Iso-CTS), and its published code, which has 0.8 as
`common_space_fraction`. Tensors that are not matrices are averaged, θ_target + Σ_t λ_t τ'_t / K, as
in the code. The paper chooses α, here λ, on held-out data. Our readings: each task has its own λ; K
counts the tasks that change the matrix; singular values that are 0 within the precision of the data
type are ignored. The code raises those too, in directions that rounding decides.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from taskvec.methods.matrices import (
    changing,
    decompose,
    one_blas_thread,
    orthogonal,
    weighted_mean,
    weighted_sum,
)
from taskvec.methods.method import Array, Block, Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

SHARE = "share of the directions that tasks share"
PARAMETERS = (Parameter("common_share", 0.8, SHARE, low=0, high=1),)


def decide(inputs: Inputs) -> Table:
    """The layer weights."""
    inputs.common("common_share")
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("iso_cts"))


def sizes(rank: int, share: float, tasks: int) -> tuple[int, int]:
    """The number of common directions, and the number of directions of each task.

    >>> sizes(768, 0.8, 8), sizes(4, 0.0, 3), sizes(3, 0.8, 2)
    ((616, 19), (1, 1), (3, 0))
    """
    own = min(rank // tasks, round((rank - int(rank * share)) / tasks))
    return rank - own * tasks, own


def combine(block: Block) -> Array:
    """The merged tensor."""
    if block.target.ndim != 2:
        return block.target + weighted_mean(block)
    tasks = changing(block)
    if not tasks:
        return block.target
    share = float(block.parameters[block.tasks[0]]["common_share"])
    common, own = sizes(min(block.target.shape), share, len(tasks))
    with one_blas_thread():
        lefts, values, rights = _directions(weighted_sum(block), block.name, common)
        for task in tasks if own else ():
            mine = block.scales[task] * block.vectors[task]
            size = float(np.linalg.norm(mine))
            mine -= lefts[0] @ (lefts[0].T @ mine)
            found = _directions(mine, block.name, own, size)
            lefts, values, rights = lefts + found[0], values + found[1], rights + found[2]
        if not any(map(len, values)):
            return block.target  # the tasks cancel
        left = orthogonal(np.concatenate(lefts, axis=1), block.name)
        right = orthogonal(np.concatenate(rights), block.name)
        merged: Array = (np.concatenate(values).mean() * left) @ right
    merged += block.target
    return merged


def _directions(
    matrix: Array, name: str, count: int, size: float | None = None
) -> tuple[list[Array], list[Array], list[Array]]:
    """The `count` largest singular directions, each in a list of length 1."""
    left, values, right = decompose(matrix, name, size)
    return [left[:, :count].copy()], [values[:count]], [right[:count].copy()]


METHOD = Method(
    name="iso_cts",
    summary="shared and task-specific singular directions with one singular value",
    source="arXiv:2502.04959",
    formula="θ = θ_target + σ̄ U⊥ V⊥ᵀ, U and V of the common and of each task's own directions",
    decide=decide,
    parameters=PARAMETERS,
    combine=combine,
    alignment="tensor",
)
