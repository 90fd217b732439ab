"""RAM+: RAM with amplification: the more a task shares, the more its exclusive entries grow.

    ρ_t = (entries that t and others change) / (entries that only t changes)
    f_t = 1 + r · min(ρ_t, alpha)
    θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t ⊙ (f_t where only t changes the entry, 1/n elsewhere)

Source: Behavior Knowledge Merge in Reinforced Agentic Models, arXiv:2601.13572; m_t, n and ε as in
`ram`. Entries are counted in each tensor, and r and alpha are 0.1 and 0.2, as in mergekit's
`ramplus_tl`; the published code counts over the whole model and has 0.05 and 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from taskvec.methods import ram
from taskvec.methods.method import Array, Block, Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

GROWTH = "strength of the amplification"
LARGEST = "upper limit of the ratio of shared to exclusive entries"
PARAMETERS = (
    Parameter("r", 0.1, GROWTH, low=0, by_layer=True),
    Parameter("alpha", 0.2, LARGEST, low=0, by_layer=True),
    ram.EPSILON,
)


def decide(inputs: Inputs) -> Table:
    """The layer weights."""
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("ram_plus"))


def combine(block: Block) -> Array:
    """The merged tensor."""
    marks = ram.changed_entries(block)
    alone = marks.sum(axis=0, dtype=np.int16) == 1
    factors = np.ones_like(block.scales)
    for i, task in enumerate(block.tasks):
        own = int(np.count_nonzero(marks[i] & alone))
        shared = int(np.count_nonzero(marks[i])) - own
        chosen = block.parameters[task]
        factors[i] += chosen["r"] * min(shared / max(own, 1), chosen["alpha"])
    return ram.merge(block, marks, factors)


METHOD = Method(
    name="ram_plus",
    summary="ram, with exclusive entries amplified if tasks overlap",
    source="arXiv:2601.13572",
    formula="θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t ⊙ (f_t where t alone changes it, 1/n elsewhere)",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    combine=combine,
    alignment="tensor",
)
