"""Sections about coefficients and training: search, fit, sweeps, ξ maps, linearity, curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from taskvec.layers import classify, module_order
from taskvec.reporting import charts
from taskvec.reporting.charts import Spec
from taskvec.reporting.document import FitData, ReportData, TrainingData
from taskvec.reporting.sections import (
    Block,
    Chart,
    Charts,
    ReportSection,
    TableBlock,
    Words,
    interval_row,
    place_name,
    shown,
)

Saved = Mapping[str, Any]
LOG_FROM = 50.0  # values that span more than this ratio are drawn over a logarithmic axis
SHARES = ("layers", "parameters", "energy")
UNITS = {"prediction": "ξ", "symmetric_kl": "ξ, symmetric KL in nats"}
MOST_AXES = 4  # that are drawn against the objective
MOST_PAIRS = 6  # of goals that are drawn against each other


# Search.


def goal_key(goal: Saved) -> str:
    """A goal as it is given on the command line."""
    return f"{goal['task']}@{goal['metric']}" if goal["metric"] else str(goal["task"])


def search_section(document: ReportData) -> ReportSection:
    """Candidates of every search, linked by brushing; the winner on test data."""
    blocks: list[Block] = []
    for search in document.searches:
        saved = search.data
        winner = saved["winner"]
        point = "none" if winner is None else ", ".join(
            f"{key} {_short(value)}" for key, value in winner["point"].items()
        )  # fmt: skip
        samples = next(iter(saved["samples"].values()))
        blocks += [
            Words(
                f"{place_name(search.path)}: {saved['tried']} candidates by {saved['sampler']}, "
                f"n = {samples['select']['n']:,} for selection, seed {saved['seed']}; "
                f"winner: {point}. Drag over an area to mark its candidates everywhere."
            ),
            Charts([Chart(name.capitalize(), spec) for name, spec in search_specs(saved).items()]),
        ]
        if saved["test"] is not None:
            blocks += _tested(saved)
    return ReportSection("search", "Search", blocks)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trial_rows(saved: Saved) -> list[dict[str, Any]]:
    """A row for each scored candidate; axes and goals under neutral field names."""
    axes = axes_of(saved)
    goals = [goal_key(goal) for goal in saved["goals"]["goals"]]
    winner = saved["winner"] and saved["winner"]["number"]
    rows = []
    for trial in saved["trials"]:
        if trial["error"] or trial["same_as"] is not None:
            continue
        lost = any(violation > 0 for violation in trial["violations"].values())
        row = {
            "number": trial["number"],
            "what": "winner" if trial["number"] == winner
            else "loses what is kept" if lost else "candidate",
            "front": "Pareto front" if trial["number"] in saved["front"] else "dominated",
            "best": trial["objectives"][0],
        }  # fmt: skip
        row |= {f"p{i}": trial["point"].get(axis) for i, axis in enumerate(axes)}
        rows.append(row | {f"g{i}": trial["values"].get(goal) for i, goal in enumerate(goals)})
    return rows


def axes_of(saved: Saved) -> list[str]:
    """Names of what is varied."""
    return [axis.partition("=")[0] for axis in saved["axes"]]


def search_specs(saved: Saved) -> dict[str, Spec]:
    """Charts by name: the candidates; the importance of axes, where it is known."""
    specs = {"candidates": _candidates(saved)}
    if saved["importance"]:
        rows = [{"name": name, "value": value} for name, value in saved["importance"].items()]
        title = "share of the spread explained (PED-ANOVA)"
        specs["importance"] = charts.spec_of(charts.bars(rows, title))
    return specs


def _candidates(saved: Saved) -> Spec:
    """Parallel coordinates, axes against scores and each other, goals against each other."""
    alt = charts.altair()
    axes, rows = axes_of(saved), trial_rows(saved)
    goals = [goal_key(goal) for goal in saved["goals"]["goals"]]
    brushes = []
    panels = []
    numeric = [
        i for i in range(len(axes)) if all(isinstance(row[f"p{i}"], (int, float)) for row in rows)
    ]
    named = _titles(saved)
    first = "first objective" if saved["goals"]["trade_off"] or len(goals) > 1 else named[goals[0]]
    pairs = [(f"p{i}", "best", axes[i], first) for i in numeric[:MOST_AXES]]
    pairs += [(f"p{i}", f"p{j}", axes[i], axes[j]) for i, j in pairwise(numeric)][:MOST_AXES]
    pairs += [
        (f"g{i}", f"g{j}", named[goals[i]], named[goals[j]])
        for i in range(len(goals))
        for j in range(i + 1, len(goals))
    ][:MOST_PAIRS]
    for n in range(len(pairs)):
        brushes.append(alt.selection_interval(name=f"brush{n}"))
    chosen = brushes[0] if brushes else None
    for brush in brushes[1:]:
        chosen = chosen & brush
    for (x, y, x_title, y_title), brush in zip(pairs, brushes, strict=True):
        panels.append(_scatter(rows, (x, y), (x_title, y_title), brush, chosen))
    panels.insert(0, _parallel(rows, axes, goals, chosen))
    spec = charts.spec_of(alt.concat(*panels, columns=3, spacing=28), trials=rows)
    spec["usermeta"] = {"fit": 330}
    return spec


def _titles(saved: Saved) -> dict[str, str]:
    return {
        goal_key(goal): f"{goal_key(goal)}: {saved['metrics'][goal_key(goal)]} ({goal['way']})"
        for goal in saved["goals"]["goals"]
    }


WHAT = ("candidate", "loses what is kept", "winner")


def _scatter(
    rows: Sequence[Saved], fields: tuple[str, str], titles: tuple[str, str], brush: Any, chosen: Any
) -> Any:
    alt = charts.altair()
    x, y = fields
    scale = alt.Scale(zero=False, nice=False, padding=8)
    title = "goals" if x.startswith("g") else "axis and score" if y == "best" else "two axes"
    return (
        alt.Chart(alt.NamedData(name="trials"), title=title)
        .mark_point(filled=True, size=70, opacity=0.85)
        .encode(
            x=alt.X(f"{x}:Q", title=titles[0], scale=scale),
            y=alt.Y(f"{y}:Q", title=titles[1], scale=scale),
            color=alt.condition(
                chosen,
                alt.Color("best:Q", scale=alt.Scale(range=list(charts.SCALE)),
                          legend=alt.Legend(title="first objective", orient="bottom")),
                alt.value("#8886"),
            ),
            shape=alt.Shape(
                "what:N",
                scale=alt.Scale(domain=list(WHAT), range=["circle", "cross", "diamond"]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            size=alt.condition("datum.what == 'winner'", alt.value(190), alt.value(55)),
            tooltip=[alt.Tooltip("number:Q", title="candidate"),
                     alt.Tooltip(f"{x}:Q", title=titles[0], format=".3~g"),
                     alt.Tooltip(f"{y}:Q", title=titles[1], format=".3~g"),
                     alt.Tooltip("front:N", title="trade-off")],
        )
        .add_params(brush)
        .properties(width=300, height=220)
    )  # fmt: skip


def _parallel(rows: Sequence[Saved], axes: Sequence[str], goals: Sequence[str], chosen: Any) -> Any:
    """A line for each candidate over all axes and goals, each from its lowest to its highest."""
    alt = charts.altair()
    fields = {**{f"p{i}": axis for i, axis in enumerate(axes)},
              **{f"g{i}": goal for i, goal in enumerate(goals)}}  # fmt: skip
    folded = []
    for field, title in fields.items():
        values = [row[field] for row in rows]
        place = _places(values)
        for row, value in zip(rows, values, strict=True):
            folded.append({**row, "axis": title, "place": place(value), "shown": _short(value)})
    color = alt.Color(
        "best:Q", scale=alt.Scale(range=list(charts.SCALE)),
        legend=alt.Legend(title="first objective", orient="bottom"),
    )  # fmt: skip
    strong, weak = alt.value(0.85), alt.value(0.08)
    return (
        alt.Chart(charts.data(folded), title="all candidates")
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("axis:N", sort=list(fields.values()), title=None,
                    axis=alt.Axis(labelAngle=-25, grid=True, labelLimit=110)),
            y=alt.Y("place:Q", title="lowest to highest", axis=alt.Axis(labels=False, grid=False)),
            detail="number:N",
            color=color,
            opacity=alt.condition(chosen, strong, weak) if chosen is not None else strong,
            tooltip=[alt.Tooltip("number:Q", title="candidate"),
                     alt.Tooltip("axis:N"), alt.Tooltip("shown:N", title="value")],
        )
        .properties(width=300, height=220)
    )  # fmt: skip


def _places(values: Sequence[Any]) -> Any:
    """A function from values to 0 … 1; words stand in their order."""
    known = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in known):
        words = sorted({str(value) for value in known})
        return lambda value: (
            None if value is None else words.index(str(value)) / max(1, len(words) - 1)
        )
    low, high = min(known, default=0), max(known, default=0)
    return lambda value: None if value is None else (value - low) / ((high - low) or 1)


def _tested(saved: Saved) -> list[Block]:
    """The winner on test data beside its selection score."""
    test, rows, panels = saved["test"], [], []
    names = [name for name in ("winner", "given", "target") if name in test["figures"]]
    labels = {"winner": "winner, test", "given": "recipe as given", "target": "target"}
    for goal in saved["goals"]["goals"]:
        key = goal_key(goal)
        selected = saved["winner"]["values"].get(key)
        marks = [
            interval_row(labels[name], test["figures"][name][key])
            for name in names if key in test["figures"][name]
        ]  # fmt: skip
        point = {"value": selected, "low": selected, "high": selected}
        marks.append({"name": "winner, selection", **point, "label": _short(selected)})
        order = [*labels.values(), "winner, selection"]
        panels.append(
            Chart(f"{goal['way']} {key}",
                  charts.spec_of(charts.intervals(marks, order, saved["metrics"][key])))
        )  # fmt: skip
        rows.append(
            [f"{goal['way']} {key}", _short(selected),
             *(shown(test["figures"].get(name, {}).get(key)) for name in labels),
             shown(test["differences"].get(key), "+")]
        )  # fmt: skip
    head = ("goal", "winner, selection", *labels.values(), "Δ winner vs reference")
    return [
        Words(
            "The winner's score on selection data is the best of many and therefore too good; "
            "its score on test data is unbiased."
        ),
        Charts(panels),
        TableBlock("The winner on test data, with 95 % intervals", head, rows),
    ]


# Fit.


def fit_section(document: ReportData) -> ReportSection:
    """Fitted weights by depth, what explains them, and the descents."""
    blocks: list[Block] = []
    for fit in document.fits:
        record = fit.record
        held = record["held_out"]
        rows = [[name, shown(each["loss"]), shown(each.get("gain"), "+")]
                for name, each in held.items()]  # fmt: skip
        blocks.append(Words(f"{place_name(fit.path)}: chosen weights: {record['chosen']}."))
        panels = weight_charts(fit)
        known = [e for e in record["explanation"] if e["value"] is not None]
        for task in dict.fromkeys(e["task"] for e in known):
            marks = [interval_row(e["against"], e) for e in known if e["task"] == task]
            names = [mark["name"] for mark in marks]
            chart = charts.intervals(marks, names, "rank correlation", zero_line=True)
            panels.append(Chart(
                f"What weights of {task} go with", charts.spec_of(chart),
                "Spearman's rank correlation of weights by layer, with 95 % intervals.",
            ))  # fmt: skip
        panels.append(_descents(record["descents"]))
        blocks += [
            Charts(panels),
            TableBlock(
                "Loss on held-out prompts", ("weights", "loss", "gain over one weight"), rows
            ),
        ]
    return ReportSection("fit", "Fitted weights", blocks)


def weight_charts(fit: FitData) -> list[Chart]:
    """Weights of every task by depth."""
    if fit.table is None:
        return []
    keys = [classify(name) for name in fit.table.names]
    blocks = [key.block for key in keys if key.block is not None]
    last = max(blocks, default=0)
    modules = sorted({key.module for key in keys}, key=lambda kind: module_order("", kind))
    panels = []
    for task, weights in fit.table.weights.items():
        points = [
            {"layer": name, "place": place_of(key.block, key.module, last), "value": weight,
             "module": key.module, "norm": 1}
            for name, key, weight in zip(fit.table.names, keys, weights, strict=True)
        ]  # fmt: skip
        chart = charts.depth_points(title="weight", modules=modules, last=last)
        panels.append(Chart(f"Weights of {task}", charts.spec_of(chart, points=points)))
    return panels


def place_of(block: int | None, module: str, last: int) -> int:
    """A tensor's place on the axis of depth."""
    if block is not None:
        return block
    return -1 if charts.depth_of(block, module) == charts.INSIDE else last + 1


