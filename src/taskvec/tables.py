"""Rows of results as pandas DataFrames and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from taskvec.extras import require

SHOWN = 20  # rows in a notebook


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A `pandas.DataFrame`.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    return require("pandas", "report").DataFrame(list(rows))


def html_table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """The first rows of a table for a notebook."""

    def line(cells: Iterable[object], tag: str) -> str:
        text = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in text) + "</tr>"

    body = [line(row.values(), "td") for row in rows[:SHOWN]]
    head = [line(rows[0], "th")] if rows else []
    more = f" (first {SHOWN} of {len(rows)} rows)" if len(rows) > SHOWN else ""
    return f"<table><caption>{escape(caption + more)}</caption>{''.join(head + body)}</table>"
