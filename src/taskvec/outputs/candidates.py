"""Candidates: merges tried out in a model that is loaded once, and put back exactly afterwards.

A candidate has the weights that `merge` would write to a folder, rounded to the same dtype, in the
parameters of a loaded model. Members are read into memory once; a switch then reads them there and
writes the parameters, and nothing else: no digests, no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taskvec.checkpoints.memory import Module, dtype_of, is_torch, stored, view_of
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DType
from taskvec.errors import UsageError
from taskvec.merging.arithmetic import Array, result_of
from taskvec.merging.decide import decide
from taskvec.merging.edits import Edit
from taskvec.merging.prepare import prepare
from taskvec.merging.steps import Prepared
from taskvec.methods.table import Table
from taskvec.outputs.live import Parameters, parameters_of
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import address
from taskvec.streaming import CHUNK, RunOptions, Unit, cut, stream

BLOCK = 16 * CHUNK  # elements worked on at once


@dataclass(frozen=True, slots=True, eq=False)
class HeldView:
    """A view whose elements are in memory, in order.

    Attributes:
        dtype: See `View`.
        shape: See `View`.
        is_difference: See `View`.
        flat: The elements, as `dtype.storage`.
    """

    dtype: DType
    shape: tuple[int, ...]
    is_difference: bool
    flat: Array

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        return self.flat[start:stop]


@dataclass(slots=True)
class Bench:
    """A loaded model whose parameters candidates are put into.

    Attributes:
        prepared: The recipe whose members are held.
        parameters: Tensors of the model by name, as they are written.
        held: Views that were read into memory, by role and name.
        changed: Tensors that differ from the target's.
    """

    prepared: Prepared
    parameters: Mapping[str, Any]
    held: dict[tuple[str, str], HeldView] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def put(self, recipe: Recipe) -> Table:
        """Put a candidate into the model.

        Args:
            recipe: With the members that the bench holds; all else may differ.

        Returns:
            The table that was applied.

        Raises:
            UsageError: the recipe has other members.
            TaskvecError: the merge failed; the model is the target again then.
        """
        mine = self.prepared.recipe
        if recipe.family.members != mine.family.members:
            raise UsageError("a candidate must have the members of its first recipe")
        try:
            if _needs(recipe) != _needs(mine):
                self.prepared = prepare(recipe, self.prepared.options)
            options = replace(self.prepared.options, precision=recipe.out.precision)
            decided = decide(replace(self.prepared, recipe=recipe, options=options))
            stored_as = self.prepared.members.target.tensors
            todo = [
                edit
                for edit in decided.edits.values()
                if edit.terms
                or edit.target_factor != 1
                or edit.dtype != stored_as[edit.name].dtype
                or edit.name in self.changed
            ]
            self.changed |= {edit.name for edit in todo}
            self._write(todo, options)
        except BaseException:
            self.restore()
            raise
        return decided.table

    def restore(self) -> None:
        """Make the model the target again, bit for bit."""
        targets = [
            Edit(name, view.dtype, {"target": view})
            for name in sorted(self.changed)
            for view in [self.prepared.members.target.view(name)]
        ]
        self._write(targets, self.prepared.options)
        self.changed.clear()

    def _write(self, edits: Sequence[Edit], options: RunOptions) -> None:
        held = [self._in_memory(edit) for edit in edits]
        sink = Parameters([self.parameters[edit.name] for edit in edits])
        into = [dtype_of(edit.name, self.parameters[edit.name], "out") for edit in edits]
        precision = options.precision
        flats = [_flat(self.parameters[edit.name]) for edit in edits]

        def work(unit: Unit) -> list[int]:
            for i, start, stop in unit:
                blocks = {role: view.read(start, stop) for role, view in held[i].views.items()}
                edit, flat = held[i], flats[i]
                if flat is not None and edit.dtype.is_float:
                    result_of(edit, blocks, start, precision, (flat[start:stop], into[i]))
                else:
                    block = result_of(edit, blocks, start, precision)
                    sink.write(i, start, _recast(block, edit.dtype, into[i]))
            return [i for i, _, _ in unit]

        units = cut([size(e.like) for e in held], BLOCK, [edit.step for edit in held])
        for _ in stream(units, lambda: work, options.workers):
            pass
        for i in range(len(held)):
            sink.complete(i, {})

    def _in_memory(self, edit: Edit) -> Edit:
        views: dict[str, View] = {}
        same: dict[View, HeldView] = {}
        for role, view in edit.views.items():
            key = role, edit.name
            if key not in self.held:
                if view not in same:
                    block = np.ascontiguousarray(view.read(0, size(view)))
                    same[view] = HeldView(view.dtype, view.shape, view.is_difference, block)
                self.held[key] = same[view]
            views[role] = same.setdefault(view, self.held[key])
        return replace(edit, views=views, expected={})


def _needs(recipe: Recipe) -> tuple[object, ...]:
    """What preparing depends on besides the members."""
    return recipe.needs_base, recipe.needs_anchor, recipe.out.dtype


@contextmanager
def candidates(recipe: Recipe, into: Module, options: RunOptions = RunOptions()) -> Iterator[Bench]:
    """A bench over a loaded model, which is the target again when the context ends.

    Args:
        recipe: Names the members; its method and scales do not matter yet.
        into: The target, loaded; its parameters may be wider or narrower than they are stored.
        options: How to run.

    Raises:
        UsageError: the model is not the target: a name, a shape or a weight differs; or the recipe
            has stages.
        TaskvecError: a member is broken or does not fit.
    """
    if recipe.stages:
        raise UsageError("a candidate cannot have stages; merge the recipe and evaluate the folder")
    prepared = prepare(recipe, options)
    parameters = parameters_of(into)
    _check_is_target(prepared, parameters)
    bench = Bench(prepared, parameters)
    try:
        yield bench
    finally:
        bench.restore()


def _check_is_target(prepared: Prepared, parameters: Mapping[str, Any]) -> None:
    for name in [tensor.name for shard in prepared.shards for tensor in shard.tensors]:
        if name not in parameters:
            raise UsageError(
                f"the loaded model has no tensor {name!r} of the target; "
                "merge the recipe and evaluate the folder"
            )
        there = view_of(name, parameters[name], "the loaded model")
        target = prepared.members.target.view(name)
        if there.shape != target.shape or not _equal(there, target):
            raise UsageError(
                f"the loaded model is not the target: tensor {name!r} differs; "
                "load the target's own weights"
            )


def _equal(there: View, target: View) -> bool:
    """Whether a tensor in memory holds the target's elements, converted to its dtype."""
    for start in range(0, size(target), BLOCK):
        stop = min(size(target), start + BLOCK)
        block = _recast(target.read(start, stop), target.dtype, there.dtype)
        if not np.array_equal(block, there.read(start, stop)):
            return False
    return True


def _flat(tensor: Any) -> Array | None:
    """The elements of a tensor in main memory as an array that shares it, if they lie in order."""
    if is_torch(tensor):
        is_there = tensor.device.type == "cpu" and tensor.is_contiguous()
        return stored(tensor.detach().view(-1)) if is_there else None
    return tensor.reshape(-1) if tensor.flags.c_contiguous else None


def _recast(block: Array, dtype: DType, into: DType) -> Array:
    """Stored elements in another dtype, rounded once."""
    from taskvec.kernels.convert import recast
    from taskvec.kernels.gram import STRETCH

    out = np.empty(len(block), into.storage)
    wide = np.float64 if 8 in (dtype.itemsize, into.itemsize) else np.float32
    row = np.empty(STRETCH, wide)
    recast(dtype.code, address(block), into.code, address(out), len(block), row)
    return out
