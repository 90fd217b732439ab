"""Slerp: interpolate two models along the arc between them instead of the chord.

    θ = sin(α_1 Ω)/sin Ω · θ_ft,1 + sin(α_2 Ω)/sin Ω · θ_ft,2      α_t = λ_t / (λ_1 + λ_2)
    cos Ω = ⟨θ_ft,1, θ_ft,2⟩ / (‖θ_ft,1‖ ‖θ_ft,2‖), tensor by tensor

Source: Shoemake, Animating Rotation with Quaternion Curves, doi:10.1145/325334.325242, section 3.3,
for vectors of any length, as in mergekit's `slerp`. If the two are parallel or nearly opposite (cos
Ω below −0.9995), or one is zero, they are interpolated linearly.
"""

from __future__ import annotations

from taskvec.methods import sphere
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

NAME = "slerp"


def decide(inputs: Inputs) -> Table | Need:
    """Coefficients by the angle of the two models; requests their inner products first.

    Raises:
        ParameterError: there are not exactly two tasks, or every λ is 0.
    """
    sphere.check_directions(inputs, NAME, tasks=2)
    if not inputs.passes:
        return Need("products", inputs.layer_weights())
    products = inputs.passes[0]
    assert isinstance(products, Products)
    cosine = sphere.pair_cosine(sphere.directions(products.gram))
    coefficients = sphere.arc(cosine, sphere.shares(inputs.layer_scales))
    return sphere.table_of(inputs, products, coefficients, NAME, None)


METHOD = Method(
    name=NAME,
    summary="interpolate two task models along the arc between them",
    source="doi:10.1145/325334.325242",
    formula="θ = Σ_t sin(α_t Ω)/sin Ω · θ_ft,t, α_t = λ_t / Σ_s λ_s",
    decide=decide,
    needs_anchor=False,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_table=False,
)
