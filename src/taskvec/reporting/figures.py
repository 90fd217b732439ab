"""Figures as files: SVG, PNG and PDF, from the charts that the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.errors import UsageError
from taskvec.extras import require
from taskvec.files import write_whole, writing
from taskvec.layers import module_order
from taskvec.reporting import charts
from taskvec.reporting.charts import Spec
from taskvec.reporting.layers import interference_chart, matrix_spec
from taskvec.reporting.sections import Chart
from taskvec.reporting.studies import error_spec, place_of, search_specs, sweep_charts

Saved = Mapping[str, Any]
FORMATS = (".svg", ".png", ".pdf")
INK = "#222"
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"  # what a file's reader may have


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be drawn, before the work that leads to it.

    Raises:
        UsageError: another format than SVG, PNG or PDF.
        MissingExtraError: Altair or vl-convert is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a figure's name must end in {', '.join(FORMATS)}")
    require("altair", "report")
    require("vl_convert", "report")


def save_figure(spec: Spec, path: Path) -> None:
    """Write a chart in the format that the name says, on white.

    Raises:
        UsageError, MissingExtraError: see `check_figure`.
        OutputError: the file cannot be written.
    """
    check_figure(path)
    with writing(path):
        write_whole(path, drawn(spec, path.suffix.lower()))


def drawn(spec: Spec, suffix: str = ".svg") -> bytes:
    """A chart as the content of a file."""
    convert: Any = require("vl_convert", "report")
    config = charts.theme(INK) | {"background": "white", "font": FONT, "padding": 12}
    whole = {"$schema": charts.SCHEMA, **spec, "config": config}
    if suffix == ".svg":
        return str(convert.vegalite_to_svg(whole)).encode()
    if suffix == ".png":
        return bytes(convert.vegalite_to_png(whole, scale=2))
    return bytes(convert.vegalite_to_pdf(whole))


def save_charts(panels: Sequence[Chart], path: Path, columns: int, title: str = "") -> None:
    """Write several charts as one figure.

    Args:
        panels: In their order.
        path: File to write.
        columns: In a row.
        title: Above all.

    Raises:
        UsageError, MissingExtraError, OutputError: see `save_figure`.
    """
    check_figure(path)
    save_figure(composed(panels, columns, title), path)


def composed(panels: Sequence[Chart], columns: int, title: str = "") -> Spec:
    """Several charts as one spec of fixed widths."""
    views = []
    for panel in panels:
        spec = charts.inlined(panel.spec)
        spec.pop("$schema", None)
        spec.setdefault("width", charts.WIDTH)
        views.append(spec | {"title": panel.title})
    whole: Spec = {
        "concat": views,
        "columns": columns,
        "spacing": 34,
        "resolve": {"scale": {"color": "independent", "size": "independent"}},
    }
    return {"title": {"text": title, "anchor": "start", "offset": 14}, **whole} if title else whole


def draw_similarity(scan: Saved, path: Path, scheme: str = "logarithmic") -> None:
    """Similarity and weight of every layer against depth; rank correlation between tasks.

    After figure 5 of LATA, arXiv:2502.20186.

    Args:
        scan: What `taskvec scan --json` prints.
        path: File to write.
        scheme: Whose weights are drawn.
    """
    check_figure(path)
    tasks = list(scan["summary"]["tasks"])
    rows = scan["layers"]
    found = {row["tower"] for row in rows if row["block"] is not None}
    towers = sorted(found, key=lambda tower: module_order(tower, "block")) or ["model"]
    has_base = any(row["similarity"] is not None for row in rows)
    values = {"similarity": "similarity to instruction tuning", scheme: f"weight, {scheme}"}
    values = values if has_base else {"task_norm": "‖τ‖"}
    panels = []
    for tower in towers:
        mine = [row for row in rows if row["tower"] == tower]
        for key, title in values.items():
            for task in tasks:
                name = f"{task} ({tower})" if len(towers) > 1 else task
                points = [row for row in mine if row["task"] == task]
                panels.append(Chart(f"{name}: {title}", _depth(points, key, title, scan)))
    if len(tasks) > 1 and has_base:
        matrix = scan["summary"]["rank_correlation"]
        cells = [[matrix[a][b] for b in tasks] for a in tasks]
        title = "rank correlation of similarity (Spearman)"
        panels.append(Chart(title, matrix_spec(tasks, cells, "Spearman")))
    anchor = Path(scan["members"]["anchor"]["path"]).name
    granularity = scan["granularity"]
    save_charts(panels, path, max(len(tasks), 1), f"{anchor}: {', '.join(tasks)}, by {granularity}")


def _depth(rows: Sequence[Saved], key: str, title: str, scan: Saved) -> Spec:
    """One value of a task's layers against depth, the same range of values for all tasks."""
    everywhere = [row for row in scan["layers"] if row[key] is not None]
    blocks = [row["block"] for row in everywhere if row["block"] is not None]
    last = max(blocks, default=0)
    modules = {row["module"] or "block" for row in everywhere}
    points = [
        {"layer": row["layer"], "place": place_of(row["block"], row["module"] or "block", last),
         "value": row[key], "module": row["module"] or "block", "norm": row["task_norm"]}
        for row in rows if row[key] is not None
    ]  # fmt: skip
    values = [row[key] for row in everywhere]
    chart = charts.depth_points(
        title=title,
        modules=sorted(modules, key=lambda kind: module_order("", kind)),
        last=last,
        domain=(min(values, default=0), max(values, default=1)),
    )
    if key == "similarity":
        chart = charts.altair().layer(chart, charts.horizontal(scan["threshold"]))
    return charts.spec_of(chart.properties(height=charts.HEIGHT), points=points)


