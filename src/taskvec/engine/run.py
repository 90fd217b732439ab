"""Running a recipe: plan, collect, decide, apply, publish."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml

from taskvec.checkpoints.card import model_card
from taskvec.checkpoints.companions import companions
from taskvec.checkpoints.staging import Staging, staged
from taskvec.checkpoints.vectors import Vector
from taskvec.checkpoints.views import View
from taskvec.dtypes import FLOATS
from taskvec.engine.apply import (
    EVERYTHING,
    LARGEST,
    Combination,
    Edit,
    Election,
    Record,
    Voter,
    apply,
)
from taskvec.engine.depth import factors
from taskvec.engine.manifest import MANIFEST_FILE, RECIPE_FILE, make_manifest
from taskvec.engine.members import Members, open_members
from taskvec.engine.plan import Plan, check_output, inputs_of, make_plan, make_stages
from taskvec.engine.recipe import Recipe
from taskvec.engine.scans import scan_members
from taskvec.engine.stages import Stage
from taskvec.errors import TaskvecError, UsageError
from taskvec.methods.method import Need
from taskvec.methods.selection import bound, mask_key
from taskvec.methods.table import Table, check_table
from taskvec.statistics.collect import Sources, describe
from taskvec.statistics.competition import competition
from taskvec.statistics.kept import Sums, kept_sums
from taskvec.statistics.products import Products, products_of_models, products_of_vectors
from taskvec.statistics.scan import Scan
from taskvec.statistics.trim import Counting, Threshold, thresholds
from taskvec.streaming import BLOCK, Progress, silent

Array = np.ndarray[Any, Any]

MAX_PASSES = 3
_RECIPE_HEAD = f"""\
# What this folder was made from. A table that was given, from Python or by --table, is not in here.
# To repeat the merge bit for bit in any case: taskvec merge {MANIFEST_FILE} OUT
"""
# Collectors of further passes that a method may ask for, by the name of what they collect.
COLLECTORS: dict[str, Callable[[Plan, Need, Options], object]] = {
    "products": lambda plan, need, options: _products(plan, options),
    "thresholds": lambda plan, need, options: _thresholds(plan, need, options),
    "kept": lambda plan, need, options: _kept(plan, need, options),
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


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        path: The folder; None for a model in memory that was written into.
        fingerprint: Identity of its weights by content.
        table: Weights that were used.
        warnings: What a user should know.
    """

    path: Path | None
    fingerprint: str
    table: Table
    warnings: tuple[str, ...]


def run(
    recipe: Recipe, out: Path, *, table: Table | None = None, options: Options = Options()
) -> Merged:
    """Merge by a recipe and publish the folder.

    Args:
        recipe: Checked recipe.
        out: Folder to appear.
        table: Layer weights that take the place of the method's own.
        options: How to run.

    Raises:
        TaskvecError: anything foreseen; no output is left, and an output that was there is
            untouched.
    """
    check_scales(recipe)
    plan = make_plan(recipe, threads=options.threads)
    check_output(plan, out, force=options.force)
    out = Path(os.path.realpath(out))
    stage_tables = settle(plan.stages, recipe.stage_tables, options)
    table = decided(plan, table, options)
    edits = edits_of(plan, table)
    with staged(out, plan.shards, _job(plan, table), force=options.force) as staging:
        with plan.members.at_rest():
            records = apply(
                [edits[t.name] for t in staging.tensors],
                staging,
                skip=staging.verified(options.progress),
                precision=recipe.out.precision,
                threads=options.threads,
                block=options.block,
                progress=options.progress,
            )
        manifest = make_manifest(plan, table, stage_tables, records)
        _add_companions(staging, plan, table, manifest)
        staging.publish()
    warnings = [*plan.members.warnings, *table.warnings, *identical(records, plan.members)]
    warnings += other_anchors(plan.members, manifest["members"])
    return Merged(out, manifest["output"]["fingerprint"], table, tuple(dict.fromkeys(warnings)))


