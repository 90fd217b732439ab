"""Deciding: from a plan to a table, through scans and whatever further passes a method asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from taskvec.errors import TaskvecError, UsageError
from taskvec.family.members import Members, open_members
from taskvec.merging.edits import edits_of
from taskvec.merging.plan import Plan, inputs_of, make_stages
from taskvec.merging.scans import scan_members
from taskvec.merging.stages import Stage
from taskvec.methods.method import Need
from taskvec.methods.parameters import value_at
from taskvec.methods.selection import bound, mask_key
from taskvec.methods.table import Table, check_table
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import Sources
from taskvec.statistics.competition import competition
from taskvec.statistics.kept import Sums, kept_by_rank, kept_sums
from taskvec.statistics.products import Products, products_of_models, products_of_vectors
from taskvec.statistics.scan import Scan
from taskvec.statistics.trim import Counting, Threshold, thresholds
from taskvec.streaming import BLOCK, Progress, silent

Array = np.ndarray[Any, Any]

MAX_PASSES = 3
# Collectors of further passes that a method may ask for, by the name of what they collect.
COLLECTORS: dict[str, Callable[[Plan, Need, Options], object]] = {
    "products": lambda plan, need, options: _products(plan, options),
    "thresholds": lambda plan, need, options: _thresholds(plan, need, options),
    "kept": lambda plan, need, options: _kept(plan, need, options),
    "kept_by_rank": lambda plan, need, options: _kept_by_rank(plan, need, options),
    "competition": lambda plan, need, options: _competition(plan, need, options),
}


@dataclass(frozen=True, slots=True)
class Options:
    """How to run, as opposed to what.

    Attributes:
        force: Replace an output folder that is not empty.
        cache: `use` scans that were kept, and keep new ones; `renew`: keep but do not take; `off`.
        threads: Default: the processors there are, at most 8.
        block: Elements worked on at once; changes no bit of the result.
        progress: Told what is being done.
    """

    force: bool = False
    cache: str = "use"
    threads: int | None = None
    block: int = BLOCK
    progress: Progress = silent


def decided(plan: Plan, table: Table | None, options: Options) -> Table:
    """The table that was given, or the method's own; the stages are settled.

    Raises:
        UsageError: the method takes no table, or it does not fit the members.
    """
    method = plan.recipe.method
    if table is not None and not method.takes_table and table.origin != method.name:
        raise UsageError(f"{method.name} takes no table; use task_arithmetic or lata")
    if table is not None:
        check_table(table, plan.members.tasks, plan.members.merged, table.origin)
    has_a_say = method.sparsifies or method.combine is not None  # in what becomes of weights
    if table is None or (method.takes_table and has_a_say and table.selection is None):
        table = _decide(plan, options, None, table)
    return table


def settle(stages: Mapping[str, Stage], options: Options = Options()) -> dict[str, Table]:
    """Decide the tables of stages, in order, so that their tensors can be read.

    Args:
        stages: As planned.
        options: How to run.

    Returns:
        The tables by name.
    """
    # A kept scan is checked against the weights when they are written; a stage is not written.
    fresh = replace(options, cache="renew") if options.cache == "use" else options
    tables: dict[str, Table] = {}
    for name, stage in stages.items():
        table = stage.plan.recipe.table
        if not isinstance(table, Table):
            table = _decide(stage.plan, fresh, None)
        check_table(table, stage.plan.members.tasks, stage.plan.members.merged, name)
        stage.edits = edits_of(stage.plan, table)
        tables[name] = table
    return tables


def settled_members(recipe: Recipe, options: Options = Options()) -> Members:
    """The members of a recipe as a scan reads them: with the base, if there is one."""
    family, stages = recipe.family, make_stages(recipe)
    members = open_members(
        family, needs_base=family.base is not None, needs_anchor=True, stages=stages
    )
    settle(stages, options)
    return members


def decide(plan: Plan, options: Options = Options(), scan: Scan | None = None) -> Table:
    """The method's table, from a scan and whatever further passes the method asks for.

    Raises:
        TaskvecError: the method asks for more than `MAX_PASSES` passes.
    """
    settle(plan.stages, options)
    return _decide(plan, options, scan)


def _decide(plan: Plan, options: Options, scan: Scan | None, table: Table | None = None) -> Table:
    """As `decide`, with layer weights that were given for a method that sparsifies."""
    recipe, members = plan.recipe, plan.members
    if recipe.layer_weights is not None and table is None:
        table = _decide(replace(plan, recipe=recipe.weigher), options, scan)
    if recipe.method.needs_scan and scan is None:
        scan = scan_members(
            members,
            cache=options.cache,
            threads=options.threads,
            block=options.block,
            progress=options.progress,
        )
    passes: tuple[object, ...] = ()
    known = {"scan": scan if recipe.method.needs_scan else None, "table": table}
    while True:
        outcome = recipe.method.decide(inputs_of(recipe, members, passes=passes, **known))
        if isinstance(outcome, Table):
            return outcome
        if len(passes) == MAX_PASSES:
            raise TaskvecError(
                f"method {recipe.method.name} asks for more than {MAX_PASSES} passes"
            )
        if outcome.statistic not in COLLECTORS:
            raise TaskvecError(
                f"method {recipe.method.name} asks for statistic {outcome.statistic!r}; "
                f"known: {', '.join(COLLECTORS)}"
            )
        passes = (*passes, COLLECTORS[outcome.statistic](plan, outcome, options))


def _products(plan: Plan, options: Options) -> Products:
    """Inner products of task vectors, or of the task models where none are taken."""
    members = plan.members
    how: dict[str, Any] = {
        "threads": options.threads,
        "block": options.block,
        "progress": options.progress,
    }
    if "anchor" in members.sources:
        return products_of_vectors(scan_members(members, cache=options.cache, **how))
    roles = [f"task:{task}" for task in members.tasks]
    sources = [Sources(name, members.views(name, roles)) for name in members.merged]
    with members.at_rest():
        return products_of_models(sources, members.tasks, named=members.named, **how)


def _thresholds(plan: Plan, need: Need, options: Options) -> dict[str, dict[str, Threshold]]:
    """Thresholds of magnitude under the layer weights that the method has made."""
    sources, weights, how = _swept(plan, need, options)
    return thresholds(sources, weights, need.densities, need.scope, how)


def _kept(plan: Plan, need: Need, options: Options) -> Sums:
    """Σ |x| and Σ m |x| under the layer weights that the method has made and its random masks."""
    sources, weights, how = _swept(plan, need, options)
    names = plan.members.merged
    bounds = {t: {n: bound(value_at(d, n)) for n in names} for t, d in need.densities.items()}
    return kept_sums(sources, weights, bounds, _keys(plan, need), how)


def _kept_by_rank(plan: Plan, need: Need, options: Options) -> Sums:
    """The same where the larger entries of a row are kept more often."""
    sources, weights, how = _swept(plan, need, options)
    shares = {
        t: {n: (value_at(d, n), value_at(need.epsilons[t], n)) for n in plan.members.merged}
        for t, d in need.densities.items()
    }
    return kept_by_rank(sources, weights, shares, _keys(plan, need), how)


def _keys(plan: Plan, need: Need) -> dict[str, dict[str, int]]:
    """What draws depend on besides the entry, by task, then by tensor."""
    seed, names = plan.recipe.seed, plan.members.merged
    return {t: {n: mask_key(seed, t, n) for n in names} for t in need.densities}


def _competition(plan: Plan, need: Need, options: Options) -> dict[str, dict[str, float]]:
    """Bounds of magnitude and of scores, of the tasks that compete."""
    sources, weights, how = _swept(plan, need, options)
    densities = cast(Mapping[str, float], need.densities)  # which are of the whole model
    return competition(sources, weights, densities, how)


def _swept(
    plan: Plan, need: Need, options: Options
) -> tuple[list[Sources], dict[str, dict[str, float]], Counting]:
    """What passes over the tasks of a need read, their layer weights, and how they run."""
    members = plan.members
    roles = ["anchor", *(f"task:{task}" for task in need.densities)]
    sources = [Sources(name, members.views(name, roles)) for name in members.merged]
    weights = {task: need.table.of(task) for task in need.densities}
    how = Counting(plan.recipe.out.precision, options.threads, options.block, options.progress)
    return sources, weights, how
