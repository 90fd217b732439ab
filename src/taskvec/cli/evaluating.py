"""What the verbs that evaluate share: options about data, asking and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli.commands import Arguments, Option, WholeNumber
from taskvec.cli.progress import Bars
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.evaluation.data import DataPlaces

DATA_HEAD, ASKING_HEAD, SCORING_HEAD = "Evaluation data", "Asking models", "Scoring answers"

DATA = (
    Option("--data", metavar="DIR|TASK=PATH", multiple=True, heading=DATA_HEAD,
           help="where data are, for all tasks or for one; repeatable; other data come from the "
           "hub"),
    Option("--shots", type=int, metavar="N", heading=DATA_HEAD, show_default="the task's own",
           help="worked examples before a question"),
    Option("--draws", type=int, default=1, metavar="N", heading=DATA_HEAD,
           help="answers to a prompt, where a task can use several"),
    Option("--include-path", type=click.Path(), metavar="DIR", heading=DATA_HEAD,
           help="your task files for harness:… tasks", more="[how](../how-to/use-the-harness.md)"),
)  # fmt: skip
SEED = Option(
    "--seed", type=WholeNumber(min=0), metavar="N", heading=DATA_HEAD, show_default="0",
    help="seed of samples, draws and intervals, and of recipes among the models",
)  # fmt: skip
LIMIT = Option(
    "--limit", type=int, metavar="N", heading=DATA_HEAD, show_default="all",
    help="samples of a task, drawn by the seed",
)  # fmt: skip
LOADED_DTYPE = Option(
    "--dtype", "model_dtype", default="auto", heading=ASKING_HEAD,
    words=("auto", "float32", "bfloat16", "float16"),
    help="element type of the loaded weights; auto is as stored on an accelerator, float32 on a "
    "CPU",
)  # fmt: skip
DEVICE = Option(
    "--device", default="auto", heading=ASKING_HEAD, words=("auto", "cpu", "cuda", "cuda:1", "mps"),
    help="where models run",
)  # fmt: skip
BATCH_TOKENS = Option(
    "--batch-tokens", type=int, metavar="N", heading=ASKING_HEAD,
    show_default="by the memory there is", help="tokens of a batch, with padding",
)  # fmt: skip
ASKING = (
    Option("--apply-chat-template", is_flag=True, heading=ASKING_HEAD,
           help="harness:… tasks ask in conversations"),
    Option("--context", type=int, metavar="N", heading=ASKING_HEAD,
           show_default="the model's, at most 2,048", help="tokens of a window over a text"),
    Option("--stride", type=int, metavar="N", heading=ASKING_HEAD, show_default="the window",
           help="tokens that each window after the first predicts"),
    Option("--truncate", is_flag=True, heading=ASKING_HEAD,
           help="cut prompts that do not fit the context at the front instead of refusing them"),
    LOADED_DTYPE, DEVICE, BATCH_TOKENS,
)  # fmt: skip
SCORING = (
    Option("--judge", metavar="JUDGE", heading=SCORING_HEAD, show_default="prefixes",
           help="judge of harm: prefixes[:FILE], classifier:MODEL:LABEL, endpoint:URL?model=NAME",
           more="[how](../how-to/measure-harm.md)"),
    Option("--allow-code-execution", is_flag=True, heading=SCORING_HEAD,
           help="run programs that models write, in a sandbox (humaneval, mbpp)",
           more="[how](../how-to/run-generated-code.md)"),
    Option("--workers", type=int, metavar="N", heading=SCORING_HEAD,
           show_default="the processors, at most 8", help="programs that run at once"),
)  # fmt: skip


def out_option(default: str, what: str) -> Option:
    """Where results go, of verbs that resume in that folder."""
    return Option(
        "-o", "--out", type=click.Path(), metavar="DIR", default=default, heading="Output",
        help=f"{what}; the same command continues in it",
    )  # fmt: skip


def keywords_from(args: Arguments, seed: int, *, limit: int | None = None) -> dict[str, Any]:
    """Keywords of `taskvec.evaluation.options`; records go to the output folder of the command."""
    from taskvec.evaluation.options import EvaluationKeywords

    given = vars(args) | {"data": places(args.data), "dtype": args.model_dtype}
    given |= {"limit": limit, "seed": seed, "progress": Bars(args, unit="samples")}
    return {key: given[key] for key in EvaluationKeywords.__annotations__ if key in given}


def places(texts: Sequence[str], flag: str = "--data") -> DataPlaces:
    """Where data are: DIR for all tasks, TASK=PATH for one.

    Raises:
        UsageError: a folder does not exist.
    """
    from taskvec.evaluation.data import DataPlaces

    folders, by_task = [], {}
    for text in texts:
        task, equals, path = text.partition("=")
        if equals and not Path(text).exists():
            by_task[task] = Path(path).expanduser()
        elif Path(text).expanduser().is_dir():
            folders.append(Path(text).expanduser())
        else:
            raise UsageError(f"{flag} {text}: no such folder; give DIR, or TASK=PATH")
    return DataPlaces(tuple(folders), by_task)
