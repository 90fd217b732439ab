"""What a merge will cost, from headers alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

from taskvec.checkpoints.shards import Shard
from taskvec.checkpoints.source import Source
from taskvec.family.members import Members
from taskvec.merging.stages import KEPT, StageSource
from taskvec.merging.steps import Estimate, Prepared
from taskvec.methods.method import Need
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import roles_of
from taskvec.streaming import BLOCK, CHUNK, RunOptions

# Anonymous memory of the interpreter with numpy, numba and the merge's kernels, and of the
# bookkeeping for one tensor of one member; both measured, see docs/log.md.
FIXED_BYTES = 60_000_000
PASS_BYTES = 35_000_000  # the kernels of a pass before the merge, and what its threads keep
TENSOR_BYTES = 1_600
# Arrays that a method's own `combine` needs of what it sees at once, besides 4 for every task:
# stored and widened elements, results, and LAPACK's workspace; measured as well.
COPIES = {"element": 10, "row": 10, "tensor": 22}


def estimate(
    recipe: Recipe,
    members: Members,
    stages: Mapping[str, StageSource],
    shards: Sequence[Shard],
    options: RunOptions,
) -> Estimate:
    """What a merge of these members will read, write and hold in memory."""
    tensors, workers = members.target.tensors, options.workers
    read = {id(s): s for role, s in members.sources.items() if role != "base"}
    scanned = roles_of(members.tasks, recipe.needs_base) if recipe.needs_scan else []
    return Estimate(
        scan_bytes=sum(_nbytes(members.sources[role], members.merged) for role in scanned),
        merge_bytes=sum(_nbytes(source, tensors) for source in read.values()),
        write_bytes=sum(shard.nbytes for shard in shards),
        peak_bytes=FIXED_BYTES
        + PASS_BYTES * (recipe.needs_scan or recipe.method.sparsifies)
        + workers * BLOCK * (4 + sum(_widest(s, members.merged) for s in members.distinct))
        + TENSOR_BYTES * len(tensors) * len(members.distinct)
        + _combining_bytes(recipe, members, workers)
        + sum(_combining_bytes(s.recipe, s.members, workers + KEPT) for s in stages.values()),
    )


def reading_bytes(prepared: Prepared, need: Need) -> int:
    """Bytes of one reading for a statistic; the anchor is read again beside every task."""
    names, sources = prepared.members.merged, prepared.members.sources
    tasks = [_nbytes(sources[f"task:{task}"], names) for task in prepared.members.tasks]
    anchor = _nbytes(sources["anchor"], names) if "anchor" in sources else 0
    return sum(tasks) + anchor * (1 if need.statistic == "products" else len(tasks))


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


def _nbytes(source: Source, names: Iterable[str]) -> int:
    """Bytes read for those of the named tensors that a source has."""
    if isinstance(source, StageSource):
        return source.read_bytes
    return sum(source.tensors[name].nbytes for name in names if name in source.tensors)


def _widest(source: Source, names: Iterable[str]) -> int:
    """Bytes of an element of a block that is read."""
    infos = [source.tensors[name] for name in names if name in source.tensors]
    widths = {4 if i.quantised_bytes is not None else i.dtype.itemsize for i in infos}
    return max(widths, default=0)
