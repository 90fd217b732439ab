"""Members whose rows of tokens differ: made to have the rows of the result, by a policy.

`refuse` changes nothing. `truncate-padding` drops the last rows, which no token uses. `by-token`
reads, at the row of a token of the target, the row that this token has in each member. `union` does
the same and appends the added tokens that only tasks have.

Under the last two a row changes by τ_t only where anchor and task know its token. Everywhere else
the members read the same elements, so that τ_t = 0 (and τ_instr = 0 where the base lacks a token):

| row of | target | anchor | base, tasks |
|---|---|---|---|
| token of all | own | own | own |
| token that the task or the base lacks | own | own | the anchor's |
| token that the anchor lacks, or no token | own | the target's | the target's |
| new token | the mean over the tasks that have it | the same | the same |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from taskvec.checkpoints.rows import NOTHING, Mean, gather
from taskvec.checkpoints.source import Source, derived
from taskvec.checkpoints.tokenizers import (
    VOCABULARIES,
    Added,
    Tokenizer,
    next_row,
    read_tokenizer,
    with_added_tokens,
)
from taskvec.checkpoints.vectors import Vector
from taskvec.checkpoints.views import View
from taskvec.errors import FamilyError
from taskvec.family.tokens import some, token_tensors
from taskvec.statistics.collect import describe

Array = np.ndarray[Any, Any]
_OWN, _ANCHOR, _TARGET, _NEW = 0, 1, 2, 3  # numbers of the parts that rows are picked from


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A source with rows of tokens.

    Attributes:
        who: Its first role, in words.
        source: As it was opened.
        tokenizer: What the rows are for.
        rows: Number of rows by tensor.
    """

    who: str
    source: Source
    tokenizer: Tokenizer
    rows: Mapping[str, int]

    @property
    def all_rows(self) -> int:
        """Number of rows that all of its tensors have."""
        return min(self.rows.values())


@dataclass(frozen=True, slots=True, eq=False)
class _Picked:
    """Where each row of a tensor comes from in one member, as `gather` takes it."""

    which: Array
    row: Array