def other_anchors(members: Members, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tasks that are vectors taken from another model than the anchor, as far as that is known."""
    digests = known["anchor"]["digests"] if "anchor" in known else {}
    vectors = {task: members.sources[f"task:{task}"] for task in members.tasks}
    return [
        f"task {task!r} is a vector that was taken from another model than the anchor "
        f"({vector.metadata.get('anchor', 'unknown')})"
        for task, vector in vectors.items()
        if isinstance(vector, Vector)
        and not vector.starts_from(digests, members.sources["anchor"].tensors)
    ]


def check_scales(recipe: Recipe) -> None:
    """Raise `UsageError` if a task has no λ."""
    missing = sorted(recipe.family.tasks.keys() - recipe.scales.keys())
    if missing:
        raise UsageError(
            f"scale of task {missing[0]!r} is missing; {recipe.method.name} has no default λ"
        )


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


def settle(
    stages: Mapping[str, Stage], given: Mapping[str, Table], options: Options = Options()
) -> dict[str, Table]:
    """Decide the tables of stages, in order, so that their tensors can be read.

    Args:
        stages: As planned.
        given: Tables of a merge that is repeated, by name.
        options: How to run.

    Returns:
        The tables by name.
    """
    # A kept scan is checked against the weights when they are written; a stage is not written.
    fresh = replace(options, cache="renew") if options.cache == "use" else options
    tables: dict[str, Table] = {}
    for name, stage in stages.items():
        table = given.get(name)
        if table is None:
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
    settle(stages, recipe.stage_tables, options)
    return members


def decide(plan: Plan, options: Options = Options(), scan: Scan | None = None) -> Table:
    """The method's table, from a scan and whatever further passes the method asks for.

    Raises:
        TaskvecError: the method asks for more than `MAX_PASSES` passes.
    """
    settle(plan.stages, plan.recipe.stage_tables, options)
    return _decide(plan, options, scan)


def _decide(plan: Plan, options: Options, scan: Scan | None, table: Table | None = None) -> Table:
    """As `decide`, with layer weights that were given for a method that sparsifies."""
    recipe, members = plan.recipe, plan.members
    if recipe.weighing is not None and table is None:
        table = _decide(replace(plan, recipe=recipe.weighing), options, scan)
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
    seed = plan.recipe.seed
    sources, weights, how = _swept(plan, need, options)
    bounds = {task: bound(density) for task, density in need.densities.items()}
    keys = {t: {n: mask_key(seed, t, n) for n in plan.members.merged} for t in need.densities}
    return kept_sums(sources, weights, bounds, keys, how)


def _competition(plan: Plan, need: Need, options: Options) -> dict[str, dict[str, float]]:
    """Bounds of magnitude and of scores, of the tasks that compete."""
    sources, weights, how = _swept(plan, need, options)
    return competition(sources, weights, need.densities, how)


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


def edits_of(plan: Plan, table: Table) -> dict[str, Edit]:
    """What becomes of each tensor of the output, by name."""
    members = plan.members
    column = {name: i for i, name in enumerate(table.names)}
    scales = layer_scales(plan, table)
    coefficients = (table.weights * scales).T.tolist()
    factors = table.target.tolist() if table.target is not None else None
    weighed = [
        *(["anchor"] if plan.recipe.needs_anchor else []),
        *(f"task:{t}" for t in table.tasks),
    ]
    named = members.named
    same_as_anchor = members.sources.get("anchor") is members.target
    merged, equal = set(members.merged), set(members.equal)
    edits: dict[str, Edit] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            name = tensor.name
            if name not in merged:
                roles = ["target", *(members.sources if name in equal else ())]
                views = members.views(name, dict.fromkeys(roles))
                known = {role: d[name] for role, d in table.digests.items() if name in d}
                must_equal = name in equal
                edits[name] = Edit(
                    name,
                    tensor.dtype,
                    views,
                    must_equal=must_equal,
                    expected=known,
                    named=named,
                )
                continue
            i = column[name]
            terms = {
                f"task:{task}": c
                for task, c in zip(table.tasks, coefficients[i], strict=True)
                if c != 0 and members.has(f"task:{task}", name)
            }
            mine = scales[:, i].tolist()
            combination = _combination(plan, table, i, mine) if terms else None
            expected = {role: d[name] for role, d in table.digests.items() if name in d}
            if same_as_anchor and "anchor" in expected:
                expected["target"] = expected["anchor"]
            factor = factors[i] if factors is not None else 1.0
            views = _views(members, name, terms, factor, weighed, expected)
            edits[name] = Edit(
                name,
                tensor.dtype,
                views,
                terms,
                factor,
                expected=expected,
                named=named,
                election=_election(table, name, i, mine, list(terms)),
                combination=combination,
            )
    return edits


def layer_scales(plan: Plan, table: Table) -> Array:
    """λ_t of every task of a table for every tensor of it, shape (tasks, tensors)."""
    scales = np.array([plan.recipe.scales[task] for task in table.tasks]).reshape(-1, 1)
    found: Array = scales * factors(
        plan.recipe.profiles, table.tasks, table.names, plan.members.keys
    )
    return found


def _combination(
    plan: Plan, table: Table, column: int, scales: Sequence[float]
) -> Combination | None:
    """What a method that combines blocks itself is told for one tensor."""
    method, recipe = plan.recipe.method, plan.recipe
    if method.combine is None:
        return None
    weights = dict(zip(table.tasks, table.weights[:, column].tolist(), strict=True))
    by_task = dict(zip(table.tasks, scales, strict=True))
    return Combination(
        method.combine,
        method.alignment,
        weights,
        by_task,
        recipe.parameters,
        recipe.seed,
        table.selection,
    )


def _election(
    table: Table, name: str, column: int, scales: Sequence[float], roles: Sequence[str]
) -> Election | None:
    """What a table's selection is for one tensor, tasks in the order of the edit's terms."""
    selection = table.selection
    if selection is None or not roles:
        return None
    voters = []
    for role in roles:
        task = role.removeprefix("task:")
        i = table.tasks.index(task)
        threshold = selection.thresholds.get(task, {}).get(name, EVERYTHING)
        voters.append(
            Voter(
                weight=float(table.weights[i, column]),
                scale=scales[i]
                * selection.rescale.get(task, 1.0)
                * selection.factors.get(task, {}).get(name, 1.0),
                share=abs(scales[i]),
                threshold=threshold,
                # A ceiling of 0, in a tensor that hardly changes, drops all but zeros.
                ceiling=max(1, selection.ceilings.get(task, {}).get(name, LARGEST + 1)) - 1,
                bound=bound(selection.densities.get(task, 1.0)),
                key=mask_key(selection.seed, task, name),
            )
        )
    return Election(tuple(voters), selection.election, selection.merge)


def _views(
    members: Members,
    name: str,
    terms: Mapping[str, float],
    factor: float,
    weighed: list[str],
    expected: Mapping[str, str],
) -> dict[str, View]:
    """What is read: what the result is made of, and members whose identity is not known yet."""
    roles = ["target"] if factor != 0 else []
    for role in weighed:
        used = role in terms or (role == "anchor" and bool(terms))
        if used or role not in expected:
            roles.append(role)
    return members.views(name, roles)


def _job(plan: Plan, table: Table) -> str:
    """Identity of a job: recipe, table, inputs as they look, layout of the output."""
    parts: list[Any] = [
        plan.recipe.to_dict(),
        table.to_json(),
        [(role, source.identity) for role, source in plan.members.sources.items()],
        [shard.header for shard in plan.shards],
    ]
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def _add_companions(staging: Staging, plan: Plan, table: Table, manifest: dict[str, Any]) -> None:
    recipe, members = plan.recipe, plan.members
    dtype = FLOATS[recipe.out.dtype] if recipe.out.dtype is not None else None
    files = companions(members.target, dtype)
    files["README.md"] = model_card(
        staging.out.name,
        {describe(role): source for role, source in members.sources.items()},
        method=recipe.method.name,
        formula=f"{recipe.method.formula} ({table.origin})",
        scales={task: recipe.scale_of(task) for task in recipe.scales},
    )
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    files[RECIPE_FILE] = f"{_RECIPE_HEAD}{text}".encode()
    files[MANIFEST_FILE] = json.dumps(manifest).encode() + b"\n"
    for name, content in files.items():
        staging.add(name, content)


def identical(records: Mapping[str, Record], members: Members) -> list[str]:
    """Tasks whose every tensor that was read is the anchor's."""
    anchor = members.sources.get("anchor")
    found = []
    for task in members.tasks:
        if members.sources[f"task:{task}"] is anchor:
            continue  # known, and told, before anything was read
        pairs = [
            (record["anchor"], record[f"task:{task}"])
            for record in records.values()
            if "anchor" in record and f"task:{task}" in record
        ]
        if pairs and all(a == b for a, b in pairs):
            found.append(f"task {task!r} is identical to the anchor: its task vector is zero")
    return found
