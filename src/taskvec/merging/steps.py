"""What the steps of a merge hand on: a recipe is prepared, then decided, then applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from taskvec.checkpoints.shards import Shard
from taskvec.family.members import Members
from taskvec.merging.edits import Edit, make_edits
from taskvec.merging.stages import StageSource
from taskvec.methods.table import Table
from taskvec.recipes.recipe import Recipe
from taskvec.streaming import RunOptions


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge will cost, known from headers.

    Attributes:
        scan_bytes: What a scan reads; 0 if the method needs none.
        merge_bytes: What the merge reads at most (layers with weight 0 are not read from tasks).
        write_bytes: What is written.
        peak_bytes: Anonymous memory at the most, estimated.
    """

    scan_bytes: int
    merge_bytes: int
    write_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe whose members were opened and fit together. Only headers were read.

    Attributes:
        recipe: As checked.
        options: How to run, with the precision of the recipe.
        members: As opened.
        stages: What some members are the result of, by name, in order.
        shards: Files to be written.
        estimate: What it will cost.
    """

    recipe: Recipe
    options: RunOptions
    members: Members
    stages: Mapping[str, StageSource]
    shards: list[Shard]
    estimate: Estimate

    @property
    def warnings(self) -> tuple[str, ...]:
        """What looks odd about the members."""
        return self.members.warnings

    def __repr__(self) -> str:
        merged, tasks = len(self.members.merged), ", ".join(self.members.tasks)
        return (
            f"<Prepared {self.recipe.method.name} of {tasks}: {merged} tensors to merge, "
            f"{self.estimate.write_bytes:,} bytes to write>"
        )


@dataclass(frozen=True)
class Decided:
    """A prepared recipe with its weights.

    Attributes:
        prepared: What was decided on.
        table: Weights of every task and tensor.
        stages: Tables of the stages by name.
    """

    prepared: Prepared
    table: Table
    stages: Mapping[str, Table]

    @cached_property
    def edits(self) -> dict[str, Edit]:
        """What becomes of each tensor of the output, by name, in the order of the shards."""
        p = self.prepared
        return make_edits(p.recipe, p.members, p.shards, self.table)
