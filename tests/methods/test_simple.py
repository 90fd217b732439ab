"""task_arithmetic, average, and the list of methods."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from taskvec.errors import ParameterError
from taskvec.methods import METHODS, average, find_method, task_arithmetic
from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.plugins import flaw_of
from taskvec.statistics.products import Products


def inputs(scales, names=("x", "y", "z"), merge="mean"):
    tasks = tuple(sorted(scales))
    return Inputs(tasks, names, scales, {task: {"merge": merge} for task in tasks})


def test_task_arithmetic_weighs_everything_one():
    table = task_arithmetic.decide(inputs({"a": 0.5, "b": -2.0}))
    assert table.tasks == ("a", "b")
    assert table.names == ("x", "y", "z")
    assert table.weights.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert table.target is None
    assert table.digests == {}
    assert table.warnings == ()


@pytest.mark.parametrize("scales", [{"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 3.0},
                                    {"a": 0.3, "b": 0.9, "c": 2.0}])  # fmt: skip
def test_average_weighs_by_scale_over_their_sum(scales):
    table = average.decide(inputs(scales))
    total = sum(scales.values())
    for task in table.tasks:
        for weight in table.of(task).values():
            # What the engine uses, λ w, is λ / Σ|λ|: one rounding more than that quotient.
            assert scales[task] * weight == pytest.approx(scales[task] / total, rel=2.0**-52)
    assert table.target is not None
    assert table.target.tolist() == [0, 0, 0]


def test_average_without_division_is_the_sum():
    table = average.decide(inputs({"a": 0.5, "b": 0.75}, merge="sum"))
    assert table.weights.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert table.target is not None
    assert table.target.tolist() == [0, 0, 0]


def test_average_of_nothing_is_refused():
    with pytest.raises(ParameterError, match="above 0 for one task at least; got 0 for all"):
        average.decide(inputs({"a": 0.0, "b": 0.0}))


def test_average_declares_that_it_takes_no_negative_scale():
    method = find_method("average")
    assert not method.takes_negative_scale
    assert not method.needs_anchor
    assert not method.takes_table
    assert method.default_scale == 1


@pytest.mark.parametrize("name", sorted(METHODS))
def test_declarations(name):
    method = METHODS[name]
    assert isinstance(method, Method)
    assert method.name == name
    for text in (method.summary, method.source, method.formula):
        assert text.strip() == text != ""
        assert "\n" not in text
    assert flaw_of(method, name) is None
    for parameter in method.parameters:
        assert parameter.check(parameter.default, name) == parameter.default


@pytest.mark.parametrize("name", [n for n in sorted(METHODS) if not METHODS[n].needs_scan])
def test_decisions_are_pure(name):
    method, given = METHODS[name], inputs({})
    parameters = {p.name: p.default for p in method.parameters}
    for scales in ({"a": 0.5, "b": 0.75}, {"a": 0.5}) if method.takes_tasks else ():
        given = replace(inputs(scales), parameters=dict.fromkeys(scales, parameters))
        try:
            method.decide(given)
        except ParameterError:  # it takes another number of tasks
            continue
        break
    first, second = method.decide(given), method.decide(given)
    if isinstance(first, Need):
        assert repr(first) == repr(second)
        collected: object = {task: {} for task in given.tasks}
        if first.statistic == "products":
            collected = Products(np.stack([np.eye(len(given.tasks))] * len(given.names)), True)
        given = replace(given, passes=(collected,) * 2)
        first, second = method.decide(given), method.decide(given)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.tasks == given.tasks
    assert first.names == given.names
    assert np.isfinite(first.weights).all()


@pytest.mark.parametrize(("name", "hint"), [
    ("lta", r"unknown method 'lta'; did you mean 'lata'\?"),
    ("soup", r"unknown method 'soup'; known: "),
    (None, r"unknown method None; known: lata, task_arithmetic, "),
    (["lata"], r"unknown method \['lata'\]; known: "),
])  # fmt: skip
def test_unknown_methods(name, hint):
    with pytest.raises(ParameterError, match=hint):
        find_method(name)
