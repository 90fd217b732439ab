"""Opening a family: headers read, checked against the target, tensors sorted by what is done."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source
from taskvec.checkpoints.views import View
from taskvec.errors import FamilyError, TaskvecError, UsageError
from taskvec.family.architectures import told_first
from taskvec.family.opening import open_family
from taskvec.family.rounding import notes_on_rounding, warnings_of_rounding
from taskvec.family.tokens import other_rows, remedy_for_rows, token_tensors
from taskvec.layers import LayerKey, classify, override
from taskvec.recipes.recipe import Family
from taskvec.statistics.collect import describe

_CACHE = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias)"
    r"|attention\.(bias|masked_bias)|embeddings\.position_ids)$"
)


@dataclass(frozen=True, slots=True)
class Members:
    """A family whose headers were read and fit together.

    Attributes:
        sources: By role: `target`, `anchor`, `base`, `task:NAME`; one object where two roles are
            one model.
        tasks: Task names, sorted.
        merged: Floating-point tensors that the recipe includes, sorted.
        equal: Integer and boolean tensors that it includes; they must be the same in every member.
        kept: Tensors that stay as they are in the target.
        keys: What each tensor of the target is.
        notes: What was done so that the members fit, in words.
        warnings: What looks odd but is not wrong.
        words: Roles in the words of the recipe, where those are others.
    """

    sources: dict[str, Source]
    tasks: tuple[str, ...]
    merged: tuple[str, ...]
    equal: tuple[str, ...]
    kept: tuple[str, ...]
    keys: dict[str, LayerKey]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, str]:
        """Roles and where their models are, for messages."""
        return {
            role: f"{self.words.get(role) or describe(role)} ({source.where})"
            for role, source in self.sources.items()
        }

    @property
    def target(self) -> Source:
        """The member that is edited, or whose shape the result has."""
        return self.sources["target"]

    def has(self, role: str, name: str) -> bool:
        """Whether a role has a tensor; a task that is a difference may leave it as it is."""
        source = self.sources[role]
        return not source.is_difference or name in source.tensors

    def views(self, name: str, roles: Iterable[str]) -> dict[str, View]:
        """The views of one tensor by role; a role that leaves the tensor as it is has none."""
        return {role: self.sources[role].view(name) for role in roles if self.has(role, name)}

    @property
    def distinct(self) -> list[Source]:
        """Every source once."""
        return list({id(source): source for source in self.sources.values()}.values())

    def check_unchanged(self) -> None:
        """Raise `StaleError` if a file is not what it was when it was opened."""
        for source in self.distinct:
            source.check_unchanged()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Read weights; a file that changed meanwhile is reported before any other error.

        Raises:
            StaleError: a file is not what it was when it was opened.
        """
        try:
            yield
        except TaskvecError:
            self.check_unchanged()
            raise
        self.check_unchanged()


def open_members(
    family: Family,
    *,
    needs_base: bool,
    needs_anchor: bool,
    stages: Mapping[str, Source] | None = None,
) -> Members:
    """Open every checkpoint that is needed and check that they fit.

    Args:
        family: Models and patterns.
        needs_base: Whether the base is used; if not, it is not opened.
        needs_anchor: Whether task vectors are taken; without, tasks are used as they are.
        stages: What `stage:NAME` means, by name.

    Raises:
        UsageError: a role that is needed is not given, or a pattern that fits no tensor.
        CheckpointError: a member is broken.
        FamilyError: members differ in tensors, shapes or dtypes.
    """
    sources, notes, copied = open_family(
        family, needs_base=needs_base, needs_anchor=needs_anchor, stages=stages or {}
    )
    tasks = tuple(sorted(family.tasks))
    target = sources["target"]
    known = {name for source in sources.values() for name in (*source.tensors, *_left_out(source))}
    chosen = _select(target.tensors, known, family.include, family.exclude)
    statistics = [n for n in chosen if _is_running_statistic(n)]
    left = copied.union(statistics)
    chosen = [n for n in chosen if n not in left and not is_cache(target.tensors[n])]
    kept = target.tensors.keys() - set(chosen)
    words = _words(family)
    with told_first(sources):
        for role, source in sources.items():
            if source is target:
                continue
            extra = _extra(source, target, kept, family)
            _compare(words.get(role) or describe(role), source, target, chosen, extra)
    merged = tuple(n for n in chosen if target.tensors[n].dtype.is_float)
    if not merged:
        raise UsageError("include and exclude leave no floating-point tensor to merge")
    overrides = tuple(override(entry) for entry in family.layers)
    if statistics:
        notes.append(
            f"running statistics stay the target's ({statistics[0]!r}, {len(statistics)} in all): "
            "measure them again on data"
        )
    notes += [*_mixed(sources, merged), *notes_on_rounding(sources)]
    return Members(
        sources=sources,
        tasks=tasks,
        merged=merged,
        equal=tuple(n for n in chosen if not target.tensors[n].dtype.is_float),
        kept=tuple(sorted(kept)),
        keys={name: classify(name, overrides) for name in target.tensors},
        notes=tuple(notes),
        warnings=(
            *_odd(sources, tasks),
            *_by_number(family, sources, merged),
            *warnings_of_rounding(sources, merged),
        ),
        words=words,
    )


def _left_out(source: Source) -> Iterator[str]:
    """Names that patterns may fit although no member has them any more."""
    yield from getattr(source, "left_out", ())
    for part in source.parts:
        yield from _left_out(part)


def _words(family: Family) -> dict[str, str]:
    """Roles that the family names otherwise, or does not name."""
    start = "anchor" if family.anchor is not None else "instruct"
    if family.start is None:
        return {}
    return {"anchor": start} | ({"target": start} if family.target is None else {})


