"""`taskvec verify OUT`: check a merged folder against its manifest."""

from __future__ import annotations

from dataclasses import asdict

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb
from taskvec.cli.options import THREADS
from taskvec.cli.printing import answer, show
from taskvec.cli.progress import Bars


def run(args: Arguments) -> int:
    """Run this verb: 0 all the same, 1 something differs, 3 something could not be checked."""
    from taskvec.outputs.verify import verify
    from taskvec.statistics.collect import describe

    checks = verify(
        args.folder,
        inputs=args.inputs,
        replay=args.replay,
        threads=args.threads,
        progress=Bars(args, name=str(args.folder)),
    )
    outcomes = {check.outcome for check in checks}
    if args.json:
        answer([asdict(check) for check in checks])
    else:
        rows = [(describe(c.what), c.outcome, c.detail) for c in checks]
        show(rows, ("checked", "outcome", ""))
    return 1 if "different" in outcomes else 3 if "absent" in outcomes else 0


VERB = Verb(
    "verify", run, [
        Argument("folder", metavar="OUT", help="folder that taskvec wrote"),
        Option("--inputs/--no-inputs", default=True, help="read the members too"),
        Option("--replay", is_flag=True, help="repeat the merge and compare; writes nothing"),
        THREADS, JSON,
    ],
    streams=True,
    page="[What the outcomes mean](../how-to/reproduce-and-verify.md). Exit code 1: something "
    "differs;\n3: something could not be checked. `--json` has what, outcome and detail of every "
    "check.",
)  # fmt: skip
