"""Model Breadcrumbs: each task vector without its largest and smallest entries.

    θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t                                 elect none, merge sum
    θ = θ_target + Σ over {t : sgn = γ} of λ_t m_t ⊙ τ'_t,  γ = sgn(Σ_t λ_t m_t ⊙ τ'_t)   elect mass

In each tensor, m_t drops the share `gamma` of entries that is largest in magnitude. Of the
remaining entries it keeps the largest ones, until a share `density` of all entries is kept.

Source: Model Breadcrumbs, arXiv:2312.06795, section 3, which defines masks by the percentiles β and
γ of each layer: density = γ − β, gamma = 1 − γ. Defaults are β = 0.9 and γ = 0.993. Entries that
equal the γ-th percentile are dropped. The paper adds the masked vectors. `elect` adds the election
of TIES (arXiv:2306.01708, algorithm 1) after the masks, and `merge: mean` divides by the number of
tasks that are added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.parameters import Parameter, tensorwise
from taskvec.methods.selection import ELECTIONS, MERGES, Selection
from taskvec.methods.table import Table
from taskvec.methods.ties import SCOPES, shares
from taskvec.statistics.trim import Threshold

DROPPED = "share of the largest entries, which are dropped"

PARAMETERS = (
    Parameter("density", 0.093, "share of entries kept", low=0, high=1, by_layer=True),
    Parameter("gamma", 0.007, DROPPED, low=0, high=1, by_layer=True),
    Parameter("scope", "tensor", "where entries are ranked", choices=SCOPES),
    Parameter("elect", "none", "how the sign is elected", choices=ELECTIONS),
    Parameter("merge", "sum", "how entries are combined", choices=MERGES),
)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights with a lower and an upper bound; requests one pass for each bound."""
    table, scope = inputs.layer_weights(), inputs.common("scope")
    dropped, kept = shares(inputs, "gamma"), shares(inputs, "density")
    if not inputs.passes:
        return Need("thresholds", table, dropped, scope)
    if len(inputs.passes) == 1:
        both = {t: tensorwise(_sum, dropped[t], kept[t]) for t in inputs.tasks}
        return Need("thresholds", table, both, scope)
    top, floor = (cast(dict[str, dict[str, Threshold]], found) for found in inputs.passes)
    ceilings = {task: {n: t.lower for n, t in mine.items()} for task, mine in top.items()}
    selection = Selection(
        thresholds=floor,
        ceilings=ceilings,
        election=inputs.common("elect"),
        merge=inputs.common("merge"),
    )
    return replace(table, selection=selection, origin=table.used_by("breadcrumbs"))


def _sum(dropped: float, kept: float) -> float:
    return min(1.0, dropped + kept)


METHOD = Method(
    name="breadcrumbs",
    summary="drop the largest and the small entries of each task vector, add the rest",
    source="arXiv:2312.06795",
    formula="θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t",
    decide=decide,
    parameters=PARAMETERS,
    sparsifies=True,
)
