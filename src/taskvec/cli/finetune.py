"""`taskvec finetune MODEL`: train part of a model; what changed is a task vector."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.cli.reading import add_reading, fields_from

if TYPE_CHECKING:
    from taskvec.training.api import Finetuned

# Flags that are settings of the same name, and how they are read.
_SETTINGS: Mapping[str, tuple[type, str, str]] = {
    "steps": (int, "N", "updates (2000; language models 1000)"),
    "batch-size": (int, "N", "examples of a step, over all devices (128; language models 16)"),
    "micro-batch": (int, "N", "examples at once on a device; smaller needs less memory (all)"),
    "learning-rate": (float, "RATE", "its peak (1e-5; language models 2e-5)"),
    "weight-decay": (float, "RATE", "of AdamW (0.1)"),
    "warmup-steps": (int, "N", "steps up to the peak (500, at most a quarter of the steps)"),
    "clip": (float, "NORM", "longest gradient (1.0)"),
    "seed": (int, "N", "of the order of examples, of what is drawn, of dropout (0)"),
    "precision": (str, "KIND", "auto | float32 | bfloat16; weights stay float32"),
    "device": (str, "NAME", "auto | cpu | cuda | cuda:1 | mps"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the hub")
    parser.add_argument(
        "--train",
        metavar="WHAT",
        default="attention",
        help="attention (default), attention-qv, attention+bias, mlp, linear, norms, embeddings, "
        "heads, all, names and patterns, joined by commas; or lora",
    )
    parser.add_argument(
        "--layers", metavar="FILE", help="overrides of the layer table: `layers` of a recipe"
    )
    parser.add_argument(
        "--linearised", action="store_true", help="train the tangent of the model at its weights"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="PATH",
        required=True,
        help="a file, a folder, or hub:NAME[:CONFIG[:SPLIT]]",
    )
    data.add_argument(
        "--validation", metavar="PATH|SHARE", help="likewise; or a share of the data to hold out"
    )
    add_reading(data)
    data.add_argument("--limit", type=int, metavar="N", help="examples, drawn by the seed (all)")
    data.add_argument("--context", type=int, metavar="N", help="most tokens of an example")
    data.add_argument("--truncate", action="store_true", help="cut longer ones, at the end")
    data.add_argument("--image-size", type=int, metavar="PX", help="height and width of images")
    head = parser.add_argument_group("head of a classifier")
    head.add_argument(
        "--head",
        choices=("own", "probe", "zero-shot"),
        help="the model's own; a linear probe, fitted first; CLIP's, from the names of the classes "
        "(its own if it has one, or else a probe)",
    )
    head.add_argument(
        "--pool", help="cls | mean | last | pooler: of features (texts: mean; images: cls)"
    )
    head.add_argument(
        "--template",
        metavar="TEXT",
        action="append",
        help="of a zero-shot head, {} is the class; repeatable ('a photo of a {}.')",
    )
    training = parser.add_argument_group("training")
    for name, (kind, metavar, text) in _SETTINGS.items():
        training.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    training.add_argument("--label-smoothing", type=float, default=0.0, metavar="SHARE", help="(0)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="DIR", required=True, help="vector, metrics and state; resumes"
    )
    output.add_argument(
        "--save", choices=("vector", "model"), default="vector", help="model: also as a folder"
    )
    output.add_argument("--force", action="store_true", help="remove what is in --out first")
    output.add_argument("--save-every", type=int, default=100, metavar="N", help="steps (100)")
    output.add_argument(
        "--validate-every", type=int, metavar="N", help="steps (before the first and at the end)"
    )
    output.add_argument(
        "--tensorboard", action="store_true", help="write events for TensorBoard too"
    )
    output.add_argument("--json", action="store_true", help="print the result as JSON")
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    fields = fields_from(args)

    from taskvec.recipes.reading import read_layers
    from taskvec.training.api import finetune
    from taskvec.training.data import Reading
    from taskvec.training.heads import TEMPLATES
    from taskvec.training.loop import is_first_process
    from taskvec.training.models import HeadOptions
    from taskvec.training.run import RunOutput
    from taskvec.training.tokens import Fitting

    names = [name.replace("-", "_") for name in _SETTINGS]
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    started = time.perf_counter()
    is_first = is_first_process()
    with _Bar(quiet=args.quiet or not is_first) as bar:
        trained = finetune(
            args.model,
            args.data,
            train=args.train,
            layers=() if args.layers is None else read_layers(args.layers),
            validation=_validation(args.validation),
            linearised=args.linearised,
            settings=settings,
            reading=Reading(args.format, fields, args.limit, args.seed or 0),
            asking=HeadOptions(
                Fitting(args.context, args.truncate),
                args.image_size,
                args.label_smoothing,
                args.head,
                args.pool,
                tuple(args.template or TEMPLATES),
            ),
            output=RunOutput(
                out=Path(args.out).expanduser(),
                force=args.force,
                save_every=args.save_every,
                validate_every=args.validate_every,
                saves_model=args.save == "model",
                tensorboard=args.tensorboard,
                tell=bar.tell,
                say=_say if is_first else lambda text: None,
            ),
        )
    if is_first:
        _print(_result(trained, time.perf_counter() - started), as_json=args.json)
    return 0


def _validation(text: str | None) -> str | float | None:
    """A path, or a share."""
    if text is None or Path(text).expanduser().exists():
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _say(text: str) -> None:
    print(f"taskvec: {text}", file=sys.stderr)


class _Bar:
    """A progress bar, from the first step on that is done here."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def tell(self, record: Mapping[str, Any], steps: int) -> None:
        """A step was done, of so many in all."""
        if self.quiet or "loss" not in record:
            return
        if self.bar is None:
            from tqdm import tqdm

            done = record["step"] - 1
            self.bar = tqdm(total=steps, initial=done, desc="train", unit="step", file=sys.stderr)
        self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        self.bar.update()


def _result(trained: Finetuned, seconds: float) -> dict[str, Any]:
    steps = [record for record in trained.records if "loss" in record]
    validations = [record for record in trained.records if "validation_loss" in record]
    return {
        "path": str(trained.path),
        "tensors": len(trained.selection.names),
        "parameters": trained.selection.parameters,
        "total": trained.selection.total,
        "steps": len(steps),
        "loss": steps[-1]["loss"],
        "validations": validations,
        "seconds": round(seconds, 3),
    }


def _print(result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    validations = result["validations"]
    if validations:
        common.show(
            [
                (each["step"], each["validation_loss"], each.get("validation_accuracy"))
                for each in validations
            ],
            ("step", "validation loss", "accuracy"),
        )
    print(f"{result['path']}  ({result['steps']:,} steps; {result['seconds']:.1f} s)")
