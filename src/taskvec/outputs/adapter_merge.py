"""The result of a recipe as a LoRA adapter over its target: what it holds, costs, and replays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from taskvec.checkpoints.adapter_changes import difference
from taskvec.checkpoints.adapters import open_adapter
from taskvec.checkpoints.factored import FactorStack
from taskvec.checkpoints.naming import display_name
from taskvec.checkpoints.source import Derived, Source, widened
from taskvec.checkpoints.views import size
from taskvec.dtypes import DTYPES, FLOATS
from taskvec.errors import UsageError
from taskvec.family.vocabulary import token_metadata
from taskvec.merging.apply import Nowhere, Record, apply_edits
from taskvec.merging.changes import changes, differing
from taskvec.merging.edits import Edit
from taskvec.merging.stages import StageSource
from taskvec.merging.steps import Decided, Prepared
from taskvec.outputs.adapter import AdapterShape, Change, kinds_of, read_difference
from taskvec.recipes.recipe import Recipe


def adapter_shape(recipe: Recipe) -> AdapterShape:
    """What adapter a recipe asks for."""
    out = recipe.out
    return AdapterShape(
        rank=out.rank,
        rest=out.rest,
        seed=recipe.seed,
        dtype=FLOATS[out.dtype] if out.dtype is not None else DTYPES["F32"],
        stacks=True,
    )


def change_of(decided: Decided) -> Change:
    """What a merge changes in its target.

    Tensors that are no stack of factors are compared with the target, and left out where they do
    not differ; whole numbers that differ are an error, as in every merge.

    Raises:
        UsageError: the target is not stored as it is, so that no adapter can be put over it.
        FamilyError: tensors of whole numbers differ.
    """
    prepared = decided.prepared
    recipe, members, options = prepared.recipe, prepared.members, prepared.options
    _check_target(members.target)
    edits = decided.edits
    apply_edits([edit for edit in edits.values() if edit.must_equal], Nowhere(), options)
    differences = changes(edits.values(), members.target, options.precision)
    found = _change(prepared, edits, sorted(differences, key=_name))
    kinds = kinds_of(found, adapter_shape(recipe))
    stacked = {name for name, kind in kinds.items() if isinstance(kind, FactorStack)}
    differ = differing([edit for edit in found.edits if edit.name not in stacked], options)
    kept = stacked | differ
    return replace(found, edits=tuple(edit for edit in found.edits if edit.name in kept))


def _name(edit: Edit) -> str:
    return edit.name


def _change(prepared: Prepared, edits: Mapping[str, Edit], differences: list[Edit]) -> Change:
    members, recipe = prepared.members, prepared.recipe
    metadata = {
        "taskvec_version": version("taskvec"),
        "what": "merge",
        "method": recipe.method.name,
        "anchor": display_name(members.target),
        **token_metadata(members.target)[0],
    }
    return Change(
        name="merge",
        members=members,
        over="target",
        edits=tuple(differences),
        whole=lambda edit: replace(edits[edit.name], dtype=edit.dtype),
        metadata=metadata,
        published=recipe.published,
    )


def _check_target(target: Source) -> None:
    source = target
    while source.parts:
        if isinstance(source, StageSource) or (
            isinstance(source, Derived) and source.how == "added"
        ):
            raise UsageError(
                f"{target.where}: the target is not a model that is stored, so that no adapter can "
                "be put over it; write the target first, or remove form: lora"
            )
        source = source.parts[0]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter will hold, known from headers: at the most, as some changes may be zero.

    Attributes:
        matrices: How many weights get factors.
        lowest: Their smallest rank.
        highest: Their largest rank.
        nbytes: Size of the factors.
        whole: Tensors that have no place in B A, if they differ.
    """

    matrices: int
    lowest: int
    highest: int
    nbytes: int
    whole: tuple[str, ...]


def plan_adapter(prepared: Prepared) -> AdapterPlan:
    """See `AdapterPlan`."""
    recipe, members = prepared.recipe, prepared.members
    _check_target(members.target)
    shape, method = adapter_shape(recipe), recipe.method
    is_linear = not method.sparsifies and method.combine is None and method.needs_anchor
    edits = []
    for name in members.merged:
        roles = [f"task:{task}" for task in members.tasks if members.has(f"task:{task}", name)]
        if roles:
            factor = 0.0 if is_linear else 1.0  # anything but 0: no stack
            views = members.views(name, ["target", *roles])
            terms = dict.fromkeys(roles, 1.0)
            edits.append(Edit(name, DTYPES["F32"], views, terms, target_factor=factor))
    kinds = kinds_of(_change(prepared, {}, edits), shape, reads=False)
    ranks, nbytes = [], 0
    for edit in edits:
        kind = kinds[edit.name]
        if kind is None:
            continue
        rows = edit.like.shape[0]
        columns = math.prod(edit.like.shape[1:])
        rank = min(rows, columns) if isinstance(kind, str) else kind.rank
        ranks.append(rank if shape.rank is None else min(rank, shape.rank))
        nbytes += ranks[-1] * (rows + columns) * shape.dtype.itemsize
    whole = tuple(name for name, kind in kinds.items() if kind is None)
    if not ranks:
        return AdapterPlan(0, 0, 0, 0, whole)
    return AdapterPlan(len(ranks), min(ranks), max(ranks), nbytes, whole)


def replay_adapter(decided: Decided, folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is not as a manifest says: differences worked out again, and how near the adapter is.

    Differences must have the same bits. Factors of a singular value decomposition need not, on
    another machine; the adapter that is there must be as near to the difference as is said.

    Returns:
        Names of the tensors.
    """
    known = manifest["adapter"]
    model = decided.prepared.members.target
    opened = open_adapter(folder)
    # What is saved whole is not compared, and need not fit: a tied head, rows that were added.
    adapter = difference(opened, model, exclude=tuple(opened.whole))
    errors = {row["name"]: row for row in known["tensors"]}
    wrong = []
    change = change_of(decided)
    for edit in change.edits:
        records: dict[str, Record] = {}
        tau = read_difference(edit, decided.prepared.options, records).reshape(-1)
        is_same = records[edit.name]["output"] == known["differences"].get(edit.name)
        row = errors.get(edit.name)
        if is_same and row is not None and row["kept"] in ("stacked", "lora"):
            view = adapter.view(edit.name)
            lost = tau - widened(view.read(0, size(view)), view.dtype)
            error = math.sqrt(float((lost.astype("f8") ** 2).sum())) / row["norm"]
            is_same = abs(error - row["error"]) <= 1e-6 + 1e-3 * row["error"]
        if not is_same:
            wrong.append(edit.name)
    return wrong
