"""Model Stock: the mean of the task vectors, shortened more the less they agree.

    t = k cos θ / (1 + (k − 1) cos θ)      cos θ = mean over pairs s ≠ t of cos(τ_s, τ_t)
    θ = θ_target + t · (1/k) Σ_t λ_t τ_t

Each layer (a tensor) has its own t, or each filter (a row along the last dimension).

Source: Model Stock, arXiv:2403.19522, section 4, equations 2 and 3, for k fine-tunes and λ = 1.
The authors state in issue 2 of their repository that cos θ is the mean over all pairs. The paper
does not treat vectors at more than a right angle, where t would be negative, and unbounded as cos θ
nears −1/(k − 1). Here t is 0 then. A zero vector is at a right angle to all others. A task with
λ = 0 does not count in k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods import sphere
from taskvec.methods.method import Block, Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

Array = np.ndarray[Any, Any]

NAME = "model_stock"
PARAMETERS = (Parameter("granularity", "layer", "what shares one t", choices=("layer", "filter")),)


def ratio(gram: Array) -> Array:
    """The interpolation ratio t of k task vectors.

    Args:
        gram: Their inner products, shape (…, k, k), k ≥ 2.

    Returns:
        shape (…), in [0, 1].

    Source: arXiv:2403.19522, equation 3; 0 for a negative cos θ is this project's reading.
    """
    k = gram.shape[-1]
    rows, columns = np.triu_indices(k, 1)
    pairs = sphere.directions(gram).cosines[..., rows, columns]
    cosine = np.clip(pairs.mean(-1), 0, 1)
    found: Array = k * cosine / (1 + (k - 1) * cosine)
    return found


def decide(inputs: Inputs) -> Table | Need:
    """t/k by tensor, from inner products; weight 1 for `filter`.

    Raises:
        ParameterError: there is only one task, or only one with λ ≠ 0.
    """
    by_filter = inputs.common("granularity") == "filter"
    counted = inputs.layer_scales != 0
    if len(inputs.tasks) < 2 or (counted.sum(axis=0) == 1).any():
        raise ParameterError(
            f"{NAME} takes two tasks or more whose scale is not 0: it rests on the angle between "
            "them; got one"
        )
    if by_filter or not counted.any():
        return replace(inputs.layer_weights(), origin=NAME)
    if not inputs.passes:
        return Need("products", inputs.layer_weights())
    products = inputs.passes[0]
    assert isinstance(products, Products)
    weights = np.zeros(counted.shape)
    for chosen in np.unique(counted, axis=1).T:  # one kind only, unless scales are by layer
        if chosen.any():
            tensors = (counted == chosen[:, None]).all(axis=0)
            mine = ratio(products.gram[tensors][:, chosen][:, :, chosen])
            weights[np.ix_(chosen, tensors)] = mine / chosen.sum()
    return Table(inputs.tasks, inputs.names, weights, digests=products.digests, origin=NAME)


def combine(block: Block) -> Array:
    """θ_target + Σ_t λ_t w_t τ_t, with w_t = t/k of each row for `filter`."""
    total = np.zeros_like(block.target)
    for scale, vector in zip(block.scales, block.vectors, strict=True):
        total += scale * vector
    if block.parameters[block.tasks[0]]["granularity"] == "filter":
        counted = block.vectors[block.scales != 0]
        weights = ratio(sphere.row_gram(counted)) / len(counted)
        total *= weights[:, None].astype(total.dtype)
    return block.target + total


METHOD = Method(
    name=NAME,
    summary="mean of the task vectors, shortened by the angle between them",
    source="arXiv:2403.19522",
    formula="θ = θ_target + t/k Σ_t λ_t τ_t, t = k cos θ / (1 + (k − 1) cos θ)",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_table=False,
    combine=combine,
    alignment="row",
)
