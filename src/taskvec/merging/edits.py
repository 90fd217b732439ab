"""Edits: what becomes of each tensor of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskvec.checkpoints.shards import Shard
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DType
from taskvec.family.members import Members
from taskvec.methods.method import Block
from taskvec.methods.parameters import Resolved, value_at
from taskvec.methods.selection import Selection, bound, mask_key
from taskvec.methods.table import Table
from taskvec.recipes.depth import by_tensor, factors
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import describe
from taskvec.statistics.trim import Threshold
from taskvec.streaming import CHUNK, row_step

Array = np.ndarray[Any, Any]

LARGEST = 0x7FFFFFFF  # bits of the largest magnitude
EVERYTHING = Threshold(0, 2**62)


@dataclass(frozen=True, slots=True)
class Voter:
    """One task in one tensor, where entries are selected.

    Attributes:
        weight: w_t.
        scale: λ_t · rescale_t.
        share: |λ_t|.
        threshold: Smallest magnitude that is kept.
        ceiling: Bits of the largest magnitude that is kept.
        bound: An entry is kept if its draw, in [0, 2^32), is below.
        key: What draws depend on besides the entry.
    """

    weight: float
    scale: float
    share: float
    threshold: Threshold
    ceiling: int
    bound: int
    key: int


@dataclass(frozen=True, slots=True)
class Election:
    """How the pure vectors of one tensor are sparsified and combined; see `kernels.elect`.

    Attributes:
        voters: In the order of the edit's terms.
        election: `none`, `mass` or `count`.
        merge: `sum`, `mean` or `weighted`.
    """

    voters: tuple[Voter, ...]
    election: str
    merge: str


@dataclass(frozen=True, slots=True)
class Combination:
    """A method's own `combine`, with its other arguments.

    Attributes:
        combine: See `Method`.
        alignment: See `Method`.
        weights: w_t by task, every task of the merge.
        scales: λ_t by task, in the same order.
        parameters: See `Block`.
        seed: See `Block`.
        selection: See `Block`.
    """

    combine: Callable[[Block], Array]
    alignment: str
    weights: Mapping[str, float]
    scales: Mapping[str, float]
    parameters: Mapping[str, Resolved]
    seed: int
    selection: Selection | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """What becomes of one tensor.

    Attributes:
        name: Parameter name.
        dtype: Element type of the result.
        views: Everything that is read, by role. The result starts from `target`, if that is there.
        terms: c_t by role of a task, each to be multiplied with the task's (vector or) tensor;
            empty: unchanged.
        target_factor: c_target.
        must_equal: Whether all views must hold the same elements (integers).
        expected: Digest that each view must have, where one is known.
        election: How entries are selected; None: `terms` are added as they are.
        combination: The method's own way; `terms` then only says which tasks are read.
        named: Members by role, for messages; those that are not in it go by their roles.
    """

    name: str
    dtype: DType
    views: Mapping[str, View]
    terms: Mapping[str, float] = field(default_factory=dict)
    target_factor: float = 1.0
    must_equal: bool = False
    expected: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    election: Election | None = None
    combination: Combination | None = None

    def who(self, role: str) -> str:
        """A member in words."""
        return self.named.get(role, describe(role))

    @property
    def like(self) -> View:
        """The view whose shape the result has."""
        return next(iter(self.views.values()))

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it; a view that two roles share counts once."""
        return size(self.like) * sum(view.dtype.itemsize for view in set(self.views.values()))

    @property
    def step(self) -> int:
        """What it may be cut at multiples of, in elements."""
        alignment = "element" if self.combination is None else self.combination.alignment
        if alignment == "element":
            return CHUNK
        if alignment == "row":
            return row_step(self.like.shape)
        return max(CHUNK, -(-size(self.like) // CHUNK) * CHUNK)


def make_edits(
    recipe: Recipe, members: Members, shards: Sequence[Shard], table: Table
) -> dict[str, Edit]:
    """What becomes of each tensor of the output, by name, in the order of the shards."""
    merge = _Merge(recipe, members, table)
    return {
        tensor.name: merge.edit(tensor.name, tensor.dtype)
        for shard in shards
        for tensor in shard.tensors
    }


class _Merge:
    """One merge, tensor by tensor."""

    def __init__(self, recipe: Recipe, members: Members, table: Table) -> None:
        self.recipe, self.members, self.table = recipe, members, table
        self.column = {name: i for i, name in enumerate(table.names)}
        self.scales = layer_scales(recipe, members, table)
        self.coefficients = (table.weights * self.scales).T.tolist()
        self.factors = table.target.tolist() if table.target is not None else None
        self.parameters = by_tensor(recipe.parameters, members.merged, members.keys)
        self.merged, self.equal = set(members.merged), set(members.equal)
        self.named = members.named
        self.weighed = [
            *(["anchor"] if recipe.needs_anchor else []),
            *(f"task:{task}" for task in table.tasks),
        ]
        self.same_as_anchor = members.sources.get("anchor") is members.target

    def edit(self, name: str, dtype: DType) -> Edit:
        """What becomes of one tensor."""
        members, table = self.members, self.table
        expected = {role: d[name] for role, d in table.digests.items() if name in d}
        if name not in self.merged:
            must_equal = name in self.equal
            others = members.sources if must_equal else ()
            views = members.views(name, dict.fromkeys(["target", *others]))
            return Edit(
                name, dtype, views, must_equal=must_equal, expected=expected, named=self.named
            )
        i = self.column[name]
        terms = {
            f"task:{task}": c
            for task, c in zip(table.tasks, self.coefficients[i], strict=True)
            if c != 0 and members.has(f"task:{task}", name)
        }
        if self.same_as_anchor and "anchor" in expected:
            expected["target"] = expected["anchor"]
        factor = self.factors[i] if self.factors is not None else 1.0
        roles = ["target"] if factor != 0 else []
        for role in self.weighed:  # what the result is made of, or what is not identified yet
            used = role in terms or (role == "anchor" and bool(terms))
            if used or role not in expected:
                roles.append(role)
        return Edit(
            name,
            dtype,
            members.views(name, roles),
            terms,
            factor,
            expected=expected,
            named=self.named,
            election=self._election(name, i, list(terms)),
            combination=self._combination(name, i) if terms else None,
        )

    def _combination(self, name: str, column: int) -> Combination | None:
        """What a method that combines blocks itself gets for one tensor."""
        method, table = self.recipe.method, self.table
        if method.combine is None:
            return None
        return Combination(
            method.combine,
            method.seen_at_once(self.recipe.parameters),
            dict(zip(table.tasks, table.weights[:, column].tolist(), strict=True)),
            dict(zip(table.tasks, self.scales[:, column].tolist(), strict=True)),
            {
                task: {k: value_at(v, name) for k, v in mine.items()}
                for task, mine in self.parameters.items()
            },
            self.recipe.seed,
            table.selection,
        )

    def _election(self, name: str, column: int, roles: Sequence[str]) -> Election | None:
        """What a table's selection is for one tensor, tasks in the order of the edit's terms."""
        table, selection = self.table, self.table.selection
        if selection is None or not roles:
            return None
        voters = []
        for role in roles:
            task = role.removeprefix("task:")
            i = table.tasks.index(task)
            scale = float(self.scales[i, column])
            voters.append(
                Voter(
                    weight=float(table.weights[i, column]),
                    scale=scale
                    * value_at(selection.rescale.get(task, 1.0), name)
                    * selection.factors.get(task, {}).get(name, 1.0),
                    share=abs(scale),
                    threshold=selection.thresholds.get(task, {}).get(name, EVERYTHING),
                    # A ceiling of 0, in a tensor that hardly changes, drops all but zeros.
                    ceiling=max(1, selection.ceilings.get(task, {}).get(name, LARGEST + 1)) - 1,
                    bound=bound(value_at(selection.densities.get(task, 1.0), name)),
                    key=mask_key(selection.seed, task, name),
                )
            )
        return Election(tuple(voters), selection.election, selection.merge)


def layer_scales(recipe: Recipe, members: Members, table: Table) -> Array:
    """λ_t of every task of a table for every tensor of it, shape (tasks, tensors)."""
    scales = np.array([recipe.scales[task] for task in table.tasks]).reshape(-1, 1)
    found: Array = scales * factors(recipe.profiles, table.tasks, table.names, members.keys)
    return found
