"""What training changed, as a task vector that holds only the tensors that trained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from taskvec.checkpoints.adapters import Adapter
from taskvec.checkpoints.folder import open_stored
from taskvec.checkpoints.memory import described
from taskvec.checkpoints.names import Names, find_tensor
from taskvec.checkpoints.source import Source, derived
from taskvec.errors import FamilyError, UsageError
from taskvec.family.opening import open_model
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family
from taskvec.streaming import RunOptions
from taskvec.training.lora import adapted_weights, has_lora
from taskvec.training.selection import ParameterSelection, check_names
from taskvec.vectors.difference import Wanted
from taskvec.vectors.vector_file import Extracted, extract_vector

if TYPE_CHECKING:
    from torch import Tensor, nn


def save_vector(
    module: nn.Module,
    start: str | os.PathLike[str] | Mapping[str, Any],
    selection: ParameterSelection,
    path: str | os.PathLike[str],
    *,
    task: str = "task",
    dtype: str | None = None,
    force: bool = False,
) -> Extracted:
    """Write θ − θ_start of the trained parameters, in the format of `taskvec extract`.

    Args:
        module: As trained, or as `add_lora` wrapped it.
        start: The model that training started from: folder, name on the hub, or tensors by name.
            The vector's names are its own, also where transformers renames tensors on loading.
        selection: What trained; the rest is not looked at.
        path: File to appear; ends in `.safetensors`.
        task: Name of the task in the file.
        dtype: Element type; default: float32, or float64 where a weight is that.
        force: Replace the file if it is there.

    Returns:
        What was written; tensors that did not change are not in it.

    Raises:
        UsageError: the selection is of another module, or `start` is not a whole model.
        FamilyError: `start` lacks a tensor that trained, or has it in another shape, or nothing
            changed.
        TaskvecError: the file cannot be written.
    """
    plain: Any = module
    if has_lora(module):
        plain = plain.get_base_model()
        weights = adapted_weights(module)
    else:
        parameters = dict(module.named_parameters())
        check_names(selection, parameters)
        weights = {name: parameters[name].detach() for name in selection.names}
    anchor = open_model(start)
    if isinstance(anchor, Adapter) or anchor.is_difference:
        raise UsageError(f"{anchor.where}: is an adapter or a task vector; give the whole model")
    with _to_stored(plain, weights, anchor, Path(path)) as (trained, names):
        only = {name: anchor.tensors[name] for name in names}
        family = Family(
            anchor=derived(anchor, "what trained", tensors=only),
            tasks={task: trained},
        )
        options = {"method": "task_arithmetic", "scale": 1.0, "dtype": dtype}
        recipe = as_recipe(family, options)
        return extract_vector(recipe, Path(path), Wanted(task=task), RunOptions(force=force))


@contextmanager
def _to_stored(
    module: Any, weights: Mapping[str, Tensor], anchor: Source, path: Path
) -> Iterator[tuple[Source | Mapping[str, Tensor], list[str]]]:
    """The trained tensors under their names in the anchor, and those names.

    What transformers renames, fuses or splits on loading is saved by it into a folder beside `path`
    that goes again.

    Raises:
        FamilyError: the anchor lacks a tensor that trained.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    tied = {names[0]: names for names in aliases.values()}
    index = Names(anchor.tensors)
    here = {name: _name_in_anchor(tied.get(name, [name]), index) for name in weights}
    lacking = [name for name, there in here.items() if there is None]
    if not lacking:
        stored = {str(here[name]): tensor for name, tensor in weights.items()}
        yield stored, list(stored)
        return
    missing = FamilyError(
        f"{anchor.where}: lacks {lacking[0]!r}, which trained ({len(lacking)} such); give the "
        "model that training started from, or freeze what it does not have, such as a new head"
    )
    if not hasattr(module, "save_pretrained"):
        raise missing
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.absolute().parent, prefix=".vector-") as folder:
        module.save_pretrained(folder, state_dict=dict(weights))
        saved = open_stored(folder)
        there = {name: _name_in_anchor([name], index) for name in saved.tensors}
        if None in there.values():
            raise missing
        back = {str(new): old for old, new in there.items()}
        tensors = {new: replace(saved.tensors[old], name=new) for new, old in back.items()}
        yield (
            derived(
                saved,
                "named as in the anchor",
                tensors=tensors,
                make_view=lambda name: saved.view(back[name]),
                where=described(module),
            ),
            list(back),
        )


def _name_in_anchor(names: list[str], index: Names) -> str | None:
    """The anchor's name of a tensor with these names."""
    found = (find_tensor(name, index) for name in names)
    return next((name for name in found if name is not None), None)
