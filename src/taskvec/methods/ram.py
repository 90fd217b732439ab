"""RAM: keep the full change where one task changes an entry, average where several do.

    m_t = [|τ'_t| > ε]      n = Σ_t m_t, entry by entry
    θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t / max(n, 1)

Source: Behavior Knowledge Merge in Reinforced Agentic Models, arXiv:2601.13572 (Reinforced Agent
Merging); ε = 1e-5 as in the published code. Reinforcement learning changes few entries, and an
average over all tasks would dilute them. Our reading: each task has its own λ, 1 in the paper.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from taskvec.methods.method import Array, Block, Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

STILL = "an entry that a task changes by no more stays unchanged"
EPSILON = Parameter("epsilon", 1e-5, STILL, low=0, by_layer=True)
PARAMETERS = (EPSILON,)


def decide(inputs: Inputs) -> Table:
    """The layer weights."""
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("ram"))


def combine(block: Block) -> Array:
    """The merged entries."""
    return merge(block, changed_entries(block), np.ones_like(block.scales))


def changed_entries(block: Block) -> Array:
    """m_t of every task, with the shape of the vectors."""
    epsilons = [block.parameters[task]["epsilon"] for task in block.tasks]
    marks = zip(block.scales, block.vectors, epsilons, strict=True)
    return np.stack([(np.abs(v) > epsilon) & (scale != 0) for scale, v, epsilon in marks])


def merge(block: Block, marks: Array, factors: Array) -> Array:
    """θ; entries that only task t changes are multiplied by its factor, shape (K,)."""
    count = np.zeros(block.target.shape, block.target.dtype)
    for mark in marks:
        count += mark
    merged = block.target.copy()
    terms = zip(block.scales, factors, block.vectors, marks, strict=True)
    for scale, factor, vector, mark in terms:
        share = np.where(count > 1, scale / np.maximum(count, 1), scale * factor)
        merged += np.where(mark, share * vector, 0)
    return merged


METHOD = Method(
    name="ram",
    summary="keep entries that one task changes, average those that several change",
    source="arXiv:2601.13572",
    formula="θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t / n, n of the tasks change the entry",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    combine=combine,
)
