"""`taskvec report PATH…`: everything that was measured, on one page."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb, misuse
from taskvec.cli.printing import answer
from taskvec.cli.streams import say, warn
from taskvec.errors import TaskvecError

if TYPE_CHECKING:
    from taskvec.reporting.api import Report

OUT = "report.html"
EVERY = 2.0  # seconds between two looks at the files


def run(args: Arguments) -> int:
    """Run this verb."""
    if not args.paths:
        misuse("PATH is missing: give files or folders that taskvec wrote")
    out = Path(args.out or (OUT if args.format is None else f"report.{args.format}"))
    found = _write(args, out)
    if args.open:
        click.launch(out.resolve().as_uri())
    if args.json:
        answer({"out": str(out), "sections": [s.title for s in found.sections],
                "sources": found.document.sources, "notes": found.document.notes})  # fmt: skip
    else:
        print(f"{out}: {', '.join(section.title for section in found.sections)}")
    if args.watch:
        _watch(args, out)
    return 0


def _write(args: Arguments, out: Path) -> Report:
    from taskvec.reporting.api import report

    found = report(list(args.paths), refreshes=EVERY * 2 if args.watch else None)
    found.save(out, args.format)
    warn(found.document.notes)
    return found


def _watch(args: Arguments, out: Path) -> None:
    """Write the page again whenever a file changes, until the user interrupts."""
    say("watching for changes; Ctrl-C ends")
    before = _state(args.paths)
    while True:
        time.sleep(EVERY)
        now = _state(args.paths)
        if now == before:
            continue
        before = now
        try:
            _write(args, out)
        except TaskvecError as error:  # such as a file that is being written
            say(f"not written again: {error}")


def _state(paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Size and time of every file that a report may read."""
    from taskvec.reporting.collect import watched

    found = {}
    for path in watched(paths):
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            continue
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


VERB = Verb(
    "report", run, [
        Argument("paths", nargs=-1, metavar="PATH…",
                 help="files or folders: a scan, a merged folder, a table, or what eval, search, "
                 "sweep, pairs, fit, disentangle and finetune wrote"),
        Option("-o", "--out", type=click.Path(), metavar="FILE", heading="Output",
               show_default=OUT, help="file to write"),
        Option("--format", heading="Output", words=("html", "json", "md"),
               show_default="by the name of the file",
               help="the page, its data, or a table and two figures for a model card"),
        Option("--open", is_flag=True, heading="Output", help="open the page in the browser"),
        Option("--watch", is_flag=True, heading="Output",
               help="write the page again whenever a file changes"),
        JSON,
    ],
    extra="report",
    page="""\
Writes one self-contained HTML file about everything that lies under the paths;
[how](../how-to/report.md). A merged folder brings the scan of its family from the cache.
`--json` prints the file, its sections and what was read; `--format json` writes the data.""",
)  # fmt: skip
