"""Edits: what becomes of each tensor of the output, from a plan and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.checkpoints.views import View
from taskvec.family.members import Members
from taskvec.merging.apply import EVERYTHING, LARGEST, Combination, Edit, Election, Voter
from taskvec.merging.plan import Plan
from taskvec.methods.parameters import Resolved, value_at
from taskvec.methods.selection import bound, mask_key
from taskvec.methods.table import Table
from taskvec.recipes.depth import by_tensor, factors

Array = np.ndarray[Any, Any]


def edits_of(plan: Plan, table: Table) -> dict[str, Edit]:
    """What becomes of each tensor of the output, by name."""
    members = plan.members
    column = {name: i for i, name in enumerate(table.names)}
    scales = layer_scales(plan, table)
    parameters = by_tensor(plan.recipe.parameters, members.merged, members.keys)
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
            combination = _combination(plan, table, i, mine, parameters) if terms else None
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
    plan: Plan,
    table: Table,
    column: int,
    scales: Sequence[float],
    parameters: Mapping[str, Resolved],
) -> Combination | None:
    """What a method that combines blocks itself is told for one tensor."""
    method, name = plan.recipe.method, table.names[column]
    if method.combine is None:
        return None
    weights = dict(zip(table.tasks, table.weights[:, column].tolist(), strict=True))
    by_task = dict(zip(table.tasks, scales, strict=True))
    return Combination(
        method.combine,
        method.seen_at_once(plan.recipe.parameters),
        weights,
        by_task,
        {t: {k: value_at(v, name) for k, v in mine.items()} for t, mine in parameters.items()},
        plan.recipe.seed,
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
                * value_at(selection.rescale.get(task, 1.0), name)
                * selection.factors.get(task, {}).get(name, 1.0),
                share=abs(scales[i]),
                threshold=threshold,
                # A ceiling of 0, in a tensor that hardly changes, drops all but zeros.
                ceiling=max(1, selection.ceilings.get(task, {}).get(name, LARGEST + 1)) - 1,
                bound=bound(value_at(selection.densities.get(task, 1.0), name)),
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
