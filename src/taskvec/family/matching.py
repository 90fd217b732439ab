"""Members whose tensors go by other names than the target's: read under the target's names.

Literal names come first and cost nothing. What is left is matched by canonical name
(`checkpoints.names`), then by the tables of renamings that transformers publishes, where it is
installed, then as parts of fused tensors or fused tensors of parts. What then has no counterpart is
left to the comparison of members, which reports it.

A text-only member of a family whose target sees or hears as well has no tower for that: its task
vector is zero there, and where no member has the tower, it is copied from the target. The other way
round, what a member sees or hears with is left out where the target has only text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import xxhash

from taskvec.checkpoints.joined import Section, Zeros, joined
from taskvec.checkpoints.names import Names, canonical, fits, forms
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Derived, Source, derived
from taskvec.checkpoints.views import View
from taskvec.errors import FamilyError
from taskvec.family.renames import renamings
from taskvec.statistics.collect import describe

Make = Callable[[], View]
# Beginnings of canonical names of what a text-only model does not have.
_SENSES: Final = re.compile(
    r"(vision|audio|audio_tower|multi_modal_projector|vision_embed_tokens|image_newline|embed_vision"
    r"|embed_audio|mm_projector|merger|connector|vision_\w+|audio_\w+|image_\w+|aligner|visual_\w+)(\.|$)"
)


@dataclass(slots=True)
class _Match:
    """What a member's tensors are, by the target's names.

    Attributes:
        names: The member's name of each tensor that is called otherwise.
        made: Tensors that are made of others of the member.
        consumed: The member's names that these stand for.
        kinds: Pairs of names by how they were matched.
    """

    names: dict[str, str] = field(default_factory=dict)
    made: dict[str, tuple[TensorInfo, Make]] = field(default_factory=dict)
    consumed: set[str] = field(default_factory=set)
    kinds: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, kind: str, theirs: str, name: str) -> None:
        """A tensor of the target that the member calls `theirs`."""
        self.names[name] = theirs
        self.consumed.add(theirs)
        self.kinds.setdefault(kind, []).append((theirs, name))

    def make(self, kind: str, theirs: Sequence[str], info: TensorInfo, make: Make) -> None:
        """A tensor of the target that is made of others."""
        self.made[info.name] = info, make
        self.consumed.update(theirs)
        self.kinds.setdefault(kind, []).append((theirs[0], info.name))


def with_names_of_target(
    sources: Mapping[str, Source],
) -> tuple[dict[str, Source], list[str], set[str]]:
    """The same members under the target's names.

    Returns:
        The sources, what was done in words, and names of tensors that only the target has because
        no other member sees or hears.

    Raises:
        FamilyError: two tensors of a member are one of the target's.
    """
    target = sources["target"]
    index: Names | None = None
    done: dict[int, Source] = {id(target): target}
    notes: list[str] = []
    lacking: dict[str, set[str]] = {}
    for role, source in sources.items():
        if id(source) not in done:
            left = [name for name in source.tensors if name not in target.tensors]
            done[id(source)] = source
            if left:
                index = index or Names(target.tensors)
                match = _match(role, source, target, index, left)
                if match.names or match.made:
                    done[id(source)] = _renamed(source, match)
                    notes += _summary(role, match)
        found = done[id(source)]
        senses = _more_senses(found, target)
        if senses:
            tensors = {name: info for name, info in found.tensors.items() if name not in senses}
            done[id(source)] = derived(found, "without senses of its own", tensors=tensors)
            notes.append(
                f"{describe(role)} has {_some(senses)} ({len(senses):,} tensors), for which the "
                "target has no tower: left out"
            )
            found = done[id(source)]
        if not found.is_difference and found is not target:
            senses = _without_senses(found, target)
            if senses:
                lacking[role] = senses
    result = {role: done[id(source)] for role, source in sources.items()}
    filled, of_copies, copied = _filled(result, lacking)
    return filled, notes + of_copies, copied


def fitted(change: Derived, over: Source) -> Derived:
    """The change by an adapter under the names of the model that it is over.

    Layers that an adapter changes and the model has as parts of a fused tensor, or the other way
    round, are matched as those of members are.

    Raises:
        FamilyError: the adapter changes what the model lacks.
    """
    left = [name for name in change.tensors if name not in over.tensors]
    if not left:
        return change
    match = _match("adapter", change, over, Names(over.tensors), left)
    lacking = [name for name in left if name not in match.consumed]
    if lacking:
        raise FamilyError(
            f"{change.where}: changes {lacking[0]!r}, which the model that it is over "
            f"({over.where}) lacks; give the model that it was trained over, or merge it in PEFT "
            "(merge_and_unload, save_pretrained) and give the whole model"
        )
    return _renamed(change, match)


def _match(role: str, source: Source, target: Source, index: Names, left: Sequence[str]) -> _Match:
    match = _Match()
    taken = {name: name for name in source.tensors if name in target.tensors}
    rest: list[str] = []
    for name in left:
        found = index.find(name)
        if len(found) != 1 or _is_taken(role, source, found[0], taken, name):
            rest.append(name)
        else:
            match.add("other names", name, found[0])
            taken[found[0]] = name
    if rest and (renames := renamings(target.config, source.config)):
        rest = _by_tables(role, source, match, taken, rest, renames, target)
    if rest:
        _by_parts(source, target, match, rest)
    return match


def _is_taken(role: str, source: Source, name: str, taken: Mapping[str, str], other: str) -> bool:
    """Whether a tensor of the target has its counterpart already.

    Raises:
        FamilyError: both are one tensor by their names, so it is not clear which to use.
    """
    one = taken.get(name)
    if one is not None and canonical(one) == canonical(other):
        raise FamilyError(
            f"{describe(role)} ({source.where}): {one!r} and {other!r} are both {name!r} of the "
            "target; give a copy without the wrong one"
        )
    return one is not None


def _by_tables(
    role: str,
    source: Source,
    match: _Match,
    taken: dict[str, str],
    names: Sequence[str],
    renames: Callable[[str], str],
    target: Source,
) -> list[str]:
    """Match by what transformers calls tensors in memory; the result is what is left."""
    in_memory: dict[str, list[str]] = {}
    for name in target.tensors:
        in_memory.setdefault(renames(name), []).append(name)
    rest = []
    for name in names:
        found = in_memory.get(renames(name), [])
        if len(found) != 1 or _is_taken(role, source, found[0], taken, name):
            rest.append(name)
        else:
            match.add("names of another version of transformers", name, found[0])
            taken[found[0]] = name
    return rest


def _by_parts(source: Source, target: Source, match: _Match, rest: Sequence[str]) -> None:
    """Match tensors that are fused in one model and apart in the other."""
    mine = {canonical(name): name for name in rest}
    open_ = {
        canonical(name): name
        for name in target.tensors
        if name not in match.names and name not in source.tensors
    }
    for plain, name in open_.items():  # fused in the target
        info = target.tensors[name]
        for form in forms(plain, info.shape[0] if len(info.shape) == 3 else 0):
            parts = [mine.get(part) for part in form.parts]
            there = [part for part in parts if part is not None]
            if not there or (len(there) < len(parts) and not source.is_difference):
                continue
            infos = _infos(source, parts, info)
            if infos is None or not fits(info, infos):
                continue
            made = TensorInfo(name, source.tensors[there[0]].dtype, info.shape, 0)
            make = partial(_joined, source, parts, infos, info.shape)
            match.make("being fused in the target", there, made, make)
            break
    for plain, name in mine.items():  # fused in the member
        info = source.tensors[name]
        for form in forms(plain, info.shape[0] if len(info.shape) == 3 else 0):
            parts_of_target = [open_.get(part) for part in form.parts]
            if None in parts_of_target:
                continue
            named = [part for part in parts_of_target if part is not None]
            infos = [target.tensors[part] for part in named]
            if not fits(info, infos):
                continue
            offset = 0
            for part, theirs in zip(named, infos, strict=True):
                made = TensorInfo(part, info.dtype, theirs.shape, 0)
                section = partial(_section, source, name, offset, theirs.shape)
                match.make("being apart in the target", [name], made, section)
                offset += theirs.size
            break


def _infos(
    source: Source, parts: Sequence[str | None], whole: TensorInfo
) -> list[TensorInfo] | None:
    """The parts; those that a difference lacks share the rest, if its size is known."""
    known = [None if part is None else source.tensors[part] for part in parts]
    there = [info.shape for info in known if info is not None]
    if len(there) == len(parts):
        return [info for info in known if info is not None]
    is_experts = len(whole.shape) == 3
    rows = whole.shape[1] if is_experts else whole.shape[0]
    group = len(parts) // whole.shape[0] if is_experts else len(parts)
    found = []
    for i, info in enumerate(known):
        first = i - i % group
        of_group = [k.shape[0] if k is not None else None for k in known[first : first + group]]
        left = _rows_of(of_group, rows)[i - first]
        blank = TensorInfo("", whole.dtype, (left, *there[0][1:]), 0)
        found.append(blank if info is None else info)
    return found


def _rows_of(known: Sequence[int | None], total: int) -> list[int]:
    """Rows of every part of a group; keys and values have as many, gate and up as well."""
    if len(known) < 3:
        return [total // len(known)] * len(known)
    q, *pair = known
    both = next((rows for rows in pair if rows is not None), None)
    if both is None:
        both = (total - (q if q is not None else total // 3)) // 2
    return [total - 2 * both, both, both]


def _joined(
    source: Source,
    parts: Sequence[str | None],
    infos: Sequence[TensorInfo],
    shape: tuple[int, ...],
) -> View:
    views = [
        Zeros(info.shape) if part is None else source.view(part)
        for part, info in zip(parts, infos, strict=True)
    ]
    return joined(views, shape)


def _section(source: Source, name: str, offset: int, shape: tuple[int, ...]) -> View:
    return Section(source.view(name), offset, shape)


def _renamed(source: Source, match: _Match) -> Derived:
    """A member under the target's names; tensors without a counterpart keep theirs."""
    tensors = {n: info for n, info in source.tensors.items() if n not in match.consumed}
    tensors |= {
        name: replace(source.tensors[theirs], name=name) for name, theirs in match.names.items()
    }
    tensors |= {name: info for name, (info, _) in match.made.items()}

    def view(name: str) -> View:
        if name in match.made:
            return match.made[name][1]()
        return source.view(match.names.get(name, name))

    digest = xxhash.xxh3_128()
    for name, theirs in sorted(match.names.items()):
        digest.update(f"{name}\0{theirs}\n".encode())
    for name, (info, _) in sorted(match.made.items()):
        digest.update(f"{name}\0{info.shape}\n".encode())
    return derived(source, f"names {digest.hexdigest()}", tensors=tensors, make_view=view)