def is_cache(info: TensorInfo) -> bool:
    """Tensors that a model computes when it is built: rotary caches, causal masks, positions.

    Some versions of a library store them and others do not, so that a member may lack them; the
    result has the target's.
    """
    is_mask = not info.name.endswith("bias") or len(info.shape) == 4  # and no bias of a projection
    return is_mask and _CACHE.search(info.name) is not None


def _is_running_statistic(name: str) -> bool:
    """What normalisation layers measured of data; arithmetic on it can make a variance negative."""
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def _by_number(family: Family, sources: Mapping[str, Source], merged: Sequence[str]) -> list[str]:
    """Warnings about rows of tokens that fit by their number alone."""
    is_by_token = family.vocabulary in ("by-token", "union")
    return [] if is_by_token else other_rows(sources, merged)


def _mixed(sources: Mapping[str, Source], names: Sequence[str]) -> list[str]:
    """Members whose weights have another dtype than the target's."""
    target = sources["target"]
    found = []
    for role, source in sources.items():
        other = {
            (source.tensors[n].dtype.config_name, target.tensors[n].dtype.config_name)
            for n in names
            if n in source.tensors and source.tensors[n].dtype != target.tensors[n].dtype
        }
        if other and not source.is_difference:
            pairs = ", ".join(f"{got} beside {wanted}" for got, wanted in sorted(other))
            found.append(
                f"{describe(role)} is {pairs}: read as it is, worked with in float32 (or "
                "out.precision), rounded once"
            )
    return found


def _select(
    names: Iterable[str], known: Set[str], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Names that the patterns leave; a pattern that fits nothing in any member is an error."""
    names = list(names)

    def matching(patterns: Sequence[str], key: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            fits = {n for n in known if fnmatchcase(n, pattern)}
            if not fits:
                raise UsageError(
                    f"{key} pattern {pattern!r} fits no tensor of any member, such as {names[0]!r}"
                )
            found |= fits
        return found

    included = matching(include, "include") if include else known
    excluded = matching(exclude, "exclude")
    return [n for n in names if n in included and n not in excluded]


def _extra(member: Source, target: Source, kept: Set[str], family: Family) -> list[str]:
    """Tensors of a member that the target lacks, and that no pattern or policy leaves out."""
    return [
        n
        for n in member.tensors
        if n not in target.tensors
        and n not in kept
        and not is_cache(member.tensors[n])
        and not any(fnmatchcase(n, pattern) for pattern in family.exclude)
        and (not family.include or any(fnmatchcase(n, pattern) for pattern in family.include))
    ]


def _compare(
    who: str, member: Source, target: Source, chosen: Sequence[str], extra: Sequence[str]
) -> None:
    remedy = "exclude it in the recipe, or use checkpoints of one architecture"
    missing = [n for n in chosen if n not in member.tensors]
    if missing and not member.is_difference:
        raise FamilyError(
            f"{who} ({member.where}): lacks tensor {missing[0]!r} of the target "
            f"({len(missing)} missing); {remedy}"
        )
    if extra and not member.tensors.keys() & target.tensors.keys():
        raise FamilyError(
            f"{who} ({member.where}): has no tensor in common with the target ({target.where}), "
            f"but {extra[0]!r} and {len(extra) - 1} more; it belongs to another model"
        )
    if extra:
        raise FamilyError(
            f"{who} ({member.where}): has tensor {extra[0]!r}, which the target lacks "
            f"({len(extra)} extra); to leave it out, use exclude: "
            f"[{_like(extra, target.tensors)}]"
        )
    for name in chosen:
        if name not in member.tensors:
            continue
        got, expected = member.tensors[name], target.tensors[name]
        if got.shape != expected.shape:
            if name in token_tensors({"target": target, "member": member}):
                remedy = remedy_for_rows(member, target)
            raise FamilyError(
                f"{who} ({member.where}): tensor {name!r} has shape {list(got.shape)}, "
                f"the target has {list(expected.shape)}; {remedy}"
            )
        if got.dtype != expected.dtype and not (got.dtype.is_float and expected.dtype.is_float):
            raise FamilyError(
                f"{who} ({member.where}): tensor {name!r} is {got.dtype.name}, the target has "
                f"{expected.dtype.name}; {remedy}"
            )


def _like(names: Sequence[str], of_target: Collection[str]) -> str:
    """Patterns for tensors that one member has and the target lacks, as a recipe takes them.

    None of them fits a tensor of the target.

    >>> _like(["v.0.w", "v.1.w", "m.0.q.bias", "m.1.q.bias"], ["m.0.q.weight", "m.0.k.bias"])
    '"v.*", "*.q.bias"'
    """

    def pattern(name: str) -> str:
        if len(names) == 1:
            return name
        parts = name.split(".")
        ends = [f"*.{'.'.join(parts[-n:])}" for n in range(1, len(parts))]
        for each in (f"{parts[0]}.*", *ends):
            if fnmatchcase(name, each) and not any(fnmatchcase(n, each) for n in of_target):
                return each
        return name

    return ", ".join(f'"{each}"' for each in dict.fromkeys(map(pattern, names)))


def _odd(sources: Mapping[str, Source], tasks: Sequence[str]) -> Iterable[str]:
    anchor = sources.get("anchor")
    for task in tasks:
        if sources[f"task:{task}"] is anchor:
            yield f"task {task!r} is identical to the anchor: its task vector is zero"
    if anchor is not None and sources.get("base") is anchor:
        yield "base and instruct are one folder: the instruction vector is zero"
