"""Selection and test data: two disjoint parts of the samples of each task.

Samples with the same requests count as one, also under different ids: what was asked for selection
is not asked again for the test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from taskvec.errors import UsageError
from taskvec.evaluation.data import DataPlaces
from taskvec.evaluation.evaluate import Asked, EvaluationOptions, TaskSamples, prepare
from taskvec.evaluation.task import Sample

SELECT_N = 100  # samples of a task, or half of what there is


@dataclass(frozen=True, slots=True)
class Splitting:
    """How samples are divided.

    Attributes:
        select_n: Samples of a task that candidates are chosen by; None: 100, or half of all.
        test_n: Samples of a task that the winner is scored on again; None: all others.
        test_data: Where test data lie, if apart; None: they are drawn from the same.
    """

    select_n: int | None = None
    test_n: int | None = None
    test_data: DataPlaces | None = None

    def __post_init__(self) -> None:
        for name, value in (("select_n", self.select_n), ("test_n", self.test_n)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more; got {value}")


@dataclass(frozen=True, slots=True)
class Split:
    """The two parts of every task, in the same order."""

    select: tuple[TaskSamples, ...]
    test: tuple[TaskSamples, ...]

    def to_json(self) -> dict[str, Any]:
        """By task: how many samples, and digests of what they ask."""
        parts = {"select": self.select, "test": self.test}
        return {
            part[0].task.name: {
                name: {"n": len(each.samples), "digest": digest(each.samples)}
                for name, each in zip(parts, part, strict=True)
            }
            for part in zip(*parts.values(), strict=True)
        }


def digest(samples: Sequence[Sample]) -> str:
    """Of ids and requests, in order."""
    record = [[sample.id, [asdict(request) for request in sample.requests]] for sample in samples]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def split(asked: Sequence[Asked], options: EvaluationOptions, how: Splitting) -> Split:
    """Samples of tasks, divided by the seed.

    Args:
        asked: Tasks, each once. One without samples, a function, is asked as it is in both parts.
        options: How to evaluate; its limit is not used.
        how: How many, and from where.

    Raises:
        UsageError: there are too few samples, or a name stands for several tasks.
        TaskvecError: as `prepare`.
    """
    options = replace(options, limit=None)
    here = prepare(asked, options)
    apart = None
    if how.test_data is not None:
        apart = prepare(asked, replace(options, data=how.test_data))
    if len(here) != len(asked):
        raise UsageError("a group of tasks cannot be a goal; name the tasks themselves")
    pairs = [
        _divide(each, None if apart is None else apart[i], how, options.settings.seed)
        for i, each in enumerate(here)
    ]
    return Split(tuple(first for first, _ in pairs), tuple(second for _, second in pairs))


def _divide(
    here: TaskSamples, apart: TaskSamples | None, how: Splitting, seed: int
) -> tuple[TaskSamples, TaskSamples]:
    if here.task.measure is not None:
        return here, here
    task = here.task.name
    shuffled = _shuffle(here.samples, f"{seed}:{task}:select")
    half = len(shuffled) if apart is not None else len(shuffled) // 2
    wanted = how.select_n if how.select_n is not None else min(SELECT_N, max(1, half))
    chosen, rest = shuffled[:wanted], shuffled[wanted:]
    if apart is not None:
        rest = _shuffle(apart.samples, f"{seed}:{task}:test")
    asked = {sample.requests for sample in chosen}
    left = [sample for sample in rest if sample.requests not in asked]
    test = left[: how.test_n]
    if len(chosen) < wanted or len(test) < (how.test_n or 1):
        there = f"{len(shuffled)} different samples"
        if apart is not None:
            there += f" and {len(left)} others for the test"
        raise UsageError(
            f"task {task!r} has {there}; {wanted} for selection and {how.test_n or 1} for the test "
            "do not fit; ask for fewer, or give separate test data"
        )
    return _part(here, chosen), _part(apart or here, test)


def _shuffle(samples: Sequence[Sample], seed: str) -> list[Sample]:
    """Samples with different requests, in an order that the seed gives."""
    unique = list({sample.requests: sample for sample in reversed(samples)}.values())[::-1]
    return Random(seed).sample(unique, len(unique))


def _part(whole: TaskSamples, chosen: Sequence[Sample]) -> TaskSamples:
    """Some samples, in the order of the data."""
    place = {sample.id: i for i, sample in enumerate(whole.samples)}
    return replace(whole, samples=sorted(chosen, key=lambda sample: place[sample.id]))
