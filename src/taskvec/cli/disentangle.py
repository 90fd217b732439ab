"""`taskvec disentangle MODEL`: how task vectors interact, add up, and can be taken away."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.cli import disentangle_tables as tables
from taskvec.cli.reading import add_reading, fields_from
from taskvec.errors import UsageError, nearest

if TYPE_CHECKING:
    from taskvec.disentanglement import ModelTask

OUT = "taskvec-disentangle"
MEASURES = ("error", "addition", "negation", "linearity")
# Coefficients of each measure: how many, from, to.
GRIDS = {
    "error": (15, -2.0, 2.0),
    "addition": (21, 0.0, 1.0),
    "negation": (21, 0.0, 1.0),
    "linearity": (8, 0.25, 2.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument(
        "model", metavar="MODEL", help="what the vectors start from: a folder or a name on the hub"
    )
    parser.add_argument(
        "--task",
        metavar="NAME=VECTOR",
        action="append",
        default=[],
        help="a vector's file, a fine-tuned folder or an adapter; repeatable",
    )
    parser.add_argument(
        "--measure",
        metavar="A,B,…",
        default="error",
        help="error (default), addition, negation, linearity",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="what a task is measured on: a file, a folder, or hub:NAME[:CONFIG[:SPLIT]]",
    )
    data.add_argument(
        "--validation",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="what coefficients are chosen on (addition, negation), and probes are fitted to",
    )
    data.add_argument("--control", metavar="NAME", help="name of the data that negation must keep")
    add_reading(data)
    data.add_argument("--limit", type=int, metavar="N", help="examples of a task (all)")
    data.add_argument("--seed", type=int, default=0, help="of examples and intervals (0)")
    how = parser.add_argument_group("what is measured")
    how.add_argument(
        "--points", type=int, metavar="N", help="coefficients (error 15 × 15, others 21, 8)"
    )
    how.add_argument("--low", type=float, metavar="X", help="the smallest (error -2, others 0)")
    how.add_argument("--high", type=float, metavar="X", help="the largest (2; λ 1)")
    how.add_argument(
        "--distance", default="prediction", help="of error: prediction (default) | symmetric_kl"
    )
    how.add_argument(
        "--methods",
        metavar="A,B,…",
        default="task_arithmetic",
        help="that merge, of addition and negation; see `taskvec methods` (task_arithmetic)",
    )
    how.add_argument("--base", metavar="DIR", help="model before instruction tuning (LATA)")
    how.add_argument("--by-task", action="store_true", help="addition: a coefficient for each task")
    how.add_argument(
        "--keep", type=float, default=0.95, metavar="SHARE", help="of the control (0.95)"
    )
    how.add_argument(
        "--parts", default="module", help="of linearity: whole | module (default) | block"
    )
    how.add_argument(
        "--linearised", action="store_true", help="measure the model's tangent instead of the model"
    )
    asking = parser.add_argument_group("how the model is asked")
    asking.add_argument(
        "--plain", action="store_true", help="prompts as they are, without the chat template"
    )
    asking.add_argument(
        "--head", metavar="KIND", help="of a classifier: own | probe | zero-shot | features (none)"
    )
    asking.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="of a zero-shot head, {} is the class; repeatable ('a photo of a {}.')",
    )
    asking.add_argument("--context", type=int, metavar="N", help="tokens of a window over a text")
    asking.add_argument("--image-size", type=int, metavar="PX", help="height and width of images")
    asking.add_argument("--dtype", default="auto", help="auto | float32 | bfloat16 | float16")
    asking.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:1 | mps")
    asking.add_argument("--batch-tokens", type=int, metavar="N", help="(by the memory there is)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="DIR", default=OUT, help=f"results, figures and records; resumes ({OUT})"
    )
    output.add_argument("--json", action="store_true", help="print the results as JSON")
    output.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    measures = _words(args.measure, MEASURES, "--measure")
    vectors, data = _named(args.task, "--task"), _named(args.data, "--data")
    validation = _named(args.validation, "--validation")
    _check(args, measures, vectors, data, validation)

    from taskvec.disentanglement.opening import open_vectors
    from taskvec.files import write_text

    module, tasks, chosen_on = _opened(args, vectors, data, validation)
    models = open_vectors(args.model, module, vectors, Path(args.out))
    if args.linearised:
        from taskvec.disentanglement import linearised

        module, states = linearised(module, models)
        models = dict(states)
    told: dict[str, Any] = {"model": args.model}
    for measure in measures:
        told[measure] = _MEASURED[measure](args, module, models, tasks, chosen_on)
    folder = Path(args.out)
    write_text(folder / "results.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
    else:
        print(f"{args.out}/: results.json, and what was measured")
    return 0


def _check(
    args: argparse.Namespace,
    measures: Sequence[str],
    vectors: Mapping[str, str],
    data: Mapping[str, str],
    validation: Mapping[str, str],
) -> None:
    """Find what does not go together before anything is loaded."""
    if not vectors:
        raise UsageError("no task vector is given; give --task NAME=VECTOR")
    known = {*vectors, *([args.control] if args.control else [])}
    for flag, given in (("--data", data), ("--validation", validation)):
        for name in given:
            if name not in known:
                raise UsageError(f"{flag} {name}: is no task; give --task {name}=VECTOR")
    wanted = set(vectors)
    if "negation" in measures:
        if args.control is None:
            raise UsageError("negation needs data that it must keep: give --control NAME")
        if set(vectors) == {args.control}:
            raise UsageError(f"--control {args.control}: is what is taken away; give other data")
        wanted |= {args.control}
    needs_validation = {"addition", "negation"} & set(measures)
    for flag, given in (("--data", data), ("--validation", validation)):
        lacking = sorted(wanted - set(given))
        if lacking and (flag == "--data" or needs_validation):
            raise UsageError(f"{flag} {lacking[0]}=PATH is missing")
    if "error" in measures and len(vectors) != 2:
        raise UsageError(f"the error is of two tasks; got {len(vectors)}: {', '.join(vectors)}")
    if args.linearised and "linearity" in measures:
        raise UsageError("a linearised model is linear; measure the linearity of the model itself")
    if "linearity" in measures and 0 in _coefficients(args, "linearity"):
        raise UsageError(
            "linearity is measured at coefficients other than 0; change --low, --high or --points"
        )


def _opened(
    args: argparse.Namespace,
    vectors: Mapping[str, str],
    data: Mapping[str, str],
    validation: Mapping[str, str],
) -> tuple[Any, dict[str, ModelTask], dict[str, ModelTask]]:
    """The model, and its tasks: what is reported, and what coefficients are chosen on."""
    from taskvec.disentanglement.opening import MeasuringOptions, open_tasks
    from taskvec.training.data import Reading, read_data

    reading = Reading(args.format, fields_from(args), args.limit, args.seed)
    measured, others = (
        {name: read_data(path, reading) for name, path in by_task.items()}
        for by_task in (data, validation)
    )
    asking = MeasuringOptions(
        dtype=args.dtype,
        device=args.device,
        context=args.context,
        is_plain=args.plain,
        image_size=args.image_size,
        batch_tokens=args.batch_tokens,
        head=args.head,
        templates=tuple(args.template or ()),
    )
    return open_tasks(args.model, vectors, measured, others, asking)


def _error(args: Any, module: Any, vectors: Any, tasks: Any, chosen_on: Any) -> dict[str, Any]:
    from taskvec.disentanglement import disentanglement_error
    from taskvec.files import write_text

    found = disentanglement_error(
        module,
        vectors,
        {name: tasks[name] for name in vectors},
        alphas=_coefficients(args, "error"),
        distance=args.distance,
        **_common(args),
    )
    told, folder = found.to_json(), Path(args.out)
    write_text(folder / "error.csv", found.to_csv())
    _draw(told, folder / "error.png")
    if not args.json:
        tables.print_error(found)
    return told


def _draw(told: Mapping[str, Any], path: Path) -> None:
    """The heat map, where matplotlib is installed."""
    from taskvec.errors import MissingExtraError
    from taskvec.reporting.heat_map import draw_heat_map

    try:
        draw_heat_map(told, path)
    except MissingExtraError as error:
        print(f"taskvec: no heat map: {error}", file=sys.stderr)


def _addition(args: Any, module: Any, vectors: Any, tasks: Any, chosen_on: Any) -> list[Any]:
    from taskvec.disentanglement import task_addition

    found = task_addition(
        module,
        vectors,
        {name: chosen_on[name] for name in vectors},
        {name: tasks[name] for name in vectors},
        methods=_methods(args),
        base=args.base,
        search="by-task" if args.by_task else "shared",
        scales=_coefficients(args, "addition"),
        **_common(args),
    )
    if not args.json:
        tables.print_additions(list(found.values()))
    return [each.to_json() for each in found.values()]


def _negation(args: Any, module: Any, vectors: Any, tasks: Any, chosen_on: Any) -> dict[str, Any]:
    from taskvec.disentanglement import task_negation

    told: dict[str, Any] = {}
    for name, vector in vectors.items():
        if name == args.control:
            continue
        splits = [{"target": by[name], "control": by[args.control]} for by in (chosen_on, tasks)]
        found = task_negation(
            module,
            vector,
            *splits,
            methods=_methods(args),
            base=args.base,
            keep=args.keep,
            scales=_coefficients(args, "negation"),
            **_common(args),
        )
        told[name] = [each.to_json() for each in found.values()]
        if not args.json:
            tables.print_negations(name, args.control, list(found.values()))
    return told


def _linearity(args: Any, module: Any, vectors: Any, tasks: Any, chosen_on: Any) -> list[Any]:
    from taskvec.disentanglement import linearity

    found = linearity(
        module,
        vectors,
        {name: tasks[name] for name in vectors},
        alphas=_coefficients(args, "linearity"),
        parts=args.parts,
        **_common(args),
    )
    if not args.json:
        tables.print_linearity(found)
    return [each.to_json() for each in found]


_MEASURED: Mapping[str, Callable[..., Any]] = {
    "error": _error,
    "addition": _addition,
    "negation": _negation,
    "linearity": _linearity,
}


def _common(args: argparse.Namespace) -> dict[str, Any]:
    from taskvec.evaluation.evaluate import silent

    progress = silent if args.quiet else partial(common.bar, unit="point")
    return {"out": args.out, "seed": args.seed, "progress": progress}


def _coefficients(args: argparse.Namespace, measure: str) -> Sequence[float]:
    from taskvec.disentanglement import coefficients

    given = (args.points, args.low, args.high)
    own = [d if g is None else g for g, d in zip(given, GRIDS[measure], strict=True)]
    return coefficients(int(own[0]), own[1], own[2])


def _methods(args: argparse.Namespace) -> dict[str, str]:
    from taskvec.methods import METHODS

    names = _words(args.methods, tuple(METHODS), "--methods")
    return {name: name for name in names}


def _words(text: str, known: Sequence[str], flag: str) -> list[str]:
    found = list(dict.fromkeys(word for word in text.split(",") if word))
    for word in found or [""]:
        if word not in known:
            raise UsageError(f"{flag}: unknown {word!r}; {nearest(word, list(known))}")
    return found


def _named(texts: Sequence[str], flag: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, path = _pair(text, flag)
        if name in found:
            raise UsageError(f"{flag} {name} is given twice; give each a name of its own")
        found[name] = path
    return found


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, _, rest = text.partition("=")
    if not name or not rest:
        raise UsageError(f"{flag} must be NAME=…; got {text!r}")
    return name, rest