def draw_sensitivity(saved: Saved, path: Path) -> None:
    """What is kept and what is scored against the value; the safe ranges shaded.

    Args:
        saved: What `taskvec sweep --json` prints.
        path: File to write.
    """
    check_figure(path)
    save_charts(sweep_charts(saved), path, 2, f"Sweep of {saved['sweep']}{_counted(saved)}")


def _counted(saved: Saved) -> str:
    """How many samples, and which seed."""
    for about in saved["measures"].values():
        return f" (n = {about['n']:,}, seed {about['seed']})"
    return ""


def draw_pairs(saved: Saved, path: Path) -> None:
    """What tasks of a pair do to each other, beside cosine and rank correlation, as matrices.

    Args:
        saved: What `taskvec pairs --json` prints.
        path: File to write.
    """
    check_figure(path)
    tasks = list(saved["tasks"])
    panels = [interference_chart(saved)]
    for name, title in (
        ("cosine", "cosine of task vectors"),
        ("rank_correlation", "rank correlation of similarity (Spearman)"),
    ):
        known = {frozenset(pair["tasks"]): pair[name] for pair in saved["pairs"]}
        cells = [[1.0 if a == b else known.get(frozenset((a, b))) for b in tasks] for a in tasks]
        panels.append(Chart(title, matrix_spec(tasks, cells, name.replace("_", " "))))
    first = next(iter(saved["tasks"].values()))
    title = f"Pairs of tasks (n = {first['n']:,}, seed {first['seed']}); ▲ synergy, ▼ interference"
    save_charts(panels, path, 3, title)


def draw_heat_map(saved: Saved, path: Path) -> None:
    """The disentanglement error by coefficient; coefficients from 0 to 1 are framed.

    After figure 3 of arXiv:2305.12827.

    Args:
        saved: As `Disentanglement.to_json` gives it.
        path: File to write.
    """
    check_figure(path)
    n = ", ".join(f"{task} n = {count:,}" for task, count in saved["examples"].items())
    save_figure(error_spec(saved) | {"title": f"disentanglement error; {n}"}, path)


def draw_search(saved: Saved, folder: Path) -> list[Path]:
    """Draw what a search tried, as SVG.

    Args:
        saved: What `trials.json` holds.
        folder: Where figures go.

    Returns:
        The files: `candidates.svg`; `importance.svg` where there were enough candidates.

    Raises:
        MissingExtraError: Altair or vl-convert is not installed.
        OutputError: a file cannot be written.
    """
    paths = []
    for name, spec in search_specs(saved).items():
        paths.append(folder / f"{name}.svg")
        save_figure(spec, paths[-1])
    return paths


