"""Figures about coefficients: what one number does, and what tasks of a pair do to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.reporting.figures import new_figure, save_figure

LOG_FROM = 50.0  # values that span more than this ratio are drawn over a logarithmic axis
SAFE, SHADE = "tab:green", 0.12
SHARES = (("layers", ":"), ("parameters", "-"), ("energy", "--"))
Cells = dict[tuple[str, str], tuple[float | None, str]]  # value and mark by row and column
OUTCOMES = {"synergy": "▲", "interference": "▼", "neither": ""}


def draw_sensitivity(told: Mapping[str, Any], path: Path) -> None:
    """What is kept and what is scored against the value, a panel each; the safe ranges shaded.

    Args:
        told: What `taskvec sweep --json` prints.
        path: File to write.
    """
    points = sorted(told["points"], key=lambda point: point["value"])
    has_kept = any(point["kept"] for point in points)
    keys = list(told["measures"])
    rows = has_kept + len(keys)
    figure, axes = new_figure(6.4, 0.8 + 2.2 * max(rows, 1), 1, max(rows, 1))
    panels = list(axes[:, 0])
    if has_kept:
        _draw_kept(panels[0], points)
    for axis, key in zip(panels[has_kept:], keys, strict=False):
        _draw_scores(axis, points, key, told["measures"][key])
    for axis in panels:
        for i, (low, high) in enumerate(told["safe_ranges"]):
            label = "safe" if i == 0 and axis is panels[0] else None
            # A line as well: a range of one value has no width.
            axis.axvspan(low, high, facecolor=SAFE, edgecolor=SAFE, alpha=SHADE, label=label)
        if _is_logarithmic(points):
            axis.set_xscale("log")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="best")
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(told["sweep"])
    save_figure(figure, path)


def _draw_kept(axis: Any, points: Sequence[Mapping[str, Any]]) -> None:
    tasks = sorted({task for point in points for task in point["kept"]})
    for i, task in enumerate(tasks):
        for share, style in SHARES:
            xy = [(p["value"], p["kept"][task][share]) for p in points if task in p["kept"]]
            known = [(x, y) for x, y in xy if y is not None]
            if known:
                name = f"{task}: {'‖τ‖²' if share == 'energy' else share}"
                x, y = zip(*known, strict=True)
                axis.plot(x, y, style, color=f"C{i}", linewidth=1.2, marker=".", ms=3, label=name)
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("share kept")


def _draw_scores(
    axis: Any, points: Sequence[Mapping[str, Any]], key: str, measure: Mapping[str, Any]
) -> None:
    xy = [
        (p["value"], p["scores"][key]["value"], *p["scores"][key]["interval"])
        for p in points
        if key in p["scores"]
    ]
    known = [each for each in xy if None not in each]
    if known:
        x, y, low, high = zip(*known, strict=True)
        axis.plot(x, y, color="C0", linewidth=1.2, marker=".", ms=4)
        axis.fill_between(x, low, high, color="C0", alpha=0.18, linewidth=0)
    if measure["recipe"]["value"] is not None:
        axis.axhline(measure["recipe"]["value"], color="black", linewidth=0.8, linestyle=":",
                     label="recipe as it is")  # fmt: skip
    axis.set_ylabel(f"{key}\n{measure['metric']} ({measure['wanted']})", fontsize=8)


def _is_logarithmic(points: Sequence[Mapping[str, Any]]) -> bool:
    values = [point["value"] for point in points]
    return bool(min(values) > 0 and max(values) / min(values) > LOG_FROM)


def draw_pairs(told: Mapping[str, Any], path: Path) -> None:
    """What tasks of a pair do to each other, beside cosine and rank correlation, as matrices.

    Args:
        told: What `taskvec pairs --json` prints.
        path: File to write.
    """
    tasks = list(told["tasks"])
    changes: Cells = {}
    lie: dict[str, Cells] = {"cosine": {}, "rank_correlation": {}}
    for pair in told["pairs"]:
        a, b = pair["tasks"]
        for task, other in ((a, b), (b, a)):
            effect = pair["effects"].get(task)
            if effect and effect["less_single"]:
                mark = OUTCOMES[effect["outcome"]]
                changes[task, other] = effect["less_single"]["value"], mark
            for name, cells in lie.items():
                cells[task, other] = pair[name], ""
    figure, axes = new_figure(9.6, 0.9 + 0.75 * len(tasks), 3, 1)
    largest = max((abs(value) for value, _ in changes.values() if value is not None), default=1.0)
    titles = {
        "cosine": "cosine of task vectors",
        "rank_correlation": "rank correlation\n(Spearman)",
    }
    signs = {task: 1 if about["higher_is_better"] else -1 for task, about in told["tasks"].items()}
    _matrix(figure, axes[0][0], tasks, changes, largest or 1.0, signs)
    axes[0][0].set_title("row's metric: merged with\nthe column's, less alone", fontsize=8)
    axes[0][0].set_xlabel("▲ synergy   ▼ interference", fontsize=7)
    for axis, (name, cells) in zip(axes[0][1:], lie.items(), strict=True):
        _matrix(figure, axis, tasks, cells, 1.0, {})
        axis.set_title(titles[name], fontsize=8)
    save_figure(figure, path)


def _matrix(
    figure: Any,
    axis: Any,
    tasks: Sequence[str],
    cells: Cells,
    largest: float,
    signs: Mapping[str, int],
) -> None:
    """Cells in colours, blue for more; for less in rows whose sign is −1."""
    values = [[float("nan")] * len(tasks) for _ in tasks]
    for (a, b), (value, _) in cells.items():
        if value is not None:
            values[tasks.index(a)][tasks.index(b)] = signs.get(a, 1) * value
    image = axis.imshow(values, vmin=-largest, vmax=largest, cmap="RdBu")
    axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=7)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=7)
    for (a, b), (value, mark) in cells.items():
        if value is not None:
            axis.text(
                tasks.index(b),
                tasks.index(a),
                f"{value:+.2f}{mark}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(value) > 0.6 * largest else "black",
            )
    figure.colorbar(image, ax=axis, shrink=0.7)
