"""`taskvec scan RECIPE`: read the weights of a family once; show every layer."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.family.members import Members
    from taskvec.recipes.recipe import Recipe
    from taskvec.statistics.scan import Scan

COLUMNS = ("similarity", "rank", "norm_ratio", "task_cosine", "linear", "logarithmic", "threshold",
           "task_norm", "instruction_norm")  # fmt: skip
HEADS = (
    "layer",
    "module",
    "elements",
    "similarity",
    "rank",
    "ρ",
    "c",
    "linear",
    "log",
    "≤ σ",
    "‖τ‖",
    "‖τ_instr‖",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="recipe; or give --task and roles"
    )
    common.add_family(parser)
    common.add_running(parser)
    group = parser.add_argument_group("what to show")
    group.add_argument(
        "--sort", choices=("name", "similarity"), default="name", help="order of the layers"
    )
    group.add_argument("--json", action="store_true", help="rows and summary as JSON")
    group.add_argument(
        "--csv", metavar="FILE", help="write the rows as CSV (- for standard output)"
    )
    group.add_argument(
        "--plot", metavar="FILE", help="draw similarity against depth (PNG, SVG or PDF)"
    )
    group.add_argument(
        "--save-table", metavar="FILE", help="write the method's table (CSV, or JSON by its name)"
    )
    group.add_argument(
        "--save-scan", metavar="FILE", help="write the statistics that all this follows from (JSON)"
    )


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    if args.json and args.csv == "-":
        raise UsageError("--json and --csv - both write to standard output; give --csv a file")
    from taskvec.merging.prepare import open_with_base
    from taskvec.merging.scans import save_scan, scan_members

    if args.plot:
        from taskvec.reporting.figures import check_figure

        check_figure(Path(args.plot))
    method = {"name": "lata"}
    recipe = common.recipe_from(args, args.recipe, needs_scales=False, method=method)
    if args.save_table and recipe.method.needs_base and recipe.family.base is None:
        raise UsageError(f"base is missing: the table of {recipe.method.name} rests on it")
    options = common.options_from(args)
    members = open_with_base(recipe, options)
    scan = scan_members(members, options)
    if args.save_scan:
        with common.writing(args.save_scan):
            save_scan(scan, Path(args.save_scan))
    result = _result(recipe, scan)
    if not scan.has_base:
        result["warnings"].append(
            "no base is given: similarity to instruction tuning cannot be known"
        )
    if args.save_table:
        _save_table(recipe, members, scan, Path(args.save_table))
    if args.csv:
        _write_csv(result["layers"], args.csv)
    if args.plot:
        from taskvec.reporting.figures import draw_similarity

        draw_similarity(result, Path(args.plot))
    common.warn([*members.warnings, *result["warnings"]])
    if args.json:
        print(json.dumps(result))
    elif args.csv != "-":
        _print(result, args.sort)
    return 0


def _result(recipe: Recipe, scan: Scan) -> dict[str, Any]:
    from taskvec.merging.layer_report import summary, weighed_rows

    parameters = [recipe.parameters[task] for task in scan.tasks]
    granularity = parameters[0].get("granularity", "tensor")
    threshold = parameters[0].get("threshold", 0.95)
    for name, value in (("granularity", granularity), ("threshold", threshold)):
        if any(p.get(name, value) != value for p in parameters):
            raise UsageError(f"tasks differ in {name}; scan them one by one, or give one --{name}")
    warnings = []
    if scan.has_base and recipe.method.name == "lata":
        from taskvec.methods.lata import lata

        warnings = list(lata(scan, per_task=recipe.parameters).warnings)
    return {
        "granularity": granularity,
        "threshold": threshold,
        "layers": weighed_rows(scan, granularity, threshold),
        "summary": summary(scan, granularity, threshold),
        "other": [n for n, key in zip(scan.names, scan.keys, strict=True) if key.module == "other"],
        "members": {
            role: {"path": m.path, "fingerprint": m.fingerprint} for role, m in scan.members.items()
        },
        "warnings": warnings,
    }


def _save_table(recipe: Recipe, members: Members, scan: Scan, path: Path) -> None:
    from taskvec.merging.decide import inputs_of
    from taskvec.methods.table import Table

    scaled = recipe.with_scales(dict.fromkeys(scan.tasks, 1.0) | recipe.scales)
    table = recipe.method.decide(inputs_of(scaled, members, scan=scan))
    if not isinstance(table, Table):
        raise UsageError(f"the table of {recipe.method.name} rests on more than a scan")
    with common.writing(path):
        table.save(path)


def _write_csv(rows: list[dict[str, Any]], path: str) -> None:
    if path == "-":
        _rows_to(sys.stdout, rows)
        return
    from taskvec.files import write_whole

    text = io.StringIO(newline="")
    _rows_to(text, rows)
    with common.writing(path):
        write_whole(Path(path), text.getvalue().encode())


def _rows_to(file: Any, rows: list[dict[str, Any]]) -> None:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _print(result: dict[str, Any], order: str) -> None:
    granularity = result["granularity"]
    for task, about in result["summary"]["tasks"].items():
        rows = [row for row in result["layers"] if row["task"] == task]
        if order == "similarity":
            rows.sort(key=lambda row: (row["similarity"] is None, -(row["similarity"] or 0)))
        print(f"task {task}, by {granularity}")
        common.show(
            [
                (
                    r["layer"],
                    r["module"] or "block",
                    r["elements"],
                    *(_rank(c, r[c]) for c in COLUMNS),
                )
                for r in rows
            ],
            HEADS,
        )
        print()
        if about["quantiles"] is not None:
            spread = ", ".join(f"{name} {value:.4f}" for name, value in about["quantiles"].items())
            print(f"  similarity  {spread}")
            print(
                f"  σ = {result['threshold']:g}    keeps {about['kept_layers']:.1%} of the layers, "
                f"{about['kept_parameters']:.1%} of the parameters"
            )
        if about["norm_ratio"] is not None and about["task_cosine"] is not None:
            print(f"  whole model ρ = {about['norm_ratio']:.4f}, c = {about['task_cosine']:.4f}")
        print()
    tasks = list(result["summary"]["tasks"])
    if len(tasks) > 1:
        matrix = result["summary"]["rank_correlation"]
        print("rank correlation (Spearman) of similarity between tasks")
        common.show([(a, *(matrix[a][b] for b in tasks)) for a in tasks], ("", *tasks))
        print()
        for pair, share in result["summary"]["sign_conflict"].items():
            if share is not None:
                print(f"sign conflict {pair}: {share:.1%} of the elements that both changed")
    if result["other"]:
        print(f"not recognised by name, layers of their own: {', '.join(result['other'])}")


def _rank(column: str, value: Any) -> Any:
    """Ranks without decimals, unless they are shared."""
    return (
        int(value)
        if column in ("rank", "threshold") and value is not None and value == int(value)
        else value
    )
