"""The difference of two members of a family, tensor by tensor, as edits that need no target.

```text
task         τ_t       = θ_ft,t − θ_pre
pure         τ'_t      = w_t τ_t, with the layer weights w_t of the recipe's method
complex      τ_comp,t  = θ_ft,t − θ_base
instruction  τ_instr   = θ_pre − θ_base
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DTYPES, FLOATS, DType
from taskvec.errors import FamilyError, UsageError, nearest
from taskvec.family.members import Members, open_members
from taskvec.merging.changes import differing
from taskvec.merging.decide import decide
from taskvec.merging.edits import Edit
from taskvec.merging.prepare import prepare, prepare_stages
from taskvec.methods.table import Table
from taskvec.recipes.recipe import Recipe, TaskSpec
from taskvec.statistics.collect import describe
from taskvec.streaming import BLOCK, RunOptions

DIFFERENCES = ("task", "pure", "complex", "instruction")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which difference.

    Attributes:
        what: `task`, `pure`, `complex` or `instruction`.
        task: Which task; may be None if there is only one.
        scaled: Whether a pure vector is multiplied with its λ.
    """

    what: str = "task"
    task: str | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.what not in DIFFERENCES:
            raise UsageError(f"what must be in {' | '.join(DIFFERENCES)}; got {self.what!r}")
        if self.scaled and self.what != "pure":
            raise UsageError(f"scaled goes with a pure vector; got {self.what}")


@dataclass(frozen=True, slots=True)
class Difference:
    """What is extracted, before weights are read for it.

    Attributes:
        what: One of `DIFFERENCES`.
        task: Name; None for the instruction vector.
        members: As opened.
        start: Role of the model that the difference starts from, `anchor` or `base`.
        edits: Tensors that differ, in name order.
        zero: Tensors that do not, in name order.
        table: Layer weights of a pure vector.
        scale: λ that it is multiplied with; 1 unless that was asked for.
        warnings: What a user should know.
        published: Names on the hub of local models, by path.
    """

    what: str
    task: str | None
    members: Members
    start: str
    edits: tuple[Edit, ...]
    zero: tuple[str, ...]
    table: Table | None
    scale: float
    warnings: tuple[str, ...]
    published: Mapping[str, str]

    @property
    def name(self) -> str:
        """The difference in words."""
        if self.what == "instruction":
            return "instruction vector"
        return f"{self.what} vector of {self.task!r}"


def make_difference(recipe: Recipe, wanted: Wanted, options: RunOptions) -> Difference:
    """Open what is needed and find the tensors that differ.

    A tensor that differs is left at its first block that does, so that hardly more is read than the
    tensors that do not.

    Args:
        recipe: Family, and for a pure vector the method. `out.dtype` None is float32, or float64
            where a member is that.
        wanted: Which difference.
        options: How to run.

    Raises:
        UsageError: the request is contradictory or incomplete.
        CheckpointError: a member is broken.
        FamilyError: members do not fit, or do not differ.
    """
    options = replace(options, precision=recipe.out.precision)
    what, table, scale = wanted.what, None, 1.0
    chosen = None if what == "instruction" else _chosen(recipe, wanted.task)
    if what == "pure" and chosen is not None:
        scale = _scale(recipe, chosen) if wanted.scaled else 1.0
        members, table = _decide(recipe, options)
    else:
        members = _open(recipe, what, chosen, options)
    edits = dict(_edits(members, wanted, chosen, _weights(table, chosen, scale), recipe.out.dtype))
    if table is not None:
        edits = {name: _expecting(edit, table) for name, edit in edits.items()}
    differ = differing(list(edits.values()), options)
    warnings = () if what == "instruction" else members.warnings
    found = Difference(
        what=what,
        task=chosen,
        members=members,
        start="anchor" if what in ("task", "pure") else "base",
        edits=tuple(edits[name] for name in members.merged if name in differ),
        zero=tuple(name for name in members.merged if name not in differ),
        table=table,
        scale=scale,
        warnings=(*warnings, *(table.warnings if table is not None else ())),
        published=recipe.published,
    )
    _check_equal(members, found)
    if not found.edits:
        raise FamilyError(
            f"the {found.name} is zero: no tensor differs from {found.start} "
            f"({members.sources[found.start].where}); is it the right folder?"
        )
    return found


def _chosen(recipe: Recipe, task: str | None) -> str:
    tasks = sorted(recipe.family.tasks)
    if task is None and len(tasks) == 1:
        return tasks[0]
    if task is None:
        raise UsageError(f"tasks are {', '.join(tasks)}; name one of them")
    if task not in tasks:
        raise UsageError(f"task {task!r} is not in this family; {nearest(task, tasks)}")
    return task


def _scale(recipe: Recipe, name: str) -> float:
    """λ of a task as one number."""
    task = recipe.tasks[name]
    if task.scale is None:
        raise UsageError(f"scale of task {name!r} is missing; a scaled vector needs it")
    if task.profile is not None:
        raise UsageError(
            f"scale of task {name!r} differs by layer; a scaled vector needs one number"
        )
    return task.scale