def _descents(descents: Sequence[Saved]) -> Chart:
    rows = [
        {"name": each["name"], "x": step, "y": loss}
        for each in descents for step, loss in each["measured"]
    ]  # fmt: skip
    names = [each["name"] for each in descents]
    chart = charts.lines(rows, x="step", y="held-out loss", names=names)
    return Chart("Descents", charts.spec_of(chart))


# Sweeps, ξ maps, addition, negation, linearity, training.


def sweep_charts(saved: Saved) -> list[Chart]:
    """What is kept and what is scored against the value; safe ranges are shaded."""
    points = sorted(saved["points"], key=lambda point: point["value"])
    panels = []
    kept = [
        {"name": f"{task}: {'‖τ‖²' if share == 'energy' else share}", "x": point["value"],
         "y": shares[share]}
        for point in points for task, shares in point["kept"].items() for share in SHARES
        if shares[share] is not None
    ]  # fmt: skip
    label = saved["sweep"]
    if kept:
        names = list(dict.fromkeys(row["name"] for row in kept))
        chart = charts.lines(kept, x=label, y="share kept", names=names)
        panels.append(Chart(f"{label}: what is kept", _swept(chart, saved, points)))
    for key, measure in saved["measures"].items():
        rows = [
            {"name": key, "x": point["value"], "y": score["value"],
             "low": score["interval"][0], "high": score["interval"][1]}
            for point in points if (score := point["scores"].get(key)) is not None
        ]  # fmt: skip
        y = f"{measure['metric']} ({measure['wanted']} is wanted)"
        chart = charts.lines(rows, x=label, y=y, names=[key])
        recipe, own = measure["recipe"]["value"], own_value(saved)
        alt = charts.altair()
        if recipe is not None:
            chart = alt.layer(chart, charts.horizontal(recipe))
        if recipe is not None and own is not None:
            chart = alt.layer(chart, charts.point(own, recipe))
        about = (
            f"Band: 95 % interval; n = {measure['n']:,}, seed {measure['seed']}; green: safe; "
            "dashed, with a diamond at its place: the recipe as it is."
        )
        panels.append(Chart(f"{label}: {key}", _swept(chart, saved, points), about))
    return panels


