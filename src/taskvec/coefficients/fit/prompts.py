"""Prompts by source, and who answers them.

A source of a language model is a file of rows with `prompt` (one turn of a user, for the model's
chat template), `prompt` and `answer`, `messages`, or `text` (as it stands), a `.txt` file with a
prompt in every line, `hub:NAME`, or a list of texts, of (prompt, answer) pairs or of such rows. A
source of a classifier or an encoder is what `finetune` reads; labels are not used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.checkpoints.hub import hub_name
from taskvec.coefficients.fit.directions import content_of
from taskvec.coefficients.fit.settings import OBJECTIVES
from taskvec.errors import DataError, UsageError, nearest
from taskvec.evaluation.data import DataRow, read_hub, read_rows
from taskvec.running.requests import Message, Text
from taskvec.training.data import (
    HUB,
    Classified,
    Conversations,
    Documents,
    Reading,
    hub_data,
    messages_of,
    read_data,
)

TARGET, ANSWERS = "target", "answers"
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt.

    Attributes:
        text: Plain, or messages that end with a user's.
        answer: What was given; None: the teacher's own is generated.
        where: Where it stands, for messages.
    """

    text: Text
    answer: str | None
    where: str


@dataclass(frozen=True, slots=True)
class Teacher:
    """Who says what is right.

    Attributes:
        kind: `task` (of the recipe), `target`, `answers` (those that the source gives), `model` (a
            folder or a name on the hub), or `none`.
        name: Of the task, or of the model.
    """

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


@dataclass(frozen=True, slots=True)
class Lesson:
    """One source of prompts.

    Attributes:
        name: Of the source.
        teacher: Who answers.
        weight: ω, over the sum of all.
        loss: One of `OBJECTIVES`.
        prompts: `Asked`, or data of a classifier or encoder; None: made from the other sources'.
        digest: Of the prompts.
    """

    name: str
    teacher: Teacher
    weight: float
    loss: str
    prompts: Any
    digest: str