def draw_demo(models: Sequence[Saved], path: Path) -> None:
    """Before and after: every skill of the models that the demo merges and forgets.

    Args:
        models: As `taskvec demo --json` prints them; any number of merges of a part, whose names
            end in what made them, such as `math + code, LATA`.
        path: File to write.
    """
    check_figure(path)
    save_figure(demo_spec(models), path)


PARTS = (
    ("parents", "merged", "Two skills added: math + code"),
    ("forgotten", "forgotten", "One skill removed: unsafe"),
    ("forgotten-zor", "forgotten-zor", "The same, in another language"),
)
BEFORE = "#9aa3ad"


def demo_spec(models: Sequence[Saved]) -> Spec:
    """A panel for each part of the demo: from the gray dot before to the colored one after."""
    ways = list(dict.fromkeys(_way(m) for m in models if ", " in m["name"]))
    panels = [_demo_panel(models, part, ways) for part in PARTS]
    subtitle = (
        f"Accuracy on {models[0]['n']} held-out questions a skill; thin bars: 95 % intervals; "
        "gray: before. One color a method."
    )
    return {
        "title": {"text": "taskvec demo: skills before and after", "subtitle": subtitle,
                  "anchor": "start", "fontSize": 16, "subtitleFontSize": 12, "offset": 14,
                  "subtitlePadding": 5},
        "hconcat": panels, "spacing": 30,
    }  # fmt: skip


def _way(model: Saved) -> str:
    return str(model["name"]).rpartition(", ")[2]


def _demo_panel(models: Sequence[Saved], part: tuple[str, str, str], ways: Sequence[str]) -> Spec:
    alt = charts.altair()
    source, merged, title = part
    before = next(m for m in models if m["part"] == source)
    after = [m for m in models if m["part"] == merged and ", " in m["name"]]
    skills = sorted(before["rate"], key=lambda skill: -_largest_change(before, after, skill))
    # Skills that no model has are left out.
    skills = [s for s in skills if any(m["rate"][s] for m in (before, *after))]
    rows = [
        {"skill": skill.removesuffix("-zor"), "way": _way(m), "from": before["rate"][skill],
         "to": m["rate"][skill], "low": m["interval"][skill][0], "high": m["interval"][skill][1],
         "shown": f"{m['rate'][skill]:.2f}"}
        for m in after for skill in skills
    ]  # fmt: skip
    order = [skill.removesuffix("-zor") for skill in skills]
    base = alt.Chart(charts.data(rows)).encode(
        y=alt.Y("skill:N", sort=order, title=None, scale=alt.Scale(paddingInner=0.35),
                axis=alt.Axis(labelFontSize=13, ticks=False, domain=False)),
        yOffset=alt.YOffset("way:N", sort=list(ways)),
        color=alt.Color("way:N", scale=charts.colors(ways),
                        legend=alt.Legend(title=None, orient="bottom", labelFontSize=12)),
    )  # fmt: skip
    scale = alt.Scale(domain=[0, 1.12], nice=False)
    axis = alt.Axis(values=[0, 0.5, 1], format=".1f")
    x = alt.X("to:Q", scale=scale, axis=axis, title="accuracy")
    change = base.mark_rule(strokeWidth=4, opacity=0.35).encode(x=alt.X("from:Q"), x2="to:Q")
    spread = base.mark_rule(strokeWidth=1).encode(x=alt.X("low:Q"), x2="high:Q")
    start = base.mark_circle(size=55, opacity=1).encode(x=alt.X("from:Q"), color=alt.value(BEFORE))
    end = base.mark_circle(size=95, opacity=1).encode(x=x)
    words = base.transform_calculate(at="max(datum.high, datum.from)").mark_text(
        align="left", dx=7, fontSize=11
    ).encode(x=alt.X("at:Q"), text="shown:N")  # fmt: skip
    chart = alt.layer(change, spread, start, end, words).properties(
        width=230, height={"step": 17}, title=alt.TitleParams(
            title, subtitle=f"before: {before['name']}", anchor="start", fontSize=13)
    )  # fmt: skip
    return dict(charts.inlined(charts.spec_of(chart)))


def _largest_change(before: Saved, after: Sequence[Saved], skill: str) -> float:
    return max((abs(m["rate"][skill] - before["rate"][skill]) for m in after), default=0.0)
