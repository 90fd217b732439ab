"""`taskvec disentangle MODEL`: how task vectors interact, add up, and can be taken away."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import disentangle_tables as tables
from taskvec.cli import evaluating
from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb, pairs_of
from taskvec.cli.options import READING, fields_from
from taskvec.cli.printing import answer
from taskvec.cli.progress import Bars
from taskvec.cli.streams import say
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


def run(args: Arguments) -> int:
    """Run this verb."""
    measures = _words(args.measure, MEASURES, "--measure")
    vectors, data = (
        pairs_of(given, flag, "NAME=…")
        for given, flag in ((args.task, "--task"), (args.data, "--data"))
    )
    validation = pairs_of(args.validation, "--validation", "NAME=…")
    _check(args, measures, vectors, data, validation)

    from taskvec.disentanglement.opening import open_vectors
    from taskvec.files import write_text

    module, tasks, chosen_on = _open_tasks(args, vectors, data, validation)
    models = open_vectors(args.model, module, vectors, Path(args.out))
    if args.linearised:
        from taskvec.disentanglement import linearised

        module, states = linearised(module, models)
        models = dict(states)
    record: dict[str, Any] = {"model": args.model}
    for measure in measures:
        record[measure] = _MEASURED[measure](args, module, models, tasks, chosen_on)
    folder = Path(args.out)
    write_text(folder / "results.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if args.json:
        answer(record)
    else:
        print(f"{args.out}/: results.json, and what was measured")
    return 0


def _check(
    args: Arguments,
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
                raise UsageError(f"{flag} {name}: unknown task; give --task {name}=VECTOR")
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


def _open_tasks(
    args: Arguments,
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
        dtype=args.model_dtype,
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
    record, folder = found.to_json(), Path(args.out)
    write_text(folder / "error.csv", found.to_csv())
    _draw(record, folder / "error.svg")
    if not args.json:
        tables.print_error(found)
    return record


def _draw(record: Mapping[str, Any], path: Path) -> None:
    """The heat map, where the extra is installed."""
    from taskvec.errors import MissingExtraError
    from taskvec.reporting.figures import draw_heat_map

    try:
        draw_heat_map(record, path)
    except MissingExtraError as error:
        say(f"no heat map: {error}")


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

    record: dict[str, Any] = {}
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
        record[name] = [each.to_json() for each in found.values()]
        if not args.json:
            tables.print_negations(name, args.control, list(found.values()))
    return record


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


def _common(args: Arguments) -> dict[str, Any]:
    return {"out": args.out, "seed": args.seed, "progress": Bars(args, unit="points")}


def _coefficients(args: Arguments, measure: str) -> Sequence[float]:
    from taskvec.disentanglement import coefficients

    given = (args.points, args.low, args.high)
    own = [d if g is None else g for g, d in zip(given, GRIDS[measure], strict=True)]
    return coefficients(int(own[0]), own[1], own[2])


def _methods(args: Arguments) -> dict[str, str]:
    from taskvec.methods import METHODS

    names = _words(args.methods, tuple(METHODS), "--methods")
    return {name: name for name in names}


def _words(text: str, known: Sequence[str], flag: str) -> list[str]:
    found = list(dict.fromkeys(word for word in text.split(",") if word))
    for word in found or [""]:
        if word not in known:
            raise UsageError(f"{flag}: unknown {word!r}; {nearest(word, list(known))}")
    return found


DATA_HEAD, MEASURE_HEAD = "Data", "What is measured"
VERB = Verb(
    "disentangle", run, [
        Argument("model", metavar="MODEL",
                 help="model that the vectors start from: a folder or a name on the hub"),
        Option("--task", metavar="NAME=VECTOR", multiple=True,
               help="a vector's file, a fine-tuned folder or an adapter; repeatable"),
        Option("--measure", metavar="A,B,…", default="error",
               help="error, addition, negation, linearity"),
        Option("--data", metavar="NAME=PATH", multiple=True, heading=DATA_HEAD,
               help="what a task is measured on: a file, a folder, or hub:NAME[:CONFIG[:SPLIT]]; "
               "repeatable"),
        Option("--validation", metavar="NAME=PATH", multiple=True, heading=DATA_HEAD,
               help="what coefficients are chosen on (addition, negation), and probes are fitted "
               "to; repeatable"),
        Option("--control", metavar="NAME", heading=DATA_HEAD,
               help="negation: name of the data whose accuracy must be kept; a vector of that name "
               "is not subtracted"),
        Option("--limit", type=int, metavar="N", heading=DATA_HEAD, show_default="all",
               help="examples of a task, drawn by the seed"),
        Option("--seed", type=int, default=0, metavar="N", heading=DATA_HEAD,
               help="seed of examples, intervals and methods that draw random numbers"),
        *READING,
        Option("--points", type=int, metavar="N", heading=MEASURE_HEAD,
               show_default="error 15 × 15, addition and negation 21, linearity 8",
               help="number of coefficients"),
        Option("--low", type=float, metavar="X", heading=MEASURE_HEAD,
               show_default="error -2, linearity 0.25, others 0", help="smallest coefficient"),
        Option("--high", type=float, metavar="X", heading=MEASURE_HEAD,
               show_default="error and linearity 2, others 1", help="largest coefficient"),
        Option("--distance", default="prediction", heading=MEASURE_HEAD,
               words=("prediction", "symmetric_kl"), help="distance of error"),
        Option("--methods", metavar="A,B,…", default="task_arithmetic", heading=MEASURE_HEAD,
               help="methods that merge in addition and negation"),
        Option("--base", metavar="MODEL", heading=MEASURE_HEAD,
               help="model before instruction tuning, for LATA"),
        Option("--by-task", is_flag=True, heading=MEASURE_HEAD,
               help="addition: a coefficient for each task"),
        Option("--keep", type=float, default=0.95, metavar="SHARE", heading=MEASURE_HEAD,
               help="negation: share of the control's accuracy to keep"),
        Option("--parts", default="module", heading=MEASURE_HEAD,
               words=("whole", "module", "block"), help="parts of linearity"),
        Option("--linearised", is_flag=True, heading=MEASURE_HEAD,
               help="measure the model's tangent instead of the model"),
        Option("--plain", is_flag=True, heading=evaluating.ASKING_HEAD,
               help="prompts as they are, without the chat template"),
        Option("--head", heading=evaluating.ASKING_HEAD, show_default="none",
               words=("own", "probe", "zero-shot", "features"), help="head of a classifier"),
        Option("--template", metavar="TEXT", multiple=True, heading=evaluating.ASKING_HEAD,
               show_default="'a photo of a {}.'",
               help="template of a zero-shot head; {} is the class; repeatable"),
        Option("--context", type=int, metavar="N", heading=evaluating.ASKING_HEAD,
               help="tokens of a window over a text"),
        Option("--image-size", type=int, metavar="PX", heading=evaluating.ASKING_HEAD,
               show_default="what the model expects", help="height and width of images"),
        evaluating.LOADED_DTYPE, evaluating.DEVICE, evaluating.BATCH_TOKENS,
        evaluating.out_option(OUT, "results, figures and records"), JSON,
    ],
    extra="train",
    page="""\
Measures how task vectors of a model interact (`error`), how well they add up (`addition`), how
cleanly one is subtracted (`negation`) and where their effect is linear (`linearity`);
[how](../how-to/measure-disentanglement.md), and [what the figures
mean](../concepts/disentanglement.md).""",
)  # fmt: skip
