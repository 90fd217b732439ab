"""`taskvec search`: which coefficients are best, by what candidates score."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common, evaluating, search_pairs, search_propose, search_sweep
from taskvec.errors import UsageError
from taskvec.extras import require

if TYPE_CHECKING:
    from taskvec.coefficients.api import SearchResult
    from taskvec.coefficients.goals import Goals
    from taskvec.coefficients.scoring import Executor, SearchJob
    from taskvec.recipes.recipe import Recipe

OUT = "taskvec-search"
SHOWN = 10  # candidates in the printed table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML; or give the flags below")
    space = parser.add_argument_group("what is varied")
    space.add_argument(
        "--vary",
        metavar="AXIS",
        action="append",
        default=[],
        help="scale=0:1.5, scale.TASK=…, threshold=0.7:1:0.05, scheme=linear,logarithmic, "
        "method=lata,ties …; repeatable (scale.TASK=0:1.5 of each task)",
    )
    space.add_argument("--sampler", default="auto", help="auto | grid | qmc | tpe | cmaes | nsga2")
    space.add_argument(
        "--trials", type=int, metavar="N", help="candidates, of all processes (by the sampler)"
    )
    _add_goals(parser)
    search_propose.add_arguments(parser)
    search_sweep.add_arguments(parser)
    search_pairs.add_arguments(parser)
    data = evaluating.add_data(parser)
    data.add_argument(
        "--select-n", type=int, metavar="N", help="samples of a task to choose by (100, or half)"
    )
    data.add_argument(
        "--test-n", type=int, metavar="N", help="other samples to test the winner on (the rest)"
    )
    data.add_argument(
        "--test-data",
        metavar="DIR|TASK=PATH",
        action="append",
        default=[],
        help="where test data lie, if apart",
    )
    evaluating.add_asking(parser)
    evaluating.add_scoring(parser)
    _add_executor(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", default=OUT, help=f"the study; resumes ({OUT})")
    output.add_argument("--plot", action="store_true", help="draw figures there too (PNG)")
    output.add_argument("--json", action="store_true", help="print trials.json")
    output.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_family(parser)


def _add_goals(parser: argparse.ArgumentParser) -> None:
    goals = parser.add_argument_group("goals: TASK or TASK@METRIC of `taskvec eval --list`")
    for flag, text in (
        ("--maximize", "to be good at"),
        ("--minimize", "to be bad at"),
        ("--keep", "in which the target's value must be kept"),
    ):
        goals.add_argument(flag, metavar="TASK", action="append", default=[], help=text)
    goals.add_argument(
        "--keep-share", type=float, default=0.95, metavar="SHARE", help="of the target's (0.95)"
    )
    goals.add_argument(
        "--single",
        metavar="GOAL=TASK",
        action="append",
        default=[],
        help="the recipe's task that was tuned for a goal: values become shares of its gain",
    )
    goals.add_argument(
        "--aggregate", default="mean", help="how several goals become one: mean | min"
    )
    goals.add_argument(
        "--trade-off", action="store_true", help="each goal is an objective of its own"
    )


def _add_executor(parser: argparse.ArgumentParser) -> None:
    scoring = parser.add_argument_group("where candidates are scored")
    scoring.add_argument("--executor", default="local", help="local (this process) | ray")
    scoring.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster that runs (one is started here)"
    )
    scoring.add_argument(
        "--ray-workers", type=int, metavar="N", help="candidates scored at once (2)"
    )


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    # Here `--dtype` is that of the loaded weights, not of an output.
    family = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "dtype"})
    recipe = common.recipe_only(family, args.recipe, needs_scales=False)
    modes = [flag for flag in ("propose", "sweep", "pairs") if getattr(args, flag)]
    if len(modes) > 1:
        raise UsageError(f"--{modes[0]} and --{modes[1]} are two things; give one of them")
    if not args.propose and args.write_recipe is not None:
        raise UsageError("--write-recipe goes with --propose; a search writes its own recipe")
    if args.propose:
        return search_propose.run(args, recipe)
    if args.sweep is not None:
        return search_sweep.run(args, recipe)
    if args.pairs:
        return search_pairs.run(args, recipe)
    if args.measure or args.limit is not None:
        raise UsageError(
            "--measure and --limit go with --sweep and --pairs; a search has --maximize, "
            "--select-n and --test-n"
        )
    return _search(args, recipe)


def _search(args: argparse.Namespace, recipe: Recipe) -> int:
    from taskvec.coefficients.api import run_search, silent
    from taskvec.reporting.search import draw_search

    if args.plot:
        require("matplotlib", "report")
    job = _job(args, recipe)
    common.announce_compiling()
    out = Path(args.out)
    progress = silent if args.quiet else partial(common.bar, "candidates", unit="candidate")
    found = run_search(job, out, trials=args.trials, executor=_executor(args), progress=progress)
    drawn = draw_search(found.told, out) if args.plot else []
    if args.json:
        print(json.dumps(found.told, ensure_ascii=False))
    else:
        _print(found, job)
        print(f"{out}/: {', '.join(_files(found, drawn))}")
    if found.recipe is None:
        _tell_miss(found, job.goals)
        return 3
    _warn(found)
    return 0


def _executor(args: argparse.Namespace) -> Callable[[SearchJob], Executor]:
    from taskvec.coefficients.scoring import Local

    if args.executor == "ray":
        from taskvec.coefficients.ray_executor import RayExecutor

        workers = 2 if args.ray_workers is None else args.ray_workers
        return partial(RayExecutor, address=args.ray_address, workers=workers)
    if args.executor != "local":
        raise UsageError(f"--executor must be local or ray; got {args.executor!r}")
    if args.ray_address is not None or args.ray_workers is not None:
        raise UsageError("--ray-address and --ray-workers go with --executor ray")
    return Local


def _job(args: argparse.Namespace, recipe: Recipe) -> SearchJob:
    from taskvec.coefficients.api import make_job
    from taskvec.coefficients.goals import make_goals
    from taskvec.coefficients.space import parse_axis
    from taskvec.coefficients.splits import Splitting

    goals = make_goals(
        args.maximize,
        args.minimize,
        args.keep,
        single=dict(evaluating.pair(text, "--single", "GOAL=TASK") for text in args.single),
        tasks=list(recipe.family.tasks),
        aggregate=args.aggregate,
        keep_share=args.keep_share,
        trade_off=args.trade_off,
    )
    axes = [parse_axis(text) for text in args.vary]
    apart = evaluating.places(args.test_data, "--test-data") if args.test_data else None
    splitting = Splitting(args.select_n, args.test_n, apart)
    options = evaluating.options_from(args)
    return make_job(recipe, axes, goals, options, splitting, sampler=args.sampler)


def _print(found: SearchResult, job: SearchJob) -> None:
    told = found.told
    axes = [axis.key for axis in job.space.axes]
    goals = [goal.key for goal in job.goals.goals]
    samples = next(iter(told["samples"].values()))
    print(
        f"{told['tried']} candidates scored, {told['failed']} failed; sampler {told['sampler']}, "
        f"seed {told['seed']}, n = {samples['select']['n']:,} a task for selection"
    )
    names = _objective_names(job.goals)
    rows = [
        [trial["number"], *(trial["point"].get(axis) for axis in axes),
         *(trial["values"][goal] for goal in goals), *trial["objectives"], _verdict(trial)]
        for trial in _best(told, found)
    ]  # fmt: skip
    for name in ("target", "single") if told["single"] else ("target",):
        values = [told[name].get(goal) for goal in goals]
        rows.append([name, *(None for _ in axes), *values, *(None for _ in names), ""])
    common.show(rows, ("candidate", *axes, *goals, *names, "kept" if job.goals.kept else ""))
    print()
    if told["test"] is not None:
        _print_test(told, job.goals)


def _objective_names(goals: Goals) -> list[str]:
    if goals.trade_off:
        return [f"{goal.way} {goal.key}" for goal in goals.aims]
    return [goals.aggregate if len(goals.aims) > 1 else "objective"]


def _best(told: Mapping[str, Any], found: SearchResult) -> list[Mapping[str, Any]]:
    """The candidates worth a line, the winner first."""
    scored = [t for t in told["trials"] if not t["error"] and t["same_as"] is None]
    if found.choice.front:
        scored = [trial for trial in scored if trial["number"] in told["front"]]
    winner = told["winner"] and told["winner"]["number"]
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


def _print_test(told: Mapping[str, Any], goals: Goals) -> None:
    """The winner on test data, beside what it is compared with."""
    test = told["test"]
    reference = "the recipe as given" if test["reference"] == "given" else "target"
    counts = {task: parts["test"]["n"] for task, parts in told["samples"].items()}
    sizes = ", ".join(f"{task} n = {count:,}" for task, count in counts.items())
    print(f"On test data, which had no say in the choice ({sizes}); 95 % intervals:")
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
    head = ("", "winner", "recipe as given", "target", f"winner less {reference}", "kept")
    common.show(rows, head)
    print()
    for line in _remarks(told):
        print(textwrap.fill(f"- {line}", 100, subsequent_indent="  "))
    print()


def _remarks(told: Mapping[str, Any]) -> list[str]:
    scores = {
        trial["number"]: trial["objectives"]
        for trial in told["trials"]
        if not trial["error"]
        and trial["same_as"] is None
        and all(violation <= 0 for violation in trial["violations"].values())
    }
    level = list(scores.values()).count(scores.get(told["winner"]["number"]))
    lines = [
        f"The winner's score on selection data is the best of {told['tried']} and therefore too "
        "good; its score on test data is not."
    ]
    if level > 1:
        lines.append(
            f"{level} of {told['tried']} candidates are level with the winner on selection data: "
            "which of them is taken means nothing. More samples or wider axes may tell them apart."
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


def _tell_miss(found: SearchResult, goals: Goals) -> None:
    """What comes nearest, where nothing is allowed."""
    miss = found.choice.miss
    assert miss is not None
    point = ", ".join(f"{key} {_shown(value)}" for key, value in miss.trial.point.items())
    common.warn(
        [
            f"no candidate keeps {goals.keep_share:.0%} of the target in all of "
            f"{', '.join(goal.key for goal in goals.kept)}. The nearest miss is candidate "
            f"{miss.trial.number} ({point}): {miss.goal} is {miss.value:.4g} and would have to be "
            f"{miss.bound:.4g}, off by {miss.share:.1%} of the target's"
        ]
    )


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _warn(found: SearchResult) -> None:
    """What is kept on selection data and not on test data."""
    lost: Sequence[str] = [
        f"{key}: kept on selection data, but not on test data: {each['value']:.4g}, and would have "
        f"to be {each['bound']:.4g}"
        for key, each in found.told["test"]["kept"].items()
        if not each["holds"]
    ]
    common.warn(lost)
