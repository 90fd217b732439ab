"""Karcher mean: the point on the sphere with the smallest sum of squared angles to the models.

    x = argmin over the unit sphere of Σ_t α_t ∠(x, u_t)²,  u_t = θ_ft,t / ‖θ_ft,t‖
    θ = Σ_t α_t ‖θ_ft,t‖ · x, tensor by tensor      α_t = λ_t / Σ_s λ_s

Source: Karcher, Riemannian center of mass, doi:10.1002/cpa.3160300502; on spheres by algorithm A1
of Spherical averages, doi:10.1145/502122.502124: starting at the direction of Σ_t α_t u_t, x
becomes exp_x(Σ_t α_t log_x(u_t)) until it moves less than 1e-10 radians. Every x is in the span of
the u_t, so only the inner products of the models are needed. The length is mergekit's choice.
"""

from __future__ import annotations

from taskvec.methods import sphere
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

NAME = "karcher"


def decide(inputs: Inputs) -> Table | Need:
    """Coefficients of the mean; requests inner products first.

    Raises:
        ParameterError: every λ is 0.
    """
    sphere.check_directions(inputs, NAME)
    if not inputs.passes:
        return Need("products", inputs.layer_weights())
    products = inputs.passes[0]
    assert isinstance(products, Products)
    found = sphere.mean(products.gram, sphere.shares(inputs.layer_scales), steps=sphere.STEPS)
    return sphere.table_of(inputs, products, found.coefficients, NAME, found.undefined)


METHOD = Method(
    name=NAME,
    summary="Karcher mean of the task models on a sphere",
    source="doi:10.1002/cpa.3160300502",
    formula="θ = Σ_t α_t ‖θ_ft,t‖ · argmin_x Σ_t α_t ∠(x, θ_ft,t)², α_t = λ_t / Σ_s λ_s",
    decide=decide,
    needs_anchor=False,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_table=False,
)
