"""The space: axes as they are asked for, what they are refused for, and recipes at points."""

from __future__ import annotations

import pytest
from tests.coefficients.made_up import recipe

from taskvec.coefficients.space import default_axes, make_space, parse_axis
from taskvec.errors import TaskvecError, UsageError


def space(*axes, of=None):
    return make_space(of or recipe(), [parse_axis(text) for text in axes])


LATA = {"name": "lata", "scheme": "threshold", "threshold": 0.9}


def test_ranges_steps_and_choices():
    assert parse_axis("scale=0:1.5").values is None
    assert parse_axis("scale=0:1:0.25").values == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert parse_axis("scale=0:1:0.3").values == (0.0, 0.3, 0.6, 0.9)
    assert parse_axis("scale=0.5:0.7:0.2").values == (0.5, 0.7)
    assert parse_axis("scale.math=-1:0").task == "math"
    assert parse_axis("scale.a.b=0:1").task == "a.b"
    assert parse_axis("scheme=linear, threshold").choices == ("linear", "threshold")
    assert parse_axis("scale=0,0.5,1e-3").choices == (0.0, 0.5, 0.001)
    assert str(parse_axis("density.math=0.10:1:0.1")) == "density.math=0.1:1:0.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scale", "--vary must be NAME=LOW:HIGH[:STEP] or NAME=ONE,OTHER,…; got 'scale'"),
        ("=0:1", "--vary must be NAME=LOW:HIGH"),
        ("scale=", "--vary must be NAME=LOW:HIGH"),
        ("scale=0.5", "--vary scale: needs two or more values, each once; got '0.5'"),
        ("scheme=linear,linear", "--vary scheme: needs two or more values, each once"),
        ("scale=0:b", "--vary scale: a range is LOW:HIGH or LOW:HIGH:STEP; got '0:b'"),
        ("scale=0:1:2:3", "a range is LOW:HIGH or LOW:HIGH:STEP"),
        ("scale=nan:1", "a range is LOW:HIGH or LOW:HIGH:STEP"),
        ("scale=1:0", "LOW must be below HIGH, and STEP from above 0 to the range; got '1:0'"),
        ("scale=0:1:0", "STEP from above 0"),
        ("scale=0:1:2", "STEP from above 0"),
    ],
)
def test_what_is_no_axis(text, message):
    with pytest.raises(UsageError) as error:
        parse_axis(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("axes", "method", "message"),
    [
        (["scale.maths=0:1"], "lata", "--vary scale.maths: there is no task 'maths'; did you mean"),
        (["density=0:1"], "lata", "--vary density: lata has no density; known: granularity, "),
        (["granularty=0:1"], "lata", "lata has no granularty; did you mean 'granularity'?"),
        (["threshold=0:1.5"], "lata", "--vary threshold: threshold of lata must be in [-1, 1]; go"),
        (["scheme=linear,loud"], "lata", "scheme of lata must be in linear | logarithmic | thresh"),
        (["scheme=0:1"], "lata", "scheme of lata must be in"),
        (["scale=-1:1"], "slerp", "--vary scale: slerp takes no negative scale; got -1"),
        (["scale=a,b"], "lata", "--vary scale: λ must be a number; got 'a'"),
        (["scale=0:1", "scale=0:2"], "lata", "--vary scale is given twice"),
        (
            ["scale=0:1", "scale.math=0:1", "scale.code=0:1"],
            "lata",
            "--vary scale: every task has an axis of its own; leave this out",
        ),
        (["method=lata,loud"], "lata", "--vary method: unknown method 'loud'"),
        (["method=lata,passthrough"], "lata", "--vary method: passthrough takes no tasks"),
        (["method=lata,ties", "density=0:2"], "lata", "density of ties must be in [0, 1]; got 2.0"),
        (["method.math=lata,ties"], "lata", "--vary method.math: there is no task 'math'"),
    ],
)  # fmt: skip
def test_what_cannot_be_varied(axes, method, message):
    with pytest.raises(TaskvecError) as error:
        space(*axes, of=recipe(method=method))
    assert message in str(error.value)
    assert isinstance(error.value, UsageError)


