"""What is swept: the notation of values, and the recipe with one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskvec.coefficients.sweeps import Sweep, parse_sweep, parse_values, set_value
from taskvec.errors import ParameterError, UsageError
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family

FAMILY = Family(base="b", instruct="i", tasks={"math": "m", "code": "c"})
SCALES = {"math": 0.5, "code": {"depth": [0.2, 0.4], "outside": 1}}


def recipe_with(method):
    return as_recipe(FAMILY, {"method": method, "scale": SCALES})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5:1:0.05", [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]),
        ("0:1:0.4", [0.0, 0.4, 0.8]),
        ("1:0.8:-0.1", [1.0, 0.9, 0.8]),
        ("-2:-1:.5", [-2.0, -1.5, -1.0]),
        ("0.001:1:4log", [0.001, 0.01, 0.1, 1.0]),
        ("1:8:4log", [1.0, 2.0, 4.0, 8.0]),
        ("1:2:3log", [1.0, 1.41421, 2.0]),
        ("1e-3,0.5", [0.001, 0.5]),
        ("7", [7.0]),
    ],
)
def test_values(text, expected):
    assert list(parse_values(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "values must be FROM:TO:STEP, FROM:TO:COUNTlog or a list V1,V2,…; got 'a'"),
        ("0:1", "values must be FROM:TO:STEP"),
        ("0:1:5lin", "values must be FROM:TO:STEP"),
        ("1,,2", "values must be FROM:TO:STEP"),
        ("nan", "values must be FROM:TO:STEP"),
        ("0:1:-0.1", "values '0:1:-0.1': STEP must lead from FROM to TO; got -0.1"),
        ("0:1:0", "STEP must lead from FROM to TO; got 0"),
        ("0:1:3log", "FROM and TO must be above 0 and differ, COUNT must be 2 or more"),
        ("1:2:1log", "COUNT must be 2 or more"),
        ("0:1:0.0001", "are 10,001; give at most 1,000"),
        ("1:2:5000log", "are 5,000; give at most 1,000"),
        ("1,2,1.0", "values must differ; '1,2,1.0' has one twice"),
        ("1e400", "values must be finite; got '1e400'"),
    ],
)
def test_other_notation_is_refused(text, message):
    with pytest.raises(UsageError) as error:
        parse_values(text)
    assert message in str(error.value)


def test_sweeps_have_a_name_and_maybe_a_task():
    assert parse_sweep("density=0.1,0.2") == Sweep("density", (0.1, 0.2))
    assert parse_sweep("scale.math.v2=1") == Sweep("scale", (1.0,), "math.v2")
    for text in ("density", "=1", ".math=1", "scale.=1"):
        with pytest.raises(UsageError, match=r"a sweep must be NAME=VALUES or NAME\.TASK=VALUES"):
            parse_sweep(text)


def test_scale_sets_every_task_or_one():
    recipe = recipe_with("task_arithmetic")
    assert set_value(recipe, Sweep("scale", (2.0,)), 2.0).scales == {"math": 2.0, "code": 2.0}
    one = set_value(recipe, Sweep("scale", (2.0,), "math"), 2.0)
    assert one.scales == {"math": 2.0, "code": 1.0}
    assert one.tasks["code"].scale_to_dict() == {"depth": [0.2, 0.4], "outside": 1.0, "times": 1.0}
    assert recipe.scales == {"math": 0.5, "code": 1.0}


def test_a_parameter_of_the_method():
    recipe = recipe_with({"name": "ties", "density": 0.3})
    assert set_value(recipe, Sweep("density", ()), 0.7).parameters["code"]["density"] == 0.7
    one = set_value(recipe, Sweep("density", (), "code"), 0.7)
    assert [one.parameters[task]["density"] for task in ("math", "code")] == [0.3, 0.7]


def test_a_parameter_of_what_weighs_the_layers():
    from taskvec.recipes.located import Document
    from taskvec.recipes.reading import read_recipe

    recipe = read_recipe(
        Document(
            {
                "base": "b", "instruct": "i", "tasks": {"math": {"model": "m", "scale": 1}},
                "method": "dare", "layer_weights": {"name": "lata", "scheme": "threshold"},
            },
            "here",
        ),
        Path(),
    )  # fmt: skip
    found = set_value(recipe, Sweep("threshold", ()), 0.5)
    assert found.weigher.parameters["math"]["threshold"] == 0.5
    assert found.parameters == recipe.parameters
    assert found.to_dict()["layer_weights"]["threshold"] == 0.5
    with pytest.raises(UsageError, match="threshold of layer_weights is the same for all tasks"):
        set_value(recipe, Sweep("threshold", (), "math"), 0.5)


@pytest.mark.parametrize(
    ("method", "sweep", "value", "error", "message"),
    [
        ("lata", Sweep("threshold", ()), 0.5, UsageError,
         "threshold has no effect in scheme 'logarithmic' of task 'math'; set scheme: threshold"),
        ("lata", Sweep("scheme", ()), 0.5, UsageError,
         "lata has no number 'scheme' to sweep; known: scale, threshold"),
        ("dare", Sweep("densty", ()), 0.5, UsageError, "did you mean 'density'?"),
        ("dare", Sweep("density", ()), 1.5, ParameterError,
         "density of dare must be in [1e-06, 1]; got 1.5"),
        ("dare", Sweep("density", (), "maths"), 0.5, UsageError,
         "sweep of density.maths: the recipe has no task 'maths'; did you mean 'math'?"),
        ("average", Sweep("scale", ()), -1.0, UsageError,
         "average takes no negative scale; got -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept(method, sweep, value, error, message):
    with pytest.raises(error) as raised:
        set_value(recipe_with(method), sweep, value)
    assert message in str(raised.value)
