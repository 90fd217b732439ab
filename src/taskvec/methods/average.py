"""Weighted average of the task models: θ = Σ_t λ_t θ_ft,t / Σ_t |λ_t|, or the sum undivided.

Source: Model soups, arXiv:2203.05482, section 2 (uniform soup if all λ are equal). It needs no
anchor and does not use the target's weights. Negative weights are refused, because an average with
them has no meaning. `merge: sum`, mergekit's `normalize: false`, leaves out the division.
"""

from __future__ import annotations

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.method import Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

MERGE = "mean: divide by the sum of the scales; sum: do not divide"
PARAMETERS = (Parameter("merge", "mean", MERGE, choices=("mean", "sum")),)


def decide(inputs: Inputs) -> Table:
    """Weight 1 / Σ|λ|, or 1, for every task and tensor; the target's own factor is 0.

    Raises:
        ParameterError: every λ is 0.
    """
    shape = (len(inputs.tasks), len(inputs.names))
    total = np.abs(inputs.layer_scales).sum(axis=0)
    if not total.all():
        where = "" if not total.any() else f" for {inputs.names[int(np.argmin(total))]!r}"
        raise ParameterError(
            f"scale of average must be above 0 for one task at least; got 0 for all{where}"
        )
    each = 1 / total if inputs.common("merge") == "mean" else np.ones(shape[1])
    weights, target = np.tile(each, (shape[0], 1)), np.zeros(shape[1])
    return Table(inputs.tasks, inputs.names, weights, target, origin="average")


METHOD = Method(
    name="average",
    summary="weighted average of the task models",
    source="arXiv:2203.05482",
    formula="θ = Σ_t λ_t θ_ft,t / Σ_t |λ_t|",
    decide=decide,
    parameters=PARAMETERS,
    needs_anchor=False,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_table=False,
)
