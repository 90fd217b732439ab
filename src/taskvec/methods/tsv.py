"""TSV-Merge: the largest singular directions of every task vector, made orthogonal.

    τ'_t ≈ U_t Σ_t V_tᵀ         the ⌊min(m, n)/K⌋ largest singular values
    U, V = [U_1 … U_K], [V_1 … V_K]     Σ = diag(λ_1 Σ_1, …, λ_K Σ_K)
    θ = θ_target + U⊥ Σ V⊥ᵀ     A⊥: nearest matrix with orthonormal columns (Procrustes)

Source: Task Singular Vectors, arXiv:2412.00081 (TSV-Merge), and its published code. Tensors that
are not matrices are averaged, θ_target + Σ_t λ_t τ'_t / K, as in the code. So is a matrix with
fewer rows or columns than K; the code keeps nothing of it. Our readings: each task has its own λ,
the paper's α if all are equal; K counts the tasks that change the matrix; directions that several
tasks share exactly, for which U⊥ is not unique, count once (the code adds a direction that rounding
decides). The code's exception for CLIP's `text_projection` is not implemented.
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
from taskvec.methods.table import Table


def decide(inputs: Inputs) -> Table:
    """The layer weights."""
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("tsv"))


def combine(block: Block) -> Array:
    """The merged tensor."""
    tasks = changing(block)
    if len(tasks) == 1 and block.target.ndim == 2:
        return block.target + weighted_sum(block)  # all of its directions remain
    if block.target.ndim != 2 or not tasks or min(block.target.shape) < len(tasks):
        return block.target + weighted_mean(block)
    kept = min(block.target.shape) // len(tasks)
    lefts, sizes, rights = [], [], []
    with one_blas_thread():
        for task in tasks:
            left, values, right = decompose(block.vectors[task], block.name)
            lefts.append(left[:, :kept].copy())  # a copy, so that the rest is freed
            sizes.append(block.scales[task] * values[:kept])
            rights.append(right[:kept].copy())
        left = orthogonal(np.concatenate(lefts, axis=1), block.name)
        right = orthogonal(np.concatenate(rights), block.name)
        merged: Array = (left * np.concatenate(sizes)) @ right
    merged += block.target
    return merged


METHOD = Method(
    name="tsv",
    summary="the largest singular directions of each task vector, made orthogonal",
    source="arXiv:2412.00081",
    formula="θ = θ_target + U⊥ Σ V⊥ᵀ of the largest singular directions of every λ_t τ'_t",
    decide=decide,
    default_scale=1.0,
    combine=combine,
    alignment="tensor",
)
