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
    """What `decide` sees.

    Attributes:
        tasks: Task names, sorted.
        names: Floating-point tensors that are merged, sorted.
        scales: λ_t by task.
        parameters: Every declared parameter of each task; `Values` where it may differ by layer.
        scan: Statistics of the weights; None if the method does not ask for them.
        table: Layer weights made elsewhere, for a method that sparsifies; None for 1 everywhere.
        seed: For methods that draw random numbers.
        passes: What further collecting passes gave, in the order in which `decide` asked.
        profile: What λ_t is multiplied with for each tensor, shape (tasks, names); None for 1.
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
            ParameterError: it does.
        """
        values = {task: self.parameters[task][name] for task in self.tasks}
        first = values[self.tasks[0]]
        if any(value != first for value in values.values()):
            words = {t: "by layer" if isinstance(v, Mapping) else v for t, v in values.items()}
            told = ", ".join(f"{task} {word}" for task, word in words.items())
            raise ParameterError(f"{name} must be the same for all tasks; got {told}")
        return first

    def layer_weights(self) -> Table:
        """The table that was given, or weight 1 for every task and tensor."""
        if self.table is not None:
            return self.table
        return Table(self.tasks, self.names, np.ones((len(self.tasks), len(self.names))))


# Statistics that `decide` may ask for, and how often anchor and tasks are read for each.
READINGS = {"products": "once", "thresholds": "2 or 3 times", "kept": "once",
            "kept_by_rank": "once", "competition": "6 to 8 times"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Need:
    """`decide` asks for one more collecting pass, under the table it has made so far.

    Attributes:
        statistic: Which collector to run, one of `READINGS`.
        table: Weights under which the statistic is collected.
        densities: Share of entries that are to be kept by task; where entries are ranked over the
            whole model, one number each.
        scope: Whether entries are ranked within a `tensor` or over the whole `model`.
        epsilons: How much likelier the largest entry of a row is kept, by task, for `kept_by_rank`.
    """

    statistic: str
    table: Table
    densities: Mapping[str, Values] = field(default_factory=dict)
    scope: str = "model"
    epsilons: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Block:
    """Elements of one tensor, as a method's own `combine` sees them.

    Their shape is (n,) where the method's alignment is `element`, (rows, columns) with whole rows
    (the last dimension; a vector is one row) where it is `row`, the tensor's own where it is
    `tensor`. They are float32, or float64 where precision or a member is that.

    Attributes:
        name: Name of the tensor.
        target: θ_target.
        vectors: w_t τ_t of every task in the order of `tasks`, shape (K, …); w_t θ_ft,t where the
            method needs no anchor. A task that does not change the tensor has zeros.
        tasks: Task names, sorted.
        scales: λ_t, shape (K,), of the same type.
        parameters: Every declared parameter of each task, as it is in this tensor.
        seed: For methods that draw random numbers.
        start: Which element of the tensor is the first.
        has_anchor: Whether the vectors are w_t τ_t; if not, they are w_t θ_ft,t.
        selection: That of the table that `decide` gave.
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
    """One way of deciding what becomes of each tensor.

    Attributes:
        name: As in the recipe.
        summary: One line.
        source: Paper or documentation that it follows.
        formula: The merged model, in the symbols of DESIGN §1.
        decide: Statistics and parameters → table, or a request for one more pass.
        parameters: What can be set, for all tasks or for one.
        needs_scan: Whether it rests on statistics of the weights.
        needs_base: Whether it needs the model before instruction tuning.
        needs_anchor: Whether it works on task vectors; if not, on the task models themselves.
        takes_anchor: Whether it works on task vectors where there is an anchor, but needs none.
        default_scale: λ where the recipe gives none; None if it must be given.
        takes_negative_scale: Whether a task can be subtracted.
        takes_tasks: Whether there is anything to add; if not, the recipe may name no task.
        takes_table: Whether a table made elsewhere can take the place of `decide`, or, where the
            method sparsifies, be what it weighs layers by.
        sparsifies: Whether it keeps part of the vectors only, or elects signs.
        combine: How one block becomes the merged block, of the shape of `Block.target`; None: the
            table says it all. The table that `decide` gives then has the weights w_t.
        alignment: What `combine` must see at once: `element`, `row` or `tensor`; a parameter may
            ask for more.
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
        """The alignment under these parameters, by task."""
        whole = {p.name: p.whole for p in self.parameters if p.whole}
        asked = any(mine[name] in whole[name] for mine in parameters.values() for name in whole)
        return "tensor" if asked else self.alignment
