"""Charts in Vega-Lite: how every figure of the package and of the report looks.

Functions take plain rows and give Altair charts without a theme. Names from users never become
field names or expressions, only values. A page sets the width of a chart; a file has a fixed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taskvec.extras import require

Row = Mapping[str, Any]
Spec = dict[str, Any]

# Distinct on white and on black, also for most color-blind readers.
COLORS = ("#3b82d6", "#e0803a", "#2ba37a", "#c060b0", "#b59a1c", "#d4515f", "#6f8ba0", "#8468d0",
          "#3fa3ad", "#96714e")  # fmt: skip
WIDTH, HEIGHT = 320, 220
DIVERGING, SEQUENTIAL, GOOD_BAD = "blueorange", "viridis", "redblue"
SCALE = ("#8468d0", "#2ba3a3", "#e0a030")  # low to high, for marks on white and on black
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"


def theme(ink: str) -> Spec:
    """Vega's config with one color for axes and words."""
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 12,
             "titleFontWeight": 500}  # fmt: skip
    axis = {"domainColor": ink, "tickColor": ink, "gridColor": ink, "domainOpacity": 0.4,
            "tickOpacity": 0.4, "gridOpacity": 0.12}  # fmt: skip
    return {
        "background": "transparent",
        "font": "system-ui, 'DejaVu Sans', sans-serif",
        "view": {"stroke": None},
        "axis": words | axis,
        "legend": words | {"symbolOpacity": 1},
        "title": {"color": ink, "subtitleColor": ink, "fontSize": 12, "fontWeight": 600},
        "text": {"color": ink},
        "rule": {"color": ink},
        "line": {"strokeWidth": 1.6},
        "range": {"category": list(COLORS)},
    }


def altair() -> Any:
    """The module `altair`.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("altair", "report")


def data(rows: Sequence[Row]) -> Any:
    """Rows as data of a chart."""
    return altair().InlineData(values=[dict(row) for row in rows])


def spec_of(chart: Any, **datasets: Sequence[Row]) -> Spec:
    """A chart as plain data, without Altair's theme; with rows of named data sets."""
    spec: Spec = chart.to_dict(validate=False)
    spec.pop("config", None)
    if datasets:
        spec["datasets"] = {**spec.get("datasets", {}), **{k: list(v) for k, v in datasets.items()}}
    return spec


def inlined(spec: Any) -> Any:
    """A copy of a spec with the rows of its named data sets where they are used."""
    sets = spec.get("datasets", {})

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(each) for each in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"name"} and value["name"] in sets:
            return {"values": sets[value["name"]]}
        return {key: copied(each) for key, each in value.items()}

    return {key: copied(value) for key, value in spec.items() if key != "datasets"}


def colors(names: Sequence[str]) -> Any:
    """One color a name, the same wherever the names are the same."""
    wheel = [COLORS[i % len(COLORS)] for i in range(len(names))]
    return altair().Scale(domain=list(names), range=wheel)


def intervals(
    rows: Sequence[Row], names: Sequence[str], title: str, *, zero_line: bool = False
) -> Any:
    """A dot and its 95 % interval for each name.

    Args:
        rows: `name`, `value`, `low`, `high`, `label`.
        names: In their order, which decides their colors.
        title: Of the axis.
        zero_line: Whether 0 is marked, for differences.
    """
    alt = altair()
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("name:N", sort=list(names), title=None, axis=alt.Axis(labelLimit=140)),
        color=alt.Color("name:N", scale=colors(names), legend=None),
        tooltip=[alt.Tooltip("name:N", title="model"), alt.Tooltip("label:N", title=title)],
    )
    scale = alt.Scale(zero=False, nice=True)
    rule = base.mark_rule(strokeWidth=2.5, opacity=0.55).encode(
        x=alt.X("low:Q", title=title, scale=scale), x2="high:Q"
    )
    dot = base.mark_circle(size=70, opacity=1).encode(x=alt.X("value:Q", scale=scale))
    layers = [rule, dot]
    if zero_line:
        layers.insert(0, vertical(0))
    return alt.layer(*layers).properties(height=max(44, 22 * len({row["name"] for row in rows})))


def vertical(value: float) -> Any:
    """A thin line at a value of x."""
    alt = altair()
    return (
        alt.Chart(data([{"at": value}]))
        .mark_rule(strokeDash=[3, 3], opacity=0.6)
        .encode(x=alt.X("at:Q"))
    )


