"""PCB-Merging: entries compete by importance to their task and agreement with other tasks.

    x_t = sgn(λ_t) τ'_t,  a_t = |x_t| clipped to two quantiles,  ν_t = a_t scaled to [0, 1]
    β_t = exp(N ν_t²) · tanh(x_t ⊙ Σ_u x_u)                          intra- and inter-balancing
    σ_t = (β_t − c_t) / (max β_t − c_t) where β_t > c_t, else 0      c_t: a `density` share is above
    θ = θ_target + Σ_t λ_t σ_t ⊙ sgn(τ'_t) a_t / Σ_t σ_t

N is the number of tasks. The quantiles (0.0001 and 0.9999), c_t and max β_t are taken over the
whole task vector.

Source: Parameter Competition Balancing for Model Merging, arXiv:2410.02396. The paper writes a
softmax for both balancings. This method follows the published code, which has exp and tanh; the
denominator of the softmax is a constant factor for each task, on which σ_t does not depend. The
bounds of a_t and the default density also come from the code. If all λ_t are equal, λ is the
paper's. A subtracted task competes with its vector reversed, and a task with λ_t = 0 does not
compete; both are this project's reading.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.method import Block, Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.selection import Selection
from taskvec.methods.table import Table

Array = np.ndarray[Any, Any]

LIMITS = ("smallest", "largest", "cut", "top")  # what a score is measured by, by task
MOST = 80  # tasks: exp(N) is a float32
PARAMETERS = (Parameter("density", 0.1, "share of entries with a weight above 0", low=0, high=1),)


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with the limits for scores; requests these first.

    Raises:
        ParameterError: more than `MOST` tasks.
    """
    if len(inputs.tasks) > MOST:
        raise ParameterError(f"pcb takes at most {MOST} tasks; got {len(inputs.tasks)}")
    table = inputs.layer_weights()
    signs = np.sign(inputs.layer_scales)
    competing = [task for task, mine in zip(inputs.tasks, signs, strict=True) if mine.any()]
    if not inputs.passes and competing:
        densities = {task: inputs.parameters[task]["density"] for task in competing}
        return Need("competition", replace(table, weights=signs * table.weights), densities)
    limits = cast(dict[str, dict[str, float]], inputs.passes[0]) if competing else {}
    selection = Selection(limits=limits)
    return replace(table, selection=selection, origin=table.used_by("pcb"))


def combine(block: Block) -> Array:
    """Weight the entries of all tasks by their scores."""
    from taskvec.kernels.competition import score, weigh

    assert block.selection is not None
    limits = block.selection.limits
    rows = [i for i, task in enumerate(block.tasks) if task in limits]
    scales = block.scales[rows]
    vectors = np.sign(scales)[:, None] * block.vectors[rows]
    bounds = np.array([list(map(limits[block.tasks[i]].get, LIMITS)) for i in rows], np.float64)
    smallest, largest, cut, top = bounds.T.copy()
    scores = np.empty(vectors.shape, np.float32)
    score(vectors, smallest, largest, scores)
    merged = block.target.copy()
    weigh(vectors, scores, np.abs(scales), smallest, largest, cut, top, merged)
    return merged


METHOD = Method(
    name="pcb",
    summary="weight every entry by its size and its agreement with other tasks",
    source="arXiv:2410.02396",
    formula="θ = θ_target + Σ_t λ_t σ_t ⊙ τ'_t / Σ_t σ_t, σ_t from exp(N ν_t²) tanh(τ'_t Σ_u τ'_u)",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    sparsifies=True,
    combine=combine,
)
