"""What `taskvec scan` shows: every layer of every task, with its weight under each scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from taskvec.layers import model_order
from taskvec.methods.lata import drop_above, linear, logarithmic, rank
from taskvec.statistics.scan import LayerStatistics, Scan, layer_statistics

Row = dict[str, Any]
QUANTILES = {"min": 0.0, "25%": 0.25, "50%": 0.5, "75%": 0.75, "max": 1.0}


def layer_rows(scan: Scan, granularity: str, threshold: float) -> list[Row]:
    """One row for each task and layer.

    Args:
        scan: Of a family with a base.
        granularity: `tensor`, `module` or `block`.
        threshold: σ of the column `threshold`.

    Returns:
        Mappings with task, layer, tower, block, module, elements, similarity, rank, norm_ratio,
        task_cosine, linear, logarithmic, threshold, task_norm, instruction_norm, anchor_norm;
        the layers of a task are in the order of the model. Layers that the task did not touch have
        None for similarity, rank and weights; without a base, everything that is measured from it
        is None.
    """
    rows: list[Row] = []
    for task in scan.tasks:
        of_task: list[Row] = []
        statistics = _statistics(scan, task, granularity)
        ranked = ~np.isnan(statistics.similarity)
        columns: dict[str, Any] = {
            "similarity": statistics.similarity,
            "norm_ratio": statistics.norm_ratio,
            "task_cosine": statistics.task_cosine,
            "task_norm": statistics.task_norm,
            "instruction_norm": statistics.instruction_norm,
            "anchor_norm": statistics.anchor_norm,
        }
        similarity = statistics.similarity[ranked]
        for name, values in (
            ("rank", rank(similarity)),
            ("linear", linear(similarity) if len(similarity) else similarity),
            ("logarithmic", logarithmic(similarity) if len(similarity) else similarity),
            ("threshold", drop_above(similarity, threshold)),
        ):
            column = np.full(len(ranked), np.nan)
            column[ranked] = values
            columns[name] = column
        first = {
            layer: i for i, layer in reversed(list(enumerate(statistics.tensor_layer.tolist())))
        }
        for i, layer in enumerate(statistics.layers):
            key = scan.keys[first[i]]
            row: Row = {"task": task, "layer": layer, "tower": key.tower, "block": key.block}
            row["module"] = key.module if granularity != "block" or key.block is None else None
            row["elements"] = int(statistics.sizes[i])
            for name in ("similarity", "rank", "norm_ratio", "task_cosine", "linear", "logarithmic",
                         "threshold", "task_norm", "instruction_norm", "anchor_norm"):  # fmt: skip
                value = float(columns[name][i])
                row[name] = value if np.isfinite(value) else None
            of_task.append(row)
        of_task.sort(key=lambda r: model_order(r["tower"], r["block"], r["module"], r["layer"]))
        rows += of_task
    return rows


def _statistics(scan: Scan, task: str, granularity: str) -> LayerStatistics:
    """Statistics of a task; what is measured from the base is NaN if there is none."""
    statistics = layer_statistics(scan, task, granularity)
    if scan.has_base:
        return statistics
    unknown = np.full(len(statistics.layers), np.nan)
    return replace(
        statistics,
        similarity=unknown,
        norm_ratio=unknown,
        task_cosine=unknown,
        instruction_norm=unknown,
    )


def rank_correlation(scan: Scan, granularity: str) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation of similarity between tasks, over the layers that both touched."""
    columns = {task: _statistics(scan, task, granularity).similarity for task in scan.tasks}
    return {a: {b: _spearman(columns[a], columns[b]) for b in scan.tasks} for a in scan.tasks}


def _spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2:
        return None
    x, y = rank(a[both]), rank(b[both])
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else None


def summary(scan: Scan, granularity: str, threshold: float) -> dict[str, Any]:
    """Quantiles of similarity, share kept by σ, whole-model ρ and c by task; sign conflicts."""
    out: dict[str, Any] = {"tasks": {}, "rank_correlation": rank_correlation(scan, granularity)}
    for task in scan.tasks:
        statistics = _statistics(scan, task, granularity)
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
