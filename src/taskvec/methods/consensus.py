"""Consensus task arithmetic: keep the entries that at least k tasks use.

    m_t = 1 where |y_t| ≥ s_t |Σ_u y_u − y_t|,  y_t = sgn(λ_t) τ'_t          (TALL mask)
    θ = θ_target + M ⊙ Σ_t λ_t τ'_t,  M = 1 where Σ_t m_t ≥ k

A task uses an entry if its own change is large compared with the combined change of all other
tasks. s_t is `mask_scale`, k is `min_tasks`.

Source: Localizing Task Information for Improved Model Merging and Compression, arXiv:2405.07813
(TALL masks and Consensus Merging). The paper calls s_t λ_t; its factor of the masked sum is a λ
that is equal for all tasks. As in the paper, masks come from the sum of whole vectors. Only the
sign of λ_t matters: a subtracted task counts with its vector reversed, and a task with λ_t = 0 uses
no entry. k = 2 is the paper's. The paper chooses s_t for each task among 0.2 … 0.6 on validation
data; 0.4, the middle, is this project's default. The authors' code has > where this method has ≥.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.method import Block, Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

Array = np.ndarray[Any, Any]

MASK_SCALE = "the larger it is, the fewer entries a task uses"
PARAMETERS = (
    Parameter("min_tasks", 2, "number of tasks that must use an entry", low=1, high=1000),
    Parameter("mask_scale", 0.4, MASK_SCALE, low=0, high=100, by_layer=True),
)


def decide(inputs: Inputs) -> Table:
    """The layer weights.

    Raises:
        ParameterError: `min_tasks` is not an integer, or there are fewer tasks.
    """
    wanted = inputs.common("min_tasks")
    if wanted != round(wanted):
        raise ParameterError(f"min_tasks of consensus must be a whole number; got {wanted:g}")
    if wanted > len(inputs.tasks):
        raise ParameterError(
            f"min_tasks of consensus is {wanted:g}, but the tasks are "
            f"{', '.join(inputs.tasks)}: nothing would be added; lower it or name more"
        )
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("consensus"))


def combine(block: Block) -> Array:
    """Count the tasks that use each entry, then add where there are enough of them."""
    signs = np.sign(block.scales)
    both = np.zeros_like(block.target)
    added = np.zeros_like(block.target)
    for sign, scale, vector in zip(signs, block.scales, block.vectors, strict=True):
        both += sign * vector
        added += scale * vector
    users = np.zeros(block.target.shape, np.int32)
    for task, sign, vector in zip(block.tasks, signs, block.vectors, strict=True):
        if sign != 0:
            distance = np.abs(both - sign * vector)
            distance *= block.target.dtype.type(block.parameters[task]["mask_scale"])
            users += np.abs(vector) >= distance
    wanted = block.parameters[block.tasks[0]]["min_tasks"]
    return np.where((users >= wanted) & (added != 0), block.target + added, block.target)


METHOD = Method(
    name="consensus",
    summary="add the entries that several tasks use",
    source="arXiv:2405.07813",
    formula="θ = θ_target + M ⊙ Σ_t λ_t τ'_t, M = [Σ_t m_t ≥ k]",
    decide=decide,
    parameters=PARAMETERS,
    sparsifies=True,
    combine=combine,
)
