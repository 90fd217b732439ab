"""Multi-slerp: the mean of any number of models on a sphere, by one step from the linear mean.

    m = direction of Σ_t α_t u_t,  u_t = v_t / ‖v_t‖,  α_t = λ_t / Σ_s λ_s
    θ = Σ_t α_t ‖v_t‖ · exp_m(Σ_t α_t log_m(u_t)), tensor by tensor

log_m(u) is the way along the sphere from m to u as a tangent vector at m, exp_m goes such a way.
With an anchor v_t = τ_t, and θ_target is added; without, v_t = θ_ft,t.

Source: mergekit's `multislerp`, as its documentation describes it: projected onto the tangent space
at the weighted mean, interpolated there, projected back. We take log and exp of the sphere for the
projections. This is the first step of algorithm A1 of Spherical averages,
doi:10.1145/502122.502124; `karcher` goes on until it settles. `projection: orthogonal` projects as
mergekit's code does, u − ⟨u, m⟩ m: what is α_t of these adds up to 0, so that m itself is reached.
"""

from __future__ import annotations

from taskvec.methods import sphere
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

NAME = "multislerp"
PROJECTION = "how models are seen from their mean: along the sphere, or straight down"
PARAMETERS = (Parameter("projection", "log", PROJECTION, choices=("log", "orthogonal")),)


def decide(inputs: Inputs) -> Table | Need:
    """Coefficients of the point that one step reaches; asks for inner products first.

    Raises:
        ParameterError: every λ is 0, or tasks are projected in two ways.
    """
    sphere.checked(inputs, NAME)
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
