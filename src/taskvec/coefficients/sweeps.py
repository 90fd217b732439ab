"""Sweeps: one number of a recipe, set to one value after another."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal

import numpy as np

from taskvec.errors import UsageError, nearest
from taskvec.methods.parameters import Parameter
from taskvec.recipes.recipe import Recipe

MOST_VALUES = 1000
SCALE = "scale"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
FORM = "FROM:TO:STEP, FROM:TO:COUNTlog or a list V1,V2,…"


@dataclass(frozen=True, slots=True)
class Sweep:
    """One number of a recipe, and the values that it takes.

    Attributes:
        name: `scale`, or a parameter of the recipe's method or of its layer weights.
        values: In the order given.
        task: The one task whose number it is; None: that of every task.
    """

    name: str
    values: tuple[float, ...]
    task: str | None = None

    @property
    def label(self) -> str:
        """As it is asked for, without values."""
        return self.name if self.task is None else f"{self.name}.{self.task}"


def parse_sweep(text: str) -> Sweep:
    """A sweep as the command line has it.

    Args:
        text: `NAME=VALUES` or `NAME.TASK=VALUES`; see `parse_values`.

    Raises:
        UsageError: it is neither.

    >>> parse_sweep("threshold=0.9:1:0.05")
    Sweep(name='threshold', values=(0.9, 0.95, 1.0), task=None)
    >>> parse_sweep("scale.math=0.5,1").task
    'math'
    """
    label, equals, values = text.partition("=")
    name, dot, task = label.partition(".")
    if not equals or not name or (dot and not task):
        raise UsageError(f"a sweep must be NAME=VALUES or NAME.TASK=VALUES; got {text!r}")
    return Sweep(name, parse_values(values), task or None)


def parse_values(text: str) -> tuple[float, ...]:
    """Values as the command line has them, both ends included.

    Args:
        text: `FROM:TO:STEP` (FROM, FROM + STEP, … up to TO), `FROM:TO:COUNTlog` (COUNT values of
            equal ratio, rounded to 6 digits) or a list with commas.

    Raises:
        UsageError: anything else, values twice, or more than 1,000.

    >>> parse_values("0.5:0.8:0.1"), parse_values("0.001:1:4log"), parse_values("0.2,1")
    ((0.5, 0.6, 0.7, 0.8), (0.001, 0.01, 0.1, 1.0), (0.2, 1.0))
    """
    if match := re.fullmatch(rf"({NUMBER}):({NUMBER}):({NUMBER})", text):
        found = _steps(text, *map(Decimal, match.groups()))
    elif match := re.fullmatch(rf"({NUMBER}):({NUMBER}):(\d+)log", text):
        found = _logarithmic(text, float(match[1]), float(match[2]), int(match[3]))
    elif re.fullmatch(rf"{NUMBER}(,{NUMBER})*", text):
        found = tuple(map(float, text.split(",")))
    else:
        raise UsageError(f"values must be {FORM}; got {text!r}")
    if not np.isfinite(found).all():
        raise UsageError(f"values must be finite; got {text!r}")
    if len(set(found)) < len(found):
        raise UsageError(f"values must differ; {text!r} has one twice")
    return found


def _steps(text: str, first: Decimal, last: Decimal, step: Decimal) -> tuple[float, ...]:
    if step == 0 or (last - first) / step < 0:
        raise UsageError(f"values {text!r}: STEP must lead from FROM to TO; got {step}")
    count = int((last - first) / step) + 1
    _check_count(text, count)
    return tuple(float(first + i * step) for i in range(count))


def _logarithmic(text: str, first: float, last: float, count: int) -> tuple[float, ...]:
    if not (first > 0 and last > 0 and first != last and count >= 2):
        raise UsageError(
            f"values {text!r}: FROM and TO must be above 0 and differ, COUNT must be 2 or more"
        )
    _check_count(text, count)
    inner = np.geomspace(first, last, count)[1:-1]
    return (first, *(float(f"{value:.6g}") for value in inner), last)


def _check_count(text: str, count: int) -> None:
    if count > MOST_VALUES:
        raise UsageError(f"values {text!r} are {count:,}; give at most {MOST_VALUES:,}")


def set_value(recipe: Recipe, sweep: Sweep, value: float) -> Recipe:
    """The recipe with one value of a sweep.

    `scale` sets λ of every task, or of the one that the sweep names; where λ differs by layer, the
    factor `times` of it.

    Raises:
        UsageError: the recipe has no such number or no such task, or the number has no say in it.
        ParameterError: the value is outside its range.
    """
    tasks = tuple(recipe.family.tasks) if sweep.task is None else (sweep.task,)
    unknown = [task for task in tasks if task not in recipe.family.tasks]
    if unknown or not tasks:
        known = nearest(sweep.task or "", list(recipe.family.tasks))
        raise UsageError(f"sweep of {sweep.label}: the recipe has no task {sweep.task!r}; {known}")
    if sweep.name == SCALE:
        if value < 0 and not recipe.method.takes_negative_scale:
            raise UsageError(f"{recipe.method.name} takes no negative scale; got {value:g}")
        return recipe.with_scales(dict.fromkeys(tasks, value))
    owner, parameter = owner_of(recipe, sweep)
    for task in tasks:
        scheme = owner.parameters[task].get("scheme")
        if (owner.method.name, sweep.name) == ("lata", "threshold") and scheme != "threshold":
            raise UsageError(
                f"threshold has no effect in scheme {scheme!r} of task {task!r}; "
                "set scheme: threshold"
            )
    number = parameter.check(value, owner.method.name)
    chosen = recipe.layer_weights
    if chosen is not None and owner.method is chosen.method:
        parameters = {**chosen.parameters, sweep.name: number}
        return replace(recipe, layer_weights=replace(chosen, parameters=parameters))
    return recipe.with_tasks(
        {t: {"parameters": {**recipe.tasks[t].parameters, sweep.name: number}} for t in tasks}
    )


def owner_of(recipe: Recipe, sweep: Sweep) -> tuple[Recipe, Parameter]:
    """The recipe whose method has the parameter: the recipe itself, or what weighs its layers."""
    known: list[str] = [SCALE]
    owners = (recipe,) if recipe.layer_weights is None else (recipe, recipe.weigher)
    for owner in owners:
        for parameter in owner.method.parameters:
            if parameter.choices:
                continue
            known.append(parameter.name)
            if parameter.name != sweep.name:
                continue
            if owner is not recipe and sweep.task is not None:
                raise UsageError(
                    f"{sweep.name} of layer_weights is the same for all tasks; sweep {sweep.name}"
                )
            return owner, parameter
    raise UsageError(
        f"{recipe.method.name} has no number {sweep.name!r} to sweep; {nearest(sweep.name, known)}"
    )