def own_value(saved: Saved) -> float | None:
    """The recipe's own value of what is swept; None where tasks differ or it is not a number."""
    recipe = saved.get("recipe") or {}
    name, _, task = str(saved["sweep"]).partition(".")
    tasks = recipe.get("tasks") or {}
    chosen = [tasks[task]] if task in tasks else list(tasks.values())
    values = {each.get(name) for each in chosen if isinstance(each, dict)}
    (value,) = values if len(values) == 1 else (None,)
    value = recipe.get("method", {}).get(name) if value is None and len(values) < 2 else value
    return float(value) if isinstance(value, (int, float)) else None


def _swept(chart: Any, saved: Saved, points: Sequence[Saved]) -> Spec:
    alt = charts.altair()
    if saved["safe_ranges"]:
        chart = alt.layer(charts.shaded(saved["safe_ranges"]), chart)
    spec = charts.spec_of(chart.properties(height=charts.HEIGHT))
    values = [point["value"] for point in points]
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        _logarithmic(spec)
    return spec


def _logarithmic(spec: Any) -> None:
    """Make every scale of x logarithmic."""
    if isinstance(spec, dict):
        x = spec.get("encoding", {}).get("x") if isinstance(spec.get("encoding"), dict) else None
        if isinstance(x, dict) and x.get("type") == "quantitative":
            x["scale"] = {"type": "log"}
        for value in spec.values():
            _logarithmic(value)
    elif isinstance(spec, list):
        for value in spec:
            _logarithmic(value)


