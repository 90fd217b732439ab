"""Sections about a scan: the family, its layers, and tasks against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.layers import GRANULARITIES, classify
from taskvec.merging.layer_report import rank_correlation, sign_conflicts
from taskvec.methods.lata import SCHEMES
from taskvec.reporting import charts
from taskvec.reporting.charts import Spec
from taskvec.reporting.document import FamilyData, MergeData, ReportData, TableData
from taskvec.reporting.families import kind_of, scan_of
from taskvec.reporting.sections import Chart, Charts, Live, ReportSection, TableBlock, Words

Array = np.ndarray[Any, Any]
ANCHOR, BASE = "anchor", "base"


def tables_of(document: ReportData, family: FamilyData) -> list[TableData]:
    """Tables of the family's tasks and tensors, in the order of the document."""
    fitted = [fit.table for fit in document.fits if fit.table is not None]
    tables = [*(merge.table for merge in document.merges), *fitted, *document.tables]
    return [t for t in tables if set(t.weights) == set(family.tasks) and t.names == family.names]


# The family in the plane.


def family_section(document: ReportData, family: FamilyData) -> ReportSection:
    """Members as points, with the vectors between them, and what is known of each."""
    tables = tables_of(document, family)
    points, share = family_points(family, tables)
    words = Words(
        f"Models as points, to scale: a projection of their weights on the plane that shows most "
        f"of the distances, {share:.0%} of their squares here. Lines are instruction and task "
        "vectors, and λ-weighted sums for merges."
        + ("" if tables or not document.merges else " The merge has other tensors than the scan.")
    )
    chart = Chart("Models in weight space", family_chart(points), "Distances are in units of ‖θ‖.")
    rows = [
        [role.replace("task:", "task "), member.path,
         "–" if member.dtypes is None else ", ".join(sorted(member.dtypes)), member.parameters,
         "; ".join(member.differs) or "–", member.fingerprint[:12]]
        for role, member in family.members.items()
    ]  # fmt: skip
    head = ("role", "model", "dtype", "parameters", "differs from the anchor in", "fingerprint")
    return ReportSection(
        "family", "Family", [words, Charts([chart]), TableBlock("Members", head, rows)]
    )


def family_points(
    family: FamilyData, tables: Sequence[TableData]
) -> tuple[list[dict[str, Any]], float]:
    """Coordinates of the members and the merges, and the share of squared distances they show.

    Classical scaling: the Gram matrix of all points, centered, and its two largest directions.

    Args:
        family: A scan.
        tables: Weights of merges, with their λ.
    """
    names, kinds, combos = _combinations(family, tables)
    gram = _gram_of(family, combos)
    count = len(names)
    center = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(center @ gram @ center)
    values = np.maximum(values, 0)
    order = np.argsort(values)[::-1][:2]
    share = float(values[order].sum() / values.sum()) if values.sum() else 1.0
    coordinates = vectors[:, order] * np.sqrt(values[order])
    coordinates -= coordinates[names.index(ANCHOR)]
    unit = math.sqrt(max(float(scan_of(family).gram[:, 0, 0].sum()), 1e-300))
    coordinates /= unit
    for axis in range(coordinates.shape[1]):  # the same picture on every machine
        if coordinates[np.argmax(np.abs(coordinates[:, axis])), axis] < 0:
            coordinates[:, axis] *= -1
    points = [
        {"name": name, "kind": kind, "x": float(xy[0]), "y": float(xy[1]) if len(xy) > 1 else 0.0}
        for name, kind, xy in zip(names, kinds, coordinates, strict=True)
    ]
    return points, share


def _combinations(
    family: FamilyData, tables: Sequence[TableData]
) -> tuple[list[str], list[str], list[Array]]:
    """Points as sums of instruction and task vectors from the anchor, by tensor."""
    n, k = len(family.names), len(family.tasks)

    def single(column: int, factor: float) -> Array:
        out = np.zeros((n, 1 + k))
        out[:, column] = factor
        return out

    names, kinds, combos = [ANCHOR], [ANCHOR], [np.zeros((n, 1 + k))]
    if family.has_base:
        names, kinds = [*names, BASE], [*kinds, BASE]
        combos.append(single(0, -1.0))
    for i, task in enumerate(family.tasks):
        names, kinds = [*names, f"task {task}"], [*kinds, "task"]
        combos.append(single(1 + i, 1.0))
    for table in tables:
        combo = np.zeros((n, 1 + k))
        for i, task in enumerate(family.tasks):
            combo[:, 1 + i] = table.scales.get(task, 1.0) * np.array(table.weights[task])
        names, kinds = [*names, table.name], [*kinds, "merge"]
        combos.append(combo)
    return names, kinds, combos


