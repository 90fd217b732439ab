"""`taskvec clean DIR`: what killed runs have left."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb
from taskvec.cli.printing import answer


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec.outputs.leftovers import clean, leftovers

    folder = Path(args.folder)
    found = leftovers(folder) if args.dry_run else clean(folder)
    if args.json:
        answer([asdict(left) | {"path": str(left.path)} for left in found])
        return 0
    for left in found:
        done = "would remove" if args.dry_run else "removed"
        if left.kind == "old output" and (args.dry_run or not left.path.exists()):
            done = "would restore or remove" if args.dry_run else "restored or removed"
        print(f"{done} {left}")
    if not found:
        print(f"{folder}: nothing is left of earlier runs")
    return 0


VERB = Verb(
    "clean", run, [
        Argument("folder", metavar="DIR", help="folder that outputs were written to"),
        Option("--dry-run", is_flag=True, help="list only; remove nothing"),
        JSON,
    ],
    page="""\
Removes half-written outputs (`.OUT.taskvec`), locks and drafts that no run holds. An old output
(`.OUT.taskvec-old`) is put back where its place is empty. Outputs themselves are never touched.
`--json` has path, of, kind, nbytes and age_s.""",
)  # fmt: skip
