"""Tests that every merge method must pass; the tests of a method inherit them.

```python
from taskvec.testing import MethodConformance
from taskvec_bounded import METHOD


class TestBounded(MethodConformance):
    method = METHOD
```

pytest then runs every `test_…` of `MethodConformance` with that method, through the real engine on
small families in temporary folders: one, two and three tasks, every element type, tensors of odd
shapes, large float16 weights, tensors that no task changes. Nothing has to be installed as a
plugin, and nothing here needs pytest: the tests are methods without arguments that raise
`AssertionError`. taskvec's own methods pass the same tests.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from taskvec.checkpoints.source import widened
from taskvec.errors import OutputError, UsageError
from taskvec.merging.apply import InMemory, apply
from taskvec.merging.decide import decide
from taskvec.merging.prepare import prepare
from taskvec.methods import METHODS
from taskvec.methods.method import Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.plugins import flaw_of, guard
from taskvec.methods.table import load_table
from taskvec.outputs.run import run
from taskvec.outputs.verify import verify
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import Recipe
from taskvec.recipes.replay import read_manifest, recipe_of
from taskvec.streaming import BLOCK, CHUNK, RunOptions
from taskvec.testing.families import (
    FLOATS,
    STILL,
    TASKS,
    Array,
    Model,
    allowed_error,
    family,
    flat,
    read,
    stored_model,
)

__all__ = ["MethodConformance"]

OURS = dict(METHODS)
REFUSALS = (UsageError, OutputError)  # a crash inside a method is neither, see `guard`
OFF = RunOptions(cache="off", threads=1)
_NUMBERS: dict[tuple[Method, tuple[float, ...]], list[int]] = {}  # see `_numbers`
INFINITE = 1_000.0  # what stands for the end of a range that has none


def _promise(test: Callable[[MethodConformance], None]) -> Callable[[MethodConformance], None]:
    """A test with its method in place, or the check that a declared exception really fails."""

    @functools.wraps(test)
    def checked(self: MethodConformance) -> None:
        reason = self.does_not_hold.get(test.__name__)
        method = guard(self.method, "the package under test")
        with mock.patch.dict(METHODS, {method.name: method}), warnings.catch_warnings():
            warnings.simplefilter("error")  # a division by zero, for example
            try:
                test(self)
            except (AssertionError, *REFUSALS):
                if reason is None:
                    raise
                return
        if reason is not None:
            raise AssertionError(
                f"{self.method.name}: {test.__name__} is listed in does_not_hold ({reason}), but "
                "passes; remove it there"
            )

    return checked


@dataclass(frozen=True, slots=True)
class _Case:
    """How a recipe of a test differs.

    Attributes:
        scales: λ of each task; None for those of the method's tests.
        given: Parameters.
        models: Member that each task is.
        shapes: `odd` or `long`.
        target: Which member is edited.
        order: −1 reverses the tasks.
        renamed: Whether the tasks have each other's names.
        seed: See `Recipe`.
    """

    scales: tuple[float, ...] | None = None
    given: Mapping[str, object] = field(default_factory=dict)
    models: tuple[str, ...] = TASKS
    shapes: str = "odd"
    target: str = "anchor"
    order: int = 1
    renamed: bool = False
    seed: int = 0


class MethodConformance:
    """The tests; a subclass names the method and what it does not guarantee.

    Attributes:
        method: The method.
        scales: λ of up to three tasks, where a test does not choose its own.
        whole: Parameters at which nothing of a task is left out, so that one task at λ = 1 gives
            its fine-tune; a `density` is 1 there without being named.
        draws: Whether it draws random numbers by the recipe's seed.
        roundings: How many roundings of a tensor's largest entry its arithmetic may be off by.
        does_not_hold: By name of a test, why the method does not promise it. A test that holds all
            the same fails, so that nothing is excused without need.

    >>> class TestAdding(MethodConformance):
    ...     method = METHODS["task_arithmetic"]
    >>> TestAdding().test_order_of_tasks()
    >>> class TestExcused(TestAdding):
    ...     does_not_hold = {"test_order_of_tasks": "the first task leads"}
    >>> TestExcused().test_order_of_tasks()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: task_arithmetic: test_order_of_tasks is listed in does_not_hold (the ...
    """

    method: ClassVar[Method]
    scales: ClassVar[tuple[float, ...]] = (0.5, 0.4, 0.3)
    whole: ClassVar[Mapping[str, object]] = {}
    draws: ClassVar[bool] = False
    roundings: ClassVar[float] = 8
    does_not_hold: ClassVar[Mapping[str, str]] = {}

    @_promise
    def test_declaration(self) -> None:
        """It can be named in recipes, and is described in single lines."""
        flaw = flaw_of(self.method, self.method.name)
        self._hold(flaw is None, f"{flaw}")
        is_free = OURS.get(self.method.name, self.method) is self.method
        self._hold(is_free, "taskvec's own method has that name")

    @_promise
    def test_every_dtype_shape_and_number_of_tasks(self) -> None:
        """It runs, or refuses a number of tasks in one line; what no task changes stays."""
        numbers = self._numbers()
        for dtype in FLOATS:
            expected = read(dtype, "anchor")[STILL]
            for number in numbers:
                got = self._merged(self._recipe(dtype, number))[STILL]
                allowed = 0 if self.method.needs_anchor else allowed_error(expected, dtype, 8)
                self._close(got, expected, allowed, f"{dtype}, {number} tasks: {STILL!r}")

    @_promise
    def test_order_of_tasks(self) -> None:
        """The order in which a recipe names its tasks changes no bit."""
        for number in self._numbers():
            recipe = self._recipe("BF16", number)
            turned = self._recipe("BF16", number, order=-1)
            self._same(self._stored(recipe), self._stored(turned), f"{number} tasks turned round")

    @_promise
    def test_names_of_tasks(self) -> None:
        """Exchanging the names of tasks changes only rounding, except for a method that draws."""
        number = max(self._numbers())
        if self.draws or number < 2:
            return
        plain = self._merged(self._recipe("F64", number))
        named = self._merged(self._recipe("F64", number, renamed=True))
        for name, values in plain.items():
            allowed = allowed_error(values, "F64", 1e3 * self.roundings)
            self._close(named[name], values, allowed, f"tasks renamed: {name!r}")

    @_promise
    def test_threads_and_blocks(self) -> None:
        """How a tensor is cut and how many threads there are changes no bit."""
        recipe = self._recipe("BF16", max(self._numbers()), shapes="long")
        one = self._stored(recipe, RunOptions(cache="off", threads=1, block=BLOCK))
        other = self._stored(recipe, RunOptions(cache="off", threads=3, block=CHUNK))
        self._same(one, other, "three threads and small blocks (is its alignment right?)")

    @_promise
    def test_scale_zero(self) -> None:
        """λ = 0 leaves the target's bytes, if the method works on task vectors."""
        if not self.method.needs_anchor:
            return
        for number in self._numbers():
            for target in ("anchor", "base"):
                zero = (0.0,) * number
                recipe = self._recipe("F16", number, scales=zero, target=target)
                expected = {n: a.tobytes() for n, a in stored_model("F16", target).items()}
                self._same(self._stored(recipe), expected, f"λ = 0, {number} tasks")

    @_promise
    def test_degenerate_tasks_and_scales(self) -> None:
        """Tasks that cancel, have λ = 0 or change nothing: it runs or refuses."""
        number = max(self._numbers())
        cases: list[tuple[tuple[str, ...], tuple[float, ...]]] = [
            (TASKS, (0.5, 0.0, 0.3)),
            (TASKS, (1e-30, 1e-30, 1e-30)),
            (("a", "a", "a"), (0.5, 0.5, 0.5)),
        ]
        if self.method.takes_negative_scale:
            cases += [(TASKS, (0.5, -0.4, 0.3)), (("a", "a", "b"), (0.5, -0.5, 0.0))]
        for models, scales in cases:
            recipe = self._recipe("F16", number, models=models, scales=scales[:number])
            self._runs_or_refuses(recipe, f"{models[:number]} at λ = {scales[:number]}")
        still = self._recipe("F16", number, models=("anchor",) * 3)
        if self._runs_or_refuses(still, "tasks that change nothing") and self.method.needs_anchor:
            expected = {n: a.tobytes() for n, a in stored_model("F16", "anchor").items()}
            self._same(self._stored(still), expected, "tasks that change nothing")

    @_promise
    def test_one_task_at_scale_one(self) -> None:
        """One task at λ = 1, weight 1 and density 1 gives its fine-tune, within rounding."""
        if 1 not in self._numbers():
            return
        density = {p.name: 1 for p in self.method.parameters if p.name == "density"}
        for dtype in FLOATS:
            recipe = self._recipe(dtype, 1, scales=(1.0,), given={**density, **self.whole})
            got, expected = self._merged(recipe), read(dtype, "a")
            for name, values in expected.items():
                allowed = allowed_error(values, dtype, self.roundings)
                self._close(got[name], values, allowed, f"λ = 1, {dtype}: {name!r}")

    @_promise
    def test_negative_scale(self) -> None:
        """λ = −1 points against the task vectors, or is refused by name."""
        numbers = self._numbers()
        if not self.method.takes_tasks:
            return
        number = min(numbers)
        if not self.method.takes_negative_scale:
            try:
                self._recipe("F32", number, scales=(-1.0,) * number)
            except UsageError as error:
                claim = f"{self.method.name} takes no negative scale"
                self._hold(claim in str(error), f"refuses λ = −1 with: {error}")
                return
            self._hold(False, "accepts λ = −1, although takes_negative_scale is False")
        recipe = self._recipe("F32", number, scales=(-1.0,) * number)
        anchor, got = flat(read("F32", "anchor")), flat(self._merged(recipe))
        vector = sum(flat(read("F32", task)) - anchor for task in TASKS[:number])
        product = float((got - anchor) @ vector)
        self._hold(product < 0, f"λ = −1 of {number} tasks points along their vectors: {product:g}")

    @_promise
    def test_the_manifest_repeats_the_merge(self) -> None:
        """Table and recipe of the manifest give the same bits; so does a table that was saved."""
        recipe = self._recipe("BF16", max(self._numbers()))
        with tempfile.TemporaryDirectory(prefix="taskvec-testing-") as folder:
            out = Path(folder) / "out"
            table = run(recipe, out, OFF).table
            for check in verify(out, replay=True, threads=1):
                self._hold(check.outcome == "same", f"verify {check.what}: {check.detail}")
            first = self._stored(recipe)
            again = recipe_of(read_manifest(out), "manifest")
            self._same(self._stored(again), first, "replayed from the manifest")
            if self.method.takes_table:
                table.save(Path(folder) / "table.json")
                given = replace(recipe, table=load_table(Path(folder) / "table.json"))
                self._same(self._stored(given), first, "with its table saved")

    @_promise
    def test_ends_of_parameters(self) -> None:
        """Every parameter at both ends of its range, or at every word, runs or is refused."""
        number = max(self._numbers())
        for parameter in self.method.parameters:
            for value in _ends(parameter):
                recipe = self._recipe("F16", number, given={parameter.name: value})
                self._runs_or_refuses(recipe, f"{parameter.name} = {value}")

    @_promise
    def test_parameters_by_layer(self) -> None:
        """A parameter by layer that is the same everywhere changes no bit, or is refused."""
        number = max(self._numbers())
        plain = self._stored(self._recipe("BF16", number))
        for parameter in self.method.parameters:
            if not parameter.by_layer:
                continue
            everywhere = {"patterns": {"*": parameter.default}}
            recipe = self._recipe("BF16", number, given={parameter.name: everywhere})
            claim = f"{parameter.name} by layer, the same everywhere"
            if self._runs_or_refuses(recipe, claim):
                self._same(self._stored(recipe), plain, claim)

    @_promise
    def test_seed(self) -> None:
        """The same seed gives the same bits; another gives others if, and only if, it draws."""
        number = max(self._numbers())
        one, again, other = (
            self._stored(self._recipe("BF16", number, seed=seed)) for seed in (3, 3, 4)
        )
        self._same(again, one, "with the same seed")
        if self.draws:
            self._hold(other != one, "gives the same bits with another seed, and should draw")
        else:
            self._same(other, one, "with another seed; set draws = True if it draws")

    def _numbers(self) -> list[int]:
        """Numbers of tasks that it runs with; others must be refused in one line."""
        if not self.method.takes_tasks:
            return [0]
        if (self.method, self.scales) in _NUMBERS:
            return _NUMBERS[self.method, self.scales]
        found = []
        for number in (1, 2, 3):
            try:
                self._merged(self._recipe("BF16", number))
            except UsageError as error:
                self._hold(_is_one_line(str(error)), f"{number} tasks: {error}")
            else:
                found.append(number)
        self._hold(found != [], "runs with none of 1, 2 and 3 tasks")
        return _NUMBERS.setdefault((self.method, self.scales), found)

    def _recipe(self, dtype: str, number: int, **changes: Any) -> Recipe:
        """A recipe of the method for the first tasks of a family; see `_Case`."""
        case, names = _Case(**changes), TASKS[:number]
        folder = family(dtype, case.shapes)
        tasks = {
            name: {"model": str(folder / model), "scale": scale}
            for name, model, scale in zip(
                reversed(names) if case.renamed else names,
                case.models[:number],
                case.scales or self.scales[:number],
                strict=True,
            )
        }
        data = {
            "base": str(folder / "base"),
            "instruct": str(folder / "anchor"),
            "target": str(folder / case.target),
            "tasks": dict(list(tasks.items())[:: case.order]),
            "method": {"name": self.method.name, **case.given},
            "seed": case.seed,
        }
        if not tasks:
            del data["tasks"]
        return read_recipe(Document(data, "conformance"), Path("/"))

    def _stored(self, recipe: Recipe, options: RunOptions = OFF) -> dict[str, bytes]:
        """Stored bytes of the merge by tensor."""
        return {name: array.tobytes() for name, array in _work_out(recipe, options).items()}

    def _merged(self, recipe: Recipe) -> Model:
        """Values of the merge by tensor, float64; all are finite."""
        stored = _work_out(recipe, OFF)
        kinds = prepare(recipe).members.target.tensors
        found = {n: widened(a, kinds[n].dtype).astype(np.float64) for n, a in stored.items()}
        for name, values in found.items():
            self._hold(bool(np.isfinite(values).all()), f"{name!r} is not finite")
        return found

    def _runs_or_refuses(self, recipe: Recipe, claim: str) -> bool:
        """Whether it runs; if not, the error must be one line."""
        try:
            self._merged(recipe)
        except REFUSALS as error:
            is_one_line = _is_one_line(str(error))
            self._hold(is_one_line, f"{claim} is refused in more than one line: {error}")
            return False
        return True

    def _hold(self, condition: bool, claim: str) -> None:
        if not condition:
            raise AssertionError(f"{self.method.name}: {claim}")

    def _same(self, got: Mapping[str, bytes], expected: Mapping[str, bytes], claim: str) -> None:
        wrong = [name for name in expected if got[name] != expected[name]]
        self._hold(not wrong, f"other bits in {', '.join(wrong)}: {claim}")

    def _close(self, got: Array, expected: Array, allowed: Array | float, claim: str) -> None:
        off = np.abs(got - expected) - allowed
        worst = float(off.max(initial=0))
        self._hold(worst <= 0, f"{claim} is off by {worst:g} more than rounding explains")


def _work_out(recipe: Recipe, options: RunOptions) -> Model:
    """The output of a merge without a folder: stored elements by tensor."""
    decided = decide(prepare(recipe, options))
    sink = InMemory(list(decided.edits.values()))
    apply(decided, sink)
    return dict(zip(decided.edits, sink.arrays, strict=True))


def _is_one_line(text: str) -> bool:
    return text.strip() == text != "" and len(text.splitlines()) == 1


def _ends(parameter: Parameter) -> tuple[object, ...]:
    if parameter.choices:
        return parameter.choices
    return max(parameter.low, -INFINITE), min(parameter.high, INFINITE)
