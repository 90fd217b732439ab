"""Magnitude pruning: the sum of the largest entries of each task vector.

    θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t      m_t keeps the `density` share largest in magnitude

The trim of TIES (arXiv:2306.01708, section 3) without its election. DARE (arXiv:2311.03099, section
4.3) uses it as a baseline. Nothing is rescaled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.selection import Selection
from taskvec.methods.table import Table
from taskvec.methods.ties import DENSITY, SCOPES, shares

PARAMETERS = (
    Parameter("density", 0.2, DENSITY, low=0, high=1, by_layer=True),
    Parameter("scope", "model", "where entries are ranked", choices=SCOPES),
)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with thresholds for the trim; requests these first."""
    table = inputs.layer_weights()
    if not inputs.passes:
        return Need("thresholds", table, shares(inputs, "density"), inputs.common("scope"))
    thresholds = cast(dict, inputs.passes[0])  # type: ignore[type-arg]
    selection = Selection(thresholds=thresholds)
    return replace(table, selection=selection, origin=table.used_by("magnitude"))


METHOD = Method(
    name="magnitude",
    summary="add the largest entries of each task vector",
    source="arXiv:2306.01708",
    formula="θ = θ_target + Σ_t λ_t trim(τ'_t)",
    decide=decide,
    parameters=PARAMETERS,
    sparsifies=True,
)