def _gram_of(family: FamilyData, combos: Sequence[Array]) -> Array:
    grams, stacked = scan_of(family).gram[:, 1:, 1:], np.stack(combos)
    gram: Array = np.einsum("pni,nij,qnj->pq", stacked, grams, stacked, optimize=True)
    return gram


def family_chart(points: Sequence[dict[str, Any]]) -> Spec:
    """Points and vectors with equal axes."""
    alt = charts.altair()
    xs, ys = [p["x"] for p in points], [p["y"] for p in points]
    reach = max(max(xs) - min(xs), max(ys) - min(ys), 1e-12) * 0.62
    cx, cy = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    kinds = ["anchor", "base", "task", "merge"]
    size = 380
    x = alt.X("x:Q", title="fraction of ‖θ‖", scale=alt.Scale(domain=[cx - reach, cx + reach]))
    y = alt.Y("y:Q", title=None, scale=alt.Scale(domain=[cy - reach, cy + reach]))
    base = alt.Chart(charts.data(points))
    color = alt.Color("kind:N", scale=charts.colors(kinds),
                      legend=alt.Legend(title=None, orient="top"))  # fmt: skip
    vectors = base.mark_rule(strokeWidth=1.6, opacity=0.6).encode(
        x=x, y=y, x2=alt.datum(0.0), y2=alt.datum(0.0), color=color
    )
    dots = base.mark_circle(size=90, opacity=1).encode(
        x=x, y=y, color=color,
        tooltip=[alt.Tooltip("name:N", title="model"), alt.Tooltip("x:Q", format=".4f"),
                 alt.Tooltip("y:Q", format=".4f")],
    )  # fmt: skip
    places = _label_places(points, size / reach / 2)
    words = [
        alt.Chart(charts.data([point]))
        .mark_text(align=align, dx=dx, dy=dy, fontSize=12)
        .encode(x=x, y=y, text="name:N")
        for point, (align, dx, dy) in zip(points, places, strict=True)
    ]
    return charts.spec_of(alt.layer(vectors, dots, *words).properties(width=size, height=size))


def _label_places(points: Sequence[dict[str, Any]], pixels: float) -> list[tuple[str, int, int]]:
    """Alignment and offset of each label, so that labels overlap each other little.

    Args:
        points: With coordinates.
        pixels: Of one unit.
    """
    sides = (("left", 9), ("right", -9))
    choices = [(align, dx, dy) for dy in (-9, 11, -26, 28) for align, dx in sides]
    taken: list[tuple[float, float, float, float]] = []
    out = []
    for point in points:
        x, y = point["x"] * pixels, -point["y"] * pixels
        boxes = []
        for align, dx, dy in choices:
            width = 7.0 * len(point["name"])
            left = x + dx - (width if align == "right" else 0)
            boxes.append((left, y + dy - 8, left + width, y + dy + 8))
        crowded = [sum(_overlap(box, other) for other in taken) for box in boxes]
        best = crowded.index(min(crowded))
        taken.append(boxes[best])
        out.append(choices[best])
    return out


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


# Layers: a map, and controls that compute weights again.


