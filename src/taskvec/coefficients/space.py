"""The space that a study searches: axes, each λ or one parameter, over a range or among choices.

```text
scale=0:1.5                  λ of every task, one value for all
scale.math=0:1               λ of one task; it goes before the axis of all tasks
density=0.1:1:0.1            in steps
scheme=linear,logarithmic    among choices
method=lata,ties             a parameter is varied where the chosen method has it
```

A point of the space is a mapping from axis to value, and stands for a recipe.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.errors import ParameterError, RecipeError, UsageError, nearest
from taskvec.methods import find_method
from taskvec.methods.method import Method
from taskvec.recipes.located import Document, Key
from taskvec.recipes.overrides import with_overrides
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import Recipe

Value = str | float
Point = Mapping[str, Value]

SCALE, METHOD = "scale", "method"
DEFAULT_SCALES = (0.0, 1.5)  # of every task, where no axis is given
MOST_POINTS = 10_000  # of a grid
NO_SCALE = 0.5  # stands where the recipe gives no λ, which is then varied


@dataclass(frozen=True, slots=True)
class Axis:
    """What is varied, and where.

    Attributes:
        name: `scale`, `method`, or a parameter of a method.
        task: One task; None: every task that has no axis of its own.
        choices: Words or numbers; empty for a range.
        low: Least value of a range.
        high: Largest value of a range.
        step: Between values of a range; None: every number in it.
    """

    name: str
    task: str | None = None
    choices: tuple[Value, ...] = ()
    low: float = math.nan
    high: float = math.nan
    step: float | None = None

    @property
    def key(self) -> str:
        """As it is asked for: `scale` or `scale.math`."""
        return self.name if self.task is None else f"{self.name}.{self.task}"

    @property
    def count(self) -> float:
        """How many values there are."""
        if self.step is None:
            return len(self.choices) or math.inf
        return math.floor((self.high - self.low) / self.step + 1e-9) + 1

    @property
    def values(self) -> tuple[Value, ...] | None:
        """Every value, where they can be counted."""
        if self.step is None:
            return self.choices or None
        return tuple(round(self.low + i * self.step, 12) for i in range(int(self.count)))

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that show whether all are allowed."""
        return self.choices or (self.low, self.high)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}={','.join(map(_text, self.choices))}"
        step = "" if self.step is None else f":{self.step:g}"
        return f"{self.key}={self.low:g}:{self.high:g}{step}"

    def holds(self, value: object) -> bool:
        """Whether it has this value."""
        if self.values is not None:
            return value in self.values
        return isinstance(value, (int, float)) and self.low <= value <= self.high