@dataclass(frozen=True, slots=True, eq=False)
class _New:
    """A token that is appended: its text, its flags, and the tasks that have it."""

    text: str
    flags: Mapping[str, bool]
    members: tuple[_Member, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """What is done to all members.

    Attributes:
        policy: In words, for identities.
        target: Where rows of `_TARGET` come from.
        anchor: Where rows of `_ANCHOR` come from.
        new: New tokens by the tasks that have them; one part from `_NEW` on for each group.
        files: Tokenizer files of the result that are not the target's own.
    """

    policy: str
    target: _Member
    anchor: _Member
    new: Mapping[tuple[_Member, ...], Sequence[str]] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def align(
    sources: dict[str, Source], policy: str, new_tokens: str
) -> tuple[dict[str, Source], list[str]]:
    """Sources whose token rows fit together, and what was done, in words.

    Args:
        sources: By role, the target among them.
        policy: `refuse`, `truncate-padding`, `by-token` or `union`.
        new_tokens: Under `union`, `copy` or `drop`.

    Raises:
        FamilyError: the policy cannot make them fit.
        CheckpointError: a tokenizer is broken, or cannot take new tokens.
    """
    names = token_tensors(sources)
    if policy == "refuse" or not names:
        return sources, []
    fit = all(
        source.tensors[name].shape[0] == sources["target"].tensors[name].shape[0]
        for source in sources.values()
        for name in names
        if name in source.tensors
    )
    if policy == "truncate-padding":
        return (sources, []) if fit else _truncate(sources, _members(sources, names, policy))
    members = _members(sources, names, policy)
    target = members[id(sources["target"])]
    if fit and all(member.tokenizer.agrees(target.tokenizer) for member in members.values()):
        return sources, []
    return _match(sources, members, appends=policy == "union" and new_tokens == "copy")


def _members(
    sources: Mapping[str, Source], names: Sequence[str], policy: str
) -> dict[int, _Member]:
    """Every source that has rows of tokens, once, by its `id`."""
    start = sources.get("anchor", sources["target"])
    found: dict[int, _Member] = {}
    for role, source in sources.items():
        rows = {n: source.tensors[n].shape[0] for n in names if n in source.tensors}
        vector = vector_in(source) if source.is_difference else None
        if not rows and vector is not None and vector.new_tokens:
            raise FamilyError(
                f"{describe(role)} ({source.where}): has new tokens but changes no others; "
                "give the fine-tune itself"
            )
        if id(source) in found or not rows:
            continue
        tokenizer = read_tokenizer(source)
        if tokenizer is None and source.is_difference:
            tokenizer = _of_difference(role, source, start, rows)
        if tokenizer is None:
            raise FamilyError(
                f"{describe(role)} ({source.where}): no tokenizer describes its token rows; "
                f"vocabulary: {policy} needs one ({', '.join(VOCABULARIES)} or *.tiktoken)"
            )
        same = [m.tokenizer for m in found.values() if m.tokenizer.agrees(tokenizer)]
        found[id(source)] = _Member(describe(role), source, same[0] if same else tokenizer, rows)
    return found


def _of_difference(
    role: str, source: Source, start: Source, rows: Mapping[str, int]
) -> Tokenizer | None:
    """The tokenizer of a difference without one: it was taken over the rows of the anchor.

    A vector that was extracted under a policy says which tokens it has besides the anchor's.
    """
    tokenizer = read_tokenizer(start)
    vector = vector_in(source)
    new = vector.new_tokens if vector is not None else None
    if tokenizer is None or vector is None or new is None:
        fit = all(start.tensors[n].shape[0] == count for n, count in rows.items())
        return tokenizer if fit else None
    if vector.metadata.get("tokens_digest") != _digest(tokenizer):
        raise FamilyError(
            f"{describe(role)} ({source.where}): was extracted over a model whose tokens differ "
            f"from the anchor's ({start.where}); extract it over this anchor"
        )
    if not new:
        return tokenizer
    files = with_added_tokens(start, tokenizer, new)
    return read_tokenizer(derived(start, "new tokens", files=files))


def vector_in(source: Source) -> Vector | None:
    """The extracted vector that a source is made of, if it is."""
    if isinstance(source, Vector):
        return source
    return vector_in(source.parts[0]) if source.parts and source.is_difference else None


def token_metadata(start: Source) -> tuple[dict[str, str], dict[str, Array]]:
    """What a vector must say of tokens, where its anchor was given other rows than it has.

    Returns:
        Metadata, empty where the rows are the anchor's own; and by tensor the rows of new tokens.
    """
    original: Source = start
    while original.parts:
        original = original.parts[0]
    names = token_tensors({"target": start})
    same = all(
        name in original.tensors and original.tensors[name].shape == start.tensors[name].shape
        for name in names
    )
    own, given = read_tokenizer(original), read_tokenizer(start)
    if original is start or own is None or given is None or (same and own.agrees(given)):
        return {}, {}
    new = sorted(
        (about.row, text, about.flags)
        for text, about in given.added.items()
        if text not in own.tokens
    )
    metadata = {
        "new_tokens": json.dumps([[text, row, dict(flags)] for row, text, flags in new]),
        "tokens_digest": _digest(own),
    }
    rows = np.array([row for row, _, _ in new], np.int64)
    return metadata, dict.fromkeys(names, rows) if len(rows) else {}


def _digest(tokenizer: Tokenizer) -> str:
    """Identity of which token has which row."""
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(tokenizer.tokens.items())).encode())


def _truncate(
    sources: dict[str, Source], members: Mapping[int, _Member]
) -> tuple[dict[str, Source], list[str]]:
    """Every token tensor cut after the last row that a token of any member has."""
    for member in members.values():
        if not member.tokenizer.knows_all:
            raise FamilyError(
                f"{member.who} ({member.source.where}): {member.tokenizer.file} lists no special "
                "tokens, so truncate-padding could drop their rows; vocabulary: by-token"
            )
    longest = max(members.values(), key=lambda m: m.tokenizer.used_rows)
    rows, tokens = longest.tokenizer.used_rows, longest.tokenizer.tokens
    for member in members.values():
        late = sorted((row, token) for token, row in tokens.items() if row >= member.all_rows)
        if late:
            raise FamilyError(
                f"{member.who} ({member.source.where}): has {member.all_rows:,} rows of tokens; "
                f"{longest.who} has {some([token for _, token in late])} beyond them, which "
                "truncate-padding does not drop; vocabulary: by-token or union"
            )
    picked = {
        key: {name: _Picked(np.zeros(rows, np.int16), np.arange(rows)) for name in member.rows}
        for key, member in members.items()
    }
    had = ", ".join(f"{m.who} {max(m.rows.values()):,}" for m in members.values())
    note = f"rows of tokens: the first {rows:,} of each member, no token uses the rest ({had})"
    target = members[id(sources["target"])]
    return _changed(sources, members, picked, _Change("truncate-padding", target, target)), [note]


