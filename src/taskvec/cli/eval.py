"""`taskvec eval`: what models can do, side by side, with intervals."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.evaluation.comparison import Compared
    from taskvec.evaluation.data import DataPlaces
    from taskvec.evaluation.evaluate import Options
    from taskvec.evaluation.figures import Figure
    from taskvec.evaluation.loading import Spec
    from taskvec.evaluation.signs import Finding
    from taskvec.evaluation.task import Tools

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
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="DIR|TASK=PATH",
        action="append",
        default=[],
        help="where data lie, for all tasks or for one; what is not there comes from the hub",
    )
    data.add_argument(
        "--limit", type=int, metavar="N", help="samples of a task, drawn by the seed (all)"
    )
    data.add_argument("--shots", type=int, metavar="N", help="worked examples before a question")
    data.add_argument("--draws", type=int, default=1, metavar="N", help="answers to a prompt (1)")
    data.add_argument("--seed", type=int, default=0, help="of samples, draws and intervals (0)")
    data.add_argument(
        "--include-path", metavar="DIR", help="task files of your own for harness:… tasks"
    )
    asking = parser.add_argument_group("how models are asked")
    asking.add_argument(
        "--apply-chat-template", action="store_true", help="harness:… tasks ask in conversations"
    )
    asking.add_argument("--context", type=int, metavar="N", help="tokens of a window over a text")
    asking.add_argument(
        "--stride", type=int, metavar="N", help="tokens that a window predicts (all of it)"
    )
    asking.add_argument(
        "--truncate", action="store_true", help="cut prompts that do not fit at the front"
    )
    asking.add_argument(
        "--dtype", default="auto", help="auto | float32 | bfloat16 | float16, of the weights"
    )
    asking.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps")
    asking.add_argument("--batch-tokens", type=int, metavar="N", help="(by the memory there is)")
    scoring = parser.add_argument_group("how answers are scored")
    scoring.add_argument(
        "--judge",
        metavar="JUDGE",
        help="of harm: prefixes[:FILE], classifier:MODEL:LABEL, endpoint:URL?model=NAME (prefixes)",
    )
    scoring.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run programs that the model wrote, shut in (humaneval, mbpp)",
    )
    scoring.add_argument(
        "--workers", type=int, metavar="N", help="programs that run at once (processors, at most 8)"
    )
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
    singles = dict(_pair(text, "--single", "TASK=NAME") for text in args.single)
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
    from taskvec.evaluation.results import about, evaluate_models, write_results
    from taskvec.evaluation.signs import find_signs

    options = _options(args)
    prepared = prepare(names, options)
    results = evaluate_models(specs, prepared, options)
    compared = compare(results, reference=reference, singles=singles)
    findings = find_signs(results, reference=reference, singles=singles)
    told = {
        "reference": reference,
        "tasks": {task: [each.to_json() for each in row] for task, row in compared.items()},
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


def _pair(text: str, flag: str, form: str) -> tuple[str, str]:
    left, _, right = text.partition("=")
    if not left or not right:
        raise UsageError(f"{flag} must be {form}; got {text!r}")
    return left, right


def _options(args: argparse.Namespace) -> Options:
    from taskvec.evaluation.evaluate import Options, silent
    from taskvec.evaluation.task import Settings

    return Options(
        data=_places(args.data),
        limit=args.limit,
        include_path=None if args.include_path is None else Path(args.include_path).expanduser(),
        settings=Settings(args.shots, args.seed, args.draws, args.apply_chat_template),
        context=args.context,
        stride=args.stride,
        truncate=args.truncate,
        batch_tokens=args.batch_tokens,
        dtype=args.dtype,
        device=args.device,
        tools=_tools(args),
        out=Path(args.out),
        progress=silent if args.quiet else _bar,
    )


def _tools(args: argparse.Namespace) -> Tools:
    from taskvec.evaluation.judges import parse_judge
    from taskvec.evaluation.task import Tools
    from taskvec.streaming import default_threads

    judge = None
    if args.judge is not None:
        folder = Path(args.out) / "verdicts"
        judge = parse_judge(args.judge, device=args.device, folder=folder, seed=args.seed)
    workers = default_threads() if args.workers is None else args.workers
    return Tools(allow_code_execution=args.allow_code_execution, judge=judge, workers=workers)


def _places(texts: Sequence[str]) -> DataPlaces:
    from taskvec.evaluation.data import DataPlaces

    folders, by_task = [], {}
    for text in texts:
        task, equals, path = text.partition("=")
        if equals and not Path(text).exists():
            by_task[task] = Path(path).expanduser()
        elif Path(text).expanduser().is_dir():
            folders.append(Path(text).expanduser())
        else:
            raise UsageError(f"--data {text}: no such folder; give DIR, or TASK=PATH")
    return DataPlaces(tuple(folders), by_task)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="sample", delay=2, file=sys.stderr) as bar:
        yield bar.update


def _print(task: str, rows: Sequence[Compared], reference: str, single: str | None) -> None:
    """The models in one task; 95 % intervals in brackets."""
    from taskvec.evaluation.figures import span

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
    print("Findings:" if findings else "Findings: none")
    for finding in findings:
        print(textwrap.fill(f"- {finding.text}", 100, subsequent_indent="  "))
    print()


def _how(rows: Sequence[Compared]) -> str:
    """Context and stride, where texts were read in windows; by model, where they differ."""
    from taskvec.evaluation.task import Document

    asked = (request for sample in rows[0].result.samples for request in sample.requests)
    if not any(isinstance(request, Document) for request in asked):
        return ""
    said = {
        row.result.model: "context {context}, stride {stride}".format_map(row.result.about)
        for row in rows
    }
    if len(set(said.values())) == 1:
        return f", {said[rows[0].result.model]}"
    return "".join(f"; {model}: {how}" for model, how in said.items())


def _list(*, as_json: bool) -> int:
    from taskvec.evaluation.tasks import brought, tasks

    known = {**tasks(), **brought()}
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
