"""The verbs as Python functions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskvec.checkpoints.memory import Module
from taskvec.errors import UsageError
from taskvec.family.members import open_members
from taskvec.merging.deciding import Options
from taskvec.merging.scans import scan_members
from taskvec.methods.table import Table
from taskvec.outputs.live import run_into
from taskvec.outputs.run import Merged, run
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import Family, Recipe
from taskvec.statistics.scan import Scan
from taskvec.streaming import Progress, silent
from taskvec.vectors.difference import Wanted
from taskvec.vectors.extract import Extracted, extract_vector
from taskvec.vectors.lora import extract_lora, shape_of


def scan(
    family: Family,
    *,
    cache: str = "use",
    threads: int | None = None,
    progress: Progress = silent,
) -> Scan:
    """Read a family's weights once and keep what LATA and its analysis need.

    Args:
        family: With `instruct` (or `anchor`); with `base` if instruction vectors are wanted.
        cache: `use` a kept scan if the files look untouched, and keep this one; `renew`: only keep;
            `off`: neither.
        threads: Default: the processors there are, at most 8.
        progress: Told the bytes read.

    Returns:
        Statistics of every floating-point tensor.

    Raises:
        TaskvecError: a member is broken or does not fit; NaN or infinite weights.
    """
    members = open_members(family, needs_base=family.base is not None, needs_anchor=True)
    return scan_members(members, cache=cache, threads=threads, progress=progress)


def merge(
    family: Family,
    table: Table | str | Mapping[str, object],
    *,
    scale: Mapping[str, float | Mapping[str, Any]],
    out: str | os.PathLike[str] | Module | Mapping[str, Any],
    dtype: str | None = None,
    shard_size: str | int = "5GB",
    precision: str = "float32",
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Merged:
    """Write θ_target + Σ_t λ_t w_t τ_t as a Hugging Face folder, or into a model in memory.

    Args:
        family: Checkpoints.
        table: Layer weights, for example from `lata`; or a method, by name or as in a recipe
            (`"task_arithmetic"`, `{"name": "lata", "scheme": "linear"}`).
        scale: λ_t by task; negative subtracts. A mapping, as in a recipe, for λ by layer.
        out: Folder to write; or a module, or a dict of tensors or arrays, to write into.
        dtype: Element type of the result; default: the target's.
        shard_size: Largest size of one file.
        precision: Arithmetic, `float32` or `float64`.
        force: Replace `out` if it is not empty.
        threads: Default: the processors there are, at most 8.
        progress: Told what is being done.

    Raises:
        TaskvecError: anything foreseen; nothing half-written is left.
    """
    is_table = isinstance(table, Table)
    recipe = recipe_of_family(
        family,
        "task_arithmetic" if is_table else table,
        scale,
        {"shard_size": shard_size, "precision": precision} | ({"dtype": dtype} if dtype else {}),
    )
    options = Options(force=force, threads=threads, progress=progress)
    return _run(recipe, out, table if isinstance(table, Table) else None, options)


def forget(
    family: Family,
    *,
    scale: Mapping[str, float],
    out: str | os.PathLike[str] | Module | Mapping[str, Any],
    scheme: str = "threshold",
    threshold: float = 0.95,
    granularity: str = "tensor",
    dtype: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Merged:
    """Write θ_target − Σ_t λ_t w_t τ_t: the skills that the tasks were tuned for are taken out.

    Args:
        family: With `base`, `instruct` and the unwanted skills as tasks; `target` is edited.
        scale: λ_t by task, positive.
        out: Folder to write; or a module, or a dict of tensors or arrays, to write into.
        scheme: LATA's scheme; the paper forgets by `threshold`.
        threshold: σ.
        granularity: `tensor`, `module` or `block`.
        dtype: Element type of the result; default: the target's.
        force: Replace `out` if it is not empty.
        threads: Default: the processors there are, at most 8.
        progress: Told what is being done.

    Raises:
        UsageError: a scale is negative.
        TaskvecError: anything foreseen; nothing half-written is left.

    Source: LATA, arXiv:2502.20186, section 4.
    """
    method = {"name": "lata", "scheme": scheme, "threshold": threshold, "granularity": granularity}
    recipe = recipe_of_family(family, method, scale, {"dtype": dtype} if dtype else {})
    options = Options(force=force, threads=threads, progress=progress)
    return _run(negated(recipe), out, None, options)


def extract(
    family: Family,
    *,
    out: str | os.PathLike[str],
    what: str = "task",
    task: str | None = None,
    table: Table | str | Mapping[str, object] | None = None,
    scale: Mapping[str, float] | None = None,
    form: str = "vector",
    rank: int | None = None,
    energy: float | None = None,
    rest: str = "refuse",
    seed: int = 0,
    dtype: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Extracted:
    """Write what a task changed as one file, which is a task again, or as a LoRA adapter.

    Args:
        family: With `instruct` (or `anchor`); with `base` for complex and instruction vectors.
        out: File to write, ending in `.safetensors`; for an adapter a folder.
        what: `task` (θ_ft − θ_pre), `pure` (layer weights × that), `complex` (θ_ft − θ_base) or
            `instruction` (θ_pre − θ_base).
        task: Which task; may be None if there is only one.
        table: Layer weights of a pure vector, or a method, as in `merge`.
        scale: λ by task that a pure vector is multiplied with; None: it is not.
        form: `vector` or `lora`.
        rank: Of every matrix of an adapter; or give `energy`.
        energy: Share of each matrix's ‖τ‖² that an adapter keeps, in (0, 1].
        rest: What an adapter does with tensors that are no linear weights: `refuse`, `drop` or
            `save` (as PEFT's `modules_to_save`).
        seed: Of the random projections that factor a matrix.
        dtype: Element type; default: float32, or float64 where a member is that.
        force: Replace `out` if it is there.
        threads: Default: the processors there are, at most 8.
        progress: Told the bytes read.

    Raises:
        UsageError: what is asked for cannot be meant.
        TaskvecError: anything foreseen; nothing half-written is left.
    """
    is_table = isinstance(table, Table)
    method = "task_arithmetic" if table is None or is_table else table
    scales = dict.fromkeys(family.tasks, 1.0) if scale is None else scale
    recipe = recipe_of_family(family, method, scales, {"dtype": dtype} if dtype else {})
    if what == "pure" and table is None:
        raise UsageError("a pure vector needs a table, or a method that makes one; got neither")
    given = table if isinstance(table, Table) else None
    wanted = Wanted(what, task, scale is not None, given)
    options = Options(force=force, threads=threads, progress=progress)
    shape = shape_of(form, rank=rank, energy=energy, rest=rest, seed=seed)
    if shape is None:
        return extract_vector(recipe, Path(out), wanted, options)
    return extract_lora(recipe, Path(out), wanted, shape, options)


def _run(
    recipe: Recipe,
    out: str | os.PathLike[str] | Module | Mapping[str, Any],
    table: Table | None,
    options: Options,
) -> Merged:
    if isinstance(out, (str, os.PathLike)):
        return run(recipe, Path(out), table=table, options=options)
    return run_into(recipe, out, table=table, options=options)


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


def recipe_of_family(
    family: Family,
    method: object,
    scale: Mapping[str, float | Mapping[str, Any]],
    out: Mapping[str, object],
) -> Recipe:
    """The recipe that stands for what a verb was given in Python.

    Args:
        family: Checkpoints, in folders or in memory.
        method: By name, or as in a recipe.
        scale: λ by task.
        out: As in a recipe.

    Raises:
        UsageError: a scale is for no task of the family, or anything else is wrong.
    """
    unknown = sorted(scale.keys() - family.tasks.keys())
    if unknown:
        raise UsageError(f"scale names {unknown[0]!r}, which is no task of this family")
    data: dict[str, object] = {
        "tasks": {
            task: {"model": "in Python"} | ({"scale": scale[task]} if task in scale else {})
            for task in family.tasks
        },
        "method": method,
        "out": dict(out),
    }
    return read_recipe(Document(data, "merge"), Path.cwd()).with_models(family)
