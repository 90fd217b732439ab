"""Opening the models of a family as sources that have the same tensors, as far as that can be done.

An adapter becomes the difference that it makes to the model that it was trained over (as a task),
or the whole model with it (in every other role). A head that is tied to the embedding in one member
and not in another is untied everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.hub import fetch, hub_name
from taskvec.checkpoints.memory import MARK, Module, open_memory
from taskvec.checkpoints.pickled import is_pickled, open_pickled
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source, derived
from taskvec.engine.recipe import STAGE, Family
from taskvec.engine.stacking import Stack, stacked
from taskvec.errors import CheckpointError, UsageError
from taskvec.layers import LANGUAGE_HEADS, TOKEN_EMBEDDINGS

# Model types that tie the head to the embedding unless their config says otherwise.
_TIED_BY_DEFAULT = ("bert", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "opt", "roberta")


def open_family(
    family: Family, *, needs_base: bool, needs_anchor: bool, stages: Mapping[str, Source]
) -> tuple[dict[str, Source], list[str]]:
    """The sources of a family by role, and what was done so that they fit, in words.

    Args:
        family: Models and policies.
        needs_base: Whether the base is used; if not, it is opened only where an adapter is over it.
        needs_anchor: Whether task vectors are taken.
        stages: What `stage:NAME` means, by name.

    Raises:
        UsageError: a role that is needed is not given.
        CheckpointError: a member is broken.
        FamilyError: an adapter does not fit the model that it is over.
    """
    if needs_anchor and family.start is None:
        raise UsageError("instruct (or anchor) is missing: task vectors are measured from it")
    if needs_base and family.base is None:
        raise UsageError(
            "base is missing: this method compares with the step from base to instruct"
        )
    sources = _roles(family, needs_base=needs_base, needs_anchor=needs_anchor, stages=stages)
    return _with_one_head(sources)


def _roles(
    family: Family, *, needs_base: bool, needs_anchor: bool, stages: Mapping[str, Source]
) -> dict[str, Source]:
    """Every role that is read, adapters put on what they are over."""
    opened: dict[object, Source] = {}

    def model(spec: object) -> Source:
        if isinstance(spec, str) and spec.startswith(STAGE):
            return stages[spec.removeprefix(STAGE)]
        if isinstance(spec, Stack):
            return stacked(spec.pieces, [model(piece.model) for piece in spec.pieces])
        key: object = id(spec)
        if isinstance(spec, (str, os.PathLike)):
            key = os.path.realpath(os.path.expanduser(spec))  # noqa: PTH111 (leaves ~nobody)
        if key not in opened:
            opened[key] = open_model(spec, allow_pickle=family.allow_pickle)
        return opened[key]

    sources: dict[str, Source] = {}
    if family.edited is not None:
        sources["target"] = model(family.edited)
    if needs_anchor:
        sources["anchor"] = model(family.start)
    if needs_base:
        sources["base"] = model(family.base)
    tasks = sorted(family.tasks)
    sources |= {f"task:{task}": model(family.tasks[task]) for task in tasks}
    if "target" not in sources:
        sources["target"] = sources[f"task:{tasks[0]}"]
    return sources


def open_model(spec: object, *, allow_pickle: bool = False) -> Source:
    """The source that a recipe or a family means by `spec`.

    Args:
        spec: A path, a name on the hub, a state dict or module in memory, or a source itself.
        allow_pickle: Whether pickled weights may be read.

    Raises:
        CheckpointError: it is broken or not there.
    """
    if isinstance(spec, (Mapping, Module)):
        return open_memory(spec)
    if not isinstance(spec, (str, os.PathLike)):
        return cast(Source, spec)
    if os.fspath(spec).startswith(MARK):
        raise CheckpointError(f"{spec}: was in memory and cannot be read again; merge in Python")
    name = hub_name(spec)
    if name is None:
        return _open_path(spec, allow_pickle)
    name, path = fetch(name, allow_pickle=allow_pickle)
    return derived(_open_path(path, allow_pickle), "from the hub", where=str(name))


def _open_path(path: str | os.PathLike[str], allow_pickle: bool) -> Source:
    there = Path(os.path.expanduser(path))  # noqa: PTH111 (unlike Path's, leaves ~nobody)
    if allow_pickle and is_pickled(there):
        return open_pickled(there)
    return open_checkpoint(path)


def _with_one_head(sources: dict[str, Source]) -> tuple[dict[str, Source], list[str]]:
    """The same sources with a head either in all of them or in none.

    If any member has a head of its own, those that tie it to the embedding get it as a view of the
    embedding; if all tie it, copies that some of them store are left out, as transformers does.
    """
    notes: list[str] = []
    whole = {role: source for role, source in sources.items() if not source.is_difference}
    for head in sorted(
        {n for s in whole.values() for n in s.tensors if n.endswith(LANGUAGE_HEADS)}
    ):
        stored = [role for role, source in whole.items() if head in source.tensors]
        tied = [role for role, source in whole.items() if _ties(source, head)]
        if len(stored) == len(whole) and not tied:
            continue
        if len(tied) == len(whole):
            notes.append(f"{head} is tied to the embedding in every member and left out")
            sources = _changed(sources, stored, partial(_without, head))
        elif tied:
            notes.append(
                f"{head} is tied to the embedding in {', '.join(sorted(tied))} and not in all "
                "members: the result is untied"
            )
            sources = _changed(sources, tied, partial(_untied, head))
        whole = {role: source for role, source in sources.items() if not source.is_difference}
    return sources, notes


def _changed(
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


def _ties(source: Source, head: str) -> bool:
    """Whether a member takes its head from the embedding when it is loaded."""
    text = source.config.get("text_config")
    places = [source.config, *([text] if isinstance(text, dict) else [])]
    said = [place["tie_word_embeddings"] for place in places if "tie_word_embeddings" in place]
    if said:
        is_tied = bool(said[0])
    else:
        is_tied = head not in source.tensors or (
            source.config.get("model_type") in _TIED_BY_DEFAULT
        )
    return is_tied and _embedding(source) is not None


def _embedding(source: Source) -> str | None:
    """The token embedding, if there is exactly one."""
    names = [name for name in source.tensors if name.endswith(TOKEN_EMBEDDINGS)]
    return names[0] if len(names) == 1 else None


def _without(head: str, source: Source) -> Source:
    tensors = {name: info for name, info in source.tensors.items() if name != head}
    return derived(source, f"without {head}", tensors=tensors)


def _untied(head: str, source: Source) -> Source:
    embedding = _embedding(source)
    assert embedding is not None
    info = source.tensors[embedding]
    tensors = {**source.tensors, head: TensorInfo(head, info.dtype, info.shape, 0)}
    return derived(
        source,
        f"{head} is {embedding}",
        tensors=tensors,
        make_view=lambda name: source.view(embedding if name == head else name),
        config={**source.config, "tie_word_embeddings": False},
    )