def _summary(role: str, match: _Match) -> list[str]:
    out = []
    for kind, pairs in match.kinds.items():
        theirs, name = pairs[0]
        out.append(
            f"{describe(role)}: {len(pairs):,} tensor{'s' if len(pairs) > 1 else ''} matched by "
            f"{kind}, such as {theirs!r} for {name!r}"
        )
    return out


def _more_senses(source: Source, target: Source) -> set[str]:
    """Tensors of towers for images or sound of which the target has nothing."""
    if source.is_difference or source is target:
        return set()
    more = [name for name in source.tensors if name not in target.tensors]
    groups = {n: found[1] for n in more if (found := _SENSES.match(canonical(n))) is not None}
    if not groups:
        return set()
    theirs = {m[1] for n in target.tensors if (m := _SENSES.match(canonical(n))) is not None}
    return set(groups) if not theirs else set()


def _without_senses(source: Source, target: Source) -> set[str]:
    """Tensors of towers for images or sound that a member lacks whole."""
    missing = [name for name in target.tensors if name not in source.tensors]
    groups: dict[str, set[str]] = {}
    for name in missing:
        found = _SENSES.match(canonical(name))
        if found is not None:
            groups.setdefault(found[1], set()).add(name)
    if not groups:
        return set()
    for name in source.tensors:
        found = _SENSES.match(canonical(name))
        if found is not None:
            groups.pop(found[1], None)
    return set().union(*groups.values()) if groups else set()


