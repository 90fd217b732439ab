"""Opening a family: headers read, checked against the target, tensors sorted by what is done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

from taskvec.checkpoints.folder import Checkpoint, open_checkpoint
from taskvec.checkpoints.views import View
from taskvec.engine.recipe import Family
from taskvec.errors import FamilyError, UsageError
from taskvec.layers import LayerKey, classify, override
from taskvec.statistics.collect import describe


@dataclass(frozen=True, slots=True)
class Members:
    """A family whose headers were read and fit together.

    Attributes:
        checkpoints: By role: `target`, `anchor`, `base`, `task:NAME`; one object where two roles
            are one folder.
        tasks: Task names, sorted.
        merged: Floating-point tensors that the recipe includes, sorted.
        equal: Integer and boolean tensors that it includes; they must be the same in every member.
        kept: Tensors that it leaves as they are in the target.
        keys: What each tensor of the target is.
        warnings: What looks odd but is not wrong.
    """

    checkpoints: dict[str, Checkpoint]
    tasks: tuple[str, ...]
    merged: tuple[str, ...]
    equal: tuple[str, ...]
    kept: tuple[str, ...]
    keys: dict[str, LayerKey]
    warnings: tuple[str, ...]

    @property
    def target(self) -> Checkpoint:
        """The member that is edited, or whose shape the result has."""
        return self.checkpoints["target"]

    def views(self, name: str, roles: Iterable[str]) -> dict[str, View]:
        """The views of one tensor by role."""
        return {role: self.checkpoints[role].view(name) for role in roles}

    @property
    def distinct(self) -> list[Checkpoint]:
        """Every opened folder once."""
        return list({c.path: c for c in self.checkpoints.values()}.values())


def open_members(family: Family, *, needs_base: bool, needs_anchor: bool) -> Members:
    """Open every checkpoint that is needed and check that they fit.

    Args:
        family: Paths and patterns.
        needs_base: Whether the base is used; if not, it is not opened.
        needs_anchor: Whether task vectors are taken; without, tasks are used as they are.

    Raises:
        UsageError: a role that is needed is not given, or a pattern that fits no tensor.
        CheckpointError: a member is broken.
        FamilyError: members differ in tensors, shapes or dtypes.
    """
    if needs_anchor and family.start is None:
        raise UsageError("instruct (or anchor) is missing: task vectors are measured from it")
    if needs_base and family.base is None:
        raise UsageError(
            "base is missing: this method compares with the step from base to instruct"
        )
    paths: dict[str, str | os.PathLike[str]] = {}
    if family.edited is not None:
        paths["target"] = family.edited
    if needs_anchor and family.start is not None:
        paths["anchor"] = family.start
    if needs_base and family.base is not None:
        paths["base"] = family.base
    tasks = tuple(sorted(family.tasks))
    paths |= {f"task:{task}": family.tasks[task] for task in tasks}
    paths.setdefault("target", family.tasks[tasks[0]])
    checkpoints = _open_all(paths)
    target = checkpoints["target"]
    chosen = _select(target.tensors, family.include, family.exclude)
    kept = target.tensors.keys() - set(chosen)
    for role in paths:
        if checkpoints[role] is not target:
            _compare(describe(role), checkpoints[role], target, chosen, kept, family)
    merged = tuple(n for n in chosen if target.tensors[n].dtype.is_float)
    if not merged:
        raise UsageError("include and exclude leave no floating-point tensor to merge")
    overrides = tuple(override(entry) for entry in family.layers)
    return Members(
        checkpoints=checkpoints,
        tasks=tasks,
        merged=merged,
        equal=tuple(n for n in chosen if not target.tensors[n].dtype.is_float),
        kept=tuple(sorted(kept)),
        keys={name: classify(name, overrides) for name in target.tensors},
        warnings=tuple(_odd(checkpoints, tasks)),
    )


def _open_all(paths: dict[str, str | os.PathLike[str]]) -> dict[str, Checkpoint]:
    opened: dict[str, Checkpoint] = {}
    checkpoints = {}
    for role, path in paths.items():
        real = os.path.realpath(os.path.expanduser(path))  # noqa: PTH111
        if real not in opened:
            opened[real] = open_checkpoint(path)
        checkpoints[role] = opened[real]
    return checkpoints


def _select(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names that the patterns leave; a pattern that fits nothing is an error."""
    names = list(names)

    def matching(patterns: Sequence[str], key: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            fits = {n for n in names if fnmatchcase(n, pattern)}
            if not fits:
                raise UsageError(
                    f"{key} pattern {pattern!r} fits no tensor of the target, such as {names[0]!r}"
                )
            found |= fits
        return found

    included = matching(include, "include") if include else set(names)
    excluded = matching(exclude, "exclude")
    return [n for n in names if n in included and n not in excluded]


def _compare(
    who: str,
    member: Checkpoint,
    target: Checkpoint,
    chosen: Sequence[str],
    kept: Set[str],
    family: Family,
) -> None:
    remedy = "exclude it in the recipe, or use checkpoints of one architecture"
    missing = [n for n in chosen if n not in member.tensors]
    if missing:
        raise FamilyError(
            f"{who} ({member.path}): lacks tensor {missing[0]!r} of the target "
            f"({len(missing)} missing); {remedy}"
        )
    extra = [
        n
        for n in member.tensors
        if n not in target.tensors
        and n not in kept
        and not any(fnmatchcase(n, pattern) for pattern in family.exclude)
        and (not family.include or any(fnmatchcase(n, pattern) for pattern in family.include))
    ]
    if extra:
        raise FamilyError(
            f"{who} ({member.path}): has tensor {extra[0]!r}, which the target lacks "
            f"({len(extra)} extra); {remedy}"
        )
    for name in chosen:
        got, expected = member.tensors[name], target.tensors[name]
        if got.shape != expected.shape:
            raise FamilyError(
                f"{who} ({member.path}): tensor {name!r} has shape {list(got.shape)}, "
                f"the target has {list(expected.shape)}; {remedy}"
            )
        if got.dtype != expected.dtype:
            raise FamilyError(
                f"{who} ({member.path}): tensor {name!r} is {got.dtype.name}, the target has "
                f"{expected.dtype.name}; convert one of them (mixed dtypes are not supported yet)"
            )


def _odd(checkpoints: dict[str, Checkpoint], tasks: Sequence[str]) -> Iterable[str]:
    anchor = checkpoints.get("anchor")
    for task in tasks:
        if checkpoints[f"task:{task}"] is anchor:
            yield f"task {task!r} is the anchor itself: its task vector is zero"
    if anchor is not None and checkpoints.get("base") is anchor:
        yield "base and instruct are one folder: the instruction vector is zero"
