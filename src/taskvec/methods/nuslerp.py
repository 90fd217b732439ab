"""NuSLERP: slerp of two task vectors, or without an anchor of two models.

    θ = θ_target + sin(α_1 Ω)/sin Ω · τ_1 + sin(α_2 Ω)/sin Ω · τ_2      α_t = λ_t / (λ_1 + λ_2)
    cos Ω = ⟨τ_1, τ_2⟩ / (‖τ_1‖ ‖τ_2‖), of the whole tensor, row by row or column by column

Without an anchor, θ_ft,t replaces τ_t and the target is not used.

Source: WARP, arXiv:2406.16768, section 3.2, interpolates task vectors in this way. Relative
weights, rows (along the last dimension) and columns (along the first) come from mergekit's
`nuslerp`; a vector is one row and one column. If the two are parallel or nearly opposite (cos Ω
below −0.9995), or one is zero, they are interpolated linearly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from taskvec.methods import sphere
from taskvec.methods.method import Block, Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

Array = np.ndarray[Any, Any]

NAME = "nuslerp"
KINDS = ("tensor", "row", "column")
PARAMETERS = (
    Parameter("granularity", "tensor", "what shares one angle", choices=KINDS, whole=("column",)),
)


def decide(inputs: Inputs) -> Table | Need:
    """Coefficients by the angle in each tensor, from inner products; for rows and columns weight 1.

    Raises:
        ParameterError: there are not exactly two tasks, or every λ is 0.
    """
    sphere.check_directions(inputs, NAME, tasks=2)
    if inputs.common("granularity") != "tensor":
        return replace(inputs.layer_weights(), origin=NAME)
    if not inputs.passes:
        return Need("products", inputs.layer_weights())
    products = inputs.passes[0]
    assert isinstance(products, Products)
    cosine = sphere.pair_cosine(sphere.directions(products.gram))
    coefficients = sphere.arc(cosine, sphere.shares(inputs.layer_scales))
    weights = coefficients.T  # λ is in them, and `combine` adds what it is given
    return Table(inputs.tasks, inputs.names, weights, digests=products.digests, origin=NAME)


def combine(block: Block) -> Array:
    """The point on the arc, row by row or column by column."""
    vectors = block.vectors
    granularity = block.parameters[block.tasks[0]]["granularity"]
    if granularity == "column":
        vectors = vectors.reshape(len(vectors), *(block.target.shape or (1,)))
        cosine = sphere.pair_cosine(sphere.directions(sphere.column_gram(vectors)))
        parts = sphere.arc(cosine, sphere.shares(block.scales.astype(np.float64)))
        vectors = np.moveaxis(parts, -1, 0).astype(vectors.dtype)[:, None] * vectors
    if granularity == "row":
        cosine = sphere.pair_cosine(sphere.directions(sphere.row_gram(vectors)))
        alpha = sphere.shares(block.scales.astype(np.float64)[:, None])
        vectors = sphere.arc(cosine, alpha).T[:, :, None].astype(vectors.dtype) * vectors
    total: Array = (vectors[0] + vectors[1]).reshape(block.target.shape)
    return block.target + total if block.has_anchor else total


METHOD = Method(
    name=NAME,
    summary="interpolate two task vectors, or models, along the arc between them",
    source="arXiv:2406.16768",
    formula="θ = [θ_target +] Σ_t sin(α_t Ω)/sin Ω · τ_t, α_t = λ_t / Σ_s λ_s",
    decide=decide,
    parameters=PARAMETERS,
    needs_anchor=False,
    takes_anchor=True,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_table=False,
    combine=combine,
    alignment="row",
)