def test_a_profile_is_varied_as_a_whole():
    """λ by layer keeps its shape; a parameter by layer is refused."""
    depth = {"depth": [0.2, 0.8], "outside": 0}
    tasks = recipe().to_dict()["tasks"]
    tasks["math"]["scale"] = depth | {"times": 2}
    of = recipe(tasks=tasks)
    made = space("scale.math=0:1", of=of)
    assert made.given is None
    at = made.recipe_at({"scale.math": 0.25})
    assert at.scales["math"] == 0.25
    assert at.profiles == of.profiles
    with pytest.raises(UsageError, match="density of task 'math' differs by layer in the recipe"):
        space("density=0:1", of=recipe(method={"name": "ties", "density": depth | {"outside": 1}}))


def test_missing_scales_must_be_varied():
    of = recipe(scale=None)
    assert space("scale=0:1", of=of).given is None
    assert space(of=of).axes == tuple(default_axes(of))
    with pytest.raises(UsageError, match="scale of task 'code' is missing; give it in the recipe"):
        space("scale.math=0:1", of=of)


def test_default_axes():
    assert [str(axis) for axis in space().axes] == ["scale.code=0:1.5", "scale.math=0:1.5"]


def test_members_in_memory_are_refused():
    from dataclasses import replace

    given = recipe()
    family = replace(given.family, tasks={**given.family.tasks, "math": {"a": 1}})
    with pytest.raises(UsageError, match="math is not in a folder or on the hub"):
        make_space(replace(given, family=family), [])


def test_stages_and_what_takes_no_tasks():
    stage = {"instruct": str(recipe().family.start), "method": "task_arithmetic",
             "tasks": {"x": {"model": "y", "scale": 1}}}  # fmt: skip
    with pytest.raises(UsageError, match="a recipe with stages cannot be searched"):
        space(of=recipe(stages={"one": stage}))
    with pytest.raises(UsageError, match="passthrough takes no tasks; there is nothing to search"):
        space(of=recipe(tasks={}, method="passthrough", target=str(recipe().family.start)))


def test_one_scale_for_all_but_those_with_their_own():
    made = space("scale=0:1", "scale.math=0:1")
    at = made.recipe_at({"scale": 0.25, "scale.math": 0.75})
    assert at.scales == {"math": 0.75, "code": 0.25}
    assert made.given == {"scale": 0.5, "scale.math": 0.5}


def test_a_point_is_the_recipe_that_says_so():
    """The same as the recipe that a user would write."""
    made = space(
        "scale=0:1", "threshold.math=0.5:1", "scheme=linear,threshold", of=recipe(method=LATA)
    )
    at = made.recipe_at({"scale": 0.3, "threshold.math": 0.7, "scheme": "linear"})
    tasks = recipe(scale=0.3).to_dict()["tasks"]
    tasks["math"]["threshold"] = 0.7
    assert at == recipe(tasks=tasks, method=LATA | {"scheme": "linear"})
    assert made.given == {"scale": 0.5, "threshold.math": 0.9, "scheme": "threshold"}
    assert space("threshold=0.5:1", of=recipe(method=LATA)).given == {"threshold": 0.9}


def test_a_parameter_is_varied_where_the_method_has_it():
    made = space("scale=0,1", "method=lata,ties", "density=0.1:0.3:0.1", "scheme=linear,threshold")
    points = list(made.points())
    assert len(points) == 2 * (2 + 3)
    assert {"method": "ties", "scale": 0.0, "density": 0.2} in points
    assert {"method": "lata", "scale": 1.0, "scheme": "linear"} in points
    at = made.recipe_at({"method": "ties", "scale": 1.0, "density": 0.2})
    assert at == recipe(scale=1.0, method={"name": "ties", "density": 0.2})
    other = space("method=lata,ties", "scheme=linear,threshold", of=recipe(method=LATA))
    assert other.given == {"method": "lata", "scheme": "threshold"}
    at = other.recipe_at({"method": "ties"})
    assert at == recipe(method="ties")


def test_given_is_none_outside_the_space():
    assert space("scale=0:1:0.5").given == {"scale": 0.5}
    assert space("scale=0:1:0.3").given is None
    assert space("scale=0.6:1").given is None
    assert space("method=lata,ties").given is None
    tasks = recipe().to_dict()["tasks"]
    tasks["math"]["scale"] = 0.7
    assert space("scale=0:1", of=recipe(tasks=tasks)).given is None
