"""`taskvec.evaluate`: one model, in a folder, on the hub, in memory, or as a candidate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from taskvec.checkpoints.memory import Module
from taskvec.errors import UsageError
from taskvec.evaluation.evaluate import Asked, Results, evaluate_with, prepare
from taskvec.evaluation.loading import Models
from taskvec.evaluation.options import EvaluationKeywords, evaluation_options
from taskvec.evaluation.task import Task, task_of
from taskvec.keywords import takes
from taskvec.methods.table import Table
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family, Recipe
from taskvec.running.model import preserve_modes, wrap


class ModelKeywords(TypedDict, total=False):
    """About the model.

    Attributes:
        tokenizer: Of a loaded model.
        table: Of a family: layer weights, or a method, as in `merge`.
        scale: Of a family: λ by task.
        name: What the model is called in results, and in `out`; default: as it is given, and
            `candidate` for what is merged in memory.
    """

    tokenizer: Any
    table: Table | str | Mapping[str, object] | None
    scale: Mapping[str, float | Mapping[str, Any]] | None
    name: str | None


class EvaluateKeywords(ModelKeywords, EvaluationKeywords, total=False):
    """What `evaluate` takes."""


@takes(ModelKeywords, EvaluationKeywords)
def evaluate(
    model: str | os.PathLike[str] | Module | Family | Recipe,
    tasks: Sequence[Asked],
    **options: Unpack[EvaluateKeywords],
) -> Results:
    """Measure what a model can do.

    Args:
        model: A folder or a name on the hub; a loaded causal language model of transformers (left
            in the mode, of training or evaluation, that it was in); a recipe, or a family with
            `table` and `scale`, which are merged in memory.
        tasks: Names, which `taskvec eval --list` shows; tasks; or functions of model and tokenizer
            that return a number, or numbers by name.
        {options}

    Returns:
        The result of each task, by name; a group of the harness has several.

    Raises:
        UsageError: the arguments are contradictory or incomplete.
        DataError: data are missing or malformed.
        TaskvecError: anything else foreseen.
    """
    tokenizer, table, scale, name = (
        options.get("tokenizer"), options.get("table"), options.get("scale"), options.get("name")
    )  # fmt: skip
    how = evaluation_options(options)
    _check_arguments(model, tasks, tokenizer, table, scale)
    prepared = prepare(list(tasks), how)
    if isinstance(model, Module):
        with preserve_modes(model):
            loaded = wrap(model, tokenizer, name or "the module")
            where = loaded.encoder.where
            return Results(
                evaluate_with(lambda: loaded, loaded.encoder, prepared, how, where=where)
            )
    given = table if isinstance(table, Table) else None
    if isinstance(model, Family):
        method = "task_arithmetic" if table is None or given is not None else table
        model = as_recipe(model, {"method": method, "scale": scale or {}})
    default = "candidate" if isinstance(model, Recipe) else os.fspath(model)
    if given is not None and isinstance(model, Recipe):
        model = replace(model, table=given)
    with Models(how) as models:
        return Results(models.evaluate(model, prepared, name or default))


def _check_arguments(model: Any, tasks: Any, tokenizer: Any, table: Any, scale: Any) -> None:
    """Refuse what does not go together, rather than pass over some of it."""
    if isinstance(tasks, (str, Task)) or callable(tasks):
        shown = repr(tasks) if isinstance(tasks, str) else task_of(tasks).name
        raise UsageError(f"tasks must be a list; give [{shown}]")
    if not isinstance(model, (str, os.PathLike, Module, Family, Recipe)):
        raise UsageError(
            "the model must be a folder, a name on the hub, a module, a family or a recipe; "
            f"got {type(model).__name__}"
        )
    if scale is not None and not isinstance(model, Family):
        raise UsageError("scale goes with a family; a folder, a module or a recipe has its own")
    takes_table = isinstance(model, Family) or (
        isinstance(model, Recipe) and isinstance(table, Table)
    )
    if table is not None and not takes_table:
        raise UsageError(
            "table goes with a family, or, as layer weights, with a recipe; "
            "a folder or a module is evaluated as it is"
        )
    if tokenizer is not None and not isinstance(model, Module):
        raise UsageError("tokenizer goes with a module; a folder has its own")