def sweeps_section(document: ReportData) -> ReportSection:
    """Every sweep."""
    panels = [chart for sweep in document.sweeps for chart in sweep_charts(sweep.data)]
    words = Words("One number is varied at a time. In a safe range, no measure is worse than at "
                  "its best value by more than the paired 95 % interval.")  # fmt: skip
    return ReportSection("sweeps", "Sweeps", [words, Charts(panels)])


def error_spec(saved: Saved) -> Spec:
    """The disentanglement error by coefficient; a square marks 0 to 1.

    After figure 3 of arXiv:2305.12827.
    """
    alt = charts.altair()
    one, two = saved["tasks"]
    rows = [
        {"one": cell["alphas"][one], "two": cell["alphas"][two], "value": cell["error"]["value"],
         "shown": shown(cell["error"])}
        for cell in saved["cells"]
    ]  # fmt: skip
    order = sorted({row["one"] for row in rows})
    axis = alt.Axis(format=".2~f", labelAngle=0, labelOverlap=True, grid=False)
    base = alt.Chart(charts.data(rows)).encode(
        x=alt.X("one:O", title=f"α of {one}", axis=axis),
        y=alt.Y("two:O", title=f"α of {two}", sort="descending", axis=axis),
        tooltip=[alt.Tooltip("one:Q", title=f"α of {one}", format=".3~g"),
                 alt.Tooltip("two:Q", title=f"α of {two}", format=".3~g"),
                 alt.Tooltip("shown:N", title=UNITS[saved["distance"]])],
    )  # fmt: skip
    cells = base.mark_rect().encode(
        color=alt.Color("value:Q", scale=alt.Scale(scheme="magma", reverse=True, domainMin=0),
                        title=UNITS[saved["distance"]])
    )  # fmt: skip
    inside = base.transform_filter(
        "datum.one >= 0 && datum.one <= 1 && datum.two >= 0 && datum.two <= 1"
    ).mark_rect(fillOpacity=0, stroke=charts.COLORS[5], strokeWidth=1.5)
    size = max(220, min(360, 22 * len(order)))
    return charts.spec_of(alt.layer(cells, inside).properties(width=size, height=size))


