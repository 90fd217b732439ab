"""`taskvec methods [NAME]`: the methods and their parameters."""

from __future__ import annotations

import argparse
import json

from taskvec.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="only this one")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    from taskvec.methods import METHODS, find_method

    chosen = [find_method(args.name)] if args.name else list(METHODS.values())
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "name": m.name,
                        "summary": m.summary,
                        "formula": m.formula,
                        "source": m.source,
                        "needs_base": m.needs_base,
                        "needs_anchor": m.needs_anchor,
                        "default_scale": m.default_scale,
                        "negative_scale": m.takes_negative_scale,
                        "table": m.takes_table,
                        "alignment": m.alignment,
                        "parameters": [
                            {"name": p.name, "default": p.default, "range": p.range, "help": p.help}
                            for p in m.parameters
                        ],
                    }
                    for m in chosen
                ]
            )
        )
        return 0
    for method in chosen:
        needs = ["base"] if method.needs_base else []
        needs += ["instruct (or anchor)"] if method.needs_anchor else []
        scale = "required" if method.default_scale is None else f"default {method.default_scale:g}"
        print(f"{method.name}: {method.summary}")
        print(f"  {method.formula}    {method.source}")
        print(f"  needs {' and '.join([*needs, 'tasks'])}; scale {scale}", end="")
        print(", may be negative" if method.takes_negative_scale else ", not negative")
        if method.parameters:
            common.show(
                [(f"  {p.name}", p.default, p.range, p.help) for p in method.parameters],
                ("  parameter", "default", "range", ""),
            )
        print()
    return 0
