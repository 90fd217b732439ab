"""Decide: from a prepared recipe to a table, with the statistics that a method requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from taskvec.errors import TaskvecError, UsageError
from taskvec.family.members import Members
from taskvec.merging.scans import scan_members
from taskvec.merging.steps import Decided, Prepared
from taskvec.methods.method import Inputs, Need
from taskvec.methods.parameters import value_at
from taskvec.methods.selection import bound, mask_key
from taskvec.methods.table import Table, check_table, load_table
from taskvec.recipes.depth import by_tensor, factors
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import Sources
from taskvec.statistics.competition import competition
from taskvec.statistics.masked_sums import Sums, masked_sums, masked_sums_by_rank
from taskvec.statistics.products import Products, products_of_models, products_of_vectors
from taskvec.statistics.scan import Scan
from taskvec.statistics.trim import Threshold, thresholds

Array = np.ndarray[Any, Any]

MAX_PASSES = 3


def decide(prepared: Prepared) -> Decided:
    """The tables of a recipe and of its stages.

    A table that the recipe gives takes the place of the method's own layer weights.

    Raises:
        UsageError: a task has no λ; the method takes no table, or it does not fit the members.
        CheckpointError: NaN or infinite weights.
        TaskvecError: the method asks for more than `MAX_PASSES` passes.
    """
    check_scales(prepared.recipe)
    stages = {name: stage.table for name, stage in prepared.stages.items()}
    recipe, members, method = prepared.recipe, prepared.members, prepared.recipe.method
    table = load_table(recipe.table) if isinstance(recipe.table, Path) else recipe.table
    if table is not None:
        if not (method.takes_table or table.is_final or table.origin == method.name):
            raise UsageError(f"{method.name} does not accept a table; use task_arithmetic or lata")
        check_table(table, members.tasks, members.merged, table.origin)
    has_a_say = method.sparsifies or method.combine is not None  # in what becomes of weights
    is_weights = method.takes_table and has_a_say and table is not None and table.selection is None
    if table is None or (is_weights and not table.is_final):
        table = decide_table(prepared, given=table)
    return Decided(prepared, table, stages)


def check_scales(recipe: Recipe) -> None:
    """Raise `UsageError` if a task has no λ."""
    missing = sorted(recipe.tasks.keys() - recipe.scales.keys())
    if missing:
        raise UsageError(
            f"scale of task {missing[0]!r} is missing; {recipe.method.name} has no default λ"
        )


def decide_table(
    prepared: Prepared, *, given: Table | None = None, scan: Scan | None = None
) -> Table:
    """The method's own table, from a scan and further passes that the method asks for.

    Args:
        prepared: Members and recipe.
        given: Layer weights for a method that sparsifies or combines.
        scan: Of the members, if it is there already.

    Raises:
        TaskvecError: see `decide`.
    """
    recipe, members = prepared.recipe, prepared.members
    is_weighed = recipe.layer_weights is not None and given is None
    if scan is None and (recipe.needs_scan if is_weighed else recipe.method.needs_scan):
        scan = scan_members(members, prepared.options)
    if is_weighed:
        given = decide_table(replace(prepared, recipe=recipe.weigher), scan=scan)
    seen = scan if recipe.method.needs_scan else None
    passes: tuple[object, ...] = ()
    while True:
        outcome = recipe.method.decide(
            inputs_of(recipe, members, scan=seen, table=given, passes=passes)
        )
        if isinstance(outcome, Table):
            return outcome if outcome.origin else replace(outcome, origin=recipe.method.name)
        if len(passes) == MAX_PASSES:
            raise TaskvecError(
                f"method {recipe.method.name} asks for more than {MAX_PASSES} passes"
            )
        if outcome.statistic not in COLLECTORS:
            raise TaskvecError(
                f"method {recipe.method.name} asks for statistic {outcome.statistic!r}; "
                f"known: {', '.join(COLLECTORS)}"
            )
        if outcome.statistic == "products" and scan is not None:
            passes = (*passes, products_of_vectors(scan))
        else:
            passes = (*passes, COLLECTORS[outcome.statistic](prepared, outcome))


def decide_from_headers(prepared: Prepared) -> Table | Need | None:
    """The table, if no weights need to be read for it, or what the method asks for first.

    None where it rests on a scan.
    """
    if prepared.recipe.needs_scan:
        return None
    return prepared.recipe.method.decide(inputs_of(prepared.recipe, prepared.members))


def inputs_of(recipe: Recipe, members: Members, **known: Any) -> Inputs:
    """What the method decides on."""
    parameters = by_tensor(recipe.parameters, members.merged, members.keys)
    profile = None
    if recipe.profiles:
        profile = factors(recipe.profiles, members.tasks, members.merged, members.keys)
    return Inputs(
        members.tasks,
        members.merged,
        recipe.scales,
        parameters,
        seed=recipe.seed,
        profile=profile,
        **known,
    )


def _products(prepared: Prepared, need: Need) -> Products:
    """Inner products of task vectors, or of the task models where none are taken."""
    members, options = prepared.members, prepared.options
    if "anchor" in members.sources:
        return products_of_vectors(scan_members(members, options))
    roles = [f"task:{task}" for task in members.tasks]
    sources = [Sources(name, members.views(name, roles)) for name in members.merged]
    with members.at_rest():
        return products_of_models(sources, members.tasks, named=members.named, options=options)


def _thresholds(prepared: Prepared, need: Need) -> dict[str, dict[str, Threshold]]:
    """Thresholds of magnitude under the layer weights that the method has made."""
    sources, weights = _pure_vectors(prepared, need)
    return thresholds(sources, weights, need.densities, need.scope, prepared.options)


def _masked_sums(prepared: Prepared, need: Need) -> Sums:
    """Σ |x| and Σ m |x| under the layer weights that the method has made and its random masks."""
    sources, weights = _pure_vectors(prepared, need)
    names = prepared.members.merged
    bounds = {t: {n: bound(value_at(d, n)) for n in names} for t, d in need.densities.items()}
    return masked_sums(sources, weights, bounds, _keys(prepared, need), prepared.options)


def _masked_sums_by_rank(prepared: Prepared, need: Need) -> Sums:
    """The same where the larger entries of a row are kept more often."""
    sources, weights = _pure_vectors(prepared, need)
    shares = {
        t: {n: (value_at(d, n), value_at(need.epsilons[t], n)) for n in prepared.members.merged}
        for t, d in need.densities.items()
    }
    return masked_sums_by_rank(sources, weights, shares, _keys(prepared, need), prepared.options)


def _competition(prepared: Prepared, need: Need) -> dict[str, dict[str, float]]:
    """Bounds of magnitude and of scores, of the tasks that compete."""
    sources, weights = _pure_vectors(prepared, need)
    densities = cast(Mapping[str, float], need.densities)  # which are of the whole model
    return competition(sources, weights, densities, prepared.options)


# Collectors of further passes that a method may ask for, by the name of what they collect.
COLLECTORS: dict[str, Callable[[Prepared, Need], object]] = {
    "products": _products,
    "thresholds": _thresholds,
    "masked_sums": _masked_sums,
    "masked_sums_by_rank": _masked_sums_by_rank,
    "competition": _competition,
}


def _keys(prepared: Prepared, need: Need) -> dict[str, dict[str, int]]:
    """What draws depend on besides the entry, by task, then by tensor."""
    seed, names = prepared.recipe.seed, prepared.members.merged
    return {t: {n: mask_key(seed, t, n) for n in names} for t in need.densities}


def _pure_vectors(
    prepared: Prepared, need: Need
) -> tuple[list[Sources], dict[str, dict[str, float]]]:
    """What passes over the tasks of a need read, and the layer weights of those tasks."""
    members = prepared.members
    roles = ["anchor", *(f"task:{task}" for task in need.densities)]
    sources = [Sources(name, members.views(name, roles)) for name in members.merged]
    return sources, {task: need.table.of(task) for task in need.densities}
