"""Sections of a report: words, charts and tables as data, which the page and Markdown both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.evaluation.intervals import Figure, span
from taskvec.reporting.charts import Spec
from taskvec.reporting.document import FigureData

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph.

    Attributes:
        text: Plain text.
        is_lead: Whether it is the statement that a reader should take away.
    """

    text: str
    is_lead: bool = False


@dataclass(frozen=True, slots=True)
class Chip:
    """A short warning that leads to a place of the page."""

    text: str
    place: str


@dataclass(frozen=True, slots=True)
class Chips:
    """Warnings."""

    chips: Sequence[Chip]


@dataclass(frozen=True, slots=True)
class Code:
    """A text to copy, such as a command or a recipe."""

    title: str
    text: str
    is_long: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart.

    Attributes:
        title: Above it.
        spec: Vega-Lite.
        about: What it shows, below it and for screen readers.
    """

    title: str
    spec: Spec
    about: str = ""


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts side by side where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True, slots=True)
class TableBlock:
    """A table; cells that are numbers stand to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Live:
    """A part that the page's script fills.

    Attributes:
        kind: `layers`, `scores` or `samples`.
        config: What the script needs besides the document.
        specs: Charts by name.
    """

    kind: str
    config: Mapping[str, Any]
    specs: Mapping[str, Spec] = field(default_factory=dict)


Block = Words | Chips | Code | Charts | TableBlock | Live


@dataclass(frozen=True, slots=True)
class ReportSection:
    """A section of the page.

    Attributes:
        id: Its anchor.
        title: Heading.
        blocks: Its content, in order.
    """

    id: str
    title: str
    blocks: Sequence[Block]


def figure_data(saved: Mapping[str, Any]) -> FigureData:
    """A figure of a JSON object, which may say more."""
    return FigureData(**{key: saved[key] for key in ("value", "interval", "n")})


def figure_of(data: FigureData | Mapping[str, Any]) -> Figure:
    """A figure from its data; null is NaN."""
    value, interval, n = (
        (data.value, data.interval, data.n)
        if isinstance(data, FigureData)
        else (data["value"], data["interval"], data["n"])
    )
    nan = float("nan")
    low, high = (nan if x is None else x for x in interval)
    return Figure(nan if value is None else value, low, high, n)


def shown(data: FigureData | Mapping[str, Any] | None, sign: str = "") -> str:
    """A figure with its interval, or a dash."""
    return "–" if data is None else span(figure_of(data), sign)


def interval_row(name: str, data: FigureData | Mapping[str, Any], sign: str = "") -> dict[str, Any]:
    """A row for `charts.intervals`."""
    figure = data if isinstance(data, FigureData) else figure_data(data)
    return {
        "name": name,
        "value": figure.value,
        "low": figure.interval[0],
        "high": figure.interval[1],
        "label": f"{shown(figure, sign)}, n = {figure.n:,}",
    }


def place_name(path: str) -> str:
    """What a file is called in titles: its folder and name."""
    parts = Path(path).parts
    return "/".join(parts[-2:])


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"]), listed(["a"])
    ('a, b and c', 'a')
    """
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
