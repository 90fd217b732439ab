"""Rows of results as pandas DataFrames, as CSV, and as HTML for notebooks."""

from __future__ import annotations

import csv
import io
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


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV with a head."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def html_table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """The first rows of a table for a notebook."""

    def line(cells: Iterable[object], tag: str) -> str:
        text = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in text) + "</tr>"

    body = [line(row.values(), "td") for row in rows[:SHOWN]]
    head = [line(rows[0], "th")] if rows else []
    more = f" (first {SHOWN} of {len(rows)} rows)" if len(rows) > SHOWN else ""
    return f"<table><caption>{escape(caption + more)}</caption>{''.join(head + body)}</table>"
