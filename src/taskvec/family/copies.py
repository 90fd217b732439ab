"""Tensors that are one in the model, and several in some of its files.

T5, BART and their kin have one embedding, `shared.weight`, which files may hold again under the
names of encoder and decoder; the heads of BERT and RoBERTa have one bias under two names. Whether a
stored tensor is a copy is seen in its elements; what a config says of it is a hint, and where there
is nothing to compare the only one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source, derived
from taskvec.checkpoints.views import same_elements

_SHARED: Final = re.compile(r"(?P<root>.*?)shared\.weight")
_COPIES: Final = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_PAIRS: Final = {
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}


def with_one_embedding(sources: Mapping[str, Source]) -> tuple[dict[str, Source], list[str]]:
    """The members without copies of what they hold under another name, and what was done, in words.

    If a tensor is not a copy in one member, the result has no copy, and members that do
    not hold it get a view of what it is taken from.
    """
    whole = {role: source for role, source in sources.items() if not source.is_difference}
    notes: list[str] = []
    result = dict(sources)
    for copy, origin in sorted(_pairs(whole)):
        stored = [role for role, source in whole.items() if copy in source.tensors]
        lacking = [role for role in whole if role not in stored]
        if copy in _PAIRS and not lacking:
            continue
        parted = [
            role
            for role in stored
            if origin not in result[role].tensors
            or not same_elements(result[role].view(copy), result[role].view(origin))
        ]
        if not parted:
            result = changed(result, stored, partial(without, copy))
            notes.append(f"{copy} is {origin} in every member and left out")
        elif lacking and all(origin in result[role].tensors for role in lacking):
            result = changed(result, lacking, partial(with_copy, copy, origin))
            notes.append(f"{copy} is not {origin} in all members, so it is merged separately")
    return result, notes


def _pairs(sources: Mapping[str, Source]) -> set[tuple[str, str]]:
    """Names that may be copies, each with the name of what it is a copy of."""
    names = {name for source in sources.values() for name in source.tensors}
    found = {(copy, origin) for copy, origin in _PAIRS.items() if {copy, origin} <= names}
    for name in names:
        shared = _SHARED.fullmatch(name)
        if shared is not None:
            copies = (shared["root"] + copy for copy in _COPIES)
            found |= {(copy, name) for copy in copies if copy in names}
    return found


def changed(
    sources: Mapping[str, Source], roles: list[str], change: Callable[[Source], Source]
) -> dict[str, Source]:
    """Sources with some changed; roles that shared one object still do."""
    done: dict[int, Source] = {}
    result = dict(sources)
    for role in roles:
        source = sources[role]
        if id(source) not in done:
            done[id(source)] = change(source)
        result[role] = done[id(source)]
    return result


def without(name: str, source: Source) -> Source:
    """A member without one of its tensors."""
    tensors = {each: info for each, info in source.tensors.items() if each != name}
    return derived(source, f"without {name}", tensors=tensors)


def with_copy(copy: str, origin: str, source: Source) -> Source:
    """A member that holds one of its tensors under another name as well."""
    info = source.tensors[origin]
    return derived(
        source,
        f"{copy} is {origin}",
        tensors={**source.tensors, copy: TensorInfo(copy, info.dtype, info.shape, 0)},
        make_view=lambda name: source.view(origin if name == copy else name),
    )
