"""The JSON schema of recipes: that editors accept what taskvec does, and know every key."""

from __future__ import annotations

import json

import pytest

from taskvec.errors import RecipeError
from taskvec.methods import METHODS
from taskvec.recipes.located import Document, parse_yaml
from taskvec.recipes.reading import load_recipe, read_recipe
from taskvec.recipes.schema import RecipeFile, TaskEntry, recipe_schema
from taskvec.recipes.writing import recipe_text, write_recipe

SCHEMA = recipe_schema()
KINDS = SCHEMA["$defs"]


def test_every_key_is_there_with_a_description():
    assert SCHEMA["properties"].keys() == RecipeFile.model_fields.keys()
    for name, kind in [("recipe", SCHEMA), *KINDS.items()]:
        for key, about in kind.get("properties", {}).items():
            assert about.get("description"), f"{name}.{key}"


def test_no_key_is_taken_that_the_reader_refuses():
    for kind in [SCHEMA, *KINDS.values()]:
        for each in [kind, *kind.get("anyOf", [])]:
            if "properties" in each:
                assert each["additionalProperties"] is False


def test_every_method_is_there_with_its_parameters():
    words, *kinds = KINDS["MethodEntry"]["anyOf"]
    assert words["enum"] == sorted(METHODS)
    found = {kind["properties"]["name"]["const"]: kind for kind in kinds}
    for name, method in METHODS.items():
        assert found[name]["properties"].keys() == {"name", *(p.name for p in method.parameters)}
        assert found[name]["description"] == method.summary
    parameters = {p.name for method in METHODS.values() for p in method.parameters}
    task = KINDS["TaskEntry"]["anyOf"][-1]["properties"]
    assert task.keys() == parameters | TaskEntry.model_fields.keys()


def test_ranges_and_choices_are_those_of_the_declarations():
    lata = next(k for k in KINDS["MethodEntry"]["anyOf"] if "enum" not in k
                and k["properties"]["name"]["const"] == "lata")["properties"]  # fmt: skip
    assert lata["threshold"]["minimum"] == -1
    assert lata["threshold"]["maximum"] == 1
    assert lata["scheme"]["enum"] == ["linear", "logarithmic", "threshold"]
    assert lata["scheme"]["default"] == "logarithmic"


def test_it_is_json_without_infinities():
    assert json.loads(json.dumps(SCHEMA, allow_nan=False)) == SCHEMA


EVERYTHING = """\
base: {model: b, hub: org/base}
instruct: i
target: {stack: [{model: a, blocks: [0, 2]}, {model: stage:one, blocks: [2, 4], scale: 0.5}]}
tasks:
  math: folder
  code: {model: c, scale: {depth: 0.5, patterns: {"*": 1, "*.mlp.*": [0, 1]}}, hub: org/code}
  more: {model: c, scale: -1, over: base, density: {depth: [1, 0.5], outside: 1}}
method: {name: ties, density: 0.2}
layer_weights: lata
table: weights.csv
include: "model.*"
exclude: ["*.bias"]
layers: [{pattern: x, module: mlp}]
out: {dtype: bfloat16, shard_size: 5GB, precision: float64}
seed: 3
stages: {one: {target: a, method: passthrough}}
"""


def test_an_editor_accepts_what_the_reader_accepts(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    document = parse_yaml(EVERYTHING, "r.yaml")
    assert set(document.data) | {"anchor", "vocabulary", "new_tokens", "allow_pickle"} == set(
        RecipeFile.model_fields
    )
    recipe = read_recipe(document, tmp_path)
    for data in (document.data, recipe.to_dict()):
        jsonschema.validate(data, SCHEMA)


@pytest.mark.parametrize("change", [
    {"methd": "lata"}, {"method": {"name": "ties", "scheme": "linear"}}, {"seed": "x"},
    {"tasks": {"a": {"scale": 1}}}, {"out": {"dtype": "int3"}}, {"method": "tiess"},
])  # fmt: skip
def test_an_editor_refuses_what_the_reader_refuses(change, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    data = {"instruct": "i", "tasks": {"a": {"model": "a", "scale": 1}}, "method": "ties"} | change
    with pytest.raises(RecipeError):
        read_recipe(Document(data, "r"), tmp_path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_a_recipe_that_is_written_finds_its_schema(tmp_path):
    data = {"instruct": "i", "tasks": {"a": {"model": "a", "scale": 1}}, "method": "ties"}
    write_recipe(tmp_path / "r.yaml", recipe_text(data, "of a test"))
    first, about = (tmp_path / "r.yaml").read_text().splitlines()[:2]
    assert about == "# of a test"
    assert json.loads((tmp_path / first.partition("$schema=")[2]).read_text()) == SCHEMA
    assert load_recipe(tmp_path / "r.yaml").method.name == "ties"
