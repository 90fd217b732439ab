"""Records: every sample of a task with what was replied and scored, as JSON lines.

The first line says what the rest belongs to, with a key. While a task runs, replies are added to a
file `….part` one by one; a run with the same key goes on from there, or takes the replies of a
finished file. A last line that a crash cut short is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.errors import OutputError
from taskvec.evaluation.task import Replies, Sample, Score
from taskvec.running.requests import Answer, Likelihood, Reply, Request, WholeText

SHOWN = 4000  # characters of a document that a record repeats


def read_replies(path: Path, key: str) -> dict[str, list[Reply]]:
    """Replies by sample that an earlier run with this key left; empty if there are none.

    Args:
        path: Of the records; those of an unfinished run lie beside it.
        key: What the run depends on.
    """
    for file in (part_of(path, key), path):
        lines = _lines(file)
        if lines and lines[0].get("key") == key:
            return {line["id"]: [_reply(r) for r in line["replies"]] for line in lines[1:]}
    return {}


def part_of(path: Path, key: str) -> Path:
    """Where replies are added while a task runs; other settings do not overwrite them."""
    return path.with_name(f"{path.name}.{key[:8]}.part")


@contextmanager
def journal(
    path: Path | None, header: Mapping[str, Any], kept: Mapping[str, Replies]
) -> Iterator[Callable[[str, Replies], None]]:
    """A function that keeps the replies to a sample as soon as they are there.

    Args:
        path: Of the records; None: nothing is kept.
        header: First line.
        kept: Replies that are there already.

    Raises:
        OutputError: the file cannot be written.
    """
    if path is None:
        yield lambda sample, replies: None
        return
    part = part_of(path, header["key"])
    lines = [_line(header), *(_kept_line(sample, replies) for sample, replies in kept.items())]
    write_whole(part, "".join(lines))  # what is kept already is not lost on a full disk
    with part.open("a", encoding="utf-8") as file:

        def add(sample: str, replies: Replies) -> None:
            try:
                file.write(_kept_line(sample, replies))
                file.flush()
            except OSError as error:
                text = error.strerror or error
                raise OutputError(f"{part}: cannot be written: {text}") from error

        yield add


def _kept_line(sample: str, replies: Replies) -> str:
    return _line({"id": sample, "replies": [_plain(reply) for reply in replies]})


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(dict(data), ensure_ascii=False) + "\n"


def write_records(
    path: Path,
    header: Mapping[str, Any],
    samples: Sequence[Sample],
    replies: Sequence[Replies],
    scores: Sequence[Score],
) -> None:
    """Write the finished records in the place of whatever was there.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [dict(header)]
    for sample, mine, score in zip(samples, replies, scores, strict=True):
        lines.append(
            {
                "id": sample.id,
                "scores": {name: _number(value) for name, value in score.values.items()},
                "notes": dict(score.notes),
                "replies": [_plain(reply) for reply in mine],
                "requests": [_request(request) for request in sample.requests],
                "reference": dict(sample.reference),
            }
        )
    write_whole(path, "".join(map(_line, lines)))
    part_of(path, header["key"]).unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either there as it should be or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file up to the first that is not whole; none if there is no such file."""
    found: list[dict[str, Any]] = []
    try:
        with open(documents.open_regular(path), encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                found.append(json.loads(line))
    except (OSError, ValueError, RecursionError):
        pass
    return found


def _plain(reply: Reply) -> dict[str, Any]:
    """A reply in JSON types, from which `_reply` makes it again: NaN is null, −∞ is `"-inf"`."""
    if isinstance(reply, Answer):
        return {"text": reply.raw, "tokens": reply.tokens, "ended": reply.ended}
    data = asdict(reply)
    if data["log_likelihood"] == -math.inf:
        return data | {"log_likelihood": "-inf"}
    return {key: _number(value) for key, value in data.items()}


def _reply(data: Mapping[str, Any]) -> Reply:
    if "text" in data:
        return Answer(data["text"], data["tokens"], data["ended"])
    total = math.nan if data["log_likelihood"] is None else float(data["log_likelihood"])
    return Likelihood(total, data["tokens"], data["is_greedy"])


def _request(request: Request) -> dict[str, Any]:
    data = asdict(request)
    if isinstance(request, WholeText) and len(request.text) > SHOWN:
        data["text"] = request.text[:SHOWN] + f" … ({len(request.text)} characters)"
    return data


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
