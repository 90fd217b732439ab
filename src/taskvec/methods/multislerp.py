"""Multi-slerp: the approximate mean of models on a sphere, one step from the linear mean.

    m = direction of Σ_t α_t u_t,  u_t = v_t / ‖v_t‖,  α_t = λ_t / Σ_s λ_s
    θ = Σ_t α_t ‖v_t‖ · exp_m(Σ_t α_t log_m(u_t)), tensor by tensor

log_m(u) is the path along the sphere from m to u, as a tangent vector at m; exp_m follows such a
path. With an anchor, v_t = τ_t and θ_target is added; without one, v_t = θ_ft,t.

Source: mergekit's `multislerp`, as its documentation describes it: project onto the tangent space
at the weighted mean, interpolate there, project back. Our projections are log and exp of the
sphere. This is the first step of algorithm A1 of Spherical averages, doi:10.1145/502122.502124;
`karcher` repeats it until it converges. `projection: orthogonal` projects as in mergekit's code,
u − ⟨u, m⟩ m: the sum of these with weights α_t is 0, so the result is m itself.
"""

from __future__ import annotations

from taskvec.methods import sphere
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

NAME = "multislerp"
PROJECTION = "projection at the mean: along the sphere, or orthogonal"
PARAMETERS = (Parameter("projection", "log", PROJECTION, choices=("log", "orthogonal")),)


def decide(inputs: Inputs) -> Table | Need:
    """Coefficients of the point after one step; requests inner products first.

    Raises:
        ParameterError: every λ is 0, or tasks have different projections.
    """
    sphere.check_directions(inputs, NAME)
    if not inputs.passes:
        return Need("products", inputs.layer_weights())
    products = inputs.passes[0]
    assert isinstance(products, Products)
    steps = 1 if inputs.common("projection") == "log" else 0
    found = sphere.mean(products.gram, sphere.shares(inputs.layer_scales), steps)
    return sphere.table_of(inputs, products, found.coefficients, NAME, found.undefined)


METHOD = Method(
    name=NAME,
    summary="mean of task vectors or models on a sphere, one step from the linear mean",
    source="mergekit",
    formula="θ = [θ_target +] Σ_t α_t ‖v_t‖ · exp_m(Σ_t α_t log_m(v_t/‖v_t‖)), α_t = λ_t / Σ_s λ_s",
    decide=decide,
    parameters=PARAMETERS,
    needs_anchor=False,
    takes_anchor=True,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_table=False,
)
