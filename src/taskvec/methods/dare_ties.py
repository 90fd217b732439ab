"""DARE before TIES: random masks and rescaling instead of the trim, then election.

    y_t = λ_t (m_t ⊙ τ'_t) / d,  m_t ~ Bernoulli(d)
    θ = θ_target + mean over {t : sgn(y_t) = γ} of y_t,  γ = sgn(Σ_t y_t)

Source: DARE, arXiv:2311.03099, section 4.2, which applies it before TIES-Merging, arXiv:2306.01708.
The mask of DARE replaces the trim. `rescale` is that of `dare`.
"""

from __future__ import annotations

from dataclasses import replace

from taskvec.methods import dare, ties
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.table import Table

PARAMETERS = (
    *dare.PARAMETERS,
    *(p for p in ties.PARAMETERS if p.name in ("elect", "merge")),
)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with random masks and an election."""
    table = inputs.layer_weights()
    if need := dare.to_collect(inputs, table):
        return need
    selection = dare.selection_of(inputs, inputs.common("elect"), inputs.common("merge"))
    return replace(table, selection=selection, origin=table.used_by("dare_ties"))


METHOD = Method(
    name="dare_ties",
    summary="drop at random and rescale, elect signs, average agreeing entries",
    source="arXiv:2311.03099",
    formula="θ = θ_target + mean_{t: sgn = γ} λ_t m_t ⊙ τ'_t / density",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    sparsifies=True,
)