def _match(
    sources: dict[str, Source], members: Mapping[int, _Member], *, appends: bool
) -> tuple[dict[str, Source], list[str]]:
    """Rows matched by token, and new tokens appended if that is wanted."""
    target = members[id(sources["target"])]
    anchor = members.get(id(sources.get("anchor")), target)
    new = _new_tokens(sources, members, target) if appends else []
    first = _first_new_row(target, new) if new else 0
    groups: dict[tuple[_Member, ...], list[str]] = {}
    appended = _Picked(np.zeros(len(new), np.int16), np.zeros(len(new), np.int64))
    for i, token in enumerate(new):
        mine = groups.setdefault(token.members, [])
        appended.which[i], appended.row[i] = _NEW + list(groups).index(token.members), len(mine)
        mine.append(token.text)
    places = {key: _places(target.tokenizer, m.tokenizer) for key, m in members.items()}
    picked: dict[int, dict[str, _Picked]] = {key: {} for key in members}
    for name, had in target.rows.items():
        rows = max(had, first + len(new))
        known = _limited(places[id(anchor.source)], anchor.rows[name], rows)
        for key, member in members.items():
            if name not in member.rows:
                continue
            own = _limited(places[key], member.rows[name], rows)
            one = _pick(own, known, is_target=member is target)
            one.which[first : first + len(new)] = appended.which
            one.row[first : first + len(new)] = appended.row
            if member.source.is_difference and member.source.view(name).is_difference:
                one.which[one.which != _OWN] = NOTHING
            picked[key][name] = one
    change = _Change("union" if appends else "by-token", target, anchor)
    notes = [note for m in members.values() if m is not target for note in _note(m, target, new)]
    if new:
        added = {token.text: Added(first + i, token.flags) for i, token in enumerate(new)}
        files = with_added_tokens(target.source, target.tokenizer, added)
        change = replace(change, new=groups, files=files)
        notes.append(
            f"new rows of tokens from {first:,} on: "
            + ", ".join(f"{t.text!r} of {' and '.join(m.who for m in t.members)}" for t in new[:8])
            + (f" and {len(new) - 8:,} more" if len(new) > 8 else "")
        )
    return _changed(sources, members, picked, change), notes


def _note(member: _Member, target: _Member, new: Sequence[_New]) -> Iterator[str]:
    """What matching by token comes to for one member; nothing where it has the target's tokens."""
    theirs, own = target.tokenizer.tokens, member.tokenizer.tokens
    appended = {token.text for token in new}
    lacking = [t for t in theirs if t not in own]
    left_out = [t for t in own if t not in theirs and t not in appended]
    parts = [f"lacks {some(lacking)} of the target"] if lacking else []
    parts += [f"leaves out {some(left_out)} that only it has"] if left_out else []
    if not member.tokenizer.knows_all:
        parts.append(f"{member.tokenizer.file} lists no special tokens: their rows are not merged")
    if parts or any(theirs.get(token, row) != row for token, row in own.items()):
        yield "; ".join([f"{member.who}: rows of tokens matched by token", *parts])


def _places(target: Tokenizer, member: Tokenizer) -> Array:
    """By row of the target the row of its token in a member, or −1, shape (used rows,), int64."""
    places = np.full(target.used_rows, -1, np.int64)
    for token, row in target.tokens.items():
        other = member.tokens.get(token)
        if other is not None:
            places[row] = other
    return places


def _limited(places: Array, had: int, rows: int) -> Array:
    """Places for a tensor of `rows` rows from one that has `had`; −1 without a row."""
    out = np.full(rows, -1, np.int64)
    count = min(rows, len(places))
    out[:count] = places[:count]
    out[out >= had] = -1
    return out


def _pick(own: Array, known: Array, *, is_target: bool) -> _Picked:
    """Where rows come from by the table at the head of this file.

    Args:
        own: Row of each token in the member, −1 if it has none, shape (rows,).
        known: The same in the anchor.
        is_target: Whether the member is the target, whose rows stay as they are.
    """
    every = np.arange(len(own))
    if is_target:
        return _Picked(np.zeros(len(own), np.int16), every)
    which = np.full(len(own), _TARGET, np.int16)
    row = every.copy()
    which[known >= 0], row[known >= 0] = _ANCHOR, known[known >= 0]
    taken = (own >= 0) & (known >= 0)
    which[taken], row[taken] = _OWN, own[taken]
    return _Picked(which, row)


def _new_tokens(
    sources: Mapping[str, Source], members: Mapping[int, _Member], target: _Member
) -> list[_New]:
    """Added tokens of tasks that the target lacks: by task, then by row."""
    roles = sorted(role for role in sources if role.startswith("task:"))
    found: dict[str, _New] = {}
    for key in dict.fromkeys(id(sources[role]) for role in roles if id(sources[role]) in members):
        member = members[key]
        tokens, added = member.tokenizer.tokens, member.tokenizer.added
        theirs = target.tokenizer.tokens
        rows = sorted(
            (row, token)
            for token, row in tokens.items()
            if token not in theirs and row < member.all_rows
        )
        ordinary = [token for _, token in rows if token not in added]
        if ordinary:
            raise FamilyError(
                f"{member.who} ({member.source.where}): {some(ordinary)} of its vocabulary not in "
                "the target's, nor added to it, so they cannot be appended; leave out what only "
                "tasks have: vocabulary: by-token"
            )
        for name in target.rows if rows else ():
            if not _has_new_rows(member, name):
                raise FamilyError(
                    f"{member.who} ({member.source.where}): has {some([t for _, t in rows])} that "
                    f"the target lacks, but no rows of {name!r} for that; leave new tokens out "
                    "with new_tokens: drop"
                )
        for _, token in rows:
            before = found.get(token, _New(token, added[token].flags, ()))
            found[token] = replace(before, members=(*before.members, member))
    return list(found.values())


