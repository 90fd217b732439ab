"""Arcee Fusion: take from one fine-tune the entries whose change stands out in their tensor.

    importance  I = |τ'| · KL(softmax(θ_target + τ') ‖ softmax(θ_target)), the KL of its row
    threshold   q_½ + 1.5 (q_¾ − q_¼) of I in the tensor
    θ = θ_target + λ [I ≥ threshold] ⊙ τ'

Source: mergekit's documentation of `arcee_fusion`, and its results (tests/peers): there is no
paper. A row runs along the last dimension. q_p is the value at position ⌊p (n − 1)⌋ of the n sorted
values. mergekit uses the same value for tensors that it does not sample; for tensors that it
samples, its result changes from run to run. mergekit has no λ, which is λ = 1 here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.method import Array, Block, Inputs, Method
from taskvec.methods.table import Table

_ELEMENTS = 1 << 20  # widened to float64 at once


def decide(inputs: Inputs) -> Table:
    """The layer weights.

    Raises:
        ParameterError: there is more than one task.
    """
    if len(inputs.tasks) != 1:
        raise ParameterError(
            f"arcee_fusion takes one task; got {', '.join(inputs.tasks)}; merge one, then give the "
            "result as the target of the next"
        )
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("arcee_fusion"))


def combine(block: Block) -> Array:
    """The merged tensor."""
    vector = block.vectors[0]
    if not vector.size:
        return block.target
    rows = vector.shape[-1] if vector.shape else 1
    importance = important(block.target.reshape(-1, rows), vector.reshape(-1, rows))
    places = [int(share * (importance.size - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = np.partition(importance, places, axis=None)[places]
    selected = (importance >= middle + 1.5 * (high - low)).reshape(vector.shape)
    return block.target + np.where(selected, block.scales[0] * vector, 0)


def important(target: Array, vector: Array) -> Array:
    """I of every entry, float64.

    The divergence is a small difference of large terms, and float32 would leave few digits of it.

    Args:
        target: θ_target, shape (rows, columns).
        vector: τ', the same shape.
    """
    importance = np.empty(target.shape)
    step = max(1, _ELEMENTS // target.shape[1])
    for start in range(0, len(target), step):
        base = target[start : start + step].astype(np.float64)
        change = vector[start : start + step].astype(np.float64)
        before, after = _log_softmax(base), _log_softmax(base + change)
        divergence = (np.exp(after) * (after - before)).sum(axis=1, keepdims=True)
        importance[start : start + step] = np.abs(change) * np.maximum(divergence, 0)
    return importance


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


METHOD = Method(
    name="arcee_fusion",
    summary="the entries of one task whose change stands out in their tensor",
    source="arcee-ai/mergekit",
    formula="θ = θ_target + λ [I ≥ q_½ + 1.5 (q_¾ − q_¼)] ⊙ τ', I = |τ'| · KL of the row",
    decide=decide,
    default_scale=1.0,
    combine=combine,
    alignment="tensor",
)
