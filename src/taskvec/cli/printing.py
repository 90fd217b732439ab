"""What verbs print: tables, JSON, sizes, and errors about files they write."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from taskvec.cli.streams import is_terminal, say
from taskvec.errors import OutputError


def answer(result: Any) -> None:
    """Print a result as one line of JSON."""
    print(json.dumps(result, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))


def show(rows: Sequence[Sequence[object]], head: Sequence[str], file: TextIO | None = None) -> None:
    """Print a table with aligned columns; numbers to the right.

    On a terminal the table fits its width, and long cells wrap. Elsewhere, as in a pipe or a file,
    a row is a line.
    """
    file = file or sys.stdout
    cells = [[_cell(value) for value in row] for row in rows]
    right = [
        all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(head))
    ]
    if is_terminal(file):
        _show_fitting(cells, head, right, file)
        return
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    for line in [list(head), *cells]:
        fields = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        ]
        print("  ".join(fields).rstrip(), file=file)


def _show_fitting(
    cells: Sequence[Sequence[str]], head: Sequence[str], right: Sequence[bool], file: TextIO
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, is_number in zip(head, right, strict=True):
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(file=file, highlight=False).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def gigabytes(count: int) -> str:
    """Bytes for people.

    >>> gigabytes(2_500_000_000), gigabytes(1_200_000), gigabytes(900)
    ('2.50 GB', '1.20 MB', '900 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise what the system says about writing a file as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file, or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    from taskvec.files import write_whole

    with writing(path):
        write_whole(Path(path), text.encode())


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