def _has_new_rows(member: _Member, name: str) -> bool:
    """Whether a member has weights, and no differences, of its new tokens in a tensor."""
    vector = vector_in(member.source)
    if vector is not None:
        return vector.new_rows(name) is not None
    return name in member.rows and not member.source.view(name).is_difference


def _first_new_row(target: _Member, new: Sequence[_New]) -> int:
    """Where new rows go: behind the last token, into rows that were padding and beyond."""
    first = next_row(target.source, target.tokenizer)
    if first > target.all_rows or len(set(target.rows.values())) > 1:
        counts = " and ".join(f"{count:,}" for count in sorted(set(target.rows.values())))
        raise FamilyError(
            f"{target.who} ({target.source.where}): has {counts} rows of tokens, but tokens up to "
            f"row {first - 1:,}, so {some([t.text for t in new])} cannot be appended; leave new "
            "tokens out with new_tokens: drop"
        )
    return first


def _changed(
    sources: dict[str, Source],
    members: Mapping[int, _Member],
    picked: Mapping[int, Mapping[str, _Picked]],
    change: _Change,
) -> dict[str, Source]:
    """The sources with the picked rows; roles that shared one object still do."""
    done: dict[int, Source] = {}
    for key, member in members.items():
        stays = all(
            len(one.row) == member.rows[name]
            and not one.which.any()
            and np.array_equal(one.row, np.arange(len(one.row)))
            for name, one in picked[key].items()
        )
        if not stays:
            done[key] = _with_rows(member, picked[key], change)
    return {role: done.get(id(source), source) for role, source in sources.items()}


def _with_rows(member: _Member, picked: Mapping[str, _Picked], change: _Change) -> Source:
    source = member.source
    target, anchor = change.target.source, change.anchor.source
    givers = [m.source for group in change.new for m in group]

    def view(name: str) -> View:
        if name not in picked:
            return source.view(name)
        parts = [source.view(name), anchor.view(name), target.view(name)]
        parts += [_new_rows(name, group, tokens) for group, tokens in change.new.items()]
        return gather(parts, picked[name].which, picked[name].row)

    digest = xxhash.xxh3_128()
    for name, one in picked.items():
        digest.update(name.encode() + one.which.tobytes() + one.row.tobytes())
    for group, tokens in change.new.items():
        places = [[m.tokenizer.tokens[token] for token in tokens] for m in group]
        digest.update(repr((tokens, places)).encode())
    shapes = {
        name: replace(source.tensors[name], shape=(len(one.row), *source.tensors[name].shape[1:]))
        for name, one in picked.items()
    }
    rows = len(next(iter(picked.values())).row)
    return derived(
        source,
        f"vocabulary {change.policy} {digest.hexdigest()}",
        parts=tuple({id(s): s for s in (anchor, target, *givers) if s is not source}.values()),
        tensors={**source.tensors, **shapes},
        make_view=view,
        config=source.config if source.is_difference else with_rows(source.config, rows),
        files=change.files if source is target else None,
    )


def _new_rows(name: str, group: Sequence[_Member], tokens: Sequence[str]) -> View:
    """Rows of tokens that are new, as the tasks that have them share them."""
    views = []
    for member in group:
        rows = np.array([member.tokenizer.tokens[token] for token in tokens], np.int64)
        vector = vector_in(member.source)
        view = vector.new_rows(name) if vector is not None else None
        if view is None:
            view = member.source.view(name)
        else:  # its rows are those of its new tokens alone
            assert vector is not None
            listed = [about.row for about in (vector.new_tokens or {}).values()]
            rows = np.array([listed.index(row) for row in rows.tolist()], np.int64)
        views.append(gather([view], np.zeros(len(rows), np.int16), rows))
    return views[0] if len(views) == 1 else Mean(tuple(views))


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config of a model with this many rows of tokens."""
    text = config.get("text_config")
    changed = dict(config)
    if isinstance(text, dict):
        changed["text_config"] = {**text, "vocab_size": rows}
    if config and ("vocab_size" in config or not isinstance(text, dict)):
        changed["vocab_size"] = rows
    return changed
