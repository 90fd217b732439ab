"""What a method is: a declaration, and a pure function from statistics to a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from taskvec.methods.parameters import Parameter, Resolved
from taskvec.methods.table import Table
from taskvec.statistics.scan import Scan


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `decide` sees.

    Attributes:
        tasks: Task names, sorted.
        names: Floating-point tensors that are merged, sorted.
        scales: λ_t by task.
        parameters: Every declared parameter of each task.
        scan: Statistics of the weights; None if the method does not ask for them.
        passes: What further collecting passes gave, in the order in which `decide` asked.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    scales: Mapping[str, float]
    parameters: Mapping[str, Resolved]
    scan: Scan | None = None
    passes: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Need:
    """`decide` asks for one more collecting pass, under the table it has made so far.

    Attributes:
        statistic: Which collector to run; the engine knows them by name.
        table: Weights under which the statistic is collected.
    """

    statistic: str
    table: Table


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
        default_scale: λ where the recipe gives none; None if it must be given.
        takes_negative_scale: Whether a task can be subtracted.
        takes_tasks: Whether there is anything to add; if not, the recipe may name no task.
        takes_table: Whether a table made elsewhere can take the place of `decide`.
        alignment: What must be held at once: `element`, `row` or `matrix`.
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
    default_scale: float | None = None
    takes_negative_scale: bool = True
    takes_tasks: bool = True
    takes_table: bool = True
    alignment: str = "element"
