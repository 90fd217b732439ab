"""What verbs that evaluate take, in Python and on the command line, as one object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from taskvec.errors import UsageError
from taskvec.evaluation.data import DataPlaces
from taskvec.evaluation.evaluate import EvaluationOptions
from taskvec.evaluation.judges import parse_judge
from taskvec.evaluation.judges.verdict import Judge
from taskvec.evaluation.task import SampleSettings, Tools
from taskvec.streaming import Progress

VERDICTS_FOLDER = "verdicts"


class EvaluationKeywords(TypedDict, total=False):
    """How to evaluate.

    Attributes:
        data: Folder that data lie in, or files by task; what is not there comes from the hub.
        include_path: Folder of task files of your own for tasks `harness:…`.
        limit: Most samples of a task, drawn by the seed; default: all.
        shots: Worked examples in front of a question; default: the task's own number.
        draws: Answers that are drawn for a prompt, where a task can use several; default: 1.
        seed: Of samples, draws and intervals; default: 0.
        apply_chat_template: Whether tasks `harness:…` ask in conversations.
        context: Tokens of a window over a text; default: the model's, at most 2,048.
        stride: Tokens that each window after the first predicts; default: the whole window.
        truncate: Cut prompts that do not fit at the front, instead of refusing them.
        dtype: `float32`, `bfloat16`, `float16`; `auto`: as stored on an accelerator, else float32.
        device: Such as `cpu` or `cuda:1`; `auto`: the accelerator, if there is one.
        batch_tokens: Tokens of a batch; default: by the memory there is.
        judge: Who says how harmful an answer is, or what stands for one on the command line;
            default: refusal phrases.
        allow_code_execution: Whether programs that the model wrote may be run.
        workers: Programs that run at once; default: the processors there are, at most 8.
        out: Folder for records, from which an interrupted run goes on; default: none is written.
        progress: Called with the samples done.
    """

    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | DataPlaces | None
    include_path: str | os.PathLike[str] | None
    limit: int | None
    shots: int | None
    draws: int | None
    seed: int | None
    apply_chat_template: bool | None
    context: int | None
    stride: int | None
    truncate: bool | None
    dtype: str | None
    device: str | None
    batch_tokens: int | None
    judge: Judge | str | None
    allow_code_execution: bool | None
    workers: int | None
    out: str | os.PathLike[str] | None
    progress: Progress | None


def evaluation_options(given: Mapping[str, Any]) -> EvaluationOptions:
    """The options of these keywords; other keys, and None, do not count.

    Raises:
        UsageError: a value is out of range, or there is no such folder.
    """
    names = EvaluationKeywords.__annotations__
    known = {key: value for key, value in given.items() if key in names and value is not None}
    for name in {"out", "include_path"} & known.keys():
        known[name] = Path(known[name]).expanduser()
    if isinstance(known.get("judge"), str):
        folder = known["out"] / VERDICTS_FOLDER if "out" in known else None
        device = known.get("device", "auto")
        known["judge"] = parse_judge(known["judge"], device=device, folder=folder)

    def part(kind: type[SampleSettings | Tools | EvaluationOptions]) -> dict[str, Any]:
        return {key: known[key] for key in kind.__dataclass_fields__ if key in known}

    inner = {"settings": SampleSettings(**part(SampleSettings)), "tools": Tools(**part(Tools))}
    about = {"data": places_of(known.get("data")), **inner}
    return EvaluationOptions(**(part(EvaluationOptions) | about))


def places_of(data: Any) -> DataPlaces:
    """Where data lie, from the keyword `data`.

    Raises:
        UsageError: there is no such folder.
    """
    if data is None or isinstance(data, DataPlaces):
        return data or DataPlaces()
    if isinstance(data, Mapping):
        return DataPlaces(by_task={task: Path(path).expanduser() for task, path in data.items()})
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UsageError(f"data: there is no folder {data}; give one, or {{TASK: PATH}}")
    return DataPlaces((folder,))
