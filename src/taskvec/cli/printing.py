"""What verbs print: tables, JSON, sizes, and errors about files they write."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from textwrap import wrap
from typing import Any, TextIO

from taskvec.cli.streams import is_terminal, say

NARROW = 12  # of a column of texts on a narrow terminal


def answer(result: Any) -> None:
    """Print a result as one line of JSON."""
    print(json.dumps(result, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))


def show(rows: Sequence[Sequence[object]], head: Sequence[str], file: TextIO | None = None) -> None:
    """Print a table with aligned columns; numbers to the right.

    On a terminal the table fits its width: long texts wrap, numbers never do, and columns that do
    not fit follow in a second table. Elsewhere, as in a pipe or a file, a row is a line.
    """
    file = file or sys.stdout
    cells = [[_cell(value) for value in row] for row in rows]
    columns = [_column(name, [row[i] for row in cells]) for i, name in enumerate(head)]
    if is_terminal(file):
        _show_fitting(columns, file)
        return
    for line in range(-1, len(cells)):
        fields = [column.justified(line) for column in columns]
        print("  ".join(fields).rstrip(), file=file)


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table."""

    head: str
    cells: list[str]
    is_number: bool
    is_whole: bool  # never wraps

    @property
    def width(self) -> int:
        """Of the widest cell."""
        return max(map(len, self.cells), default=0)

    @property
    def least(self) -> int:
        """The width below which it cannot be read."""
        word = max(map(len, self.head.split()), default=0)
        return max(word, self.width if self.is_whole else min(self.width, NARROW))

    def justified(self, line: int) -> str:
        """A cell, or the head for line -1, as wide as the column."""
        text, width = self.cells[line] if line >= 0 else self.head, max(self.width, len(self.head))
        return text.rjust(width) if self.is_number else text.ljust(width)


_NUMBER = r"[-+]?(\d[\d,.]*(e[-+]\d+)?|nan|inf)"
_AMOUNT = re.compile(rf"({_NUMBER}(%| [kMG]?B)?|–|)")
_FIGURE = re.compile(rf"({_NUMBER} \[{_NUMBER}, {_NUMBER}\]|{_AMOUNT.pattern})")


def _column(head: str, cells: list[str]) -> _Column:
    """A column of numbers, shares or sizes is to the right; with intervals, it does not wrap."""
    is_number, is_whole = (all(map(form.fullmatch, cells)) for form in (_AMOUNT, _FIGURE))
    return _Column(head, cells, is_number, is_whole)


def _show_fitting(columns: Sequence[_Column], file: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    fits = sum(max(c.width, len(c.head)) + 2 for c in columns) - 2 <= console.width
    for place, block in enumerate([columns] if fits else _blocks(columns, console.width)):
        if place:
            print(file=file)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for c in block:
            lines = [c.head] if fits else wrap(c.head, max(c.least, c.width)) or [""]
            table.add_column(
                Text("\n".join(lines)), justify="right" if c.is_number else "left",
                overflow="fold", no_wrap=c.is_whole, min_width=c.least,
            )  # fmt: skip
        for row in zip(*(c.cells for c in block), strict=True):
            table.add_row(*map(Text, row))
        console.print(table)


def _blocks(columns: Sequence[_Column], width: int) -> list[list[_Column]]:
    """Columns that fit side by side; the first one is repeated."""
    blocks, room = [[columns[0]]], width - columns[0].least
    for column in columns[1:]:
        if room < column.least + 2 and len(blocks[-1]) > 1:
            blocks.append([columns[0]])
            room = width - columns[0].least
        blocks[-1].append(column)
        room -= column.least + 2
    return blocks


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show_lines(lines: Sequence[tuple[str, str]]) -> None:
    """Print texts, each behind a label."""
    for label, text in lines:
        print(f"{label:<9} {text}")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names.

    >>> some(["a", "b", "c"], 2)
    'a, b …'
    """
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def gigabytes(count: int) -> str:
    """Bytes for people.

    >>> gigabytes(2_500_000_000), gigabytes(1_200_000), gigabytes(900)
    ('2.50 GB', '1.20 MB', '900 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


@cache
def announce_compiling() -> None:
    """Say why a first run waits, if it comes to that."""
    from taskvec.kernels.jit import when_compiling

    when_compiling(lambda: say("compiling kernels, once on this machine …"))


def show_factored(rows: Sequence[Mapping[str, Any]], lost: float) -> None:
    """What became of each tensor in an adapter, and how much of all it lacks."""
    cells = [(row["name"], row["kept"], row["rank"], row["norm"], row["error"]) for row in rows]
    show(cells, ("tensor", "kept as", "rank", "‖τ‖", "error"))
    print(f"\n{lost:.2%} of ‖τ‖² is not in the adapter (error {math.sqrt(lost):.2g})")
