"""Which models a mergekit configuration merges, as a recipe names them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from taskvec.checkpoints.folder import open_checkpoint, read_config
from taskvec.checkpoints.hub import hub_name
from taskvec.errors import CheckpointError
from taskvec.recipes.mergekit.schema import Ingredient, Reference
from taskvec.recipes.mergekit.work import Work
from taskvec.validation import Key

Recipe = dict[str, Any]


def fill_roles(work: Work) -> None:
    """Base and inputs over all slices; `linear` and `karcher` count the base as an input."""
    config, document = work.config, work.document
    rows: list[list[Ingredient]] = []
    takes_base = config.method not in ("linear", "karcher", "passthrough")
    for slice_ in config.slices:
        base = slice_.base or config.base
        sources = list(slice_.sources)
        seen = [source.reference for source in sources]
        twice = next((s for i, s in enumerate(sources) if s.reference in seen[:i]), None)
        if twice is not None:
            document.fail(twice.key, f"{twice.reference} occurs twice; mergekit refuses that too")
        bases = [source for source in sources if source.reference == base]
        is_whole = sources[0].blocks is None
        if base is not None and not bases:
            if not is_whole and config.method != "passthrough":
                document.fail(slice_.key, f"base_model {base} is not among the sources")
            bases = [Ingredient(base, None, ((), {}), ("base_model",))] if is_whole else []
            sources += bases
        if takes_base:
            for source in bases:
                if source.parameters[1]:
                    work.note(
                        source.parameters[0],
                        f"parameters of base_model {base} are ignored",
                        "left out: the base has no weight",
                    )
            work.base += bases
            sources = [source for source in sources if source.reference != base]
        lengths = {None if s.blocks is None else s.blocks[1] - s.blocks[0] for s in sources + bases}
        if len(lengths) > 1:
            document.fail(slice_.key, "inputs of a slice must have as many layers each")
        rows.append(sources)
    if config.method == "passthrough":
        return
    if len({len(row) for row in rows}) > 1 or len(work.base) not in (0, len(rows)):
        document.fail(("slices",), "slices with different numbers of inputs are not supported")
    columns = [list(column) for column in zip(*rows, strict=True)]
    names = names_of([column[0].reference for column in columns])
    work.inputs = dict(zip(names, columns, strict=True))


def names_of(references: Sequence[Reference]) -> list[str]:
    """Names for tasks: the last part of the path, with a number where that is not enough."""
    found: list[str] = []
    for reference in references:
        path = (reference.lora or reference.model).split("@")[0].rstrip("/\\")
        name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", re.split(r"[/\\]", path)[-1]).lstrip(".+-")
        name = name or "model"
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        found.append(next(n for n in itertools.chain([name], numbered) if n not in found))
    return found


def model_of(work: Work, sources: Sequence[Ingredient]) -> Any:
    """A model as a recipe names it: the model itself, or a stack of its blocks."""
    pieces = [piece_of(work, source) for source in sources]
    first = sources[0]
    is_one = len({source.reference for source in sources}) == 1
    if first.blocks is None:
        return pieces[0]["model"]
    contiguous = all(
        a.blocks[1] == b.blocks[0]  # type: ignore[index]
        for a, b in itertools.pairwise(sources)
    )
    count = _block_count(work, first.reference)
    assert sources[-1].blocks is not None
    if is_one and contiguous and first.blocks[0] == 0 and sources[-1].blocks[1] == count:
        return pieces[0]["model"]
    return {"stack": pieces}


def piece_of(work: Work, source: Ingredient) -> dict[str, Any]:
    """One piece of a stack, without its scale."""
    piece: dict[str, Any] = {"model": spec_of(work, source.reference)}
    if source.blocks is not None:
        piece["blocks"] = list(source.blocks)
    return piece


def task_model(work: Work, sources: Sequence[Ingredient]) -> Any:
    """A task: an adapter over the base as it is, anything else as a model."""
    reference, base = sources[0].reference, [s.reference for s in work.base]
    if sources[0].blocks is None and reference.lora and base == [Reference(reference.model)]:
        _note_adapter(work, sources[0].key)
        return reference.lora
    return model_of(work, sources)


def spec_of(work: Work, reference: Reference) -> str:
    """A model as a recipe names it; one with a LoRA is a stage that puts it together."""
    model = f"stage:{reference.model}" if reference.model in work.names else reference.model
    if reference.lora is None:
        return model
    name = names_of([reference])[0]
    stage = {"anchor": model, "target": reference.lora, "method": "passthrough"}
    while work.stages.get(name, stage) != stage:
        name += "-2"
    if name not in work.stages:
        _note_adapter(work, None)
        work.stages[name] = stage
    return f"stage:{name}"


def _note_adapter(work: Work, key: Key | None) -> None:
    work.note(
        key,
        "a LoRA is put into its model by PEFT, and the sum is rounded before the merge",
        "its product is taken as it is where it is a task over the base",
    )


def _block_count(work: Work, reference: Reference) -> int | None:
    """How many blocks a model in a folder has, if its config says."""
    folder = work.folder / os.path.expanduser(reference.model)  # noqa: PTH111 (leaves ~nobody)
    if hub_name(reference.model, relative_to=work.folder) is not None:
        return None
    try:
        config = read_config(folder)
    except CheckpointError:  # the merge reports it
        return None
    config = config.get("text_config", config)
    counts = [config.get(k) for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")]
    return next((count for count in counts if isinstance(count, int)), None)


def block_count(work: Work) -> int | None:
    """How many blocks the models that are merged have, if that is known."""
    slices = [slice_.sources[0].blocks for slice_ in work.config.slices]
    if None not in slices:
        return sum(blocks[1] - blocks[0] for blocks in slices if blocks is not None)
    columns = [*work.inputs.values(), *([work.base] if work.base else [])]
    counts = (_block_count(work, sources[0].reference) for sources in columns)
    return next((count for count in counts if count is not None), None)


def tensor_names(work: Work) -> tuple[str, ...] | None:
    """Names of the tensors that are merged, if a model is in a folder."""
    for sources in (work.base, *work.inputs.values()):
        for source in sources[:1]:
            try:
                folder = os.path.expanduser(source.reference.model)  # noqa: PTH111
                return tuple(open_checkpoint(work.folder / folder).tensors)
            except (CheckpointError, OSError):
                continue
    return None


def assembled(
    work: Work, name: str, scales: Mapping[str, Any], parameters: Mapping[str, Any]
) -> Recipe:
    """The recipe of a method that takes tasks.

    Args:
        work: What is known.
        name: Of our method.
        scales: By task; a task without one has the method's default.
        parameters: Of the method; a mapping by task for those that differ.
    """
    recipe: Recipe = {}
    if work.base:
        recipe["anchor"] = model_of(work, work.base)
    recipe["tasks"] = {}
    common: Recipe = {}
    for key, value in parameters.items():
        if not isinstance(value, dict):
            common[key] = value
        elif value.keys() == work.inputs.keys():
            first, *others = value.values()
            common |= {key: first} if all(other == first for other in others) else {}
    for task, sources in work.inputs.items():
        entry: Recipe = {"model": task_model(work, sources)}
        if task in scales:
            entry["scale"] = scales[task]
        for key, value in parameters.items():
            if key not in common and isinstance(value, dict) and task in value:
                entry[key] = value[task]
        recipe["tasks"][task] = entry
    recipe["method"] = {"name": name, **common}
    return recipe