def _filled(
    sources: dict[str, Source], lacking: Mapping[str, set[str]]
) -> tuple[dict[str, Source], list[str], set[str]]:
    """Members without senses get the anchor's, so that their task vectors are zero there."""
    if not lacking:
        return sources, [], set()
    target = sources["target"]
    whole = {role for role, s in sources.items() if not s.is_difference and s is not target}
    copied = set.intersection(*lacking.values()) if set(lacking) == whole else set()
    changing = {n for s in sources.values() if s.is_difference for n in s.tensors}
    copied -= changing
    notes = []
    if copied:
        notes.append(
            f"{len(copied):,} tensors of the target that no other member has are copied: "
            f"{_some(copied)}"
        )
    start = sources.get("anchor", target)
    giver = target if "anchor" in lacking else start
    result = dict(sources)
    done: dict[int, Source] = {}
    for role, names in lacking.items():
        names = names - copied
        if not names:
            continue
        source = sources[role]
        if id(source) not in done:
            done[id(source)] = _with(source, giver, names)
            notes.append(
                f"{describe(role)} has no {_some(names)} ({len(names):,} tensors): it changes "
                "nothing there"
            )
        result[role] = done[id(source)]
    return result, notes, copied


def _some(names: Iterable[str]) -> str:
    roots = sorted({".".join(name.split(".")[:2]) + ".*" for name in names})
    return ", ".join(roots[:3]) + (", …" if len(roots) > 3 else "")


def _with(source: Source, giver: Source, names: set[str]) -> Source:
    tensors = {**source.tensors, **{name: giver.tensors[name] for name in names}}
    return derived(
        source,
        f"with {len(names)} tensors of another",
        parts=(giver,),
        tensors=tensors,
        make_view=lambda name: (giver if name in names else source).view(name),
    )
