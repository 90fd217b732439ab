"""`taskvec scan RECIPE`: read the weights of a family once; how every task relates to tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli.commands import JSON, Arguments, Option, Verb
from taskvec.cli.options import FAMILY, RECIPE, RUNNING
from taskvec.cli.printing import answer, show, some
from taskvec.cli.recipe import recipe_from, running
from taskvec.cli.streams import warn
from taskvec.errors import UsageError
from taskvec.files import write_whole, writing
from taskvec.tables import csv_text

if TYPE_CHECKING:
    from taskvec.family.members import Members
    from taskvec.methods.table import Table
    from taskvec.recipes.recipe import Recipe
    from taskvec.statistics.scan import Scan

Row = dict[str, Any]

# Columns of a row and their heads.
FULL = {
    "layer": "layer", "module": "module", "elements": "elements", "similarity": "similarity",
    "rank": "rank", "norm_ratio": "ρ", "task_cosine": "c", "linear": "linear",
    "logarithmic": "log", "threshold": "≤ σ", "task_norm": "‖τ‖", "instruction_norm": "‖τ_instr‖",
}  # fmt: skip


def run(args: Arguments) -> int:
    """Run this verb."""
    if args.json and args.csv == "-":
        raise UsageError("--json and --csv - both write to standard output; give --csv a file")
    from taskvec.merging.prepare import open_with_base
    from taskvec.merging.scans import save_scan, scan_members
    from taskvec.statistics.plausibility import role_warnings

    if args.plot:
        from taskvec.reporting.figures import check_figure

        check_figure(Path(args.plot))
    recipe = recipe_from(args, args.recipe, needs_scales=False, method={"name": "lata"})
    if args.save_table and recipe.method.needs_base and recipe.family.base is None:
        raise UsageError(f"base is missing: the table of {recipe.method.name} rests on it")
    options = running(args)
    members = open_with_base(recipe, options)
    scan = scan_members(members, options)
    if args.save_scan:
        with writing(args.save_scan):
            save_scan(scan, Path(args.save_scan))
    table = _table(recipe, scan)
    odd = dict.fromkeys([*role_warnings(scan), *(() if table is None else table.warnings)])
    result = _result(recipe, scan, list(odd))
    if args.save_table:
        _save_table(recipe, members, scan, Path(args.save_table))
    if args.csv:
        text = csv_text(result["layers"])
        if args.csv == "-":
            print(text, end="")
        else:
            with writing(args.csv):
                write_whole(Path(args.csv), text.encode())
    if args.plot:
        from taskvec.reporting.figures import draw_similarity

        draw_similarity(result, Path(args.plot), _scheme(recipe))
    warn([*members.warnings, *result["warnings"]])
    if args.json:
        answer(result)
    elif args.csv != "-":
        is_full = args.full or args.granularity is not None
        _print(result, _rows(args, result, scan, table, is_full=is_full), args.sort, is_full)
    return 0


def _table(recipe: Recipe, scan: Scan) -> Table | None:
    """LATA's table, where the recipe is one of LATA's."""
    if not scan.has_base or recipe.method.name != "lata":
        return None
    from taskvec.methods.lata import lata

    return lata(scan, per_task=recipe.parameters)


def _result(recipe: Recipe, scan: Scan, warnings: Sequence[str]) -> dict[str, Any]:
    from taskvec.merging.layer_report import summary, weighed_rows

    tasks = list(recipe.family.tasks)
    parameters = [recipe.parameters[task] for task in scan.tasks]
    granularity = parameters[0].get("granularity", "tensor")
    threshold = parameters[0].get("threshold", 0.95)
    for name, value in (("granularity", granularity), ("threshold", threshold)):
        if any(p.get(name, value) != value for p in parameters):
            raise UsageError(f"tasks differ in {name}; scan them one by one, or give one --{name}")
    none = "no base is given: similarity to instruction tuning cannot be known"
    return {
        "granularity": granularity,
        "threshold": threshold,
        "layers": _by_task(weighed_rows(scan, granularity, threshold), tasks),
        "summary": _summary_by_task(summary(scan, granularity, threshold), tasks),
        "other": [n for n, key in zip(scan.names, scan.keys, strict=True) if key.module == "other"],
        "members": {
            role: {"path": m.path, "fingerprint": m.fingerprint} for role, m in scan.members.items()
        },
        "warnings": [*warnings, *([] if scan.has_base else [none])],
    }


def _scheme(recipe: Recipe) -> str:
    """The scheme whose weights are drawn: that of the first task."""
    first = next(iter(recipe.parameters.values()))
    return str(first.get("scheme", "logarithmic"))


def _by_task(rows: list[Row], tasks: Sequence[str]) -> list[Row]:
    """Rows with tasks in the order of the recipe."""
    return sorted(rows, key=lambda row: tasks.index(row["task"]))


def _summary_by_task(summary: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    matrix = summary["rank_correlation"]
    return {
        **summary,
        "tasks": {task: summary["tasks"][task] for task in tasks},
        "rank_correlation": {a: {b: matrix[a][b] for b in tasks} for a in tasks},
    }


def _save_table(recipe: Recipe, members: Members, scan: Scan, path: Path) -> None:
    from taskvec.merging.decide import inputs_of
    from taskvec.methods.table import Table

    scaled = recipe.with_scales(dict.fromkeys(scan.tasks, 1.0) | recipe.scales)
    table = recipe.method.decide(inputs_of(scaled, members, scan=scan))
    if not isinstance(table, Table):
        raise UsageError(f"the table of {recipe.method.name} rests on more than a scan")
    with writing(path):
        table.save(path)


def _rows(
    args: Arguments, result: dict[str, Any], scan: Scan, table: Table | None, *, is_full: bool
) -> list[Row]:
    """The rows to print: as the method has its layers, or blocks with the mean of its weights."""
    if is_full:
        rows: list[Row] = result["layers"]
        return rows
    from taskvec.merging.layer_report import weighed_rows

    rows = weighed_rows(scan, "block", result["threshold"])
    if table is not None:
        layers = [key.at("block", name) for name, key in zip(scan.names, scan.keys, strict=True)]
        for row in rows:
            mine = [layer == row["layer"] for layer in layers]
            weights = table.weights[table.tasks.index(row["task"])][mine]
            row["weight"] = float((weights * scan.sizes[mine]).sum() / scan.sizes[mine].sum())
    return _by_task(rows, list(result["summary"]["tasks"]))


def _print(result: dict[str, Any], rows: list[Row], order: str, is_full: bool) -> None:
    tasks = list(result["summary"]["tasks"])
    _print_summary(result, tasks)
    if order == "similarity":
        rows = sorted(rows, key=lambda row: (row["similarity"] is None, -(row["similarity"] or 0)))
    if is_full:
        for task in tasks:
            print(f"\ntask {task}, by {result['granularity']}")
            show(
                [
                    [_cell(column, row[column]) for column in FULL]
                    for row in rows
                    if row["task"] == task
                ],
                list(FULL.values()),
            )
    else:
        print("\nby block (all columns: --full; other layers: --granularity tensor)")
        _print_blocks(rows, tasks)
    if result["other"]:
        names = f"{len(result['other'])}: {some(result['other'])}"
        print(f"\nnot recognized by name, layers of their own: {names}")


def _print_summary(result: dict[str, Any], tasks: Sequence[str]) -> None:
    """Each task in a line: its similarity, what σ keeps, ρ and c; then the tasks in pairs."""
    summary = result["summary"]
    quantiles = ("min", "25%", "50%", "75%", "max")
    lines = []
    for task in tasks:
        about = summary["tasks"][task]
        spread = about["quantiles"] or dict.fromkeys(quantiles)
        kept = [about["kept_layers"], about["kept_parameters"]]
        lines.append(
            [
                task,
                *(spread[q] for q in quantiles),
                *("–" if share is None else f"{share:.1%}" for share in kept),
                about["norm_ratio"],
                about["task_cosine"],
            ]
        )
    print(
        f"similarity to instruction tuning, by {result['granularity']}; σ = "
        f"{result['threshold']:g}; ρ and c: whole model"
    )
    show(lines, ("task", *quantiles, "layers ≤ σ", "params ≤ σ", "ρ", "c"))
    if len(tasks) < 2:
        return
    print("\nrank correlation (Spearman) of similarity between tasks")
    matrix = summary["rank_correlation"]
    show([(a, *(matrix[a][b] for b in tasks)) for a in tasks], ("", *tasks))
    conflicts = [
        f"{pair} {share:.1%}" for pair, share in summary["sign_conflict"].items()
        if share is not None
    ]  # fmt: skip
    if conflicts:
        print(f"sign conflict, of the elements that both change: {'; '.join(conflicts)}")


def _print_blocks(rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """A line a layer, with a group of columns for each task."""
    columns = {"similarity": "similarity", "norm_ratio": "ρ", "weight": "weight"}
    columns = {c: head for c, head in columns.items() if any(r.get(c) is not None for r in rows)}
    columns = columns or {"task_norm": "‖τ‖"}  # without a base
    by_layer: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], {})[row["task"]] = row
    lines = []
    for layer, found in by_layer.items():
        first: Mapping[str, Any] = next(iter(found.values()))
        cells = [found.get(task, {}).get(column) for task in tasks for column in columns]
        lines.append([layer, first["elements"], *cells])
    heads = [f"{task} {head}" if len(tasks) > 1 else head for task in tasks
             for head in columns.values()]  # fmt: skip
    show(lines, ("layer", "elements", *heads))


def _cell(column: str, value: Any) -> Any:
    """Ranks without decimals, unless they are shared; blocks have no module."""
    if column == "module":
        return value or "block"
    is_whole = column in ("rank", "threshold") and value is not None and value == int(value)
    return int(value) if is_whole else value


SHOW_HEAD = "What to show"
VERB = Verb(
    "scan", run, [
        RECIPE,
        Option("--full", is_flag=True, heading=SHOW_HEAD,
               help="every layer as the method sees it, and all columns; also with --granularity"),
        Option("--sort", type=click.Choice(("model", "similarity")), default="model",
               heading=SHOW_HEAD, help="order of the layers"),
        Option("--csv", metavar="FILE", type=click.Path(), heading=SHOW_HEAD,
               help="write the rows as CSV; - prints them instead of the tables"),
        Option("--plot", metavar="FILE", type=click.Path(), heading=SHOW_HEAD,
               help="draw similarity and weights against depth (SVG, PNG or PDF); needs the extra "
               "report"),
        Option("--save-table", metavar="FILE", type=click.Path(), heading=SHOW_HEAD,
               help="write the method's table (CSV, or JSON by its name)"),
        Option("--save-scan", metavar="FILE", type=click.Path(), heading=SHOW_HEAD,
               help="write the statistics that all this follows from (JSON)"),
        *FAMILY, *RUNNING, JSON,
    ],
    streams=True,
    page="""\
Prints each task's summary, then its blocks in the order of the model; [how to read
it](../how-to/choose-weights.md#read-the-scan). `weight` is the mean of LATA's weights over the
parameters of a block. Scales are not needed, and the method is `lata` where none is named.
[What `--json` prints](files.md#what-scan---json-prints).""",
)  # fmt: skip
