"""What a method is: a declaration, and a pure function from statistics to a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.parameters import Parameter, Resolved, Values
from taskvec.methods.selection import Selection
from taskvec.methods.table import Table
from taskvec.statistics.scan import Scan

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input of `decide`.

    Attributes:
        tasks: Task names, sorted.
        names: Floating-point tensors that are merged, sorted.
        scales: λ_t by task.
        parameters: Every declared parameter of each task; `Values` if it may differ by layer.
        scan: Statistics of the weights; None if the method does not need them.
        table: Given layer weights, for a method that sparsifies; None for 1 everywhere.
        seed: For methods that draw random numbers.
        passes: Results of further collecting passes, in the order in which `decide` requested them.
        profile: Factor of λ_t for each tensor, shape (tasks, names); None for 1.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    scales: Mapping[str, float]
    parameters: Mapping[str, Resolved]
    scan: Scan | None = None
    table: Table | None = None
    seed: int = 0
    passes: tuple[object, ...] = ()
    profile: Array | None = None

    @property
    def layer_scales(self) -> Array:
        """λ_t of every tensor, shape (tasks, names)."""
        scales = np.array([self.scales[task] for task in self.tasks]).reshape(-1, 1)
        ones = np.ones((len(self.tasks), len(self.names)))
        found: Array = scales * (ones if self.profile is None else self.profile)
        return found

    def common(self, name: str) -> Any:
        """The value of a parameter that cannot differ between tasks.

        Raises:
            ParameterError: the tasks have different values.
        """
        values = {task: self.parameters[task][name] for task in self.tasks}
        first = values[self.tasks[0]]
        if any(value != first for value in values.values()):
            words = {t: "by layer" if isinstance(v, Mapping) else v for t, v in values.items()}
            listed = ", ".join(f"{task} {word}" for task, word in words.items())
            raise ParameterError(f"{name} must be the same for all tasks; got {listed}")
        return first

    def layer_weights(self) -> Table:
        """The given table, or weight 1 for every task and tensor."""
        if self.table is not None:
            return self.table
        ones = np.ones((len(self.tasks), len(self.names)))
        return Table(self.tasks, self.names, ones, origin="")


# Statistics that `decide` may ask for, and how often anchor and tasks are read for each.
READINGS = {"products": "once", "thresholds": "2 or 3 times", "masked_sums": "once",
            "masked_sums_by_rank": "once", "competition": "6 to 8 times"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Need:
    """A request of `decide` for one more collecting pass, under the table made so far.

    Attributes:
        statistic: Which collector to run, one of `READINGS`.
        table: Weights under which the statistic is collected.
        densities: Share of entries to keep, by task; one number for each task if entries are ranked
            over the whole model.
        scope: Whether entries are ranked within a `tensor` or over the whole `model`.
        epsilons: Difference in probability between the largest and the smallest entry of a row, by
            task, for `masked_sums_by_rank`.
    """

    statistic: str
    table: Table
    densities: Mapping[str, Values] = field(default_factory=dict)
    scope: str = "model"
    epsilons: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Block:
    """Elements of one tensor, as a method's own `combine` sees them.

    With the alignment `element` the shape is (n,). With `row` it is (rows, columns), with whole
    rows (the last dimension; a vector is one row). With `tensor` it is the tensor's own. The dtype
    is float32, or float64 if precision or a member is float64.

    Attributes:
        name: Name of the tensor.
        target: θ_target.
        vectors: w_t τ_t of every task in the order of `tasks`, shape (K, …); w_t θ_ft,t if the
            method needs no anchor. A task that does not change the tensor has zeros.
        tasks: Task names, sorted.
        scales: λ_t, shape (K,), of the same type.
        parameters: Every declared parameter of each task, as it is in this tensor.
        seed: For methods that draw random numbers.
        start: Index of the first element in the tensor.
        has_anchor: Whether the vectors are w_t τ_t; if not, they are w_t θ_ft,t.
        selection: The selection of the table that `decide` returned.
    """

    name: str
    target: Array
    vectors: Array
    tasks: tuple[str, ...]
    scales: Array
    parameters: Mapping[str, Resolved]
    seed: int = 0
    start: int = 0
    has_anchor: bool = True
    selection: Selection | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """The declaration of a merge method.

    Attributes:
        name: As in the recipe.
        summary: One line.
        source: The paper or documentation that it follows.
        formula: The merged model, in the symbols of DESIGN §1.
        decide: Statistics and parameters → table, or a request for one more pass.
        parameters: Its parameters, which can be set for all tasks or for one.
        needs_scan: Whether it uses statistics of the weights.
        needs_base: Whether it needs the model before instruction tuning.
        needs_anchor: Whether it works on task vectors; if not, on the task models themselves.
        takes_anchor: Whether it works on task vectors if there is an anchor, but does not need one.
        default_scale: λ if the recipe gives none; None if λ is required.
        takes_negative_scale: Whether a task can be subtracted.
        takes_tasks: Whether the recipe may name tasks.
        takes_table: Whether a given table can replace `decide` or, if the method sparsifies, be its
            layer weights.
        sparsifies: Whether it keeps only part of the vectors, or elects signs.
        combine: From one block to the merged block, with the shape of `Block.target`; the table of
            `decide` then has the weights w_t. None if the table is the whole result.
        alignment: What `combine` must see at once: `element`, `row` or `tensor`; a parameter may
            require more.
    """

    name: str
    summary: str
    source: str
    formula: str
    decide: Callable[[Inputs], Table | Need]
    parameters: tuple[Parameter, ...] = ()
    needs_scan: bool = False
    needs_base: bool = False
    needs_anchor: bool = True
    takes_anchor: bool = False
    default_scale: float | None = None
    takes_negative_scale: bool = True
    takes_tasks: bool = True
    takes_table: bool = True
    sparsifies: bool = False
    combine: Callable[[Block], Array] | None = None
    alignment: str = "element"

    def seen_at_once(self, parameters: Mapping[str, Resolved]) -> str:
        """The alignment with these parameters, by task."""
        whole = {p.name: p.whole for p in self.parameters if p.whole}
        asked = any(mine[name] in whole[name] for mine in parameters.values() for name in whole)
        return "tensor" if asked else self.alignment
