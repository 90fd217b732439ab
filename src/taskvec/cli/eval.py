"""`taskvec eval`: what models can do, side by side, with intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import evaluating
from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb, misuse, pairs_of
from taskvec.cli.printing import answer, show
from taskvec.cli.recipe import recipe_from
from taskvec.errors import UsageError
from taskvec.journal import finite

if TYPE_CHECKING:
    from taskvec.evaluation.comparison import Compared
    from taskvec.evaluation.evaluate import Result
    from taskvec.evaluation.intervals import Figure
    from taskvec.evaluation.loading import Spec

OUT = "taskvec-eval"
MANIFEST_FILE = "taskvec-manifest.json"
COMPARISON_HEAD = "Comparison"


def run(args: Arguments) -> int:
    """Run this verb."""
    if args.list:
        return _list(as_json=args.json)
    models = _name_models(args.models)
    singles = pairs_of(args.single, "--single", "TASK=NAME")
    wanted = pairs_of(args.expect, "--expect", "TASK=up|down|keep")
    names = [name for text in args.tasks for name in text.split(",") if name]
    reference = args.reference or next(iter(models))
    for name in (reference, *singles.values()):
        if name not in models:
            raise UsageError(f"unknown model {name!r}; the models are {', '.join(models)}")
    unknown = sorted(singles.keys() - set(names))
    if unknown:
        raise UsageError(f"--single names {unknown[0]!r}, which is not one of --tasks")

    specs = {name: _spec(args, path) for name, path in models.items()}
    cards = _cards(specs) if args.update_card else {}

    from taskvec.evaluation.comparison import compare
    from taskvec.evaluation.evaluate import prepare
    from taskvec.evaluation.expectations import expect, merges_among
    from taskvec.evaluation.options import evaluation_options
    from taskvec.evaluation.results import about, evaluate_models, write_results
    from taskvec.evaluation.signs import find_signs, find_successes, fold

    options = evaluation_options(evaluating.keywords_from(args, args.seed or 0, limit=args.limit))
    prepared = prepare(names, options)
    merges = merges_among(specs)
    others = models.keys() - {reference, *singles.values()}
    asked = [each.task for each in prepared]
    expected = expect(merges, others, wanted, asked, reference=specs[reference])
    results = evaluate_models(specs, prepared, options)
    compared = compare(results, reference=reference, singles=singles)
    findings = find_signs(
        results, reference=reference, singles=singles, merges=merges, expected=expected
    )
    successes = find_successes(results, reference=reference, expected=expected)
    record = {
        "reference": reference,
        "singles": singles,
        "tasks": finite(compared),
        "expected": {name: expected[name] for name in models if expected.get(name)},
        "as_expected": finite(successes),
        "findings": finite(findings),
        **about(),
    }
    for name, folder in cards.items():
        _update_card(folder, results[name])
    write_results(Path(args.out), record)
    if args.json:
        answer(record)
    else:
        for task, rows in compared.items():
            _print(task, rows, reference, singles.get(task))
        if successes:
            _print_list("As expected:", [success.text for success in successes])
        _print_list("Findings:" if findings else "Findings: none", fold(findings))
        print(f"{args.out}/: results.json, and what was asked and replied")
    return 0


def _cards(specs: Mapping[str, Spec]) -> dict[str, Path]:
    """Folders with a model card of taskvec, by model."""
    from taskvec.outputs.card import has_card

    folders = {n: Path(spec).expanduser() for n, spec in specs.items() if isinstance(spec, str)}
    found = {name: folder for name, folder in folders.items() if has_card(folder)}
    if not found:
        raise UsageError("--update-card: no model is a folder that taskvec merge wrote; add one")
    return found


def _update_card(folder: Path, results: Sequence[Result]) -> None:
    """Write the scores of one model into its card."""
    from taskvec.outputs.card import add_scores

    add_scores(
        folder,
        [
            {"task": result.task, "metric": metric, "value": figure.value,
             "low": figure.low, "high": figure.high, "n": figure.n}
            for result in results
            for metric, figure in result.figures.items()
        ],
    )  # fmt: skip


def _name_models(models: Sequence[str]) -> dict[str, str]:
    """Models by the names they have in tables."""
    if not models:
        misuse("MODEL is missing: give a folder, a name on the hub, or a recipe")
    found: dict[str, str] = {}
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            path = text
            named = Path(text).parent if Path(text).name == MANIFEST_FILE else Path(text)
            name = named.name if named.name not in ("", "..") else named.resolve().name
        if not name or not path:
            raise UsageError(f"a model must be MODEL or NAME=MODEL; got {text!r}")
        if name in found:
            raise UsageError(f"two models are called {name!r}; name them: NAME={path}")
        found[name] = path
    return found


def _spec(args: Arguments, path: str) -> Spec:
    """A recipe or a manifest is a candidate; anything else is a folder or a hub name."""
    if not path.endswith((".yaml", ".yml", ".json")):
        return path
    is_recipe = Path(path).name != MANIFEST_FILE  # a manifest is replayed as it is
    settings, seed = (args.settings, args.seed) if is_recipe else ((), None)
    flags = Arguments(task=(), settings=settings, seed=seed, quiet=args.quiet)
    return recipe_from(flags, path)


def _print(task: str, rows: Sequence[Compared], reference: str, single: str | None) -> None:
    """The models in one task; 95 % intervals in brackets."""
    from taskvec.evaluation.intervals import span

    def shown(figure: Figure | None) -> str:
        return "–" if figure is None else span(figure)

    first = rows[0].result
    about = first.about
    of = f" of {about['available']:,}" if about["available"] != about["n"] else ""
    metrics = list(dict.fromkeys(name for row in rows for name in row.result.figures))
    head = ["", *metrics]
    if len(rows) > 1:
        head.append(f"Δ {metrics[0]} vs {reference}")
    if single is not None:
        head.append(f"share of {single}'s")
    lines = []
    for row in rows:
        line = [row.result.model, *(shown(row.result.figures.get(m)) for m in metrics)]
        if len(rows) > 1:
            line.append("" if row.difference is None else span(row.difference, sign="+"))
        if single is not None:
            line.append("–" if row.share is None else f"{row.share:.0%}")
        lines.append(line)
    print(f"{task}: n = {about['n']:,}{of}, seed {about['seed']}{_how(rows)}")
    show(lines, head)
    print()


def _print_list(head: str, texts: Sequence[str]) -> None:
    """A paragraph for each text."""
    print(head)
    for text in texts:
        print(textwrap.fill(f"- {text}", 100, subsequent_indent="  "))
    print()


def _how(rows: Sequence[Compared]) -> str:
    """Context and stride, where texts were read in windows; by model, where they differ."""
    from taskvec.running.requests import WholeText

    asked = (request for sample in rows[0].result.samples for request in sample.requests)
    if not any(isinstance(request, WholeText) for request in asked):
        return ""
    wanted = {
        row.result.model: "context {context}, stride {stride}".format_map(row.result.about)
        for row in rows
    }
    if len(set(wanted.values())) == 1:
        return f", {wanted[rows[0].result.model]}"
    return "".join(f"; {model}: {how}" for model, how in wanted.items())


def _list(*, as_json: bool) -> int:
    from taskvec.evaluation.tasks import installed_tasks, tasks

    known = {**tasks(), **installed_tasks()}
    if as_json:
        record: Mapping[str, Any] = {
            name: {
                "summary": task.summary,
                "metrics": [metric.name for metric in task.metrics],
                "files": {file.role: list(file.names) for file in task.files},
                "hub": {f.role: str(f.hub) for f in task.files if f.hub is not None},
                "needs": list(task.needs),
                "version": task.version,
            }
            for name, task in known.items()
        }
        answer(record)
        return 0
    show(
        [
            (name, task.summary, ", ".join(m.name for m in task.metrics),
             ", ".join(file.names[0] for file in task.files) or "–")
            for name, task in known.items()
        ],
        ("task", "what it asks", "metrics", "data"),
    )  # fmt: skip
    return 0


VERB = Verb(
    "eval", run, [
        Argument("models", nargs=-1, metavar="[NAME=]MODEL…",
                 help="a folder, a name on the hub, or a recipe, which is merged in memory"),
        Option("--tasks", metavar="A,B,…", multiple=True, help="what to ask; see --list"),
        Option("--list", is_flag=True, help="list the tasks and what they read"),
        Option("--reference", metavar="NAME", heading=COMPARISON_HEAD,
               show_default="the first model", help="model that the others are compared with"),
        Option("--single", metavar="TASK=NAME", multiple=True, heading=COMPARISON_HEAD,
               help="the model that was tuned for a task alone; scores are also shown as shares of "
               "its score; repeatable"),
        Option("--expect", metavar="TASK=up|down|keep", multiple=True, heading=COMPARISON_HEAD,
               show_default="down for tasks with a negative scale in the recipe or manifest",
               help="where a score should move; repeatable"),
        evaluating.LIMIT, evaluating.SEED, *evaluating.DATA, *evaluating.ASKING,
        *evaluating.SCORING,
        Option("--set", "settings", metavar="NAME=VALUE", multiple=True,
               help="as for merge, in every recipe among the models; repeatable"),
        evaluating.out_option(OUT, "results and records"),
        Option("--update-card", is_flag=True,
               help="write the scores into the model cards of models that taskvec merged"),
        JSON,
    ],
    extra="eval",
    page="""\
Asks models the samples of some tasks and prints figures with 95 % intervals, side by side, and
[signs of failure](signs.md); [how](../how-to/evaluate.md), [tasks](tasks.md). A recipe or a
manifest instead of a model is merged in memory. `--json` prints what goes to
`results.json`.""",
)  # fmt: skip
