"""`taskvec sweep RECIPE`: what one number does, value by value, and where it is safe."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import evaluating
from taskvec.cli.commands import JSON, Arguments, Option, Verb, misuse
from taskvec.cli.options import FAMILY, RECIPE
from taskvec.cli.printing import announce_compiling, answer, show
from taskvec.cli.recipe import recipe_only
from taskvec.cli.search import OUT, PLOT, SEARCH_HEAD
from taskvec.cli.streams import warn
from taskvec.tables import csv_text

if TYPE_CHECKING:
    from taskvec.coefficients.sensitivity import Point, Sensitivity
    from taskvec.recipes.recipe import Recipe


def run(args: Arguments) -> int:
    """Run this verb."""
    if len(args.vary) != 1:
        misuse("--vary is missing or given twice; a sweep varies one number")
    recipe = recipe_only(args, args.recipe, needs_scales=False)

    from taskvec.coefficients.sensitivity import measure_sweep
    from taskvec.coefficients.sweeps import parse_sweep

    if args.plot:
        from taskvec.reporting.figures import check_figure

        check_figure(Path("sweep.svg"))
    sweep = parse_sweep(args.vary[0])
    asking = evaluating.keywords_from(args, recipe.seed, limit=args.limit)
    announce_compiling()
    found = measure_sweep(recipe, sweep, measure=args.measure, minimize=args.minimize, **asking)
    record, name = found.to_json(), f"sweep-{sweep.label}"
    write(Path(args.out) / name, record, rows(record), recipe)
    if args.plot:
        from taskvec.reporting.figures import draw_sensitivity

        about = {**record, "recipe": recipe.to_dict()}
        draw_sensitivity(about, Path(args.out) / f"{name}.svg")
    if args.json:
        answer(record)
    else:
        _print(found, record)
        print(files(args, name))
    return 0


def files(args: Arguments, name: str) -> str:
    """Where what was found lies, in words."""
    drawn = [f"{name}.svg"] if args.plot else []
    return f"{args.out}/: {', '.join([f'{name}.json', f'{name}.csv', *drawn])}"


def write(
    path: Path, record: Mapping[str, Any], table: Sequence[Mapping[str, Any]], recipe: Recipe
) -> None:
    """Write what was found as JSON, with recipe and versions, and as CSV.

    Args:
        path: Without an ending.
        record: JSON types.
        table: Rows with the same keys.
        recipe: As it was given.

    Raises:
        OutputError: they cannot be written.
    """
    from taskvec.evaluation.results import about
    from taskvec.files import write_text

    everything = {**record, "recipe": recipe.to_dict(), **about()}
    text = json.dumps(everything, indent=1, ensure_ascii=False)
    write_text(path.with_name(path.name + ".json"), text + "\n")
    write_text(path.with_name(path.name + ".csv"), csv_text(table))


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each value; `kept` columns are by task, the others by measure."""
    kept = sorted({task for point in record["points"] for task in point["kept"]})
    found = []
    for point in record["points"]:
        row = {record["sweep"]: point["value"]}
        for task in kept:
            shares = point["kept"].get(task, {})
            row |= {f"kept_{name} {task}": shares.get(name) for name in _SHARES}
        for key in record["measures"]:
            score = point["scores"].get(key)
            row |= figure_columns(key, score)
            row |= figure_columns(f"less_recipe {key}", score and score["less_recipe"])
            row |= figure_columns(f"less_best {key}", score and score["less_best"])
        found.append(row | {"safe": point["safe"], "error": point["error"] or ""})
    return found


_SHARES = ("layers", "parameters", "energy")


def figure_columns(name: str, figure: Mapping[str, Any] | None) -> dict[str, Any]:
    """Value and interval of a figure as columns; empty where there is none."""
    value, (low, high) = (figure["value"], figure["interval"]) if figure else (None, (None, None))
    return {name: value, f"{name} low": low, f"{name} high": high}


