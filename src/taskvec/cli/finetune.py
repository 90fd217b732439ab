"""`taskvec finetune MODEL`: train part of a model; what changed is a task vector."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb, given_of
from taskvec.cli.options import READING, fields_from
from taskvec.cli.printing import answer, show
from taskvec.cli.progress import Steps
from taskvec.cli.streams import say

if TYPE_CHECKING:
    from taskvec.training.api import Finetuned


def run(args: Arguments) -> int:
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

    started = time.perf_counter()
    is_first, label = is_first_process(), f"finetune {Path(args.model).name}"
    with Steps(args) as bar:

        def record_step(record: Mapping[str, Any], steps: int) -> None:
            if is_first and "loss" in record:
                bar.tell(label, record["step"], steps, record["loss"])

        trained = finetune(
            args.model,
            args.data,
            train=args.train,
            layers=() if args.layers is None else read_layers(args.layers),
            validation=_validation(args.validation),
            linearised=args.linearised,
            settings=given_of(args, SETTINGS),
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
                on_record=record_step,
                on_message=say if is_first else lambda text: None,
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
        answer(result)
        return
    validations = result["validations"]
    if validations:
        show(
            [
                (each["step"], each["validation_loss"], each.get("validation_accuracy"))
                for each in validations
            ],
            ("step", "validation loss", "accuracy"),
        )
    print(f"{result['path']}  ({result['steps']:,} steps; {result['seconds']:.1f} s)")


DATA_HEAD, HEAD_HEAD, TRAINING_HEAD, OUTPUT_HEAD = (
    "Data", "Head of a classifier", "Training", "Output",
)  # fmt: skip
# Options that are settings of the same name.
SETTINGS = (
    Option("--steps", type=int, metavar="N", heading=TRAINING_HEAD,
           show_default="2000; language models 1000", help="updates"),
    Option("--batch-size", type=int, metavar="N", heading=TRAINING_HEAD,
           show_default="128; language models 16", help="examples of a step, over all devices"),
    Option("--micro-batch", type=int, metavar="N", heading=TRAINING_HEAD, show_default="all",
           help="examples at once on a device; fewer need less memory"),
    Option("--learning-rate", type=float, metavar="RATE", heading=TRAINING_HEAD,
           show_default="1e-5; language models 2e-5", help="peak of the learning rate"),
    Option("--weight-decay", type=float, metavar="RATE", heading=TRAINING_HEAD, show_default="0.1",
           help="weight decay of AdamW"),
    Option("--warmup-steps", type=int, metavar="N", heading=TRAINING_HEAD,
           show_default="500, at most a quarter of the steps", help="steps up to the peak"),
    Option("--clip", type=float, metavar="NORM", heading=TRAINING_HEAD, show_default="1.0",
           help="largest norm of the gradient"),
    Option("--seed", type=int, metavar="N", heading=TRAINING_HEAD, show_default="0",
           help="seed of the order of examples, of what is drawn, and of dropout"),
    Option("--precision", heading=TRAINING_HEAD, show_default="auto",
           words=("auto", "float32", "bfloat16"),
           help="precision of the arithmetic; auto is bfloat16 on an accelerator that has it; "
           "weights stay float32"),
    Option("--device", heading=TRAINING_HEAD, show_default="auto",
           words=("auto", "cpu", "cuda", "cuda:1", "mps"), help="where the model is trained"),
)  # fmt: skip
TRUNCATE = Option(
    "--truncate", is_flag=True, heading=DATA_HEAD,
    help="cut longer examples at the end instead of refusing them",
)  # fmt: skip
IMAGE_SIZE = Option(
    "--image-size", type=int, metavar="PX", heading=DATA_HEAD,
    show_default="what the model expects", help="height and width of images",
)  # fmt: skip
POOL = Option(
    "--pool", heading=HEAD_HEAD, words=("cls", "mean", "last", "pooler"),
    show_default="mean of texts, cls of images", help="how features are pooled",
)  # fmt: skip
VERB = Verb(
    "finetune", run, [
        Argument("model", metavar="MODEL", help="a folder, or a name on the hub"),
        Option("--train", metavar="WHAT", default="attention",
               help="attention, attention-qv, attention+bias, mlp, linear, norms, embeddings, "
               "heads, all, names and patterns, joined by commas; or lora"),
        Option("--layers", type=click.Path(), metavar="FILE",
               help="overrides of the layer table: `layers` of a recipe"),
        Option("--linearised", is_flag=True, help="train the model's tangent at its weights"),
        Option("--data", metavar="PATH", required=True, heading=DATA_HEAD,
               help="a file, a folder, or hub:NAME[:CONFIG[:SPLIT]]"),
        Option("--validation", metavar="PATH|SHARE", heading=DATA_HEAD,
               help="validation data, or a share of the data to hold out"),
        Option("--limit", type=int, metavar="N", heading=DATA_HEAD, show_default="all",
               help="examples, drawn by the seed"),
        Option("--context", type=int, metavar="N", heading=DATA_HEAD,
               show_default="what the model reads; running text at most 512",
               help="most tokens of an example"),
        TRUNCATE, IMAGE_SIZE,
        *READING,
        Option("--head", type=click.Choice(("own", "probe", "zero-shot")), heading=HEAD_HEAD,
               show_default="its own, or else a probe",
               help="the model's own, a linear probe that is fitted first, or CLIP's from the "
               "names of the classes"),
        POOL,
        Option("--template", metavar="TEXT", multiple=True, heading=HEAD_HEAD,
               show_default="'a photo of a {}.'",
               help="template of a zero-shot head; {} is the class; repeatable"),
        *SETTINGS,
        Option("--label-smoothing", type=float, default=0.0, metavar="SHARE", heading=TRAINING_HEAD,
               help="share of the target that is spread over all classes or tokens"),
        Option("-o", "--out", type=click.Path(), metavar="DIR", required=True, heading=OUTPUT_HEAD,
               help="vector, metrics and state; the same command continues in it"),
        Option("--save", type=click.Choice(("vector", "model")), default="vector",
               heading=OUTPUT_HEAD, help="what to save; model: also the trained model as a folder"),
        Option("--force", is_flag=True, heading=OUTPUT_HEAD, help="remove what is in --out first"),
        Option("--save-every", type=int, default=100, metavar="N", heading=OUTPUT_HEAD,
               help="steps between two states"),
        Option("--validate-every", type=int, metavar="N", heading=OUTPUT_HEAD,
               show_default="before the first and at the end", help="steps between validations"),
        Option("--tensorboard", is_flag=True, heading=OUTPUT_HEAD,
               help="write events for TensorBoard too"),
        JSON,
    ],
    extra="train",
    page="""\
Trains the parameters that `--train` selects and writes the change as a task vector;
[how](../how-to/finetune.md).""",
)  # fmt: skip
