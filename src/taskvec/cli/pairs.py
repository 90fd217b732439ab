"""`taskvec pairs RECIPE`: what each task of a recipe does to each other in a merge."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import evaluating
from taskvec.cli.commands import JSON, Arguments, Option, Verb, pairs_of
from taskvec.cli.options import FAMILY, RECIPE
from taskvec.cli.printing import announce_compiling, answer, show
from taskvec.cli.recipe import recipe_only
from taskvec.cli.search import OUT, PLOT
from taskvec.cli.streams import warn
from taskvec.cli.sweep import MEASURE_HEAD, figure_columns, files, write

if TYPE_CHECKING:
    from taskvec.coefficients.pairs import Effect, Pair, Pairs
    from taskvec.evaluation.intervals import Figure

GEOMETRY = ("cosine", "pure_cosine", "sign_conflict", "rank_correlation")


def run(args: Arguments) -> int:
    """Run this verb."""
    recipe = recipe_only(args, args.recipe, needs_scales=False)

    from taskvec.coefficients.pairs import measure_pairs

    if args.plot:
        from taskvec.reporting.figures import check_figure

        check_figure(Path("pairs.svg"))
    measure = pairs_of(args.measure, "--measure", "TASK=MEASURE")
    asking = evaluating.keywords_from(args, recipe.seed, limit=args.limit)
    announce_compiling()
    found = measure_pairs(recipe, measure, **asking)
    record = found.to_json()
    write(Path(args.out) / "pairs", record, rows(record), recipe)
    if args.plot:
        from taskvec.reporting.figures import draw_pairs

        draw_pairs(record, Path(args.out) / "pairs.svg")
    if args.json:
        answer(record)
    else:
        _print(found)
        print(files(args, "pairs"))
    return 0


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two rows a pair, one for each task."""
    found = []
    for pair in record["pairs"]:
        for task in pair["tasks"]:
            (partner,) = set(pair["tasks"]) - {task}
            alone, effect = record["tasks"][task], pair["effects"].get(task)
            row = {"task": task, "with": partner, "measure": alone["measure"], "n": alone["n"]}
            for name in ("target", "single", "tuned"):
                row |= figure_columns(name, alone[name])
            for name in ("merged", "less_single", "less_tuned"):
                row |= figure_columns(name, effect and effect[name])
            row["outcome"] = (effect and effect["outcome"]) or ""
            row |= {name: pair[name] for name in GEOMETRY}
            found.append(row | {"error": pair["error"] or ""})
    return found


def _print(found: Pairs) -> None:
    """Tasks by themselves, then the pairs; 95 % intervals in brackets."""
    about = next(iter(found.alone.values())).target.about
    print(f"tasks by themselves; n = {about['n']:,} and alike, seed {about['seed']}")
    lines = []
    for task, alone in found.alone.items():
        three = (alone.target, alone.single, alone.tuned)
        figures = [None if r is None else r.figures[alone.metric.name] for r in three]
        lines.append([task, alone.target.task, alone.metric.name, *map(_span, figures)])
    show(lines, ("task", "measure", "metric", "target", "alone at its λ", "fine-tune"))
    print()
    print("what the other task of a pair does to it")
    lines = []
    for pair in found.pairs:
        for task in pair.tasks:
            (partner,) = set(pair.tasks) - {task}
            lines.append([task, partner, *_effect(pair.effects.get(task))])
    show(lines, ("task", "with", "merged", "Δ vs alone", "Δ vs fine-tune", ""))
    print()
    print("how their vectors lie, over the whole model")
    show(
        [_geometry(pair) for pair in found.pairs],
        ("pair", "cosine", "of pure vectors", "sign conflict", "rank correlation"),
    )
    print()
    print(textwrap.fill(_verdict(found), 100))
    errors = [f"{' and '.join(pair.tasks)}: {pair.error}" for pair in found.pairs if pair.error]
    alone_errors = [f"{task} alone: {a.error}" for task, a in found.alone.items() if a.error]
    warn(alone_errors + errors)


def _span(figure: Figure | None, sign: str = "") -> str:
    from taskvec.evaluation.intervals import span

    return "–" if figure is None else span(figure, sign)


def _effect(effect: Effect | None) -> list[str]:
    if effect is None:
        return ["–", "–", "–", "failed"]
    apart = [_span(effect.less_single, "+"), _span(effect.less_tuned, "+")]
    return [_span(effect.merged), *apart, effect.outcome or ""]


def _geometry(pair: Pair) -> list[Any]:
    return [", ".join(pair.tasks), *(getattr(pair.geometry, name) for name in GEOMETRY)]


def _verdict(found: Pairs) -> str:
    outcomes = Counter(effect.outcome for pair in found.pairs for effect in pair.effects.values())
    count = sum(outcomes.values())
    shares = ", ".join(
        f"{name} in {outcomes[name]}" for name in ("synergy", "interference", "neither")
    )
    return (
        f"Of {count} effects: {shares}. Synergy and interference mean that the paired 95 % "
        "interval of the difference to the task alone lies on one side of 0; of "
        f"{count} such intervals about {count / 20:.1g} would by chance."
    )


VERB = Verb(
    "pairs", run, [
        RECIPE,
        Option("--measure", metavar="TASK=MEASURE", multiple=True, heading=MEASURE_HEAD,
               help="a task of the recipe, and TASK or TASK@METRIC of `taskvec eval --list` that "
               "measures it; repeatable"),
        evaluating.LIMIT,
        evaluating.out_option(OUT, "pairs.json and pairs.csv, and records"), PLOT,
        *evaluating.DATA, *evaluating.ASKING, *evaluating.SCORING, *FAMILY, JSON,
    ],
    extra="search",
    page="""\
Merges every pair of the tasks that have a `--measure`, and compares with each alone;
[how](../how-to/sensitivity.md). `--seed` is also that of samples and intervals.""",
)  # fmt: skip
