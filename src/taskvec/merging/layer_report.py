"""What `taskvec scan` shows: every layer of every task, with its weight under each scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from taskvec.methods.lata import drop_above, linear, logarithmic, rank, spearman
from taskvec.statistics.scan import Scan, known_statistics, layer_rows

Row = dict[str, Any]
COLUMNS = ("task", "layer", "tower", "block", "module", "elements", "similarity", "rank",
           "norm_ratio", "task_cosine", "linear", "logarithmic", "threshold", "task_norm",
           "instruction_norm", "anchor_norm")  # fmt: skip
QUANTILES = {"min": 0.0, "25%": 0.25, "50%": 0.5, "75%": 0.75, "max": 1.0}


def weighed_rows(scan: Scan, granularity: str, threshold: float) -> list[Row]:
    """One row for each task and layer, as `layer_rows`, with its rank and weights.

    Args:
        scan: Of a family with a base.
        granularity: `tensor`, `module` or `block`.
        threshold: σ of the column `threshold`.

    Returns:
        As from `layer_rows`, with rank, linear, logarithmic and threshold; None for layers that the
        task did not touch, and without a base.
    """
    rows = layer_rows(scan, granularity)
    for task in scan.tasks:
        ranked = [row for row in rows if row["task"] == task and row["similarity"] is not None]
        similarity = np.array([row["similarity"] for row in ranked])
        columns = {"rank": rank(similarity), "threshold": drop_above(similarity, threshold)}
        for name, weights in (("linear", linear), ("logarithmic", logarithmic)):
            columns[name] = weights(similarity) if len(similarity) else similarity
        for i, row in enumerate(ranked):
            row |= {name: float(values[i]) for name, values in columns.items()}
    return [dict.fromkeys(COLUMNS) | row for row in rows]


def rank_correlation(scan: Scan, granularity: str) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation of similarity between tasks, over the layers that both touched."""
    columns = {task: known_statistics(scan, task, granularity).similarity for task in scan.tasks}
    return {a: {b: _spearman(columns[a], columns[b]) for b in scan.tasks} for a in scan.tasks}


def _spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2:
        return None
    found = spearman(a[both], b[both])
    return None if math.isnan(found) else found


def summary(scan: Scan, granularity: str, threshold: float) -> dict[str, Any]:
    """Quantiles of similarity, share kept by σ, whole-model ρ and c by task; sign conflicts."""
    out: dict[str, Any] = {"tasks": {}, "rank_correlation": rank_correlation(scan, granularity)}
    for task in scan.tasks:
        statistics = known_statistics(scan, task, granularity)
        ranked = ~np.isnan(statistics.similarity)
        similarity = statistics.similarity[ranked]
        out["tasks"][task] = {
            "layers": len(similarity),
            "quantiles": _quantiles(similarity) if len(similarity) else None,
            "kept_layers": float((similarity <= threshold).mean()) if len(similarity) else None,
            "kept_parameters": _share(statistics.sizes[ranked], similarity <= threshold),
            **_whole(scan, task),
        }
    out["sign_conflict"] = sign_conflicts(scan)
    return out


def _quantiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


def _share(sizes: np.ndarray[Any, Any], chosen: np.ndarray[Any, Any]) -> float | None:
    return float(sizes[chosen].sum() / sizes.sum()) if sizes.sum() else None


def _whole(scan: Scan, task: str) -> dict[str, float | None]:
    """ρ and c of all tensors taken as one vector."""
    gram, t = scan.gram.sum(0), 2 + scan.task_index(task)
    a, b, d = gram[1, 1], gram[t, t], gram[1, t]
    return {
        "norm_ratio": float(np.sqrt(b / a)) if a > 0 else None,
        "task_cosine": float(d / np.sqrt(a * b)) if a > 0 and b > 0 else None,
    }


def sign_conflicts(scan: Scan) -> Mapping[str, float | None]:
    """Share of the elements changed by both of two tasks in which their signs differ, by `a, b`."""
    agree, support = scan.agree.sum(0), scan.support.sum(0)
    return {
        f"{a}, {b}": 1 - float(agree[i, j] / support[i, j]) if support[i, j] else None
        for i, a in enumerate(scan.tasks)
        for j, b in enumerate(scan.tasks)
        if i < j
    }
