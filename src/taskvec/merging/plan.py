"""The plan: what will be read, worked out and written, known from headers alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.checkpoints.shards import OutputTensor, Shard, lay_out
from taskvec.checkpoints.source import Source
from taskvec.dtypes import FLOATS
from taskvec.family.members import Members, open_members
from taskvec.merging.stages import KEPT, Stage, as_source
from taskvec.methods.method import Inputs, Need
from taskvec.methods.table import Table
from taskvec.recipes.depth import by_tensor, factors
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import roles_of
from taskvec.streaming import BLOCK, CHUNK, default_threads

# Anonymous memory of the interpreter with numpy, numba and the merge's kernels, and of the
# bookkeeping for one tensor of one member; both measured, see docs/log.md.
FIXED_BYTES = 60_000_000
PASS_BYTES = 35_000_000  # the kernels of a pass before the merge, and what its threads keep
TENSOR_BYTES = 1_600
# Arrays that a method's own `combine` needs of what it sees at once, besides 4 for every task:
# stored and widened elements, what it works out, and LAPACK's room; measured as well.
COPIES = {"element": 10, "row": 10, "tensor": 22}


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe whose members were opened and fit together.

    Attributes:
        recipe: As checked.
        members: As opened.
        stages: What the members are made of, by name, in order; settled by `run.settle`.
        shards: Files to be written.
        scan_bytes: What a scan reads; 0 if the method needs none.
        merge_bytes: What the merge reads at most (layers that get weight 0 are not read from
            tasks).
        write_bytes: What is written.
        peak_bytes: Anonymous memory at the most, estimated.
    """

    recipe: Recipe
    members: Members
    stages: Mapping[str, Stage]
    shards: list[Shard]
    scan_bytes: int
    merge_bytes: int
    write_bytes: int
    peak_bytes: int

    def without_weights(self) -> Table | Need | None:
        """The table, if the method can make it without reading weights, or what it asks for first.

        None where it rests on a scan.
        """
        if self.recipe.needs_scan:
            return None
        return self.recipe.method.decide(inputs_of(self.recipe, self.members))

    def reading_bytes(self, need: Need) -> int:
        """Bytes of one reading for a statistic; the anchor is read anew beside every task."""
        names, sources = self.members.merged, self.members.sources
        tasks = [_nbytes(sources[f"task:{task}"], names) for task in self.members.tasks]
        anchor = _nbytes(sources["anchor"], names) if "anchor" in sources else 0
        return sum(tasks) + anchor * (1 if need.statistic == "products" else len(tasks))


def make_plan(
    recipe: Recipe, *, threads: int | None = None, stages: Mapping[str, Stage] | None = None
) -> Plan:
    """Open the members and work out what a merge would do, from headers alone.

    Args:
        recipe: Checked recipe.
        threads: How many will run.
        stages: Stages that the recipe reads; its own if None.

    Raises:
        CheckpointError, FamilyError, UsageError: see `open_members`.
    """
    stages = make_stages(recipe) if stages is None else stages
    members = open_members(
        recipe.family,
        needs_base=recipe.needs_base,
        needs_anchor=recipe.needs_anchor,
        stages=stages,
    )
    factors(recipe.profiles, members.tasks, members.merged, members.keys)  # or say what lacks
    by_tensor(recipe.parameters, members.merged, members.keys)  # likewise
    shards = lay_out(_outputs(recipe, members), recipe.out.shard_bytes)
    tensors = members.target.tensors
    write = sum(s.nbytes for s in shards)
    read = {id(s): s for role, s in members.sources.items() if role != "base"}
    scanned = roles_of(members.tasks, recipe.needs_base) if recipe.needs_scan else []
    workers = threads or default_threads()
    return Plan(
        recipe=recipe,
        members=members,
        stages=stages,
        shards=shards,
        scan_bytes=sum(_nbytes(members.sources[role], members.merged) for role in scanned),
        merge_bytes=sum(_nbytes(source, tensors) for source in read.values()),
        write_bytes=write,
        peak_bytes=FIXED_BYTES
        + PASS_BYTES * (recipe.needs_scan or recipe.method.sparsifies)
        + workers * BLOCK * (4 + sum(_widest(s, members.merged) for s in members.distinct))
        + TENSOR_BYTES * len(tensors) * len(members.distinct)
        + _combining_bytes(recipe, members, workers)
        + sum(
            _combining_bytes(stage.plan.recipe, stage.plan.members, workers + KEPT)
            for stage in stages.values()
        ),
    )


def _combining_bytes(recipe: Recipe, members: Members, workers: int) -> int:
    """Memory of a method that combines blocks itself, each thread at one of the largest."""
    method = recipe.method
    if method.combine is None:
        return 0
    alignment = method.seen_at_once(recipe.parameters)
    infos = [members.target.tensors[name] for name in members.merged]
    sizes = [_seen_at_once(math.prod(info.shape), info.shape, alignment) for info in infos]
    is_wide = recipe.out.precision == "float64" or any(
        _widest(source, members.merged) == 8 for source in members.distinct
    )
    copies = COPIES[alignment] + 4 * len(members.tasks)
    return sum(heapq.nlargest(workers, sizes)) * (8 if is_wide else 4) * copies


def _seen_at_once(size: int, shape: Sequence[int], alignment: str) -> int:
    """Elements of a tensor in one block, at the most."""
    if alignment == "tensor":
        return size
    step = math.lcm(CHUNK, shape[-1]) if alignment == "row" and shape and size else CHUNK
    return min(size, max(BLOCK, step))


def make_stages(recipe: Recipe) -> dict[str, Stage]:
    """The stages of a recipe as sources, from headers alone; each may read those before it."""
    found: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        found[name] = as_source(name, make_plan(stage, stages=dict(found)))
    return found


def _nbytes(source: Source, names: Iterable[str]) -> int:
    """Bytes read for those of the named tensors that a source has."""
    if isinstance(source, Stage):
        return source.plan.merge_bytes
    return sum(source.tensors[name].nbytes for name in names if name in source.tensors)


def _widest(source: Source, names: Iterable[str]) -> int:
    """Bytes of an element of a block that is read."""
    widths = {source.tensors[name].dtype.itemsize for name in names if name in source.tensors}
    return max(widths, default=0)


def _outputs(recipe: Recipe, members: Members) -> list[OutputTensor]:
    wanted = FLOATS[recipe.out.dtype] if recipe.out.dtype is not None else None
    return [
        OutputTensor(
            info.name, wanted if wanted and info.dtype.is_float else info.dtype, info.shape
        )
        for info in members.target.tensors.values()
    ]


def inputs_of(recipe: Recipe, members: Members, **known: Any) -> Inputs:
    """What the method decides on."""
    scales, seed, profile = recipe.scales, recipe.seed, None
    parameters = by_tensor(recipe.parameters, members.merged, members.keys)
    if recipe.profiles:
        profile = factors(recipe.profiles, members.tasks, members.merged, members.keys)
    return Inputs(
        members.tasks, members.merged, scales, parameters, seed=seed, profile=profile, **known
    )
