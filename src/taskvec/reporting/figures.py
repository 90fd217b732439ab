"""Figures drawn with matplotlib, without a display."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from taskvec.errors import UsageError
from taskvec.extras import require
from taskvec.files import write_whole, writing
from taskvec.layers import module_order

FORMATS = (".png", ".svg", ".pdf")
MARKERS = "osD^vPX*"


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be drawn, before the work that leads to it.

    Raises:
        UsageError: another format than PNG, SVG or PDF.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a figure's name must end in {', '.join(FORMATS)}")
    require("matplotlib", "report")


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, shape (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that its name says.

    Raises:
        UsageError, MissingExtraError: see `check_figure`.
        OutputError: the file cannot be written.
    """
    check_figure(path)
    with writing(path):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=path.suffix.removeprefix("."))
        write_whole(path, drawn.getvalue())


def draw_similarity(scan: dict[str, Any], path: Path) -> None:
    """Similarity against depth by module kind, a panel a task; rank correlation between tasks.

    After figure 5 of LATA, arXiv:2502.20186.

    Args:
        scan: What `taskvec scan --json` prints.
        path: File to write.
    """
    tasks = list(scan["summary"]["tasks"])
    found = {row["tower"] for row in scan["layers"] if row["block"] is not None}
    towers = sorted(found, key=lambda tower: module_order(tower, "block")) or ["model"]
    extra = 1 if len(tasks) > 1 else 0
    figure, axes = new_figure(
        4.6 * len(tasks) + 3.6 * extra, 3.8 * len(towers), len(tasks) + extra, len(towers)
    )
    for j, tower in enumerate(towers):
        for i, task in enumerate(tasks):
            rows = [r for r in scan["layers"] if r["task"] == task and r["tower"] == tower]
            _panel(axes[j][i], rows, scan["threshold"])
            axes[j][i].set_title(f"{task} ({tower})" if len(towers) > 1 else task)
        if extra:
            axes[j][-1].set_visible(j == 0)
    axes[0][0].set_ylabel("cos(τ_comp, τ_instr)")
    if extra:
        _correlation(figure, axes[0][-1], tasks, scan["summary"]["rank_correlation"])
    save_figure(figure, path)


def _panel(axis: Any, rows: list[dict[str, Any]], threshold: float) -> None:
    found = {row["module"] or "block" for row in rows if row["block"] is not None}
    kinds = sorted(found, key=lambda kind: module_order("", kind))
    for kind, marker in zip(kinds, MARKERS, strict=False):
        points = [
            (row["block"], row["similarity"])
            for row in rows
            if (row["module"] or "block") == kind
            and row["block"] is not None
            and row["similarity"] is not None
        ]
        axis.scatter(
            *zip(*points, strict=True), s=18, marker=marker, alpha=0.75, label=kind
        ) if points else None
        depths = sorted({block for block, _ in points})
        means = [
            sum(s for b, s in points if b == d) / sum(b == d for b, _ in points) for d in depths
        ]
        axis.plot(depths, means, linewidth=1, alpha=0.6)
    axis.axhline(threshold, color="black", linewidth=0.8, linestyle=":", label=f"σ = {threshold:g}")
    axis.set_xlabel("block")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7, loc="best")


def _correlation(
    figure: Any, axis: Any, tasks: list[str], matrix: dict[str, dict[str, float | None]]
) -> None:
    values = [[_number(matrix[a][b]) for b in tasks] for a in tasks]
    image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu")
    axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axis.set_yticks(range(len(tasks)), tasks)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="white" if abs(value) > 0.6 else "black",
            )
    axis.set_title("rank correlation\nof similarity (Spearman)", fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.7)


def draw_demo(models: list[dict[str, Any]], path: Path) -> None:
    """Bars of every skill by model, a panel each for merging and the two ways of forgetting.

    Args:
        models: As `taskvec demo --json` prints them.
        path: File to write.
    """
    panels = (
        ("two skills added: math + code", ("parents", "merged")),
        ("one skill removed: unsafe", ("forgotten",)),
        ("… in another language", ("forgotten-zor",)),
    )
    figure, axes = new_figure(9.5, 8.4, 1, len(panels))
    for axis, (title, parts) in zip(axes[:, 0], panels, strict=True):
        chosen = [model for model in models if model["part"] in parts]
        skills = list(chosen[0]["rate"])
        width = 0.84 / len(chosen)
        for i, model in enumerate(chosen):
            rates = [model["rate"][skill] for skill in skills]
            ends = [model["interval"][skill] for skill in skills]
            low = [max(0.0, r - a) for r, (a, _) in zip(rates, ends, strict=True)]
            high = [max(0.0, b - r) for r, (_, b) in zip(rates, ends, strict=True)]
            places = [j + (i - (len(chosen) - 1) / 2) * width for j in range(len(skills))]
            axis.bar(places, rates, width * 0.92, label=model["name"])
            axis.errorbar(
                places, rates, [low, high], fmt="none", ecolor="black", elinewidth=0.7, capsize=1.5
            )
        axis.set_xticks(range(len(skills)), [skill.removesuffix("-zor") for skill in skills])
        axis.set_ylim(0, 1.08)
        axis.set_title(title, fontsize=10, loc="left")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1][0].set_ylabel(f"right answers (n = {models[0]['n']} a skill, 95 % interval)")
    save_figure(figure, path)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