def _decide(recipe: Recipe, options: RunOptions) -> tuple[Members, Table]:
    """Members and layer weights of the whole recipe; the method may look at every task."""
    method = recipe.method
    is_linear = not method.sparsifies and method.combine is None
    if not (is_linear and method.takes_table and method.needs_anchor):
        raise UsageError(
            f"{method.name} gives no layer weights to task vectors; use task_arithmetic or lata"
        )
    scales = dict.fromkeys(recipe.tasks, 1.0) | recipe.scales  # which say nothing of the weights
    prepared = prepare(recipe.with_scales(scales), options)
    return prepared.members, decide(prepared).table


def _open(recipe: Recipe, what: str, task: str | None, options: RunOptions) -> Members:
    """Members without the tasks that are not wanted, and without another target."""
    family = recipe.family
    if task is None:
        if family.start is None:
            raise UsageError("instruct is missing: the instruction vector leads from base to it")
        tasks = {"instruct": TaskSpec(family.start)}
    else:
        tasks = {task: family.tasks[task]}
    return open_members(
        replace(family, tasks=tasks, target=None),
        needs_base=what in ("complex", "instruction"),
        needs_anchor=True,
        stages=prepare_stages(recipe, options),
    )


def _weights(table: Table | None, task: str | None, scale: float) -> Callable[[str], float]:
    """The factor of each tensor, by its name."""
    if table is None or task is None:
        return lambda name: 1.0
    weights = table.of(task)
    return lambda name: weights[name] * scale


def _expecting(edit: Edit, table: Table) -> Edit:
    """The same, which must find the weights that the table rests on."""
    digests = {role: table.digests.get(role, {}) for role in edit.views}
    return replace(
        edit, expected={r: mine[edit.name] for r, mine in digests.items() if edit.name in mine}
    )


def _edits(
    members: Members,
    wanted: Wanted,
    task: str | None,
    weight: Callable[[str], float],
    dtype: str | None,
) -> Iterable[tuple[str, Edit]]:
    """An edit for every tensor that may differ."""
    role, named = f"task:{task}", members.named
    for name in members.merged:
        views = dict(_views(members, name, wanted.what, role))
        terms = _terms(views, wanted.what, role, weight(name))
        if terms and weight(name) != 0:
            kind = result_dtype(views.values(), dtype)
            yield name, Edit(name, kind, views, terms, target_factor=0.0, named=named)


def _views(members: Members, name: str, what: str, role: str) -> Iterable[tuple[str, View]]:
    """What a tensor of the difference is made of, each under the role that messages name."""
    if what == "instruction":
        yield "instruct", members.sources["anchor"].view(name)
        yield "base", members.sources["base"].view(name)
        return
    views = members.views(name, ["anchor", role])
    is_whole = role in views and not views[role].is_difference
    if what in ("task", "pure"):
        if role in views:
            yield from views.items()
        return
    if not is_whole:  # θ_ft = θ_pre + τ, and an adapter or a vector is only τ
        yield "instruct", views["anchor"]
    if role in views:
        yield role, views[role]
    yield "base", members.sources["base"].view(name)


def _terms(views: Mapping[str, View], what: str, role: str, weight: float) -> dict[str, float]:
    """Coefficients by role. θ_ft − θ_pre is the kernel's own subtraction; others are sums."""
    if what in ("task", "pure"):
        return {role: weight} if role in views else {}
    # Whole weights first, so that they cancel before a small τ is added.
    order = [r for r in ("instruct", "base", role) if r in views]
    return {r: -1.0 if r == "base" else 1.0 for r in order}


def result_dtype(views: Iterable[View], dtype: str | None) -> DType:
    """What elements of a difference are stored as: exact where a merge computes in float32.

    Args:
        views: What it is made of.
        dtype: As in a recipe; None for float32, or float64 where a view is that.

    Raises:
        UsageError: no such dtype.
    """
    if dtype is None:
        return DTYPES["F64" if any(v.dtype.itemsize == 8 for v in views) else "F32"]
    if dtype not in FLOATS:
        raise UsageError(f"dtype must be in {' | '.join(FLOATS)}; got {dtype!r}")
    return FLOATS[dtype]


def _check_equal(members: Members, found: Difference) -> None:
    """Raise `FamilyError` if tensors that are not floating-point differ between what is compared.

    A difference of integers is not a task vector, and leaving it out would change the model.
    """
    other = "anchor" if found.what == "instruction" else f"task:{found.task}"
    first, second = members.sources[found.start], members.sources[other]
    for name in members.equal:
        if name not in second.tensors:
            continue
        a, b = first.view(name), second.view(name)
        for start in range(0, size(a), BLOCK):
            stop = min(start + BLOCK, size(a))
            if not np.array_equal(a.read(start, stop), b.read(start, stop)):
                raise FamilyError(
                    f"{describe(other)}: {a.dtype.name} tensor {name!r} differs from that of "
                    f"{found.start}; what is not floating-point must be equal, or be excluded"
                )