def _print(found: Sensitivity, record: Mapping[str, Any]) -> None:
    from taskvec.evaluation.intervals import span

    label, measures = found.sweep.label, found.measures
    for key, measure in measures.items():
        about = record["measures"][key]
        print(
            f"{key}: {measure.metric.name}, {about['wanted']} is wanted; n = {about['n']:,}, "
            f"seed {about['seed']}; the recipe as it is has "
            f"{span(measure.recipe.figures[measure.metric.name])}"
        )
    tasks = sorted({task for point in found.points for task in point.kept})
    head = [label, *(f"kept of {task}" for task in tasks)]
    for key in measures:
        head += [key, "Δ vs recipe", "worse"]
    table = []
    for point in found.points:
        line: list[Any] = [f"{point.value:g}", *(_kept_text(point, task) for task in tasks)]
        for key in measures:
            score = point.scores.get(key)
            line += (
                ["–", "–", ""]
                if score is None
                else [span(score.figure), span(score.less_recipe, "+"), "*" * score.is_worse]
            )
        table.append(line)
    show(table, head)
    if tasks:
        print(_kept_about(found))
    print()
    if measures:
        print(textwrap.fill(_verdict(found), 100))
    errors = [f"{label} = {p.value:g} failed: {p.error}" for p in found.points if p.error]
    warn(errors)


def _kept_text(point: Point, task: str) -> str:
    """Shares of layers, parameters and ‖τ‖², as far as they are known."""
    kept = point.kept.get(task)
    if kept is None:
        return "–"
    shares = (kept.layers, kept.parameters, kept.energy)
    return " ".join(f"{share:.2%}" for share in shares if share is not None)


def _kept_about(found: Sensitivity) -> str:
    if any(kept.layers is not None for point in found.points for kept in point.kept.values()):
        return "kept: shares of layers, of parameters and of ‖τ‖²"
    return "kept: share of parameters"


def _verdict(found: Sensitivity) -> str:
    """The safe range in words."""
    label, values = found.sweep.label, sorted(found.sweep.values)
    meaning = (
        "no measure is worse than at its best value by more than the paired 95 % interval (* marks "
        "where one is)"
    )
    if not found.safe:
        fewest = min(
            (point for point in found.points if point.scores),
            key=lambda p: sum(score.is_worse for score in p.scores.values()),
            default=None,
        )
        if fewest is None:
            return f"Every value of {label} failed."
        worse = ", ".join(key for key, score in fewest.scores.items() if score.is_worse)
        return (
            f"No value of {label} is safe, that is, none where {meaning}. Closest: "
            f"{fewest.value:g}, where only {worse} is worse."
        )
    first, last = found.safe[0]
    count = sum(first <= value <= last for value in values)
    text = (
        f"Safe range of {label}: {_range(first, last)}, {count} of {len(values)} values. In it "
        f"{meaning}."
    )
    ends = [f"{end:g}" for end, edge in ((first, values[0]), (last, values[-1])) if end == edge]
    if ends:
        text += f" It reaches the end of the sweep at {' and at '.join(ends)}."
    others = ", ".join(_range(low, high) for low, high in found.safe[1:])
    return text + (f" Safe as well: {others}." if others else "")


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


MEASURE_HEAD = "What is measured"
MEASURE = Option(
    "--measure", metavar="TASK", multiple=True, heading=MEASURE_HEAD,
    help="TASK or TASK@METRIC of `taskvec eval --list`; repeatable",
)  # fmt: skip

VERB = Verb(
    "sweep", run, [
        RECIPE,
        Option("--vary", metavar="NAME[.TASK]=VALUES", multiple=True, heading=SEARCH_HEAD,
               help="one number and its values: threshold=0.5:1:0.05, density=0.001:1:7log, "
               "scale.math=0.5,1"),
        MEASURE,
        Option("--minimize", metavar="TASK", multiple=True, heading=MEASURE_HEAD,
               help="the same, where low is wanted; repeatable"),
        evaluating.LIMIT,
        evaluating.out_option(OUT, "sweep-NAME.json and .csv, and records"), PLOT,
        *evaluating.DATA, *evaluating.ASKING, *evaluating.SCORING, *FAMILY, JSON,
    ],
    extra="search",
    page="""\
Tries values of one number and says in which range no measure gets worse;
[how](../how-to/sensitivity.md). Without a measure it shows what is kept of each task. `--seed` is
also that of samples and intervals.""",
)  # fmt: skip
