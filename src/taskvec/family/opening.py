"""Opening the models of a family as sources that have the same tensors, as far as that can be done.

An adapter becomes the difference that it makes to the model that it was trained over (as a task),
or the whole model with it (in every other role). A head that is tied to the embedding in one member
and not in another is untied everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from taskvec import documents
from taskvec.checkpoints.adapter_changes import difference
from taskvec.checkpoints.adapters import (
    Adapter,
    is_adapter,
    open_adapter,
    open_loose_adapter,
)
from taskvec.checkpoints.belongings import belongings, module_weights
from taskvec.checkpoints.folder import USE_ADAPTER, Checkpoint, open_checkpoint
from taskvec.checkpoints.hub import fetch, hub_name
from taskvec.checkpoints.memory import MARK, Held, Module, open_memory
from taskvec.checkpoints.pickled import is_pickled, open_pickled
from taskvec.checkpoints.source import Source, added, derived
from taskvec.checkpoints.vectors import is_vector, open_vector
from taskvec.checkpoints.views import same_elements
from taskvec.errors import CheckpointError, UsageError, nearest
from taskvec.family.architectures import told_first
from taskvec.family.copies import (
    changed,
    with_copy,
    with_one_embedding,
    without,
)
from taskvec.family.matching import fitted, with_names_of_target
from taskvec.family.stacking import stacked
from taskvec.family.tokens import TOKEN_ROWS
from taskvec.family.vocabulary import align, with_rows
from taskvec.layers import LANGUAGE_HEADS, TOKEN_EMBEDDINGS
from taskvec.recipes.recipe import STAGE, Family
from taskvec.recipes.stack import Stack
from taskvec.statistics.collect import describe

# Model types that tie the head to the embedding unless their config says otherwise.
_TIED_BY_DEFAULT = ("bert", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "opt", "roberta")
FROM_HUB = "from the hub"  # what was done to a source that is a download, as it is
# Ends of the names of architectures that have a language head.
_SPEAK = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def open_family(
    family: Family, *, needs_base: bool, needs_anchor: bool, stages: Mapping[str, Source]
) -> tuple[dict[str, Source], list[str], set[str]]:
    """The sources of a family by role, and what was done so that they fit, in words.

    The third are tensors of the target that no other member has the tower for.

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
    notes: list[str] = []
    sources = _roles(family, notes, needs_base=needs_base, needs_anchor=needs_anchor, stages=stages)
    notes += _about_files(sources)
    with told_first(sources):
        sources, more = with_one_embedding(sources)
        notes += more
        sources, more, copied = with_names_of_target(sources)
        notes += more
        sources, more = _with_one_head(sources)
        notes += more
        sources, more = align(sources, family.vocabulary, family.new_tokens)
    return sources, notes + more, copied


def _about_files(sources: Mapping[str, Source]) -> list[str]:
    """What is odd about files that were opened, and what of the target is not carried over."""
    found = [note for source in sources.values() for note in _notes(source)]
    folder = sources["target"].folder
    if folder is not None:
        _, left = belongings(folder)
        read = {file for path in _stored(sources["target"]) for file in path}
        left = [name for name in left if name not in read and not name.endswith(".index.json")]
        if left:
            shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            found.append(f"left out of the result, from the folder of the target: {shown}")
        weights = sorted({name.split("/")[0] for name in module_weights(folder)})
        if weights:
            found.append(f"the modules {', '.join(weights)} keep the target's own weights")
    return list(dict.fromkeys(found))


def _notes(source: Source) -> Iterator[str]:
    yield from getattr(source, "notes", ())
    for part in source.parts:
        yield from _notes(part)


def _stored(source: Source) -> Iterator[list[str]]:
    """Names of the weight files of the first model that a source is made of."""
    if source.parts:
        yield from _stored(source.parts[0])
    elif isinstance(source, Checkpoint):
        yield [identity.name for identity in source.stored]
    elif isinstance(source, Held):
        yield [identity.name for identity in source.read_from]


