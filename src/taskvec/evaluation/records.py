"""Records: every sample of a task with what was replied and scored, as JSON lines.

The first line says what the rest belongs to, with a key. While a task runs, replies are added to a
file `….part` one by one; a run with the same key goes on from there, or takes the replies of a
finished file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from taskvec.evaluation.task import Replies, Sample, Score
from taskvec.journal import Journal, finite
from taskvec.running.requests import Answer, Likelihood, Reply, Request, WholeText

SHOWN = 4000  # characters of a document that a record repeats


def read_replies(path: Path, key: str) -> dict[str, list[Reply]]:
    """Replies by sample that an earlier run with this key left; empty if there are none.

    Args:
        path: Of the records; those of an unfinished run lie beside it.
        key: What the run depends on.
    """
    for file in (part_of(path, key), path):
        header, *entries = Journal(file).read() or [{}]
        if header.get("key") == key:
            return {entry["id"]: [_reply(r) for r in entry["replies"]] for entry in entries}
    return {}


def part_of(path: Path, key: str) -> Path:
    """Where replies are added while a task runs; other settings do not overwrite them."""
    return path.with_name(f"{path.name}.{key[:8]}.part")


def begin_replies(
    path: Path | None, header: Mapping[str, Any], known: Mapping[str, Replies]
) -> Callable[[str, Replies], None]:
    """A function that stores the replies to a sample as soon as they are there.

    Args:
        path: Of the records; None: nothing is stored.
        header: First line.
        known: Replies that are there already.

    Raises:
        OutputError: the file cannot be written; replies of the run before are still there.
    """
    if path is None:
        return lambda sample, replies: None
    journal = Journal(part_of(path, header["key"]))
    journal.begin([header, *(_entry(sample, replies) for sample, replies in known.items())])
    return lambda sample, replies: journal.add(_entry(sample, replies))


def _entry(sample: str, replies: Replies) -> dict[str, Any]:
    return {"id": sample, "replies": [_plain(reply) for reply in replies]}


def write_records(
    path: Path,
    header: Mapping[str, Any],
    samples: Sequence[Sample],
    replies: Sequence[Replies],
    scores: Sequence[Score],
) -> None:
    """Write the finished records in place of what was there.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [dict(header)]
    for sample, mine, score in zip(samples, replies, scores, strict=True):
        lines.append(
            {
                "id": sample.id,
                "scores": finite(score.values),
                "notes": dict(score.notes),
                "replies": [_plain(reply) for reply in mine],
                "requests": [_request(request) for request in sample.requests],
                "reference": dict(sample.reference),
            }
        )
    Journal(path).begin(lines)
    part_of(path, header["key"]).unlink(missing_ok=True)


def _plain(reply: Reply) -> dict[str, Any]:
    """A reply in JSON types, from which `_reply` makes it again: NaN is null, −∞ is `"-inf"`."""
    if isinstance(reply, Answer):
        return {"text": reply.raw, "tokens": reply.tokens, "ended": reply.ended}
    data = asdict(reply)
    if data["log_likelihood"] == -math.inf:
        return data | {"log_likelihood": "-inf"}
    return dict(finite(data))


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
