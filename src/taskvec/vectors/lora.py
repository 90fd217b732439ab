"""Extracting a task vector as a LoRA adapter that PEFT loads; see `outputs.adapter`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from taskvec.errors import UsageError
from taskvec.merging.edits import Edit
from taskvec.outputs.adapter import AdapterShape, Change, tied_warning, write_adapter
from taskvec.outputs.leftovers import notes_on_leftovers
from taskvec.outputs.place import check_place
from taskvec.recipes.recipe import Recipe
from taskvec.streaming import RunOptions
from taskvec.vectors.difference import Difference, Wanted, make_difference, result_dtype
from taskvec.vectors.vector_file import Extracted, about


def shape_of(form: str, **given: Any) -> AdapterShape | None:
    """What an adapter shall be, from options; None where a vector is wanted.

    Raises:
        UsageError: an unknown form, or options that do not go with it.
    """
    if form == "lora":
        shape = AdapterShape(**given)
        if (shape.rank is None) == (shape.energy is None):
            raise UsageError("a LoRA adapter needs either a rank or an energy; give one of them")
        return shape
    if form != "vector":
        raise UsageError(f"form must be in vector | lora; got {form!r}")
    for name, value in given.items():
        if value != AdapterShape.__dataclass_fields__[name].default:
            raise UsageError(f"{name} goes with the form lora; got {value!r} for a vector")
    return None


def extract_lora(
    recipe: Recipe, out: Path, wanted: Wanted, shape: AdapterShape, options: RunOptions
) -> Extracted:
    """Write the difference of two members as a LoRA adapter.

    Args:
        recipe: Family; for a pure vector also the method. `out.dtype` is that of the factors,
            float32 by default.
        out: Folder to appear.
        wanted: Which difference.
        shape: Rank, and what becomes of the rest.
        options: How to run.

    Raises:
        UsageError: the request is contradictory or incomplete; tensors that differ have no place.
        CheckpointError, FamilyError: the members are broken, do not fit or do not differ.
        OutputError: the folder cannot be written there, or a factor overflows the dtype.
    """
    shape = replace(shape, dtype=result_dtype([], recipe.out.dtype))
    recipe = replace(recipe, out=replace(recipe.out, dtype=None))  # the difference is not rounded
    found = make_difference(recipe, wanted, options)
    change = _change(found)
    check_place(found.members, 0, out, force=options.force)
    out = Path(os.path.realpath(out))
    written = write_adapter(change, shape, out, replace(options, precision=recipe.out.precision))
    return Extracted(
        path=out,
        name=f"{found.name} as a LoRA adapter",
        tensors=tuple(row.name for row in written.rows if row.kept != "dropped"),
        zero=found.zero,
        bytes=written.nbytes,
        fingerprint=None,
        anchor_fingerprint=written.start,
        warnings=(
            *found.warnings,
            *tied_warning(change, written),
            *notes_on_leftovers(out, None),
        ),
        factored=written.rows,
        lost=written.lost,
    )


def _change(found: Difference) -> Change:
    source = found.members.sources[found.start]

    def whole(edit: Edit) -> Edit:
        views = {"target": source.view(edit.name), **edit.views}
        return replace(edit, views=views, target_factor=1.0)

    return Change(
        found.name, found.members, found.start, found.edits, whole, about(found), found.published
    )
