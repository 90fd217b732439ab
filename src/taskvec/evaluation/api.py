"""`taskvec.evaluate`: one model, in a folder, on the hub, in memory, or as a candidate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.checkpoints.memory import Module
from taskvec.errors import UsageError
from taskvec.evaluation.data import DataPlaces
from taskvec.evaluation.evaluate import (
    Asked,
    EvaluationOptions,
    Results,
    SampleProgress,
    evaluate_with,
    prepare,
    silent,
)
from taskvec.evaluation.judges import parse_judge
from taskvec.evaluation.judges.verdict import Judge
from taskvec.evaluation.loading import Models
from taskvec.evaluation.task import SampleSettings, Task, Tools, task_of
from taskvec.methods.table import Table
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family, Recipe
from taskvec.running.model import preserve_modes, wrap


def evaluate(
    model: str | os.PathLike[str] | Module | Family | Recipe,
    tasks: Sequence[Asked],
    *,
    tokenizer: Any = None,
    table: Table | str | Mapping[str, object] | None = None,
    scale: Mapping[str, float | Mapping[str, Any]] | None = None,
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    draws: int = 1,
    seed: int = 0,
    apply_chat_template: bool = False,
    context: int | None = None,
    stride: int | None = None,
    truncate: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int | None = None,
    judge: Judge | str | None = None,
    allow_code_execution: bool = False,
    workers: int | None = None,
    out: str | os.PathLike[str] | None = None,
    name: str | None = None,
    progress: SampleProgress = silent,
) -> Results:
    """Measure what a model can do.

    Args:
        model: A folder or a name on the hub; a loaded causal language model of transformers (left
            in the mode, of training or evaluation, that it was in); a recipe, or a family with
            `table` and `scale`, which are merged in memory.
        tasks: Names, which `taskvec eval --list` shows; tasks; or functions of model and tokenizer
            that return a number, or numbers by name.
        tokenizer: Of a loaded model.
        table: Of a family: layer weights, or a method, as in `merge`.
        scale: Of a family: λ by task.
        data: Folder that data lie in, or files by task; what is not there comes from the hub.
        include_path: Folder of task files of your own for tasks `harness:…`.
        limit: Most samples of a task, drawn by the seed; None: all.
        shots: Worked examples in front of a question; None: the task's own number.
        draws: Answers that are drawn for a prompt, where a task can use several.
        seed: Of samples, draws and intervals.
        apply_chat_template: Whether tasks `harness:…` ask in conversations.
        context: Tokens of a window over a text; None: the model's, at most 2,048.
        stride: Tokens that each window after the first predicts; None: the whole window.
        truncate: Cut prompts that do not fit at the front, instead of refusing them.
        dtype: `float32`, `bfloat16`, `float16`; `auto`: as stored on an accelerator, else float32.
        device: Such as `cpu` or `cuda:1`; `auto`: the accelerator, if there is one.
        batch_tokens: Tokens of a batch; None: by the memory there is.
        judge: Who says how harmful an answer is, or what stands for one on the command line; None:
            refusal phrases.
        allow_code_execution: Whether programs that the model wrote may be run.
        workers: Programs that run at once; None: as many as there are processors, at most 8.
        out: Folder for records, from which an interrupted run goes on; None: nothing is written.
        name: What the model is called in results, and in `out`; default: as it is given, and
            `candidate` for what is merged in memory.
        progress: Called with the samples done.

    Returns:
        The result of each task, by name; a group of the harness has several.

    Raises:
        UsageError: the arguments are contradictory or incomplete.
        DataError: data are missing or malformed.
        TaskvecError: anything else foreseen.
    """
    options = EvaluationOptions(
        data=_places(data),
        limit=limit,
        include_path=None if include_path is None else Path(include_path),
        settings=SampleSettings(shots, seed, draws, apply_chat_template),
        context=context,
        stride=stride,
        truncate=truncate,
        batch_tokens=batch_tokens,
        dtype=dtype,
        device=device,
        tools=Tools(
            allow_code_execution=allow_code_execution,
            judge=_judge(judge, device, out),
            workers=workers,
        ),
        out=None if out is None else Path(out),
        progress=progress,
    )
    _check_arguments(model, tasks, tokenizer, table, scale)
    prepared = prepare(list(tasks), options)
    if isinstance(model, Module):
        with preserve_modes(model):
            loaded = wrap(model, tokenizer, name or "the module")
            results = evaluate_with(
                lambda: loaded, loaded.encoder, prepared, options, where=loaded.encoder.where
            )
        return Results(results)
    given = table if isinstance(table, Table) else None
    with Models(options) as models:
        if isinstance(model, Family):
            method = "task_arithmetic" if table is None or given is not None else table
            recipe = as_recipe(model, {"method": method, "scale": scale or {}})
            results = models.evaluate((recipe, given), prepared, name or "candidate")
        elif isinstance(model, Recipe):
            results = models.evaluate((model, given), prepared, name or "candidate")
        else:
            results = models.evaluate(model, prepared, name or os.fspath(model))
    return Results(results)


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


def _judge(
    judge: Judge | str | None, device: str, out: str | os.PathLike[str] | None
) -> Judge | None:
    if not isinstance(judge, str):
        return judge
    folder = None if out is None else Path(out) / "verdicts"
    return parse_judge(judge, device=device, folder=folder)


def _places(
    data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None,
) -> DataPlaces:
    if data is None:
        return DataPlaces()
    if isinstance(data, Mapping):
        return DataPlaces(by_task={task: Path(path).expanduser() for task, path in data.items()})
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UsageError(f"data: there is no folder {data}; give one, or {{TASK: PATH}}")
    return DataPlaces((folder,))