def _roles(
    family: Family,
    notes: list[str],
    *,
    needs_base: bool,
    needs_anchor: bool,
    stages: Mapping[str, Source],
) -> dict[str, Source]:
    """Every role that is read, adapters put on what they are over."""
    opened: dict[object, Source | Adapter] = {}

    def model(spec: object) -> Source | Adapter:
        if isinstance(spec, str) and spec.startswith(STAGE):
            return _stage(spec.removeprefix(STAGE), stages)
        if isinstance(spec, Stack):
            return stacked(spec.pieces, [_whole(model(piece.model)) for piece in spec.pieces])
        key: object = id(spec)
        if isinstance(spec, (str, os.PathLike)):
            key = os.path.realpath(os.path.expanduser(spec))  # noqa: PTH111 (leaves ~nobody)
        if key not in opened:
            opened[key] = open_model(spec, allow_pickle=family.allow_pickle)
        return opened[key]

    found: dict[str, Source | Adapter] = {}
    if family.edited is not None:
        found["target"] = model(family.edited)
    if needs_anchor:
        found["anchor"] = model(family.start)
    if needs_base:
        found["base"] = model(family.base)
    tasks = sorted(family.tasks)
    found |= {f"task:{task}": model(family.tasks[task].model) for task in tasks}
    sources = _put_on(found, family, model, notes, needs_anchor=needs_anchor)
    if "target" not in sources:
        sources["target"] = sources[f"task:{tasks[0]}"]
    return sources


def _stage(name: str, stages: Mapping[str, Source]) -> Source:
    if name not in stages:
        raise UsageError(f"{STAGE}{name}: unknown stage; {nearest(name, list(stages))}")
    return stages[name]


def _put_on(
    found: Mapping[str, Source | Adapter],
    family: Family,
    model: Callable[[object], Source | Adapter],
    notes: list[str],
    *,
    needs_anchor: bool,
) -> dict[str, Source]:
    """Every role with its adapter on what that is over: as a difference, or as the model it makes.

    A task is a difference to the anchor. It becomes a whole model where it is over the base, or
    where no task vectors are taken; every other role always does.
    """
    _check_over(found, family)
    over = {f"task:{name}": task.over or "anchor" for name, task in family.tasks.items()}
    over |= {"target": "base" if family.target is None else "anchor", "anchor": "base"}
    ready: dict[str, Source] = {}
    made: dict[tuple[int, str, bool], Source] = {}

    def put(role: str, given: Source | Adapter) -> Source:
        if not isinstance(given, Adapter):
            if given.is_difference and not (needs_anchor and role.startswith("task:")):
                raise UsageError(
                    f"{describe(role)} ({given.where}): is a task vector where a model is needed; "
                    "give the model itself"
                )
            return given
        under, is_task = over.get(role, ""), role.startswith("task:")
        if not under:
            raise UsageError(
                f"{role} ({given.where}): is an adapter, and the model below it is missing; "
                f"give the whole model as {role}"
            )
        if role == "target" and given is found.get("anchor"):
            under = over["anchor"]
        if under not in ready:
            spec = family.base if under == "base" else family.start
            if spec is None:
                name = "base" if under == "base" else "instruct (or anchor)"
                raise UsageError(
                    f"{describe(role)} ({given.where}): is an adapter, and {name}, which it is "
                    "over, is missing; give it"
                )
            ready[under] = put(under, found[under] if under in found else model(spec))
        whole = not is_task or under == "base" or not needs_anchor
        if (id(given), under, whole) not in made:
            apart = _parted_head(given, ready[under])
            if apart is not None:  # in every role that is this model
                roles = [role for role in ready if ready[role] is ready[under]]
                ready.update(changed(ready, roles, partial(_untied, apart)))
                notes.append(
                    f"{apart} is tied to the embedding in the model that the adapter of "
                    f"{describe(role)} is over, which changes one of them: the result is untied"
                )
            change = fitted(
                difference(given, ready[under], exclude=family.exclude, token_rows=TOKEN_ROWS),
                ready[under],
            )
            if whole:
                change.files = given.tokenizer()
            made[id(given), under, whole] = _put(ready[under], change) if whole else change
        return made[id(given), under, whole]

    for role in sorted(found):  # anchor, base, target, tasks
        if role not in ready:
            ready[role] = put(role, found[role])
    return {role: ready[role] for role in found}


