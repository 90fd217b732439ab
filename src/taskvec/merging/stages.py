"""Stages: the result of one recipe as a model that another reads, without being written.

A stage is a source. Its tensors are those that its recipe would write, rounded as they would be;
each block is computed whenever it is read. Where a method must see more at
once than a reader asks for (whole rows, a whole tensor), the last stretches are kept, so that
readers of their other parts find them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source
from taskvec.checkpoints.views import size
from taskvec.dtypes import DType
from taskvec.family.members import Members
from taskvec.merging.arithmetic import result_of
from taskvec.merging.edits import Edit
from taskvec.methods.table import Table
from taskvec.recipes.recipe import Recipe

Array = np.ndarray[Any, Any]

KEPT = 2  # stretches: while one thread begins the next tensor, others are still at the last one


@dataclass(frozen=True, slots=True, eq=False)
class Recent:
    """The last computed stretches of a stage, by tensor and first element."""

    held: dict[tuple[str, int], Array] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def get(self, key: tuple[str, int], work_out: Callable[[], Array]) -> Array:
        """A stretch, computed by one thread while others wait for it."""
        with self.lock:
            if key not in self.held:
                while len(self.held) >= KEPT:
                    del self.held[next(iter(self.held))]
                self.held[key] = work_out()
            return self.held[key]


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A tensor of a stage."""

    edit: Edit
    precision: str
    recent: Recent
    is_difference: bool = False

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return self.edit.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.edit.like.shape

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        step, end = self.edit.step, size(self)
        is_sum = self.edit.election is None and self.edit.combination is None
        if is_sum or (start % step == 0 and (stop % step == 0 or stop == end)):
            return self._work_out(start, stop)
        parts = []
        for low in range(start - start % step, stop, step):
            high = min(low + step, end)
            work_out = partial(self._work_out, low, high)
            if start <= low and high <= stop:
                parts.append(work_out())
            else:
                stretch = self.recent.get((self.edit.name, low), work_out)
                parts.append(stretch[max(start, low) - low : stop - low])
        return np.concatenate(parts)

    def _work_out(self, start: int, stop: int) -> Array:
        blocks = {role: view.read(start, stop) for role, view in self.edit.views.items()}
        return result_of(self.edit, blocks, start, self.precision)


@dataclass(frozen=True, eq=False)
class StageSource:
    """A source whose tensors are the result of a recipe.

    Its table is decided when it is first needed, and once.

    Attributes:
        where: `stage:NAME`.
        recipe: The stage's own.
        members: The models that the stage reads.
        tensors: What the stage's result holds.
        config: The config of the result.
        read_bytes: What is read for the whole of it.
        decide: Gives the stage's table and what becomes of each tensor under it.
    """

    where: str
    recipe: Recipe
    members: Members
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    read_bytes: int
    decide: Callable[[], tuple[Table, Mapping[str, Edit]]]
    is_difference: bool = False
    _views: dict[str, Computed] = field(default_factory=dict)
    _recent: Recent = field(default_factory=Recent)

    @cached_property
    def _decided(self) -> tuple[Table, Mapping[str, Edit]]:
        return self.decide()

    @property
    def table(self) -> Table:
        """What was decided."""
        return self._decided[0]

    @property
    def folder(self) -> Path | None:
        """See `Source`."""
        return self.members.target.folder

    @property
    def files(self) -> Mapping[str, bytes]:
        """See `Source`."""
        return self.members.target.files

    @property
    def parts(self) -> tuple[Source, ...]:
        """See `Source`."""
        return tuple(self.members.distinct)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See `Source`."""
        return tuple(path for source in self.parts for path in source.inputs)

    @property
    def identity(self) -> object:
        """See `Source`."""
        members = self.members.sources.items()
        return (self.recipe.to_dict(), [(role, source.identity) for role, source in members])

    def view(self, name: str) -> Computed:
        """See `Source`."""
        if name not in self._views:
            edit, precision = self._decided[1][name], self.recipe.out.precision
            self._views[name] = Computed(edit, precision, self._recent)
        return self._views[name]

    def check_unchanged(self) -> None:
        """See `Source`."""
        for source in self.parts:
            source.check_unchanged()