def disentanglement_section(document: ReportData) -> ReportSection:
    """ξ maps, addition, negation and linearity."""
    blocks: list[Block] = []
    for record in document.disentanglements:
        saved = record.data
        panels: list[Chart] = []
        blocks.append(
            Words(f"{place_name(record.path)}: how vectors from {saved['model']} interact.")
        )
        if saved.get("error"):
            error = saved["error"]
            panels.append(Chart(
                f"Error of {error['tasks'][0]} and {error['tasks'][1]}", error_spec(error),
                f"{saved['model']}. Framed: coefficients from 0 to 1. Near 0, the tasks do not "
                "interact.",
            ))  # fmt: skip
        for each in saved.get("addition") or []:
            panels.append(_added(each))
        for name, tried in (saved.get("negation") or {}).items():
            panels += [_negated(name, each) for each in tried]
        if saved.get("linearity"):
            panels += _linear(saved["linearity"])
        blocks.append(Charts(panels))
    return ReportSection("disentanglement", "Disentanglement", blocks)


def _added(saved: Saved) -> Chart:
    marks = [interval_row(task, figure) for task, figure in saved["normalised"].items()]
    marks.append(interval_row("mean", saved["mean_normalised"]))
    names = [mark["name"] for mark in marks]
    scales = ", ".join(f"{task} {scale:g}" for task, scale in saved["scales"].items())
    return Chart(
        f"Addition by {saved['method']}",
        charts.spec_of(charts.intervals(marks, names, "accuracy ÷ that of the task's own model")),
        f"λ: {scales}; chosen on validation data.",
    )


