"""TIES-Merging: trim, elect signs, merge the entries that agree.

    trim    m_t keeps the `density` share of τ'_t that is largest in magnitude, over the whole model
    elect   γ = sgn(Σ_t λ_t m_t ⊙ τ'_t), entry by entry
    merge   θ = θ_target + mean over {t : sgn = γ} of λ_t m_t ⊙ τ'_t

Source: TIES-Merging, arXiv:2306.01708, algorithm 1; the published code ranks entries over the
whole model and elects by mass. The mean is over the tasks that agree and whose entry is not
trimmed. If all λ are equal, this is the paper's λ τ_m; defaults are its k = 20 % and λ = 1. Of
entries with equal magnitude at the cut, the first ones are kept until the density is met; the
published code keeps all of them. `merge: weighted` divides by Σ |λ_t| over the tasks that agree
instead of their number, like mergekit's `normalize` with positive weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from taskvec.errors import ParameterError
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.parameters import Parameter, Values
from taskvec.methods.selection import MERGES, Selection
from taskvec.methods.table import Table

SCOPES = ("model", "tensor")
DENSITY = "share of entries kept, the largest ones"

PARAMETERS = (
    Parameter("density", 0.2, DENSITY, low=0, high=1, by_layer=True),
    Parameter("scope", "model", "where entries are ranked", choices=SCOPES),
    Parameter("elect", "mass", "how the sign is elected", choices=("mass", "count")),
    Parameter("merge", "mean", "how agreeing entries are combined", choices=MERGES),
)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with thresholds for the trim; requests these first."""
    table = inputs.layer_weights()
    if not inputs.passes:
        return Need("thresholds", table, shares(inputs, "density"), inputs.common("scope"))
    selection = Selection(
        thresholds=cast(dict, inputs.passes[0]),  # type: ignore[type-arg]
        election=inputs.common("elect"),
        merge=inputs.common("merge"),
    )
    return replace(table, selection=selection, origin=table.used_by("ties"))


def shares(inputs: Inputs, name: str) -> dict[str, Values]:
    """The share of entries by task, for entries that are ranked within `scope`.

    Raises:
        ParameterError: the share differs by layer, and entries are ranked over the whole model.
    """
    found = {task: inputs.parameters[task][name] for task in inputs.tasks}
    layered = [task for task, share in found.items() if isinstance(share, Mapping)]
    if layered and inputs.common("scope") == "model":
        raise ParameterError(
            f"{name} of task {layered[0]!r} differs by layer, but entries are ranked over the "
            "whole model; set scope: tensor, or give one number"
        )
    return found


METHOD = Method(
    name="ties",
    summary="trim small entries, elect signs, average agreeing entries",
    source="arXiv:2306.01708",
    formula="θ = θ_target + mean_{t: sgn = γ} λ_t trim(τ'_t), γ = sgn(Σ_t λ_t trim(τ'_t))",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    sparsifies=True,
)
