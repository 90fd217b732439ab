"""Harm direction removal of Safety Arithmetic: subtract the largest entries of a harm vector.

    θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t      m_t keeps the `density` share largest in magnitude

With λ < 0, or with `taskvec forget`, this is the paper's θ̂ = θ_target − λ τ'_H, where τ_H is the
task vector of a fine-tune on harmful answers. The method is `magnitude` with the paper's density, a
baseline for forgetting.

Source: Safety Arithmetic, arXiv:2406.11801, section 3.2, equations 2 to 4; the density is the top
10 % of section 5, over the whole model as in the published code. Of equal entries at the cut, the
first ones are kept until the density is met. The paper's second step steers activations; it is not
a merge and not part of this method.
"""

from __future__ import annotations

from dataclasses import replace

from taskvec.methods import magnitude
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table
from taskvec.methods.ties import DENSITY, SCOPES

PARAMETERS = (
    Parameter("density", 0.1, DENSITY, low=0, high=1, by_layer=True),
    Parameter("scope", "model", "where entries are ranked", choices=SCOPES),
)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with thresholds for the trim; requests these first."""
    outcome = magnitude.decide(inputs)
    if isinstance(outcome, Need):
        return outcome
    return replace(outcome, origin=outcome.origin.replace("magnitude", "safety_arithmetic", 1))


METHOD = Method(
    name="safety_arithmetic",
    summary="subtract the largest entries of a harm vector",
    source="arXiv:2406.11801",
    formula="θ = θ_target + Σ_t λ_t trim(τ'_t), λ_t < 0 to forget",
    decide=decide,
    parameters=PARAMETERS,
    sparsifies=True,
)
