"""SCE: select what varies across tasks, weight tasks by their energy, erase minority signs.

    select      τ̂_t keeps the `density` share of positions whose variance across tasks is largest
    calculate   η_t = ‖τ̂_t‖² / Σ_s ‖τ̂_s‖²       of each tensor
    erase       γ = sgn(Σ_t λ_t τ̂_t), entry by entry
    merge       θ = θ_target + Σ over {t : sgn(λ_t τ̂_t) = γ} of λ_t η_t τ̂_t

Source: FuseChat, arXiv:2408.07990 (SCE), which calls `density` τ. Our readings: each task has its
own λ, 1 in the paper; `density` is a share of all positions of a tensor; a position where the tasks
do not differ has no variance and is never selected below density 1; of positions with equal
variance at the cut, the first ones are selected.

Three parameters reproduce mergekit's `sce`: `merge: mean` divides by Σ η_t of the tasks that agree;
`share_of: varying` counts only positions that vary; if the mean squares of τ̂_t sum to less than
`floor`, all tasks share one η.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.matrices import weighted_sum
from taskvec.methods.method import Array, Block, Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

DENSITY = "share of positions kept, those that vary most across tasks"
MERGE = "mean: divide the sum by the energies of the tasks that agree"
SHARE_OF = "density is a share of all positions, or of those that vary"
FLOOR = "energies count as equal if mean squares sum to less"
PARAMETERS = (
    Parameter("density", 0.1, DENSITY, low=0, high=1, by_layer=True),
    Parameter("merge", "sum", MERGE, choices=("sum", "mean")),
    Parameter("share_of", "all", SHARE_OF, choices=("all", "varying")),
    Parameter("floor", 0, FLOOR, low=0),
)


def decide(inputs: Inputs) -> Table:
    """The layer weights.

    Raises:
        ParameterError: density is below 1 and there is only one task.
    """
    density, *_ = [inputs.common(parameter.name) for parameter in PARAMETERS]
    lowest = min(density.values(), default=1.0) if isinstance(density, Mapping) else density
    check([t for t in inputs.tasks if inputs.scales[t] != 0], lowest, "")
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("sce"))


def check(tasks: Sequence[str], density: float, where: str) -> None:
    """Raise `ParameterError` if there is one task, of those whose λ is not 0, and it must vary."""
    if density < 1 and len(tasks) == 1:
        raise ParameterError(
            f"sce selects entries that vary across tasks; got one{where}, {tasks[0]} (those of "
            "λ = 0 do not count); add a task, or set density to 1"
        )


def combine(block: Block) -> Array:
    """The merged tensor."""
    tasks = np.flatnonzero(block.scales)
    parameters = block.parameters[block.tasks[0]]
    density = float(parameters["density"])
    check([block.tasks[i] for i in tasks], density, f" in tensor {block.name!r}")
    if density < 1:
        variance = varying(block.vectors[tasks])
        # In place, because a copy would take as much again; the engine is done with them.
        counted = variance.size if parameters["share_of"] == "all" else np.count_nonzero(variance)
        block.vectors[:, ~largest(variance, round(density * counted))] = 0
    energies = np.array([np.square(block.vectors[i], dtype=np.float64).sum() for i in tasks])
    if not energies.any():
        return block.target
    if energies.sum() < parameters["floor"] * block.target.size:
        energies = np.ones_like(energies)
    shares = (energies / energies.sum()).astype(block.scales.dtype)
    elected = np.sign(weighted_sum(block))
    if parameters["merge"] == "mean":
        return block.target + _mean(block, tasks, shares, elected)
    merged = block.target.copy()
    for i, share in zip(tasks, shares, strict=True):
        scaled = block.scales[i] * block.vectors[i]
        merged += np.where(np.sign(scaled) == elected, share * scaled, 0)
    return merged


def _mean(block: Block, tasks: Array, shares: Array, elected: Array) -> Array:
    """Σ η_t λ_t τ̂_t / Σ η_t over the tasks that agree, entry by entry; 0 where no task agrees."""
    total, weight = np.zeros_like(block.target), np.zeros_like(block.target)
    for i, share in zip(tasks, shares, strict=True):
        scaled = block.scales[i] * block.vectors[i]
        agrees = (np.sign(scaled) == elected) & (scaled != 0)
        total += np.where(agrees, share * scaled, 0)
        weight += np.where(agrees, share, 0)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)


def varying(vectors: Array) -> Array:
    """K times the variance across tasks, entry by entry; exactly 0 where all are equal.

    Entries are sorted first, so the order of the tasks does not affect rounding or ties.
    """
    ordered = np.sort(vectors, axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        middle = ordered.mean(axis=0)
        spread: Array = np.zeros_like(middle)
        for vector in ordered:
            spread += np.square(vector - middle)
    spread[ordered[0] == ordered[-1]] = 0
    return spread


def largest(values: Array, count: int) -> Array:
    """Positions of the `count` largest values above 0; of equal values, the first.

    >>> largest(np.array([2.0, 1.0, 2.0, 0.0, 1.0]), 3).tolist()
    [True, True, True, False, False]
    """
    flat = values.reshape(-1)
    mask = np.zeros(flat.shape, bool)
    if count:
        cut = np.partition(flat, flat.size - count)[flat.size - count]
        mask = flat > cut
        mask[np.flatnonzero(flat == cut)[: count - np.count_nonzero(mask)]] = cut > 0
    return mask.reshape(values.shape)


METHOD = Method(
    name="sce",
    summary="entries that vary across tasks, weighted by energy, without minority signs",
    source="arXiv:2408.07990",
    formula="θ = θ_target + Σ_{t: sgn = γ} λ_t η_t select(τ'_t), η_t by energy",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    combine=combine,
    alignment="tensor",
)
