"""`taskvec.extract`: what a task changed, as a file or as a LoRA adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict, Unpack

from taskvec.errors import UsageError
from taskvec.keywords import takes
from taskvec.outputs.adapter import AdapterShape
from taskvec.recipes.coerce import (
    Given,
    OutputKeywords,
    RecipeKeywords,
    RunKeywords,
    as_recipe,
    run_options,
)
from taskvec.recipes.recipe import Recipe
from taskvec.streaming import RunOptions
from taskvec.vectors.difference import Wanted
from taskvec.vectors.lora import extract_lora, shape_of
from taskvec.vectors.vector_file import Extracted, extract_vector


class VectorKeywords(TypedDict, total=False):
    """Which vector, and in which form.

    Attributes:
        what: `task` (default: θ_ft − θ_pre), `pure` (layer weights × that), `complex` (θ_ft −
            θ_base) or `instruction` (θ_pre − θ_base).
        task: Which task; not needed if there is only one.
        scaled: Whether a pure vector is multiplied with its λ; default: no.
        form: `vector` (default) or `lora`.
        rank: Of every matrix of an adapter; or give `energy`.
        energy: Share of each matrix's ‖τ‖² that an adapter keeps, in (0, 1].
        rest: What an adapter does with tensors that are not linear weights: `refuse` (default),
            `drop` or `save` (as PEFT's `modules_to_save`).
    """

    what: str | None
    task: str | None
    scaled: bool | None
    form: str | None
    rank: int | None
    energy: float | None
    rest: str | None


class ExtractKeywords(VectorKeywords, RecipeKeywords, OutputKeywords, RunKeywords, total=False):
    """What `extract` takes."""


@takes(VectorKeywords, RecipeKeywords, OutputKeywords, RunKeywords)
def extract(
    recipe: Given, out: str | os.PathLike[str], **options: Unpack[ExtractKeywords]
) -> Extracted:
    """Write what a task changed as one file, which is a task again, or as a LoRA adapter.

    Args:
        recipe: A family with `instruct` (or `anchor`), and with `base` for complex and instruction
            vectors; or a recipe, or its path. `method` (or `table`) weighs the layers of a pure
            vector; `dtype` is float32 unless given, `seed` that of the random projections of an
            adapter.
        out: File to write, ending in `.safetensors`; for an adapter a folder.
        {options}

    Raises:
        UsageError: the request is contradictory or incomplete.
        TaskvecError: anything foreseen; nothing half-written is left.
    """
    what = options.get("what") or "task"
    wanted = Wanted(what, options.get("task"), bool(options.get("scaled")))
    if what != "pure" and options.get("table") is not None:
        raise UsageError(f"layer weights go with a pure vector; got {what}")
    default = None if what == "pure" else "task_arithmetic"
    of_recipe = {k: v for k, v in options.items() if k not in VectorKeywords.__annotations__}
    asked = as_recipe(recipe, of_recipe, method=default, needs_scales=False)
    shape = shape_of(
        options.get("form") or "vector",
        rank=options.get("rank"),
        energy=options.get("energy"),
        rest=options.get("rest") or "refuse",
        seed=asked.seed if options.get("form") == "lora" else 0,
    )
    return write_difference(asked, Path(out), wanted, shape, run_options(options))


def write_difference(
    recipe: Recipe, out: Path, wanted: Wanted, shape: AdapterShape | None, options: RunOptions
) -> Extracted:
    """Write the difference of two members: a vector, or an adapter of a shape."""
    if shape is None:
        return extract_vector(recipe, out, wanted, options)
    return extract_lora(recipe, out, wanted, shape, options)