def matrix(
    rows: Sequence[Row], names: Sequence[str], *, limit: float, legend: str, scheme: str = GOOD_BAD
) -> Any:
    """Cells in colors with their value written in them.

    Args:
        rows: `a` (row), `b` (column), `value` (for the color), `text`.
        names: Of rows and columns, in their order.
        limit: Colors go from −limit to limit.
        legend: What the values are.
        scheme: Of colors.
    """
    alt = altair()
    base = alt.Chart(data(rows)).encode(
        x=alt.X("b:N", sort=list(names), title=None, axis=alt.Axis(labelAngle=-40, labelLimit=120)),
        y=alt.Y("a:N", sort=list(names), title=None, axis=alt.Axis(labelLimit=120)),
        tooltip=[
            alt.Tooltip("a:N", title="row"), alt.Tooltip("b:N", title="column"),
            alt.Tooltip("text:N", title=legend),
        ],
    )  # fmt: skip
    scale = alt.Scale(scheme=scheme, domain=[-limit, limit], domainMid=0)
    cells = base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None))
    # Middle colors are light in both themes.
    dark = alt.value("black")
    ink = alt.condition(f"abs(datum.value) > {0.62 * limit}", alt.value("white"), dark)
    words = base.mark_text(fontSize=11).encode(text="text:N", color=ink)
    return alt.layer(cells, words).properties(height=34 * len(names))


def lines(rows: Sequence[Row], *, x: str, y: str, names: Sequence[str], points: bool = True) -> Any:
    """Lines with bands.

    Args:
        rows: `x`, `y`, `name`; `low` and `high` where there is a band.
        x: Title of the axis.
        y: Title of the axis.
        names: Of the lines, in the order of their colors.
        points: Whether values are marked.
    """
    alt = altair()
    legend = alt.Legend(title=None, orient="top", columns=3) if len(names) > 1 else None
    color = alt.Color("name:N", scale=colors(names), legend=legend)
    base = alt.Chart(data(rows)).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False, nice=False, padding=6)),
        color=color,
        tooltip=[
            alt.Tooltip("name:N", title="what"), alt.Tooltip("x:Q", title=x, format=".4~g"),
            alt.Tooltip("y:Q", title=y, format=".4~g"), alt.Tooltip("low:Q", format=".4~g"),
            alt.Tooltip("high:Q", format=".4~g"),
        ],
    )  # fmt: skip
    scale = alt.Scale(zero=False)
    layers = [base.mark_line(point=points).encode(y=alt.Y("y:Q", title=y, scale=scale))]
    if any("low" in row for row in rows):
        band = base.mark_area(opacity=0.18).encode(
            y=alt.Y("low:Q", title=y, scale=scale), y2="high:Q"
        )
        layers.insert(0, band)
    return alt.layer(*layers).properties(height=HEIGHT)


def shaded(ranges: Sequence[Sequence[float]]) -> Any:
    """Ranges of x in which values are safe."""
    alt = altair()
    base = alt.Chart(data([{"from": low, "to": high} for low, high in ranges]))
    return base.mark_rect(opacity=0.12, color="#2ba37a", stroke="#2ba37a").encode(
        x="from:Q", x2="to:Q"
    )


def horizontal(value: float) -> Any:
    """A thin line at a value of y."""
    alt = altair()
    return (
        alt.Chart(data([{"at": value}]))
        .mark_rule(strokeDash=[3, 3], opacity=0.7)
        .encode(y=alt.Y("at:Q"))
    )


def point(x: float, y: float) -> Any:
    """A diamond at a place."""
    alt = altair()
    return (
        alt.Chart(data([{"x": x, "y": y}]))
        .mark_point(shape="diamond", size=130, filled=False, strokeWidth=2)
        .encode(x="x:Q", y="y:Q", color=alt.value(COLORS[5]))
    )


def bars(rows: Sequence[Row], title: str) -> Any:
    """A bar for each `name`, with its `value` written beside it."""
    alt = altair()
    order = [row["name"] for row in sorted(rows, key=lambda row: -row["value"])]
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("name:N", sort=order, title=None), x=alt.X("value:Q", title=title)
    )
    words = base.mark_text(align="left", dx=4).encode(text=alt.Text("value:Q", format=".2f"))
    return alt.layer(base.mark_bar(color=COLORS[0]), words).properties(
        height=max(48, 24 * len(rows))
    )


# Charts of layers: where a tensor is, on one axis.

INSIDE, OUTSIDE = "in", "out"