def _put(weights: Source, change: Source) -> Source:
    """The whole model that an adapter makes; its config says how many rows of tokens it has."""
    model = added(weights, change)
    for name, info in model.tensors.items():
        if name.endswith(TOKEN_EMBEDDINGS) and info.shape != weights.tensors[name].shape:
            return derived(model, "rows", config=with_rows(model.config, info.shape[0]))
    return model


def _check_over(found: Mapping[str, Source | Adapter], family: Family) -> None:
    """Refuse `over` for a task that is not an adapter."""
    for task in sorted(name for name, each in family.tasks.items() if each.over):
        given = found[f"task:{task}"]
        if not isinstance(given, Adapter):
            raise UsageError(f"task {task!r} ({given.where}): is not an adapter; remove `over`")


def _parted_head(adapter: Adapter, over: Source) -> str | None:
    """The head that an adapter parts from the embedding, if those are one tensor in the model."""
    changed = [f"{module}.weight" for module in adapter.modules] + list(adapter.whole)
    heads = [name for name in changed if name.endswith(LANGUAGE_HEADS)]
    rows = {m for m, parts in adapter.modules.items() if any("token_adapter" in p for p in parts)}
    embeds = any(
        name.endswith(TOKEN_EMBEDDINGS) and name.removesuffix(".weight") not in rows
        for name in changed
    )
    speaks = any(a.endswith(_SPEAK) for a in over.config.get("architectures") or ())
    if not heads and embeds and speaks:
        heads = ["lm_head.weight"]
    return heads[0] if heads and ties_head(over, heads[0]) else None


def _whole(model: Source | Adapter) -> Source:
    if isinstance(model, Adapter):
        raise CheckpointError(f"{model.where}: is an adapter, not a whole model; {USE_ADAPTER}")
    if model.is_difference:
        raise CheckpointError(f"{model.where}: is a task vector, not a model; it has no layers")
    return model


