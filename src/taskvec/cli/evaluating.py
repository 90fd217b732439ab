"""What the verbs that evaluate share: flags about data, asking and scoring, and their options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.evaluation.data import DataPlaces
    from taskvec.evaluation.evaluate import Options
    from taskvec.evaluation.task import Tools


def add_data(parser: argparse.ArgumentParser) -> Any:
    """The flags about data; their group, for what a verb has besides."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="DIR|TASK=PATH",
        action="append",
        default=[],
        help="where data lie, for all tasks or for one; what is not there comes from the hub",
    )
    data.add_argument("--shots", type=int, metavar="N", help="worked examples before a question")
    data.add_argument("--draws", type=int, default=1, metavar="N", help="answers to a prompt (1)")
    data.add_argument("--seed", type=int, default=0, help="of samples, draws and intervals (0)")
    data.add_argument(
        "--include-path", metavar="DIR", help="task files of your own for harness:… tasks"
    )
    return data


def add_asking(parser: argparse.ArgumentParser) -> None:
    """The flags about how models are asked."""
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


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """The flags about how answers are scored."""
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


def pair(text: str, flag: str, form: str) -> tuple[str, str]:
    """Both sides of LEFT=RIGHT.

    Raises:
        UsageError: it is not that.
    """
    left, _, right = text.partition("=")
    if not left or not right:
        raise UsageError(f"{flag} must be {form}; got {text!r}")
    return left, right


def options_from(args: argparse.Namespace, *, limit: int | None = None) -> Options:
    """How to evaluate; records go to the output folder of the command."""
    from taskvec.evaluation.evaluate import Options, silent
    from taskvec.evaluation.task import Settings

    return Options(
        data=places(args.data),
        limit=limit,
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
        progress=silent if args.quiet else partial(common.bar, unit="sample"),
    )


def _tools(args: argparse.Namespace) -> Tools:
    from taskvec.evaluation.judges import parse_judge
    from taskvec.evaluation.task import Tools
    from taskvec.streaming import default_threads

    judge = None
    if args.judge is not None:
        folder = Path(args.out) / "verdicts"
        judge = parse_judge(args.judge, device=args.device, folder=folder)
    workers = default_threads() if args.workers is None else args.workers
    return Tools(allow_code_execution=args.allow_code_execution, judge=judge, workers=workers)


def places(texts: Sequence[str], flag: str = "--data") -> DataPlaces:
    """Where data lie: DIR for all tasks, TASK=PATH for one.

    Raises:
        UsageError: a folder is not there.
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