def _text(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def parse_axis(text: str) -> Axis:
    """An axis as it is asked for.

    Raises:
        UsageError: it is not an axis.

    >>> parse_axis("scale.math=0:1"), parse_axis("density=0.1:1:0.3").values
    (Axis(name='scale', task='math', choices=(), low=0.0, high=1.0, step=None), \
(0.1, 0.4, 0.7, 1.0))
    """
    key, equals, values = text.partition("=")
    name, _, task = key.strip().partition(".")
    if not equals or not name or not values.strip():
        raise UsageError(f"--vary must be NAME=LOW:HIGH[:STEP] or NAME=ONE,OTHER,…; got {text!r}")
    about: dict[str, Any] = {"name": name, "task": task or None}
    if ":" not in values:
        words = tuple(_value(word.strip()) for word in values.split(",") if word.strip())
        if len(set(words)) < len(words) or len(words) < 2:
            raise UsageError(f"--vary {key}: needs two or more values, each once; got {values!r}")
        return Axis(**about, choices=words)
    numbers = [_value(part.strip()) for part in values.split(":")]
    if len(numbers) not in (2, 3) or any(isinstance(number, str) for number in numbers):
        raise UsageError(f"--vary {key}: a range is LOW:HIGH or LOW:HIGH:STEP; got {values!r}")
    low, high, *step = (float(number) for number in numbers)
    if not low < high or (step and not 0 < step[0] <= (high - low) * (1 + 1e-9)):
        raise UsageError(
            f"--vary {key}: LOW must be below HIGH, and STEP from above 0 to the range; "
            f"got {values!r}"
        )
    return Axis(**about, low=low, high=high, step=step[0] if step else None)


def _value(text: str) -> Value:
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched. Use `make_space`, which checks it.

    Attributes:
        recipe: As it was given; scales that it lacks are varied.
        axes: What is varied.
        data: The recipe as a mapping that `read_recipe` takes.
    """

    recipe: Recipe
    axes: tuple[Axis, ...]
    data: Mapping[str, Any]

    def choose(self, ask: Callable[[Axis], Value]) -> dict[str, Value]:
        """A point: the value that `ask` gives for every axis that the chosen method has."""
        point: dict[str, Value] = {}
        for axis in sorted(self.axes, key=lambda axis: axis.name != METHOD):
            if _applies(axis, find_method(point.get(METHOD, self.recipe.method.name))):
                point[axis.key] = ask(axis)
        return point

    def points(self) -> Iterator[dict[str, Value]]:
        """Every point, each once; the axes must have values that can be counted."""
        seen = set()
        for values in itertools.product(*(axis.values or () for axis in self.axes)):
            by_key = dict(zip((axis.key for axis in self.axes), values, strict=True))
            point = self.choose(lambda axis, by_key=by_key: by_key[axis.key])  # type: ignore[misc]
            if (key := tuple(sorted(point.items()))) not in seen:
                seen.add(key)
                yield point

    @property
    def size(self) -> float:
        """How many points there are, those of a grid with axes that do not apply counted more."""
        return math.prod(axis.count for axis in self.axes)

    @property
    def given(self) -> dict[str, Value] | None:
        """The point that stands for the recipe as it was given; None if there is none."""
        point = {}
        for axis in self.axes:
            if not _applies(axis, self.recipe.method):
                continue
            values = [_now(self.recipe, axis, task) for task in _tasks_of(axis, self)]
            if not values or values[0] is None or any(value != values[0] for value in values):
                return None
            if not axis.holds(values[0]):
                return None
            point[axis.key] = values[0]
        return point

    def mapping(self, point: Point) -> dict[str, Any]:
        """The recipe at a point, as a mapping."""
        values: dict[str | Key, object] = {}
        for axis in self.axes:
            if axis.key not in point:
                continue
            if axis.name == METHOD:
                values["method", "name"] = point[METHOD]
                continue
            for task in _tasks_of(axis, self):
                key = ("tasks", task, axis.name)
                by_layer = isinstance(self.data["tasks"][task].get(axis.name), dict)
                values[(*key, "times") if by_layer else key] = point[axis.key]
        data: dict[str, Any] = with_overrides(Document(dict(self.data), ""), values).data
        return data

    def recipe_at(self, point: Point) -> Recipe:
        """The recipe at a point.

        Raises:
            RecipeError: its values do not go together.
        """
        document = Document(self.mapping(point), "the candidate")
        return read_recipe(document, Path.cwd()).with_models(self.recipe.family)


def _applies(axis: Axis, method: Method) -> bool:
    """Whether the method has what the axis varies."""
    return axis.name in (SCALE, METHOD) or axis.name in {p.name for p in method.parameters}


def _tasks_of(axis: Axis, space: Space) -> list[str]:
    """The tasks that an axis is for."""
    if axis.name == METHOD:
        return [next(iter(space.recipe.family.tasks))]
    if axis.task is not None:
        return [axis.task]
    own = {other.task for other in space.axes if other.name == axis.name}
    return [task for task in space.recipe.family.tasks if task not in own]


def _now(recipe: Recipe, axis: Axis, task: str) -> Any:
    """The value of an axis in a recipe."""
    if axis.name == METHOD:
        return recipe.method.name
    if axis.name == SCALE:
        return recipe.scales.get(task)
    return recipe.parameters[task][axis.name]


def default_axes(recipe: Recipe) -> list[Axis]:
    """λ of every task, each by itself."""
    low, high = DEFAULT_SCALES
    return [Axis(SCALE, task, low=low, high=high) for task in sorted(recipe.family.tasks)]


def make_space(recipe: Recipe, axes: Sequence[Axis]) -> Space:
    """The space of a recipe over some axes, checked against what the methods declare.

    Args:
        recipe: Its scales may be missing where they are varied.
        axes: What is varied; none: λ of every task over `DEFAULT_SCALES`.

    Raises:
        ParameterError: a value is outside the declared range.
        UsageError: an axis is of nothing that is there, or cannot be varied.
    """
    _check_members(recipe)
    axes = tuple(axes) or tuple(default_axes(recipe))
    methods = _methods(recipe, axes)
    for axis in axes:
        _check_axis(axis, axes, recipe, methods)
    _check_scales(axes, recipe)
    scales = dict.fromkeys(recipe.tasks, NO_SCALE) | recipe.scales
    return Space(recipe, axes, recipe.with_scales(scales).to_dict())


def _check_members(recipe: Recipe) -> None:
    if recipe.stages:
        raise UsageError("a recipe with stages cannot be searched; merge the stages into folders")
    if not recipe.method.takes_tasks:
        raise UsageError(f"{recipe.method.name} takes no tasks; there is nothing to search")
    family = recipe.family
    roles = {"base": family.base, "instruct": family.start, "target": family.target}
    for role, member in {**roles, **family.models}.items():
        if member is not None and not isinstance(member, (str, os.PathLike)):
            raise UsageError(
                f"{role} is not in a folder or on the hub, and the recipe that is found could "
                "not name it; write it to a folder first"
            )


def _methods(recipe: Recipe, axes: Sequence[Axis]) -> list[Method]:
    """The methods that can be chosen."""
    chosen = next((axis.choices for axis in axes if axis.name == METHOD), (recipe.method.name,))
    try:
        methods = [find_method(name) for name in chosen]
    except ParameterError as error:
        raise UsageError(f"--vary method: {error}") from error
    for method in methods:
        if not method.takes_tasks:
            raise UsageError(f"--vary method: {method.name} takes no tasks")
    return methods


def _check_axis(
    axis: Axis, axes: Sequence[Axis], recipe: Recipe, methods: Sequence[Method]
) -> None:
    if sum(other.key == axis.key for other in axes) > 1:
        raise UsageError(f"--vary {axis.key} is given twice")
    if axis.task is not None and (axis.name == METHOD or axis.task not in recipe.family.tasks):
        hint = nearest(axis.task, list(recipe.family.tasks))
        raise UsageError(f"--vary {axis.key}: there is no task {axis.task!r}; {hint}")
    if axis.name == METHOD:
        return
    own = {other.task for other in axes if other.name == axis.name}
    if axis.task is None and own >= recipe.family.tasks.keys():
        raise UsageError(f"--vary {axis.key}: every task has an axis of its own; leave this out")
    if axis.name == SCALE:
        _check_scale(axis, methods)
        return
    having = [method for method in methods if _applies(axis, method)]
    if not having:
        known = sorted({p.name for method in methods for p in method.parameters} | {SCALE, METHOD})
        names = ", ".join(method.name for method in methods)
        raise UsageError(
            f"--vary {axis.key}: {names} has no {axis.name}; {nearest(axis.name, known)}"
        )
    for method in having:
        (parameter,) = [p for p in method.parameters if p.name == axis.name]
        for end in axis.ends:
            try:
                parameter.check(end, method.name)
            except ParameterError as error:
                raise ParameterError(f"--vary {axis.key}: {error}") from error
        if parameter.choices and not axis.choices:
            raise ParameterError(f"--vary {axis.key}: must be some of {parameter.range}")
    for task in recipe.family.tasks if axis.task is None else [axis.task]:
        if not isinstance(recipe.parameters[task].get(axis.name, 0.0), (str, float, int)):
            raise UsageError(
                f"--vary {axis.key}: {axis.name} of task {task!r} differs by layer in the recipe; "
                "give it one number there"
            )


def _check_scale(axis: Axis, methods: Sequence[Method]) -> None:
    for end in axis.ends:
        if isinstance(end, str):
            raise UsageError(f"--vary {axis.key}: λ must be a number; got {end!r}")
        for method in methods:
            if end < 0 and not method.takes_negative_scale:
                raise ParameterError(
                    f"--vary {axis.key}: {method.name} takes no negative scale; got {end:g}"
                )


def _check_scales(axes: Sequence[Axis], recipe: Recipe) -> None:
    varied = {axis.task for axis in axes if axis.name == SCALE}
    for task in sorted(recipe.family.tasks):
        if task not in recipe.scales and not varied & {None, task}:
            raise RecipeError(
                f"scale of task {task!r} is missing; give it in the recipe, or --vary scale.{task}"
            )
