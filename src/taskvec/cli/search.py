"""`taskvec search`: which coefficients are best, by what candidates score."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli import evaluating
from taskvec.cli.commands import JSON, Arguments, Option, Verb, pairs_of
from taskvec.cli.options import FAMILY, RECIPE
from taskvec.cli.printing import announce_compiling, answer, show
from taskvec.cli.progress import Bars
from taskvec.cli.recipe import recipe_only
from taskvec.cli.streams import warn
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.coefficients.api import SearchResult
    from taskvec.coefficients.goals import Goals
    from taskvec.coefficients.scoring import Executor, SearchJob

OUT = "taskvec-search"
GOALS_HEAD, SCORED_HEAD, SEARCH_HEAD = "Goals", "Where candidates are scored", "What is varied"
SHOWN = 10  # candidates in the printed table


def run(args: Arguments) -> int:
    """Run this verb."""
    recipe = recipe_only(args, args.recipe, needs_scales=False)

    from taskvec.coefficients.api import SearchKeywords, search
    from taskvec.reporting.figures import check_figure, draw_search

    if args.plot:
        check_figure(Path("candidates.svg"))
    own = {key: getattr(args, key) for key in SearchKeywords.__annotations__} | {
        "single": pairs_of(args.single, "--single", "GOAL=TASK"),
        "test_data": evaluating.places(args.test_data, "--test-data") if args.test_data else None,
        "executor": _executor(args),
    }
    announce_compiling()
    asking = evaluating.keywords_from(args, recipe.seed)
    found = search(recipe, **asking | own | {"progress": Bars(args, unit="candidates")})
    drawn = draw_search(found.record, Path(args.out)) if args.plot else []
    if args.json:
        answer(found.record)
    else:
        _print(found, found.job)
        print(f"{args.out}/: {', '.join(_files(found, drawn))}")
    if found.recipe is None:
        _warn_of_miss(found, found.job.goals)
        return 3
    _warn(found)
    return 0


def _executor(args: Arguments) -> Callable[[SearchJob], Executor]:
    from taskvec.coefficients.scoring import Local

    if args.executor == "ray":
        from taskvec.coefficients.ray_executor import RayExecutor

        workers = 2 if args.ray_workers is None else args.ray_workers
        return partial(RayExecutor, address=args.ray_address, workers=workers)
    if args.ray_address is not None or args.ray_workers is not None:
        raise UsageError("--ray-address and --ray-workers go with --executor ray")
    return Local


def _print(found: SearchResult, job: SearchJob) -> None:
    record = found.record
    axes = [axis.key for axis in job.space.axes]
    goals = [goal.key for goal in job.goals.goals]
    samples = next(iter(record["samples"].values()))
    print(
        f"{record['tried']} candidates scored, {record['failed']} failed; sampler "
        f"{record['sampler']}, seed {record['seed']}, n = {samples['select']['n']:,} a task for "
        "selection"
    )
    names = _objective_names(job.goals)
    rows = [
        [trial["number"], *(trial["point"].get(axis) for axis in axes),
         *(trial["values"][goal] for goal in goals), *trial["objectives"], _verdict(trial)]
        for trial in _best(record, found)
    ]  # fmt: skip
    for name in ("target", "single") if record["single"] else ("target",):
        values = [record[name].get(goal) for goal in goals]
        rows.append([name, *(None for _ in axes), *values, *(None for _ in names), ""])
    show(rows, ("candidate", *axes, *goals, *names, "kept" if job.goals.kept else ""))
    print()
    if record["test"] is not None:
        _print_test(record, job.goals)


def _objective_names(goals: Goals) -> list[str]:
    if goals.trade_off:
        return [f"{goal.way} {goal.key}" for goal in goals.aims]
    return [goals.aggregate if len(goals.aims) > 1 else "objective"]


def _best(record: Mapping[str, Any], found: SearchResult) -> list[Mapping[str, Any]]:
    """The candidates worth a line, the winner first."""
    scored = [t for t in record["trials"] if not t["error"] and t["same_as"] is None]
    if found.choice.front:
        scored = [trial for trial in scored if trial["number"] in record["front"]]
    winner = record["winner"] and record["winner"]["number"]
    by_rank = sorted(
        scored,
        key=lambda t: (
            t["number"] != winner,
            max([0.0, *t["violations"].values()]),
            -t["objectives"][0],
            t["number"],
        ),
    )
    return by_rank if found.choice.front else by_rank[:SHOWN]


def _verdict(trial: Mapping[str, Any]) -> str:
    if not trial["violations"]:
        return ""
    return "yes" if max(trial["violations"].values()) <= 0 else "no"


def _print_test(record: Mapping[str, Any], goals: Goals) -> None:
    """The winner on test data, beside what it is compared with."""
    test = record["test"]
    reference = "the recipe as given" if test["reference"] == "given" else "target"
    counts = {task: parts["test"]["n"] for task, parts in record["samples"].items()}
    sizes = ", ".join(f"{task} n = {count:,}" for task, count in counts.items())
    print(f"On test data, which were not used for the choice ({sizes}); 95 % intervals:")
    rows = []
    for goal in goals.goals:
        kept = test["kept"].get(goal.key)
        rows.append(
            [f"{goal.way} {goal.key}", *(_span(test["figures"].get(name, {}).get(goal.key))
             for name in ("winner", "given", "target")),
             _span(test["differences"][goal.key], "+"),
             "" if kept is None else ("yes" if kept["holds"] else f"no: {kept['bound']:.3f}")]
        )  # fmt: skip
    for name, each in zip(_objective_names(goals), test["objectives"], strict=True):
        rows.append(
            [name, f"{each['winner']:.3f}", f"{each['reference']:.3f}" if "given" in test["figures"]
             else "–", "–", _span(each["difference"], "+"), ""]
        )  # fmt: skip
    head = ("", "winner", "recipe as given", "target", f"Δ winner vs {reference}", "kept")
    show(rows, head)
    print()
    for line in _remarks(record):
        print(textwrap.fill(f"- {line}", 100, subsequent_indent="  "))
    print()


def _remarks(record: Mapping[str, Any]) -> list[str]:
    scores = {
        trial["number"]: trial["objectives"]
        for trial in record["trials"]
        if not trial["error"]
        and trial["same_as"] is None
        and all(violation <= 0 for violation in trial["violations"].values())
    }
    level = list(scores.values()).count(scores.get(record["winner"]["number"]))
    lines = [
        f"The winner's score on selection data is the best of {record['tried']} and therefore too "
        "good; its score on test data is unbiased."
    ]
    if level > 1:
        lines.append(
            f"{level} of {record['tried']} candidates are level with the winner on selection data: "
            "the choice among them is arbitrary. More samples or wider axes may separate them."
        )
    return lines


def _span(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    from taskvec.evaluation.intervals import Figure, span

    if figure is None:
        return "–"
    value, low, high = (
        math.nan if x is None else x for x in (figure["value"], *figure["interval"])
    )
    return span(Figure(value, low, high, figure["n"]), sign)


def _files(found: SearchResult, drawn: Sequence[Path]) -> list[str]:
    """What lies in the output folder."""
    recipe = [] if found.recipe is None else ["recipe.yaml"]
    front = ["front/"] if found.choice.front else []
    return [*recipe, *front, "trials.csv", "trials.json", *(path.name for path in drawn)]


def _warn_of_miss(found: SearchResult, goals: Goals) -> None:
    """What comes nearest, where nothing is allowed."""
    miss = found.choice.miss
    assert miss is not None
    point = ", ".join(f"{key} {_value_text(value)}" for key, value in miss.trial.point.items())
    warn(
        [
            f"no candidate keeps {goals.keep_share:.0%} of the target in all of "
            f"{', '.join(goal.key for goal in goals.kept)}. The nearest miss is candidate "
            f"{miss.trial.number} ({point}): {miss.goal} is {miss.value:.4g} and would have to be "
            f"{miss.bound:.4g}, off by {miss.share:.1%} of the target's"
        ]
    )


def _value_text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _warn(found: SearchResult) -> None:
    """What is kept on selection data and not on test data."""
    lost: Sequence[str] = [
        f"{key}: kept on selection data, but not on test data: {each['value']:.4g}, and would have "
        f"to be {each['bound']:.4g}"
        for key, each in found.record["test"]["kept"].items()
        if not each["holds"]
    ]
    warn(lost)


VARY = Option(
    "--vary", metavar="AXIS", multiple=True, heading=SEARCH_HEAD,
    show_default="scale.TASK=0:1.5 of every task",
    help="NAME=LOW:HIGH[:STEP] or NAME=ONE,OTHER,…, where NAME is scale, method or a parameter "
    "(NAME.TASK for one task); repeatable",
)  # fmt: skip
PLOT = Option("--plot", is_flag=True, heading="Output", help="draw figures there too (SVG)")

VERB = Verb(
    "search", run, [
        RECIPE,
        VARY,
        Option("--sampler", default="auto", heading=SEARCH_HEAD,
               words=("auto", "grid", "qmc", "tpe", "cmaes", "nsga2"), help="how candidates are "
               "chosen"),
        Option("--trials", type=int, metavar="N", heading=SEARCH_HEAD,
               show_default="the grid; qmc 32, tpe and cmaes 64, nsga2 96",
               help="candidates, of all processes and runs together"),
        Option("--maximize", metavar="TASK", multiple=True, heading=GOALS_HEAD,
               help="TASK or TASK@METRIC of `taskvec eval --list` to be good at; repeatable"),
        Option("--minimize", metavar="TASK", multiple=True, heading=GOALS_HEAD,
               help="the same, to be bad at; repeatable"),
        Option("--keep", metavar="TASK", multiple=True, heading=GOALS_HEAD,
               help="the same, in which the target's score must be kept; repeatable"),
        Option("--keep-share", type=float, default=0.95, metavar="SHARE", heading=GOALS_HEAD,
               help="share of the target's score to keep, above 0 and at most 1"),
        Option("--single", metavar="GOAL=TASK", multiple=True, heading=GOALS_HEAD,
               help="the recipe's task that was tuned for a goal: scores become shares of its gain "
               "(for all goals or none)"),
        Option("--aggregate", default="mean", heading=GOALS_HEAD, words=("mean", "min"),
               help="how several goals become one"),
        Option("--trade-off", is_flag=True, heading=GOALS_HEAD,
               help="make each goal an objective of its own"),
        Option("--select-n", type=int, metavar="N", heading=evaluating.DATA_HEAD,
               show_default="100, or half", help="samples of a task to choose by"),
        Option("--test-n", type=int, metavar="N", heading=evaluating.DATA_HEAD,
               show_default="all others", help="other samples to test the winner on"),
        Option("--test-data", metavar="DIR|TASK=PATH", multiple=True, heading=evaluating.DATA_HEAD,
               help="where test data are, if they are separate; repeatable"),
        Option("--executor", type=click.Choice(("local", "ray")), default="local",
               heading=SCORED_HEAD, help="this process, or a Ray cluster"),
        Option("--ray-address", metavar="ADDRESS", heading=SCORED_HEAD,
               show_default="one is started here", help="address of a running cluster"),
        Option("--ray-workers", type=int, metavar="N", heading=SCORED_HEAD, show_default="2",
               help="candidates scored at once"),
        evaluating.out_option(OUT, "the study"), PLOT,
        *evaluating.DATA, *evaluating.ASKING, *evaluating.SCORING, *FAMILY, JSON,
    ],
    extra="search",
    page="""\
Tries candidates on data, tests the best on other data, and writes its recipe;
[how](../how-to/search-coefficients.md). Scales are needed where they are not varied. `--seed` is
also that of samples and of the sampler. `--json` prints what goes to `trials.json`.""",
)  # fmt: skip
