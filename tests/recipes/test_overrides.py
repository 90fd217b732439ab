"""Values of flags in the place of a recipe's: where they go, and whom an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskvec.errors import RecipeError, UsageError
from taskvec.recipes.located import Document, parse_yaml
from taskvec.recipes.overrides import read_setting, with_overrides
from taskvec.recipes.reading import read_recipe

TEXT = """\
instruct: instruct
tasks:
  math: {model: math, scale: 0.5, density: 0.4}
  v1.5: code
method: {name: ties, scope: tensor}
out: {precision: float64}
"""


def overridden(overrides, text: str = TEXT, **more) -> Document:
    return with_overrides(parse_yaml(text, "r.yaml"), overrides, **more)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("seed", 1, ("seed",)),
        ("density", 0.3, ("method", "density")),
        ("math.density", 0.2, ("tasks", "math", "density")),
        ("tasks.math.density", 0.2, ("tasks", "math", "density")),
        ("v1.5.scale", 1, ("tasks", "v1.5", "scale")),
        ("tasks.v1.5.scale", 1, ("tasks", "v1.5", "scale")),
        ("out.dtype", "float16", ("out", "dtype")),
        ("layer_weights", "lata", ("layer_weights", "name")),
        ("layer_weights.scheme", "linear", ("layer_weights", "scheme")),
        (("tasks", "math", "scale"), 2, ("tasks", "math", "scale")),
    ],
)
def test_where_a_name_goes(name, value, key):
    document = overridden({name: value})
    found = document.data
    for part in key:
        found = found[part]
    assert found == value
    assert key in document.flags


def test_what_is_not_named_stays_and_the_document_given_is_not_changed():
    given = parse_yaml(TEXT, "r.yaml")
    document = with_overrides(given, {"out.dtype": "float16", "v1.5.scale": 1, "scope": "model"})
    assert document.data["out"] == {"precision": "float64", "dtype": "float16"}
    assert document.data["tasks"]["v1.5"] == {"model": "code", "scale": 1}
    assert document.data["method"] == {"name": "ties", "scope": "model"}
    assert given.data == parse_yaml(TEXT, "r.yaml").data


def test_scale_is_of_every_task():
    assert {t["scale"] for t in overridden({"scale": 0.1}).data["tasks"].values()} == {0.1}


@pytest.mark.parametrize("name", ["density", ("method", "density")])
def test_a_parameter_is_of_every_task_unless_it_names_one(name):
    tasks = overridden({name: 0.3}).data["tasks"]
    assert tasks == {"math": {"model": "math", "scale": 0.5}, "v1.5": "code"}
    tasks = overridden({"math.density": 0.2, name: 0.3}).data["tasks"]
    assert tasks["math"]["density"] == 0.2


def test_another_method_drops_the_parameters_of_the_old_one():
    flags = {"density": 0.3, "method": "dare"}
    assert overridden(flags).data["method"] == {"name": "dare", "density": 0.3}
    assert "density" not in overridden({"method": "lata"}).data["tasks"]["math"]
    same = overridden({"method": "ties"}).data
    assert same["method"] == {"name": "ties", "scope": "tensor"}
    assert same["tasks"]["math"]["density"] == 0.4


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"density": 2}, "--set density: "),
        ({"math.density": 2}, "--set math.density: "),
        ({"v1.5.scale": float("nan")}, "--set v1.5.scale: "),
        ({"densty": 0.3}, "--set densty: .*'density'"),
        ({"out.dtype": "int3"}, "--set out.dtype: "),
        ({"out": 3}, "--set out: "),
        ({"method": "tiess"}, "--set method: .*'ties'"),
        ({"seed": -1}, "--set seed: "),
        ({"math": 1}, "--set math: "),
        ({"tasks.math": {"model": "other", "density": 3}}, "--set tasks.math: "),
        ({"mth.density": 0.1}, "--set mth.density: .*'mth'.*'math'"),
    ],
)
def test_an_error_names_the_flag_and_no_line(overrides, names):
    good = TEXT.replace("v1.5: code", "v1.5: {model: code, scale: 1}")
    with pytest.raises(RecipeError, match=f"^{names}"):
        read_recipe(overridden(overrides, good), Path("/"))


def test_an_error_about_the_file_keeps_its_line():
    bad = TEXT.replace("density: 0.4", "density: 4").replace("v1.5: code", "")
    with pytest.raises(RecipeError, match=r"^r\.yaml:3: "):
        read_recipe(overridden({"scope": "model", "out.dtype": "float16"}, bad), Path("/"))


def test_a_flag_with_a_name_of_its_own():
    document = overridden({"out.dtype": "int3"}, flags={"out.dtype": "--dtype"})
    with pytest.raises(RecipeError, match=r"^--dtype: "):
        read_recipe(with_overrides(document, {"scale": 1}), Path("/"))


def test_a_task_of_a_flag_is_there_for_other_flags():
    flags = {"new.density": 0.1, "tasks.new": {"model": "n", "scale": 1}}
    entry = overridden(flags).data["tasks"]["new"]
    assert entry == {"model": "n", "scale": 1, "density": 0.1}


@pytest.mark.parametrize("text", ["density", "=3", "density=", " = "])
def test_a_setting_that_is_none(text):
    with pytest.raises(UsageError, match="--set takes NAME=VALUE"):
        read_setting(text)


def test_a_setting_that_is_not_yaml():
    with pytest.raises(RecipeError, match=r"^--set density:"):
        read_setting("density=[1")
