"""`taskvec.merge` and `taskvec.forget`: into a folder, or into a model in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from taskvec.checkpoints.memory import Module
from taskvec.errors import UsageError
from taskvec.keywords import takes
from taskvec.outputs.live import run_into
from taskvec.outputs.run import Merged, run
from taskvec.recipes.coerce import (
    FormKeywords,
    Given,
    MergeKeywords,
    OutputKeywords,
    RecipeKeywords,
    RunKeywords,
    as_recipe,
    run_options,
)
from taskvec.recipes.recipe import Family, Recipe

Place = str | os.PathLike[str] | Module | Mapping[str, Any]


@takes(RecipeKeywords, FormKeywords, OutputKeywords, RunKeywords)
def merge(recipe: Given, out: Place, **options: Unpack[MergeKeywords]) -> Merged:
    """Write θ_target + Σ_t λ_t w_t τ_t as a Hugging Face folder, or into a model in memory.

    With `form="lora"`, Σ_t λ_t w_t τ_t is written as a folder that PEFT loads over the target.

    Args:
        recipe: A recipe, or its path; a family, with `method` and `scale`; a manifest.
        out: Folder to write; or a module, or a dict of tensors or arrays, to write into.
        {options}

    Raises:
        TaskvecError: anything foreseen; nothing half-written is left.
    """
    return _write(as_recipe(recipe, options), out, options)


@takes(RecipeKeywords, FormKeywords, OutputKeywords, RunKeywords)
def forget(recipe: Given, out: Place, **options: Unpack[MergeKeywords]) -> Merged:
    """Write θ_target − Σ_t λ_t w_t τ_t: removes the skills that the tasks were tuned for.

    Args:
        recipe: As in `merge`, with the unwanted skills as tasks and positive scales; `target` is
            edited. A family is weighed by LATA with the scheme `threshold`, unless `method` says
            otherwise.
        out: As in `merge`.
        {options}

    Raises:
        UsageError: a scale is negative.
        TaskvecError: anything foreseen; nothing half-written is left.

    Source: LATA, arXiv:2502.20186, section 4.
    """
    if isinstance(recipe, Family):
        default = {"name": "lata", "scheme": "threshold"}
        options = {"method": default, **options}
    return _write(negated(as_recipe(recipe, options)), out, options)


def negated(recipe: Recipe) -> Recipe:
    """The recipe that subtracts what this one adds.

    Raises:
        UsageError: a scale is negative already.
    """
    for name, task in recipe.tasks.items():
        if task.lowest_scale < 0:
            raise UsageError(
                f"forget subtracts: scale of task {name!r} must be positive; "
                f"got {task.lowest_scale:g}"
            )
    return recipe.with_scales({name: -scale for name, scale in recipe.scales.items()})


def _write(recipe: Recipe, out: Place, options: MergeKeywords) -> Merged:
    how = run_options(options)
    if isinstance(out, (str, os.PathLike)):
        return run(recipe, Path(out), how)
    return run_into(recipe, out, how)