def _negated(name: str, saved: Saved) -> Chart:
    rows = [
        {"name": what, "x": each["scale"], "y": each[what]}
        for each in saved["tried"] for what in ("target", "control")
    ]  # fmt: skip
    chosen = "nothing is subtracted" if saved["scale"] is None else f"chosen λ {saved['scale']:g}"
    return Chart(
        f"Negation of {name} by {saved['method']}",
        charts.spec_of(
            charts.lines(rows, x="λ", y="accuracy on validation data", names=["target", "control"])
        ),
        f"{chosen}; the control must keep {saved['keep']:.0%}. {saved['note']}",
    )


def _linear(saved: Sequence[Saved]) -> list[Chart]:
    panels = []
    for task in dict.fromkeys(each["task"] for each in saved):
        mine = [each for each in saved if each["task"] == task]
        rows = [
            {"name": each["part"], "x": each["alpha"], "y": each["departure"]["value"],
             "low": each["departure"]["interval"][0], "high": each["departure"]["interval"][1]}
            for each in mine if each["departure"] is not None
        ]  # fmt: skip
        names = list(dict.fromkeys(row["name"] for row in rows))
        chart = charts.lines(rows, x="α", y="departure from linear", names=names)
        about = "0: the model answers as its tangent does along this vector."
        panels.append(Chart(f"Linearity of {task}", charts.spec_of(chart), about))
    return panels


def training_section(document: ReportData) -> ReportSection:
    """Curves of every training run."""
    blocks: list[Block] = []
    for run in document.trainings:
        blocks += [
            Words(f"{place_name(run.path)}: {_settings(run.settings)}"), Charts(_curves(run))
        ]  # fmt: skip
    return ReportSection("training", "Training", blocks)


def _settings(settings: Saved) -> str:
    names = ("steps", "batch_size", "learning_rate", "weight_decay", "seed")
    return ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in names
                     if name in settings)  # fmt: skip


def _curves(run: TrainingData) -> list[Chart]:
    groups: Iterable[tuple[str, tuple[str, ...]]] = (
        ("loss", ("loss", "validation_loss")), ("accuracy", ("accuracy", "validation_accuracy")),
        ("learning rate", ("lr",)), ("gradient norm", ("grad_norm",)),
    )  # fmt: skip
    panels = []
    for title, names in groups:
        known = [name for name in names if name in run.curves]
        rows = [
            {"name": name.replace("_", " "), "x": step, "y": value}
            for name in known for step, value in run.curves[name]
        ]  # fmt: skip
        if rows:
            labels = [name.replace("_", " ") for name in known]
            few = max(len(run.curves[name]) for name in known) <= 60
            chart = charts.lines(rows, x="step", y=title, names=labels, points=few)
            panels.append(Chart(f"{title}: {Path(run.path).parent.name}", charts.spec_of(chart)))
    return panels
