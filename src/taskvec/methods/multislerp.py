"""Multi-slerp: the mean of any number of models on a sphere, by one step from the linear mean.

    m = direction of Σ_t α_t u_t,  u_t = v_t / ‖v_t‖,  α_t = λ_t / Σ_s λ_s
    θ = Σ_t α_t ‖v_t‖ · exp_m(Σ_t α_t log_m(u_t)), tensor by tensor

log_m(u) is the way along the sphere from m to u as a tangent vector at m, exp_m goes such a way.
With an anchor v_t = τ_t, and θ_target is added; without, v_t = θ_ft,t.

Source: mergekit's `multislerp`, as its documentation describes it: projected onto the tangent space
at the weighted mean, interpolated there, projected back. We take log and exp of the sphere for the
projections. This is the first step of algorithm A1 of Spherical averages,
doi:10.1145/502122.502124; `karcher` goes on until it settles.
"""

from __future__ import annotations

from taskvec.methods import sphere
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

NAME = "multislerp"


def decide(inputs: Inputs) -> Table | Need:
    """Coefficients of the point that one step reaches; asks for inner products first.

    Raises:
        ParameterError: every λ is 0.
    """
    sphere.checked(inputs, NAME)
    if not inputs.passes:
        return Need("products", inputs.layer_weights())
    products = inputs.passes[0]
    assert isinstance(products, Products)
    found = sphere.mean(products.gram, sphere.shares(inputs.layer_scales), steps=1)
    return sphere.table_of(inputs, products, found.coefficients, NAME, found.undefined)


METHOD = Method(
    name=NAME,
    summary="mean of task vectors or models on a sphere, one step from the linear mean",
    source="mergekit",
    formula="θ = [θ_target +] Σ_t α_t ‖v_t‖ · exp_m(Σ_t α_t log_m(v_t/‖v_t‖)), α_t = λ_t / Σ_s λ_s",
    decide=decide,
    needs_anchor=False,
    takes_anchor=True,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_table=False,
)
