"""Which way a score should move: by what the user expects, or by the sign of λ in a merge.

A merge is a recipe, a manifest, or a folder with a manifest; anything else is a model like others.
A task with a negative λ was subtracted: its score should get worse than that of the merge's target,
and should not get better than that of another reference, which may never have had the skill.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.errors import CheckpointError, UsageError, nearest
from taskvec.evaluation.loading import Spec
from taskvec.evaluation.task import Task
from taskvec.recipes.recipe import Recipe
from taskvec.recipes.replay import MANIFEST_FILE, read_manifest

DIRECTIONS = ("up", "down", "keep")


@dataclass(frozen=True, slots=True)
class MergeScales:
    """What the expectations of a merge rest on.

    Attributes:
        scales: λ by task of the recipe.
        target: Where the model that was edited lies; empty if unknown.
    """

    scales: Mapping[str, float]
    target: str = ""


def merges_among(models: Mapping[str, Spec]) -> dict[str, MergeScales]:
    """The models that are merges, by name."""
    found = {}
    for name, spec in models.items():
        if isinstance(spec, Recipe):
            family = spec.family
            scales = {n: task.scale or 0.0 for n, task in family.tasks.items()}
            target = family.edited
            place = os.fspath(target) if isinstance(target, (str, os.PathLike)) else ""
            found[name] = MergeScales(scales, place)
        elif (Path(os.fspath(spec)).expanduser() / MANIFEST_FILE).is_file():
            found[name] = _read(Path(os.fspath(spec)).expanduser())
    return found


def _read(folder: Path) -> MergeScales:
    """What the manifest of a folder says; nothing if it is damaged."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return MergeScales({})
    tasks = manifest["recipe"].get("tasks") or {}
    target = manifest["members"].get("target", {}).get("path", "")
    return MergeScales({str(name): _number(task) for name, task in tasks.items()}, target)


def _number(task: Any) -> float:
    scale = task.get("scale") if isinstance(task, dict) else None
    scale = scale.get("times") if isinstance(scale, dict) else scale  # λ by layer
    return float(scale) if isinstance(scale, (int, float)) else 0.0


def expect(
    merges: Mapping[str, MergeScales],
    others: Collection[str],
    given: Mapping[str, str],
    tasks: Sequence[Task],
    *,
    reference: Spec = "",
) -> dict[str, dict[str, str]]:
    """Which way the main metric of each task should move from the reference's, by model.

    Args:
        merges: See `merges_among`.
        others: Models besides that `given` holds for.
        given: `up`, `down` or `keep` by task, as the user says; goes before the sign of λ. `math`
            stands for `zoo:math` too.
        tasks: What is asked.
        reference: The model that scores are compared with.

    Raises:
        UsageError: a task is not asked, or a direction is unknown.
    """
    wanted: dict[str, str] = {}
    for name, direction in given.items():
        if direction not in DIRECTIONS:
            raise UsageError(
                f"--expect {name}={direction}: unknown direction; use {', '.join(DIRECTIONS)}"
            )
        named = [task.name for task in tasks if _is_called(task, name)]
        if not named:
            raise UsageError(
                f"--expect {name}={direction}: no such task among --tasks; "
                f"{nearest(name, [n for t in tasks for n in _names(t)])}"
            )
        wanted |= dict.fromkeys(named, direction)
    found = {model: dict(wanted) for model in others}
    for model, merge in merges.items():
        is_target = _is_same(merge.target, reference)
        found[model] = _by_sign(merge.scales, tasks, is_target=is_target) | wanted
    return found


def _by_sign(
    scales: Mapping[str, float], tasks: Sequence[Task], *, is_target: bool
) -> dict[str, str]:
    found = {}
    for name, scale in scales.items():
        for task in tasks:
            up = task.metrics[0].higher_is_better if task.metrics else None
            if scale < 0 and up is not None and _is_called(task, name):
                better, worse = ("up", "down") if up else ("down", "up")
                found[task.name] = worse if is_target else f"not {better}"
    return found


def _is_same(target: str, reference: Spec) -> bool:
    if not target or isinstance(reference, Recipe):
        return False
    one, other = Path(target).expanduser(), Path(os.fspath(reference)).expanduser()
    return target == os.fspath(reference) or (one.exists() and one.resolve() == other.resolve())


def _is_called(task: Task, name: str) -> bool:
    return name in _names(task)


def _names(task: Task) -> list[str]:
    """The whole name and, of `zoo:math`, `math`."""
    return list(dict.fromkeys((task.name, task.name.rpartition(":")[2])))