def depths_of(blocks: Sequence[int | None]) -> list[str]:
    """The columns of a map by depth: `in`, the blocks, `out`."""
    known = sorted({block for block in blocks if block is not None})
    return [INSIDE, *map(str, known), OUTSIDE]


def depth_of(block: int | None, module: str) -> str:
    """The column of a tensor: embeddings stand before the blocks, norms and heads after them.

    >>> depth_of(3, "mlp"), depth_of(None, "embedding"), depth_of(None, "head")
    ('3', 'in', 'out')
    """
    if block is not None:
        return str(block)
    return INSIDE if module in ("embedding", "norm") else OUTSIDE


KINDS = ("embedding", "norm", "q", "k", "v", "qkv", "q norm", "k norm", "o", "attention", "router",
         "gate", "up", "down", "mlp", "final_norm", "head", "other")  # fmt: skip


def kinds_of(kinds: Sequence[str]) -> list[str]:
    """Kinds of tensors in the order of the model."""
    found = list(dict.fromkeys(kinds))
    return sorted(found, key=lambda k: (KINDS.index(k) if k in KINDS else KINDS.index("down"), k))


def layer_map(depths: Sequence[str], kinds: Sequence[str]) -> Any:
    """A cell for each place of a tensor; the page fills the data set `cells` and the domain.

    Args:
        depths: Columns.
        kinds: Rows.
    """
    alt = altair()
    low, high = alt.param(name="low", value=0), alt.param(name="high", value=1)
    return (
        alt.Chart(alt.NamedData(name="cells"))
        .mark_rect(stroke="currentColor", strokeOpacity=0.12, strokeWidth=0.5)
        .encode(
            x=alt.X(
                "depth:O", sort=list(depths), title="block", scale=alt.Scale(domain=list(depths)),
                axis=alt.Axis(labelAngle=0, labelOverlap="greedy", labelSeparation=4),
            ),
            y=alt.Y("kind:O", sort=list(kinds), title=None, scale=alt.Scale(domain=list(kinds))),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(
                    scheme=SEQUENTIAL, domainMin=alt.ExprRef("low"), domainMax=alt.ExprRef("high"),
                    clamp=True, nice=False,
                ),
                legend=alt.Legend(title=None, orient="bottom", gradientLength=160, format=".3~g"),
            ),
            tooltip=[
                alt.Tooltip("about:N", title="layer"), alt.Tooltip("shown:N", title="value"),
                alt.Tooltip("similarity:N"), alt.Tooltip("ratio:N", title="ρ"),
                alt.Tooltip("cosine:N", title="c"), alt.Tooltip("weight:N"),
            ],
        )
        .add_params(low, high)
        .properties(height=20 * len(kinds))
    )  # fmt: skip


def depth_points(
    *, title: str, modules: Sequence[str], last: int, domain: tuple[float, float] | None = None
) -> Any:
    """A value of each layer against depth, by module; after figure 5 of arXiv:2502.20186.

    Args:
        title: Of the value.
        modules: Colors, in their order.
        last: The last block; what comes before and after the blocks stands beside them.
        domain: Of the value; None: by the data.
    """
    alt = altair()
    rows = alt.NamedData(name="points")
    names = f"datum.value < 0 ? '{INSIDE}' : datum.value > {last} ? '{OUTSIDE}' : datum.label"
    scale = alt.Scale(domain=[-1.5, last + 1.5], nice=False)
    base = alt.Chart(rows).encode(
        x=alt.X("place:Q", title="block", scale=scale,
                axis=alt.Axis(labelExpr=names, tickMinStep=1, grid=False)),
        color=alt.Color("module:N", scale=colors(modules),
                        legend=alt.Legend(title=None, orient="top", columns=4)),
    )  # fmt: skip
    reach = alt.Undefined if domain is None else list(domain)
    up = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False, domain=reach))
    dots = base.mark_point(filled=True, opacity=0.75).encode(
        y=up,
        size=alt.Size("norm:Q", scale=alt.Scale(range=[14, 130]), legend=None),
        tooltip=[
            alt.Tooltip("layer:N"), alt.Tooltip("value:Q", title=title, format=".4~g"),
            alt.Tooltip("norm:Q", title="‖τ‖", format=".4~g"),
        ],
    )  # fmt: skip
    means = base.mark_line(strokeWidth=1.2, opacity=0.6).transform_filter(
        f"datum.place >= 0 && datum.place <= {last}"
    ).encode(y=alt.Y("mean(value):Q"))  # fmt: skip
    return alt.layer(dots, means).properties(height=HEIGHT)