def open_model(spec: object, *, allow_pickle: bool = False) -> Source | Adapter:
    """The source, or the adapter, that a recipe or a family means by `spec`.

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
        try:
            return _open_path(spec, allow_pickle)
        except OSError as error:
            what = f"cannot be opened: {error.strerror or error}"
            raise CheckpointError(f"{documents.plain(str(spec))[:200]}: {what}") from error
    name, path = fetch(name, allow_pickle=allow_pickle)
    model = _open_path(path, allow_pickle)
    if isinstance(model, Adapter):
        return replace(model, where=str(name))
    return derived(model, FROM_HUB, where=str(name))


def _open_path(path: str | os.PathLike[str], allow_pickle: bool) -> Source | Adapter:
    there = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 (unlike Path's, leaves ~nobody)
    if allow_pickle and is_pickled(there):
        return open_pickled(there)
    if is_vector(there):
        return open_vector(there)
    if is_adapter(path):
        return open_adapter(path, allow_pickle=allow_pickle)
    return open_loose_adapter(there) or open_checkpoint(path)


def _with_one_head(sources: dict[str, Source]) -> tuple[dict[str, Source], list[str]]:
    """The same sources with a head either in all of them or in none.

    If any member has a separate head, those that tie it to the embedding get it as a view of the
    embedding; if all tie it, copies that some of them store are left out, as transformers does.
    """
    notes: list[str] = []
    whole = {role: source for role, source in sources.items() if not source.is_difference}
    for head in sorted({n for s in whole.values() for n in s.tensors if _is_head(n)}):
        stored = [role for role, source in whole.items() if head in source.tensors]
        parted = [role for role in stored if _is_parted(whole[role], head)]
        tied = [r for r, source in whole.items() if r not in parted and ties_head(source, head)]
        if tied and len(stored) < len(whole):  # the architecture ties them; a config may be silent
            tied += [role for role in stored if role not in tied and _is_copy(whole[role], head)]
        # A difference in rows of a tied embedding is one in the same rows of the head.
        follow = [
            role
            for role, source in sources.items()
            if source.is_difference
            and ties_head(source, head)
            and not any(_is_parted(part, head) for part in source.parts)
        ]
        if parted:
            notes.append(
                f"{head} is not the embedding in {', '.join(parted)}, although the config says so: "
                "it is merged as it is stored, and the result is untied"
            )
            sources = changed(sources, parted, _with_untied_config)
        if len(stored) == len(whole) and not tied and not follow:
            pass
        elif len(tied) == len(whole):
            notes.append(f"{head} is tied to the embedding in every member and left out")
            sources = changed(sources, stored, partial(without, head))
        elif tied or follow:
            notes.append(
                f"{head} is tied to the embedding in {', '.join(sorted([*tied, *follow]))} and not "
                "in all members: the result is untied"
            )
            sources = changed(sources, [*tied, *follow], partial(_untied, head))
        whole = {role: source for role, source in sources.items() if not source.is_difference}
    return sources, notes


def _is_head(name: str) -> bool:
    """Whether a tensor is a language head; Whisper's has a name that other models' layers have."""
    return name.endswith(LANGUAGE_HEADS) or name in ("proj_out.weight", "model.proj_out.weight")


def _is_copy(source: Source, head: str) -> bool:
    """Whether a member stores its embedding as head too, and its config does not part them."""
    embedding = token_embedding(source)
    if embedding is None or _declared_tie(source) is False:
        return False
    return same_elements(source.view(head), source.view(embedding))


def _is_parted(source: Source, head: str) -> bool:
    """Whether a member stores a head that is not the embedding, while its config ties the two.

    transformers (5.8 on) uses such a head; adapters that save both leave it when they are merged.
    """
    if source.is_difference or head not in source.tensors or not ties_head(source, head):
        return False
    embedding = token_embedding(source)
    assert embedding is not None
    return not same_elements(source.view(head), source.view(embedding))


def ties_head(source: Source, head: str) -> bool:
    """Whether a member takes its head from the embedding when it is loaded, by its config."""
    is_tied = _declared_tie(source)
    if is_tied is None:
        is_tied = head not in source.tensors or (
            source.config.get("model_type") in _TIED_BY_DEFAULT
        )
    return is_tied and token_embedding(source) is not None


def _declared_tie(source: Source) -> bool | None:
    """Whether a config ties the head to the embedding; None if it does not say."""
    places = [source.config, source.config.get("text_config") or {}]
    said = [place["tie_word_embeddings"] for place in places if "tie_word_embeddings" in place]
    return bool(said[0]) if said else None


def token_embedding(source: Source) -> str | None:
    """The token embedding, if there is exactly one."""
    names = [name for name in source.tensors if name.endswith(TOKEN_EMBEDDINGS)]
    return names[0] if len(names) == 1 else None


def _with_untied_config(source: Source) -> Source:
    return derived(source, "untied", config=_untied_config(source))


def _untied_config(source: Source) -> dict[str, Any]:
    config = {**source.config, "tie_word_embeddings": False}
    text = config.get("text_config") or {}
    if text.get("tie_word_embeddings"):
        config["text_config"] = {**text, "tie_word_embeddings": False}
    return config


def _untied(head: str, source: Source) -> Source:
    embedding = token_embedding(source)
    assert embedding is not None
    untied = with_copy(head, embedding, source)
    return derived(untied, "untied", config=_untied_config(source))