def layers_section(document: ReportData, family: FamilyData, number: int) -> ReportSection:
    """The map of layers by depth and kind, live; filled by the script."""
    towers = list(dict.fromkeys(family.towers))
    kinds = charts.kinds_of(family.kinds)
    rows = [f"{tower} {kind}" for tower in towers for kind in kinds] if len(towers) > 1 else kinds
    blocks = [block for block in family.blocks if block is not None]
    modules = list(dict.fromkeys(family.modules[i] for i in family.order))
    tables = tables_of(document, family)
    live = Live(
        "layers",
        {
            "family": number,
            "places": _places(family, several=len(towers) > 1),
            "tables": [{"name": t.name, "weights": t.weights, "scales": t.scales} for t in tables],
            "start": _start(document.merges, family),
            "schemes": list(SCHEMES),
            "granularities": list(GRANULARITIES),
            "repeat": _repeat(document.merges, family),
        },
        {
            "map": charts.spec_of(
                charts.layer_map(charts.depths_of(family.blocks), rows), cells=[]
            ),
            "depth": charts.spec_of(
                charts.depth_points(title="value", modules=modules, last=max(blocks, default=0)),
                points=[],
            ),
        },
    )
    words = Words(
        "Each cell is one kind of tensor at one depth. Choose a scheme, σ or λ: weights and "
        "predicted norms are computed here, from the scan. Click a cell for its figures, or paint "
        "weights by hand; the table is what taskvec merge --table takes."
    )
    base = Words("The scan has no base, so similarity to instruction tuning is unknown.")
    return ReportSection(
        "layers" if number == 0 else f"layers-{number + 1}",
        "Layers" if number == 0 else f"Layers of {family.path}",
        [words, *([] if family.has_base else [base]), live],
    )


def _places(family: FamilyData, *, several: bool) -> dict[str, Any]:
    """Column and row of each tensor in the map."""
    depths = [
        charts.depth_of(block, module)
        for block, module in zip(family.blocks, family.modules, strict=True)
    ]
    kinds = [
        f"{tower} {kind}" if several else kind
        for tower, kind in zip(family.towers, family.kinds, strict=True)
    ]
    return {"depths": depths, "kinds": kinds}


def _start(merges: Sequence[MergeData], family: FamilyData) -> dict[str, Any]:
    """Scheme and λ to begin with: those of the first merge of the family."""
    for merge in merges:
        tasks = merge.recipe.get("tasks") or {}
        if set(tasks) == set(family.tasks):
            first = tasks[family.tasks[0]]
            keys = ("scheme", "granularity", "threshold", "normalize_weights")
            same = merge.method == "lata" and all(
                tasks[task].get(key) == first.get(key) for task in family.tasks for key in keys
            )
            known = {key: first[key] for key in keys if key in first} if same else {}
            return {**known, "scales": merge.table.scales}
    return {"scales": {}}


def _repeat(merges: Sequence[MergeData], family: FamilyData) -> str:
    for merge in merges:
        if set(merge.recipe.get("tasks") or {}) == set(family.tasks):
            return f"{merge.path}/taskvec.yaml"
    return "recipe.yaml"


def layer_maps(
    names: Sequence[str], values: Mapping[str, Sequence[float]], scheme: str = charts.SEQUENTIAL
) -> list[Chart]:
    """Maps by depth and kind that do not change, one for each task, with one scale of colors.

    Args:
        names: Tensors.
        values: By task, one for each tensor; a cell shows the mean of its tensors.
        scheme: Of colors; a diverging one has 0 in its middle.
    """
    keys = [classify(name) for name in names]
    several = len({key.tower for key in keys}) > 1
    kinds = [f"{key.tower} {kind_of(key)}" if several else kind_of(key) for key in keys]
    depths = [charts.depth_of(key.block, key.module) for key in keys]
    by_task = {task: _cells(depths, kinds, mine) for task, mine in values.items()}
    found = [cell["value"] for cells in by_task.values() for cell in cells] or [0.0]
    limit = max(map(abs, found)) or 1.0
    domain = (-limit, limit) if scheme == charts.DIVERGING else (min(0.0, *found), limit)
    chart = charts.layer_map(charts.depths_of([key.block for key in keys]), charts.kinds_of(kinds))
    out = []
    for task, cells in by_task.items():
        spec = charts.spec_of(chart, cells=cells)
        scale = spec["encoding"]["color"]["scale"]
        scale |= {"scheme": scheme, "domainMin": domain[0], "domainMax": domain[1]}
        spec["encoding"]["tooltip"] = spec["encoding"]["tooltip"][:2]
        out.append(Chart(task, spec))
    return out


def _cells(
    depths: Sequence[str], kinds: Sequence[str], values: Sequence[float]
) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[float]] = {}
    for depth, kind, value in zip(depths, kinds, values, strict=True):
        found.setdefault((depth, kind), []).append(value)
    return [
        {"depth": depth, "kind": kind, "value": (mean := sum(each) / len(each)),
         "about": f"{kind}, block {depth}", "shown": f"{mean:.4g}"}
        for (depth, kind), each in found.items()
    ]  # fmt: skip


