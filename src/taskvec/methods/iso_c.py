"""Iso-C: the sum of the task vectors, with all singular values made equal.

    Σ_t λ_t τ'_t = U Σ Vᵀ       θ = θ_target + σ̄ U Vᵀ       σ̄ = mean of the r singular values

Source: No Task Left Behind, arXiv:2502.04959 (Iso-C), and its published code. Tensors that are not
matrices are averaged, θ_target + Σ_t λ_t τ'_t / K, as in the code. The paper chooses α, here λ, on
held-out data. Our readings: each task has its own λ; r is the rank, so singular values that are 0
within the precision of the data type stay 0. The code raises those too, in directions that rounding
decides.
"""

from __future__ import annotations

from dataclasses import replace

from taskvec.methods.matrices import decompose, one_blas_thread, weighted_mean, weighted_sum
from taskvec.methods.method import Array, Block, Inputs, Method
from taskvec.methods.table import Table


def decide(inputs: Inputs) -> Table:
    """The layer weights."""
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("iso_c"))


def combine(block: Block) -> Array:
    """The merged tensor."""
    if block.target.ndim != 2:
        return block.target + weighted_mean(block)
    with one_blas_thread():
        total = weighted_sum(block)
        if not total.any():
            return block.target
        left, values, right = decompose(total, block.name)
        merged: Array = (values.mean() * left) @ right
    merged += block.target
    return merged


METHOD = Method(
    name="iso_c",
    summary="add the task vectors, then make all singular values equal",
    source="arXiv:2502.04959",
    formula="θ = θ_target + σ̄ U Vᵀ of Σ_t λ_t τ'_t = U Σ Vᵀ",
    decide=decide,
    combine=combine,
    alignment="tensor",
)
