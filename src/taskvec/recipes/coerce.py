"""From what verbs take in Python to a recipe: a recipe, a family, a mapping, or a path.

Options override what is given, under the names that a recipe and the command line have for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from taskvec.errors import UsageError, nearest
from taskvec.methods.choice import MethodChoice
from taskvec.methods.table import Table, load_table
from taskvec.recipes.located import Document
from taskvec.recipes.reading import load_recipe, read_recipe
from taskvec.recipes.recipe import Family, Recipe, TaskSpec
from taskvec.recipes.replay import MANIFEST_FILE, read_manifest, recipe_of
from taskvec.streaming import Progress, RunOptions

# A recipe or a family; a recipe as a mapping; or the path of a recipe, of a manifest, or of a
# folder that has one.
Given = Recipe | Family | Mapping[str, Any] | str | os.PathLike[str]
_IN_PYTHON = "in Python"  # the model of a task whose recipe was given in Python


class RunKeywords(TypedDict, total=False):
    """How to run.

    Attributes:
        threads: How many; default: the processors there are, at most 8.
        cache: `use` cached scans and write new ones (default); `renew`: only write; `off`: neither.
        progress: Called with what is being done; default: none.
    """

    threads: int | None
    cache: str | None
    progress: Progress | None


class RecipeKeywords(TypedDict, total=False):
    """What overrides a recipe, or completes a family.

    Attributes:
        method: How weights are decided: a name, `tv.method(name, …)`, or a mapping as in a recipe.
        scale: λ: a number for every task, or a mapping by task; negative subtracts. In place of a
            number, a mapping as in a recipe for λ by layer.
        table: Layer weights instead of the method's own: a `Table`, or a CSV or JSON file.
        layer_weights: A method that weighs layers before `method` selects or combines.
        stages: Recipes or families whose results this one reads as `stage:NAME`, by name.
        seed: For methods that draw random numbers; default 0.
        dtype: Element type of the result; default: the target's.
        shard_size: Largest size of one file, such as `5GB`.
        precision: Arithmetic, `float32` (default) or `float64`.
    """

    method: str | Mapping[str, Any] | MethodChoice | None
    scale: float | Mapping[str, float | Mapping[str, Any]] | None
    table: Table | str | os.PathLike[str] | None
    layer_weights: str | Mapping[str, Any] | MethodChoice | None
    stages: Mapping[str, Given] | None
    seed: int | None
    dtype: str | None
    shard_size: str | int | None
    precision: str | None


class FormKeywords(TypedDict, total=False):
    """What is written by a recipe.

    Attributes:
        form: `model` (default), or `lora` for an adapter over the target.
        rank: Of an adapter's matrices, at the most; default: factors of adapters are stacked.
        rest: What an adapter does with tensors that are not linear weights: `refuse` (default),
            `drop` or `save` (as PEFT's `modules_to_save`).
    """

    form: str | None
    rank: int | None
    rest: str | None


class OutputKeywords(TypedDict, total=False):
    """How an output is written.

    Attributes:
        force: Whether to replace an output that is there; default: refuse.
        copy_code: Whether to copy the target's `*.py` files into the output; default: no.
    """

    force: bool | None
    copy_code: bool | None


class PlanKeywords(RecipeKeywords, FormKeywords, RunKeywords, total=False):
    """What a verb takes that prepares a recipe."""


class MergeKeywords(RecipeKeywords, FormKeywords, OutputKeywords, RunKeywords, total=False):
    """What a verb takes that writes by a recipe."""


def run_options(given: Mapping[str, Any]) -> RunOptions:
    """How to run, from the keywords of a verb."""
    names = RunOptions.__dataclass_fields__
    return RunOptions(**{key: value for key, value in given.items() if key in names and value})


def as_recipe(
    given: Given,
    options: Mapping[str, Any] | None = None,
    *,
    needs_scales: bool = True,
    method: str | None = None,
) -> Recipe:
    """The recipe that a verb was given.

    Args:
        given: See `Given`.
        options: See `RecipeKeywords` and `FormKeywords`; other keys are left alone.
        needs_scales: Whether a task without λ is an error.
        method: The method of a family where `options` names none.

    Raises:
        UsageError: a method, a task or a value is unknown, missing or not allowed.
    """
    keys = RecipeKeywords.__annotations__ | FormKeywords.__annotations__
    chosen = {k: v for k, v in (options or {}).items() if k in keys and v is not None}
    opened = _open(given, needs_scales)
    if isinstance(opened, Recipe):
        if not chosen:
            return opened
        if isinstance(opened.table, Table) and opened.table.is_final:
            raise UsageError(
                f"a manifest is repeated as it is; remove {next(iter(chosen))}, or give the recipe"
            )
        family, data = opened.family, opened.to_dict()
        of_method, stages, table = opened.method.parameters, opened.stages, opened.table
    else:
        family, data = opened, {"method": method, "out": {}}
        of_method, stages, table = (), {}, None
        if method is None and "method" not in chosen:
            if "table" not in chosen:
                raise UsageError('method is missing; for example: method="lata"')
            data["method"] = "task_arithmetic"
    # Models and roles are the family's own; the rest is read as if it came from a file.
    data = {k: data[k] for k in ("method", "layer_weights", "out", "seed") if k in data}
    tasks = {name: _entry(task) for name, task in family.tasks.items()}
    if isinstance(opened, Family) and "method" not in chosen and method is not None:
        for name, task in family.tasks.items():  # the verb's own method has none of these
            tasks[name] = _entry(replace(task, parameters={}))
    if "method" in chosen:
        new = _as_data(chosen["method"])
        same = isinstance(opened, Recipe) and new.get("name") == opened.method.name
        for entry in tasks.values():  # parameters of another method, or that are set for all
            for parameter in of_method:
                if not same or parameter.name in new:
                    entry.pop(parameter.name, None)
        data["method"] = new
    if "layer_weights" in chosen:
        data["layer_weights"] = _as_data(chosen["layer_weights"])
    for name, scale in _scales(chosen.get("scale", {}), family).items():
        tasks[name]["scale"] = scale
    if "seed" in chosen:
        data["seed"] = chosen["seed"]
    of_output = ("dtype", "shard_size", "precision", *FormKeywords.__annotations__)
    data["out"] |= {k: chosen[k] for k in of_output if k in chosen}
    data |= {"tasks": tasks} if tasks else {"target": _IN_PYTHON}
    recipe = read_recipe(Document(data, "merge"), Path.cwd(), needs_scales=needs_scales)
    if "stages" in chosen:
        stages = {name: as_recipe(stage) for name, stage in chosen["stages"].items()}
    if "table" in chosen:
        table = chosen["table"]
        table = table if isinstance(table, Table) else load_table(Path(table))
    return replace(recipe.with_models(family), stages=stages, table=table)


def _open(given: Given, needs_scales: bool) -> Recipe | Family:
    if isinstance(given, (Recipe, Family)):
        return given
    if isinstance(given, Mapping):
        document = Document(dict(given), "the recipe")
        return read_recipe(document, Path.cwd(), needs_scales=needs_scales)
    path = Path(given)
    if path.name == MANIFEST_FILE or path.is_dir():
        return recipe_of(read_manifest(path), str(path))
    return load_recipe(path, needs_scales=needs_scales)


def _as_data(method: str | Mapping[str, Any] | MethodChoice) -> dict[str, Any]:
    """A method as a recipe has it."""
    if isinstance(method, MethodChoice):
        return method.to_dict()
    return {"name": method} if isinstance(method, str) else dict(method)


def _entry(task: TaskSpec) -> dict[str, Any]:
    """A task as a recipe has it, without its model."""
    scale = {} if task.scale is None else {"scale": task.scale_to_dict()}
    return {"model": _IN_PYTHON, **scale, **task.parameters_to_dict()}


def _scales(scale: Any, family: Family) -> dict[str, Any]:
    """λ by task, from one for all or from a mapping."""
    if not isinstance(scale, Mapping):
        return dict.fromkeys(family.tasks, scale)
    for name in sorted(scale.keys() - family.tasks.keys()):
        hint = nearest(name, list(family.tasks))
        raise UsageError(f"scale names {name!r}, which is not a task of this family; {hint}")
    return dict(scale)