# Tasks against each other.


def tasks_section(document: ReportData, family: FamilyData) -> ReportSection | None:
    """Cosine, rank correlation and sign conflict of every pair of tasks; the layers on demand."""
    if len(family.tasks) < 2:
        return None
    tasks, scan = family.tasks, scan_of(family)
    gram = scan.gram.sum(0)[2:, 2:]
    norms = np.sqrt(np.diag(gram))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = gram / np.outer(norms, norms)
    conflict = dict(sign_conflicts(scan))
    conflicts = [
        [0.0 if a == b else conflict.get(f"{a}, {b}", conflict.get(f"{b}, {a}")) for b in tasks]
        for a in tasks
    ]
    panels = [
        Chart("Cosine of task vectors", matrix_spec(tasks, cosine.tolist(), "cosine"),
              "Over the whole model; near 0: the tasks change weights independently."),
        Chart("Sign conflict", matrix_spec(tasks, conflicts, "sign conflict"),
              "Share of the entries that both change in which their signs differ; 0.5 is chance."),
    ]  # fmt: skip
    if family.has_base:
        correlation = rank_correlation(scan, "tensor")
        panels.insert(1, Chart(
            "Rank correlation of similarity",
            matrix_spec(tasks, [[correlation[a][b] for b in tasks] for a in tasks], "Spearman"),
            "Whether LATA orders the layers of both tasks alike.",
        ))  # fmt: skip
    for pairs in document.pairs:
        panels.append(interference_chart(pairs.data))
    config = {"family": document.families.index(family)}
    spec = charts.spec_of(_pair_depth(family), points=[])
    return ReportSection(
        "tasks", "Tasks against each other",
        [Charts(panels), Live("pairs", config, {"depth": spec})],
    )  # fmt: skip


def matrix_spec(
    tasks: Sequence[str], values: Sequence[Sequence[float | None]], legend: str
) -> Spec:
    """A matrix of values from −1 to 1."""
    cells = [
        (a, b, value if value is not None and math.isfinite(value) else None)
        for a, line in zip(tasks, values, strict=True)
        for b, value in zip(tasks, line, strict=True)
    ]
    rows = [
        {"a": a, "b": b, "value": value, "text": "–" if value is None else f"{value:.2f}"}
        for a, b, value in cells
    ]
    return charts.spec_of(charts.matrix(rows, tasks, limit=1.0, legend=legend))


def _pair_depth(family: FamilyData) -> Any:
    modules = list(dict.fromkeys(family.modules[i] for i in family.order))
    blocks = [block for block in family.blocks if block is not None]
    return charts.depth_points(title="cosine", modules=modules, last=max(blocks, default=0))


OUTCOMES = {"synergy": "▲", "interference": "▼", "neither": ""}


def interference_chart(saved: Mapping[str, Any]) -> Chart:
    """What merging with another task does to each, by the data of `taskvec pairs`."""
    tasks = list(saved["tasks"])
    rows = []
    for pair in saved["pairs"]:
        for task in pair["tasks"]:
            (other,) = set(pair["tasks"]) - {task}
            effect = pair["effects"].get(task)
            if not effect or not effect["less_single"] or effect["less_single"]["value"] is None:
                continue
            value = effect["less_single"]["value"]
            sign = 1 if saved["tasks"][task]["higher_is_better"] else -1
            mark = OUTCOMES.get(effect["outcome"] or "", "")
            rows.append(
                {"a": task, "b": other, "value": sign * value, "text": f"{value:+.2f}{mark}"}
            )
    limit = max((abs(row["value"]) for row in rows), default=1.0) or 1.0
    first = next(iter(saved["tasks"].values()))
    return Chart(
        "Measured interference",
        charts.spec_of(charts.matrix(rows, tasks, limit=limit, legend="Δ vs alone")),
        f"The row's metric when merged with the column's task, minus its own alone; ▲ synergy, "
        f"▼ interference (paired 95 % interval on one side of 0); n = {first['n']:,}, "
        f"seed {first['seed']}.",
    )
