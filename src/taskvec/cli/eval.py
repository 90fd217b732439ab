"""`taskvec eval`: what models can do, side by side, with intervals."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common, evaluating
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.evaluation.comparison import Compared
    from taskvec.evaluation.intervals import Figure
    from taskvec.evaluation.loading import Spec
    from taskvec.evaluation.signs import Finding

OUT = "taskvec-eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="[NAME=]MODEL",
        help="a folder, a name on the hub, or a recipe, which is merged in memory",
    )
    parser.add_argument(
        "--tasks", metavar="A,B,…", action="append", default=[], help="what to ask; see --list"
    )
    parser.add_argument("--list", action="store_true", help="list the tasks and what they read")
    data = evaluating.add_data(parser)
    data.add_argument(
        "--limit", type=int, metavar="N", help="samples of a task, drawn by the seed (all)"
    )
    evaluating.add_asking(parser)
    evaluating.add_scoring(parser)
    against = parser.add_argument_group("comparison")
    against.add_argument(
        "--reference", metavar="NAME", help="differences are taken to it (the first model)"
    )
    against.add_argument(
        "--single",
        metavar="TASK=NAME",
        action="append",
        default=[],
        help="the model that was tuned for a task alone; shares are taken of it",
    )
    against.add_argument(
        "--expect",
        metavar="TASK=up|down|keep",
        action="append",
        default=[],
        help="where a score should move (down: tasks with a negative scale in the manifest)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="DIR", default=OUT, help=f"results and records; resumes ({OUT})"
    )
    output.add_argument("--json", action="store_true", help="print the results as JSON")
    output.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    if args.list:
        return _list(as_json=args.json)
    models = _named(args.models)
    singles = dict(evaluating.pair(text, "--single", "TASK=NAME") for text in args.single)
    said = dict(evaluating.pair(text, "--expect", "TASK=up|down|keep") for text in args.expect)
    names = [name for text in args.tasks for name in text.split(",") if name]
    reference = args.reference or next(iter(models))
    for name in (reference, *singles.values()):
        if name not in models:
            raise UsageError(f"{name!r} is none of the models: {', '.join(models)}")
    unknown = sorted(singles.keys() - set(names))
    if unknown:
        raise UsageError(f"--single names {unknown[0]!r}, which is none of the tasks")

    specs = {name: _spec(path) for name, path in models.items()}

    from taskvec.evaluation.comparison import compare
    from taskvec.evaluation.evaluate import prepare
    from taskvec.evaluation.expectations import expect, merges_among
    from taskvec.evaluation.results import about, evaluate_models, write_results
    from taskvec.evaluation.signs import find_signs

    options = evaluating.options_from(args, limit=args.limit)
    prepared = prepare(names, options)
    merges = merges_among(specs)
    others = models.keys() - {reference, *singles.values()}
    asked = [each.task for each in prepared]
    expected = expect(merges, others, said, asked, reference=specs[reference])
    results = evaluate_models(specs, prepared, options)
    compared = compare(results, reference=reference, singles=singles)
    findings = find_signs(
        results, reference=reference, singles=singles, merges=merges, expected=expected
    )
    told = {
        "reference": reference,
        "tasks": {task: [each.to_json() for each in row] for task, row in compared.items()},
        "expected": {name: expected[name] for name in models if expected.get(name)},
        "findings": [finding.to_json() for finding in findings],
        **about(),
    }
    write_results(Path(args.out), told)
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
    else:
        for task, rows in compared.items():
            _print(task, rows, reference, singles.get(task))
        _print_findings(findings)
        print(f"{args.out}/: results.json, and what was asked and replied")
    return 0


def _named(models: Sequence[str]) -> dict[str, str]:
    """Models by the names they have in tables."""
    if not models:
        raise UsageError("no model is given; see taskvec eval --help")
    found: dict[str, str] = {}
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = Path(text).name, text
            if name in ("", ".."):
                name = Path(text).resolve().name
        if not name or not path:
            raise UsageError(f"a model must be MODEL or NAME=MODEL; got {text!r}")
        if name in found:
            raise UsageError(f"two models are called {name!r}; name them: NAME={path}")
        found[name] = path
    return found


def _spec(path: str) -> Spec:
    """A recipe or a manifest is a candidate; anything else is a folder or a hub name."""
    if not path.endswith((".yaml", ".yml", ".json")):
        return path
    return common.recipe_from(argparse.Namespace(), path)


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
        head.append(f"{metrics[0]}, less {reference}'s")
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
    common.show(lines, head)
    print()


def _print_findings(findings: Sequence[Finding]) -> None:
    """Signs of failure, a paragraph each."""
    from taskvec.evaluation.signs import fold

    print("Findings:" if findings else "Findings: none")
    for text in fold(findings):
        print(textwrap.fill(f"- {text}", 100, subsequent_indent="  "))
    print()


def _how(rows: Sequence[Compared]) -> str:
    """Context and stride, where texts were read in windows; by model, where they differ."""
    from taskvec.running.requests import WholeText

    asked = (request for sample in rows[0].result.samples for request in sample.requests)
    if not any(isinstance(request, WholeText) for request in asked):
        return ""
    said = {
        row.result.model: "context {context}, stride {stride}".format_map(row.result.about)
        for row in rows
    }
    if len(set(said.values())) == 1:
        return f", {said[rows[0].result.model]}"
    return "".join(f"; {model}: {how}" for model, how in said.items())


def _list(*, as_json: bool) -> int:
    from taskvec.evaluation.tasks import installed_tasks, tasks

    known = {**tasks(), **installed_tasks()}
    if as_json:
        told: Mapping[str, Any] = {
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
        print(json.dumps(told, ensure_ascii=False))
        return 0
    common.show(
        [
            (name, task.summary, ", ".join(m.name for m in task.metrics),
             ", ".join(file.names[0] for file in task.files) or "–")
            for name, task in known.items()
        ],
        ("task", "what it asks", "metrics", "data"),
    )  # fmt: skip
    return 0
