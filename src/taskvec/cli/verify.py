"""`taskvec verify OUT`: check a merged folder against its manifest."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from taskvec.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument("folder", metavar="OUT", help="folder that taskvec wrote")
    parser.add_argument("--no-inputs", action="store_true", help="do not read the members")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="work out the merge again and compare (writes nothing)",
    )
    parser.add_argument(
        "--threads", type=common._positive, metavar="N", help="default: the processors, at most 8"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="the checks as JSON")


def run(args: argparse.Namespace) -> int:
    """Run this verb: 0 all the same, 1 something differs, 3 something could not be checked."""
    from taskvec.outputs.verify import verify
    from taskvec.statistics.collect import describe

    checks = verify(
        args.folder,
        inputs=not args.no_inputs,
        replay=args.replay,
        threads=args.threads,
        progress=common.progress_for(args),
    )
    outcomes = {check.outcome for check in checks}
    if args.json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        common.show(
            [(describe(c.what), c.outcome, c.detail) for c in checks], ("checked", "outcome", "")
        )
    return 1 if "different" in outcomes else 3 if "absent" in outcomes else 0
