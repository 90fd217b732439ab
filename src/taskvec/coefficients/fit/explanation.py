"""What fitted weights go with: their rank correlation (Spearman) with what layers are.

A correlation has the percentile interval of a bootstrap over layers. Layers that a task does not
change are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.coefficients.fit.directions import TaskDirections
from taskvec.evaluation.intervals import Figure, figure_of, resamples
from taskvec.methods.lata import spearman

Array = np.ndarray[Any, Any]
FEWEST = 4  # layers of a correlation


@dataclass(frozen=True, slots=True)
class Explained:
    """One correlation of the weights of a task.

    Attributes:
        task: Which task.
        against: `dissimilarity` (1 − LATA's similarity), `norm_ratio` (ρ), `task_cosine` (c),
            `depth` (of layers in blocks) or `task_norm` (‖τ‖).
        correlation: With its interval; `n` is the number of layers.
    """

    task: str
    against: str
    correlation: Figure


def explain(
    directions: TaskDirections, layers: Sequence[str], weights: Array, seed: int
) -> list[Explained]:
    """Correlations of every task's weights.

    Args:
        directions: Members, with their scan.
        layers: Layer of each tensor.
        weights: Of each task and layer, layers in order of their first tensor.
        seed: Of the bootstrap.
    """
    depth_of = {
        layer: directions.keys[name].block
        for layer, name in zip(layers, directions.names, strict=True)
    }
    found = []
    for task, mine in zip(directions.tasks, weights, strict=True):
        known = directions.statistics(task, layers)
        depth = np.array(
            [np.nan if (at := depth_of[layer]) is None else at for layer in known.layers],
            np.float64,
        )
        values: dict[str, Array] = {"depth": depth, "task_norm": known.task_norm}
        if directions.scan.has_base:
            values = {
                "dissimilarity": 1 - known.similarity,
                "norm_ratio": known.norm_ratio,
                "task_cosine": known.task_cosine,
            } | values
        for name, value in values.items():
            there = np.isfinite(value) & (known.task_norm > 0)
            found.append(Explained(task, name, _figure(mine[there], value[there], seed)))
    return found


def _figure(weights: Array, values: Array, seed: int) -> Figure:
    n = len(weights)
    if n < FEWEST:
        return Figure(float("nan"), float("nan"), float("nan"), n)
    picks = [np.arange(n), *resamples(n, seed)]
    return figure_of(np.array([spearman(weights[pick], values[pick]) for pick in picks]), n)


def correlations(tasks: Sequence[str], runs: Sequence[Array], moves: Array) -> Mapping[str, float]:
    """Mean rank correlation between the weights of descents of different seeds, by task."""
    found = {}
    for i, task in enumerate(tasks):
        pairs = [
            spearman(one[i][moves[i]], other[i][moves[i]])
            for k, one in enumerate(runs)
            for other in runs[k + 1 :]
        ]
        found[task] = float(np.mean(pairs)) if pairs else float("nan")
    return found