def lessons_of(
    prompts: Mapping[str, Any],
    teachers: Mapping[str, Any],
    weights: Mapping[str, float],
    objective: str,
    *,
    tasks: Sequence[str],
    negative: Sequence[str],
    is_language: bool,
    reading: Reading,
) -> list[Lesson]:
    """Sources in order of their names, with their teachers.

    Args:
        prompts: By source.
        teachers: By source; a task, `target`, `answers`, a folder or a name on the hub.
        weights: ω by source; 1 where there is none.
        objective: One of `OBJECTIVES`.
        tasks: Of the recipe.
        negative: Tasks that the recipe subtracts.
        is_language: Whether the target is a language model.
        reading: How files are read.

    Raises:
        UsageError: a name is unknown, a source has no teacher, or a weight is out of range.
        DataError: prompts are missing, malformed or empty.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective must be in {' | '.join(OBJECTIVES)}; got {objective!r}")
    names = sorted({*prompts, *(n for n, t in teachers.items() if t == TARGET)})
    if not prompts:
        raise UsageError("prompts has no source; give at least one, such as a task's")
    for what, given in (("teachers", teachers), ("weights", weights)):
        for name in sorted(given.keys() - set(names)):
            raise UsageError(f"{what}: {name!r} has no prompts; {nearest(name, names)}")
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UsageError(f"the weight of source {name!r} must be above 0; got {weight:g}")
    total = sum(weights.get(name, 1.0) for name in names)
    found = []
    for name in names:
        read = _read(prompts[name], name, is_language, reading) if name in prompts else None
        teacher, loss = _teacher(name, teachers.get(name), objective, tasks, negative)
        if loss == "likelihood":
            _check_answers(name, read)
        digest = "" if read is None else _digest(read)
        found.append(Lesson(name, teacher, weights.get(name, 1.0) / total, loss, read, digest))
    return found


def _teacher(
    name: str, given: Any, objective: str, tasks: Sequence[str], negative: Sequence[str]
) -> tuple[Teacher, str]:
    """Who answers a source, and the loss that follows."""
    if objective == "entropy":
        if given is not None:
            raise UsageError(f"teachers: {name!r}: the objective entropy has no teachers")
        return Teacher("none"), "entropy"
    if given == ANSWERS or (objective == "likelihood" and given is None):
        return Teacher("answers"), "likelihood"
    if objective == "likelihood" and given != TARGET:
        raise UsageError(
            f"teachers: {name!r}: with the objective likelihood a source has its own answers, or "
            "the target as its teacher"
        )
    if given == TARGET or (given is None and name == KEEP and name not in tasks):
        return Teacher("target"), "kl"
    if given is None:
        if name not in tasks:
            raise UsageError(
                f"prompts: {name!r} is not a task of the recipe ({', '.join(tasks)}) and has no "
                "teacher; give it one: 'target', a task, a folder, or 'answers' for prompts with "
                "answers"
            )
        if name in negative:
            raise UsageError(
                f"prompts: the recipe subtracts task {name!r}, so its own model cannot be the "
                "teacher; give it the teacher 'answers' and prompts with the answers that are "
                "wanted, or as its teacher a model that gives such answers"
            )
        return Teacher("task", name), "kl"
    if isinstance(given, str) and given in tasks:
        return Teacher("task", given), "kl"
    if isinstance(given, (str, os.PathLike)):
        text = os.fspath(given)
        if hub_name(given) is None and not Path(text).expanduser().is_dir():
            hint = nearest(text, [*tasks, TARGET, ANSWERS])
            raise UsageError(
                f"teachers: {name!r}: {text!r} is not a task, 'target', 'answers', or a folder; "
                f"{hint}"
            )
        return Teacher("model", text), "kl"
    raise UsageError(f"teachers: {name!r}: must be a text or a path; got {type(given).__name__}")


def _check_answers(name: str, read: Any) -> None:
    if isinstance(read, list):
        lacking = [asked for asked in read if asked.answer is None]
        if not lacking:
            return
        where = lacking[0].where
    else:
        where = name
    raise DataError(
        f"{where}: source {name!r} is learned from its answers, but has none here; give prompt "
        "and answer, or another teacher"
    )


def _digest(read: Any) -> str:
    if isinstance(read, list):
        return content_of({"prompts": [(asked.text, asked.answer) for asked in read]})
    return str(read.digest)


def _read(value: Any, name: str, is_language: bool, reading: Reading) -> Any:
    found = _read_prompts(value, name, reading) if is_language else _inputs(value, name, reading)
    count = len(found) if isinstance(found, list) else len(found.items)
    if not count:
        raise DataError(f"prompts of {name!r}: the list is empty; give at least two")
    return found


def _inputs(value: Any, name: str, reading: Reading) -> Any:
    """Inputs of a classifier or an encoder."""
    if isinstance(value, (str, Path)):
        value = read_data(value, reading)
    if isinstance(value, Documents):
        return Classified(value.items, [0] * len(value.items), ("0",), "text", value.where,
                          value.digest)  # fmt: skip
    if isinstance(value, Classified):
        return value
    if isinstance(value, Sequence) and all(isinstance(each, str) for each in value):
        digest = content_of({"texts": list(value)})
        return Classified(list(value), [0] * len(value), ("0",), "text", f"prompts of {name!r}",
                          digest)  # fmt: skip
    raise UsageError(
        f"prompts of {name!r}: must be a file or folder that finetune reads, or a list of texts; "
        f"got {type(value).__name__}"
    )


def _read_prompts(value: Any, name: str, reading: Reading) -> list[Asked]:
    """Prompts of a language model, each once."""
    if isinstance(value, (str, Path)):
        found = _from_path(value, reading)
    elif isinstance(value, Conversations):
        found = [_of_messages(item, where) for item, where in
                 zip(value.items, value.places, strict=True)]  # fmt: skip
    elif isinstance(value, Documents):
        found = [Asked(text, None, value.where) for text in value.items]
    elif isinstance(value, Sequence):
        found = [_of_item(each, f"prompts of {name!r}, number {i}") for i, each in enumerate(value)]
    else:
        raise UsageError(
            f"prompts of {name!r}: must be a file or a list; got {type(value).__name__}"
        )
    once: dict[Any, Asked] = {}
    for asked in found:
        once.setdefault((asked.text, asked.answer), asked)
    return list(once.values())


def _of_item(item: Any, where: str) -> Asked:
    if isinstance(item, str):
        return Asked(item, None, where)
    if isinstance(item, Mapping):
        return _of_row(DataRow(item, where), Reading())
    is_pair = isinstance(item, (tuple, list)) and len(item) == 2
    if is_pair and all(isinstance(part, str) for part in item):
        return Asked(item[0], item[1], where)
    raise DataError(f"{where}: must be a text, a (prompt, answer) pair, or a row of fields")


def _from_path(source: str | Path, reading: Reading) -> list[Asked]:
    if str(source).startswith(HUB):
        return [_of_row(row, reading) for row in read_hub(hub_data(str(source)), "prompts")]
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"{source}: no such file")
    if path.name.removesuffix(".gz").endswith(".txt"):
        return [
            Asked(line, None, row.where)
            for row in read_rows(path)
            for line in row.text("text").splitlines()
            if line.strip()
        ]
    return [_of_row(row, reading) for row in read_rows(path)]


def _of_row(row: DataRow, reading: Reading) -> Asked:
    names, data = reading.names, row.data
    if any(data.get(name) is not None for name in names["messages"]):
        return _of_messages(messages_of(row, names["messages"]), row.where)
    if any(name in data for name in names["prompt"]):
        prompt = row.text(*names["prompt"])
        has_answer = any(data.get(name) is not None for name in names["response"])
        answer = row.text(*names["response"]) if has_answer else None
        return Asked((("user", prompt),), answer, row.where)
    if any(name in data for name in names["text"]):
        return Asked(row.text(*names["text"]), None, row.where)
    raise DataError(
        f"{row.where}: has no prompt, messages or text; it has {', '.join(map(str, data))}"
    )


def _of_messages(messages: Sequence[Message], where: str) -> Asked:
    if not messages:
        raise DataError(f"{where}: messages are empty")
    if messages[-1][0] != "assistant":
        return Asked(tuple(messages), None, where)
    return Asked(tuple(messages[:-1]), messages[-1][1], where)
