"""Stages: the result of one recipe as a model that another reads, without being written.

A stage is a source. Its tensors are those that its recipe would write, rounded as they would be;
each block is worked out when it is read, every time it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from taskvec.checkpoints.companions import with_dtype
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Source
from taskvec.dtypes import FLOATS, DType
from taskvec.engine.apply import Edit, result_of
from taskvec.engine.recipe import STAGE

if TYPE_CHECKING:
    from taskvec.engine.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A tensor of a stage."""

    edit: Edit
    precision: str
    is_difference: bool = False

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return self.edit.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.edit.like.shape

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `View`."""
        blocks = {role: view.read(start, stop) for role, view in self.edit.views.items()}
        return result_of(self.edit, blocks, start, self.precision)


@dataclass(slots=True, eq=False)
class Stage:
    """A source whose tensors are worked out by a recipe; made by `as_source`.

    Attributes:
        plan: The stage's own plan.
        edits: What becomes of each tensor; empty until the stage's table is decided.
    """

    where: str
    plan: Plan
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    edits: Mapping[str, Edit] = field(default_factory=dict)
    is_difference: bool = False
    _views: dict[str, Computed] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """See `Source`."""
        return self.plan.members.target.folder

    @property
    def files(self) -> Mapping[str, bytes]:
        """See `Source`."""
        return self.plan.members.target.files

    @property
    def parts(self) -> tuple[Source, ...]:
        """See `Source`."""
        return tuple(self.plan.members.distinct)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See `Source`."""
        return tuple(path for source in self.parts for path in source.inputs)

    @property
    def identity(self) -> object:
        """See `Source`."""
        members = self.plan.members.sources.items()
        return (self.plan.recipe.to_dict(), [(role, source.identity) for role, source in members])

    def view(self, name: str) -> Computed:
        """See `Source`."""
        if name not in self._views:
            self._views[name] = Computed(self.edits[name], self.plan.recipe.out.precision)
        return self._views[name]

    def check_unchanged(self) -> None:
        """See `Source`."""
        for source in self.parts:
            source.check_unchanged()


def as_source(name: str, plan: Plan) -> Stage:
    """The result of a plan as a model."""
    outputs = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
    tensors = {n: TensorInfo(n, outputs[n].dtype, outputs[n].shape, 0) for n in sorted(outputs)}
    dtype, config = plan.recipe.out.dtype, plan.members.target.config
    if dtype is not None:
        config = with_dtype(config, FLOATS[dtype])
    return Stage(f"{STAGE}{name}", plan, tensors, config)
