"""Harm direction removal of Safety Arithmetic: subtract the largest entries of a harm vector.

    θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t      m_t keeps the `density` share largest in magnitude

With λ < 0, or `taskvec forget`, this is the paper's θ̂ = θ_target − λ τ'_H, τ_H of a fine-tune on
harmful answers. It is `magnitude` with the paper's share, and a baseline for forgetting.

Source: Safety Arithmetic, arXiv:2406.11801, section 3.2, equations 2 to 4; the share is the top
10 % of section 5, taken over the whole model as in the published code. Of equal entries at the cut
those that stand first are kept, until the density is met. The paper's second step, which steers
activations, is no merge and not done here.
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
    Parameter("scope", "model", "what entries are ranked within", choices=SCOPES),
)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with thresholds for the trim; asks for these first."""
    outcome = magnitude.decide(inputs)
    if isinstance(outcome, Need):
        return outcome
    return replace(outcome, origin=outcome.origin.replace("magnitude", "safety_arithmetic", 1))


METHOD = Method(
    name="safety_arithmetic",
    summary="the largest entries of a harm vector, to be subtracted",
    source="arXiv:2406.11801",
    formula="θ = θ_target + Σ_t λ_t trim(τ'_t), λ_t < 0 to forget",
    decide=decide,
    parameters=PARAMETERS,
    sparsifies=True,
)
