"""DELLA-Merging: drop small entries more often, rescale, elect signs, average agreeing entries.

    drop    m_t ~ Bernoulli(q_t),  q_t = d + ε (r_t / (n − 1) − 1/2),  y_t = λ_t m_t ⊙ τ'_t / q_t
    elect   γ = sgn(Σ_t y_t)
    fuse    θ = θ_target + mean over {t : sgn(y_t) = γ} of y_t

r_t is the rank of an entry of |τ'_t| among the n of its row, 0 for the smallest; d = `density`.

Source: DELLA-Merging, arXiv:2406.11617 (MAGPRUNE), which gives drop probabilities p = 1 − q. Ranks
within a row, and probabilities that reach both ends, follow the authors' code (its `window_size` is
ε). A row runs along the last dimension of a tensor; a vector is one row. If all λ are equal, λ is
the paper's. The defaults are those of the authors' example. Equal entries share their mean rank,
which is this project's choice. `rescale: l1` is mergekit's, not the paper's: it multiplies by
‖τ'_t‖₁ / ‖m_t ⊙ τ'_t‖₁ of each tensor instead of 1 / q_t, as in `dare`. `elect: none` with
`merge: sum` is what mergekit calls `della_linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.dare import DENSITY, quotients
from taskvec.methods.method import Block, Inputs, Method, Need
from taskvec.methods.parameters import Parameter, value_at
from taskvec.methods.selection import ELECTIONS, MERGES, Selection, fused, mask_key
from taskvec.methods.table import Table
from taskvec.statistics.masked_sums import Sums

Array = np.ndarray[Any, Any]

SHARES = ("density", "epsilon")
EPSILON = "difference in probability between the largest and smallest entry of a row"
RESCALES = ("probability", "l1", "none")
PARAMETERS = (
    Parameter("density", 0.7, DENSITY, low=1e-6, high=1, by_layer=True),
    Parameter("epsilon", 0.14, EPSILON, low=0, high=1, by_layer=True),
    Parameter("rescale", "probability", "what the rescaling preserves", choices=RESCALES),
    Parameter("elect", "mass", "how the sign is elected", choices=ELECTIONS),
    Parameter("merge", "mean", "how agreeing entries are combined", choices=MERGES),
)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with factors for `rescale: l1`; requests their sums first.

    Raises:
        ParameterError: a probability would not be above 0 and at most 1.
    """
    for task in inputs.tasks:
        chosen = [inputs.parameters[task][name] for name in SHARES]
        is_layered = any(isinstance(value, Mapping) for value in chosen)
        for name in inputs.names if is_layered else ("",):
            density, epsilon = (value_at(value, name) for value in chosen)
            _check(density, epsilon, f"{task!r} in tensor {name!r}" if is_layered else repr(task))
    for name in ("elect", "merge"):
        inputs.common(name)  # refused where tasks differ
    table = inputs.layer_weights()
    origin = table.used_by("della")
    rescaled = {t: p for t, p in inputs.parameters.items() if p["rescale"] == "l1"}
    if not rescaled:
        return replace(table, origin=origin)
    if not inputs.passes:
        densities, epsilons = ({t: p[n] for t, p in rescaled.items()} for n in SHARES)
        return Need("masked_sums_by_rank", table, densities, epsilons=epsilons)
    factors = quotients(cast(Sums, inputs.passes[0]))
    return replace(table, origin=origin, selection=Selection(factors=factors))


def _check(density: float, epsilon: float, where: str) -> None:
    if density < 1 and (density - epsilon / 2 <= 0 or density + epsilon / 2 > 1):
        raise ParameterError(
            "density ± epsilon / 2 of della must be above 0 and at most 1; got "
            f"{density:g} ± {epsilon / 2:g} for task {where}; lower epsilon"
        )


def combine(block: Block) -> Array:
    """Whole rows, masked task by task, then elected and merged."""
    from taskvec.kernels.magprune import CACHED, prune

    keys = [np.uint64(mask_key(block.seed, task, block.name)) for task in block.tasks]
    common = block.parameters[block.tasks[0]]
    factors = block.selection.factors if block.selection is not None else {}
    merged = np.empty_like(block.target)
    columns = block.target.shape[1]
    step = max(1, CACHED // max(1, columns))
    for first in range(0, len(merged), step):
        part = slice(first, first + step)
        rows = block.vectors[:, part].copy()
        for task, key, values in zip(block.tasks, keys, rows, strict=True):
            chosen = block.parameters[task]
            shares = chosen["density"], chosen["epsilon"]
            rescale = chosen["rescale"] == "probability"
            prune(values, *shares, rescale, key, block.start + first * columns)
            if task in factors:
                values *= values.dtype.type(factors[task][block.name])
        target, scales = block.target[part], block.scales
        merged[part] = fused(target, rows, scales, common["elect"], common["merge"])
    return merged


METHOD = Method(
    name="della",
    summary="drop at random, small entries more often, elect signs, average agreeing entries",
    source="arXiv:2406.11617",
    formula="θ = θ_target + mean_{t: sgn = γ} λ_t m_t ⊙ τ'_t / q_t, q_t by rank in a row",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    sparsifies=True,
    combine=combine,
    alignment="row",
)
