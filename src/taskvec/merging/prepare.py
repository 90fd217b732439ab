"""Prepare: from a recipe to opened members and a layout of the output. Only headers are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from taskvec.checkpoints.companions import with_dtype
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.shards import OutputTensor, lay_out
from taskvec.dtypes import FLOATS
from taskvec.family.members import Members, open_members
from taskvec.merging.decide import decide
from taskvec.merging.edits import Edit
from taskvec.merging.estimate import estimate
from taskvec.merging.stages import StageSource
from taskvec.merging.steps import Prepared
from taskvec.methods.table import Table
from taskvec.recipes.depth import by_tensor, factors
from taskvec.recipes.recipe import STAGE, Recipe
from taskvec.streaming import RunOptions


def prepare(
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    stages: Mapping[str, StageSource] | None = None,
) -> Prepared:
    """Open the members of a recipe and lay out what a merge will write.

    Args:
        recipe: Checked recipe.
        options: How to run.
        stages: Stages that the recipe may read; its own if None.

    Raises:
        CheckpointError: a member is broken.
        FamilyError: members do not fit together.
        UsageError: a role that is needed is not given; a pattern matches no tensor.
    """
    options = replace(options, precision=recipe.out.precision)
    stages = prepare_stages(recipe, options) if stages is None else stages
    members = open_members(
        recipe.family,
        needs_base=recipe.needs_base,
        needs_anchor=recipe.needs_anchor,
        stages=stages,
    )
    # Values by layer must name every tensor.
    factors(recipe.profiles, members.tasks, members.merged, members.keys)
    by_tensor(recipe.parameters, members.merged, members.keys)
    shards = lay_out(_outputs(recipe, members), recipe.out.shard_bytes)
    cost = estimate(recipe, members, stages, shards, options)
    return Prepared(recipe, options, members, stages, shards, cost)


def prepare_stages(recipe: Recipe, options: RunOptions) -> dict[str, StageSource]:
    """The stages of a recipe as sources; each may read those before it."""
    # A cached scan is checked against the weights when they are written; a stage is not written.
    options = replace(options, cache="renew") if options.cache == "use" else options
    found: dict[str, StageSource] = {}
    for name, stage in recipe.stages.items():
        found[name] = _stage(name, prepare(stage, options, stages=dict(found)))
    return found


def open_with_base(recipe: Recipe, options: RunOptions = RunOptions()) -> Members:
    """The members of a recipe as a scan reads them: with the base, if there is one."""
    stages, needs_base = prepare_stages(recipe, options), recipe.family.base is not None
    return open_members(recipe.family, needs_base=needs_base, needs_anchor=True, stages=stages)


def _stage(name: str, prepared: Prepared) -> StageSource:
    """The result of a recipe as a model."""
    recipe, members = prepared.recipe, prepared.members
    outputs = {tensor.name: tensor for shard in prepared.shards for tensor in shard.tensors}
    tensors = {n: TensorInfo(n, outputs[n].dtype, outputs[n].shape, 0) for n in sorted(outputs)}
    dtype, config = recipe.out.dtype, members.target.config
    if dtype is not None:
        config = with_dtype(config, FLOATS[dtype])

    def work_out() -> tuple[Table, Mapping[str, Edit]]:
        decided = decide(prepared)
        return decided.table, decided.edits

    read_bytes = prepared.estimate.merge_bytes
    return StageSource(f"{STAGE}{name}", recipe, members, tensors, config, read_bytes, work_out)


def _outputs(recipe: Recipe, members: Members) -> list[OutputTensor]:
    wanted = FLOATS[recipe.out.dtype] if recipe.out.dtype is not None else None
    return [
        OutputTensor(
            info.name, wanted if wanted and info.dtype.is_float else info.dtype, info.shape
        )
        for info in members.target.tensors.values()
    ]
