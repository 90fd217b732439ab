"""mergekit configurations as recipes: what is written, what is told, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.adapters import pair, write_adapter
from tests.conftest import read_checkpoint, write_family

from taskvec.errors import FamilyError, RecipeError
from taskvec.methods import METHODS
from taskvec.outputs import run as engine
from taskvec.recipes.located import parse_yaml
from taskvec.recipes.mergekit.convert import Imported, convert, relocated
from taskvec.recipes.mergekit.schema import METHODS as THEIRS
from taskvec.recipes.mergekit.values import meant_pattern, plain, whole_pattern
from taskvec.recipes.mergekit.vectors import OURS
from taskvec.recipes.reading import load_recipe, read_recipe

TIES = """\
merge_method: ties
base_model: org/base
models:
  - model: org/math
    parameters: {weight: 0.5, density: 0.4}
  - model: ./code
    parameters: {weight: 0.5}
"""


def imported(text: str, faithful: bool = False, folder: Path = Path("/nowhere")) -> Imported:
    return convert(parse_yaml(text, "c.yml"), folder, faithful=faithful)


def config(method: str, weight: object = 1.0, **more: Any) -> str:
    inputs = [{"model": name, "parameters": {"weight": weight}} for name in ("math", "code")]
    data = {"merge_method": method, "base_model": "base", "models": inputs} | more
    return yaml.safe_dump(data, sort_keys=False)


def told(found: Imported) -> str:
    return "\n".join(note.text for note in found.notes)


# Recipes


def test_every_method_of_theirs_has_a_counterpart():
    assert len(THEIRS) == 20
    assert {OURS.get(name, name) for name in THEIRS} <= set(METHODS)


def test_a_recipe_as_it_is_written():
    found = imported(TIES)
    assert found.text == (
        "# yaml-language-server: $schema=recipe.schema.json\n"
        "# Imported from mergekit, as intended; see docs/how-to/from-mergekit.md\n"
        "anchor: org/base\n"
        "tasks:\n"
        "  math:\n    model: org/math\n    scale: 1\n    density: 0.4\n"
        "  code:\n    model: ./code\n    scale: 1\n"
        "method:\n  name: ties\n  merge: mean\n"
    )
    read = read_recipe(parse_yaml(found.text, "r.yaml"), Path("/somewhere"))
    assert read.family.models == {"math": "org/math", "code": "/somewhere/code"}
    assert read.parameters["code"]["density"] == 0.2


def test_faithful_writes_their_switches():
    recipe = imported(TIES, faithful=True).recipe
    assert recipe["method"] == {"name": "ties", "scope": "tensor", "merge": "mean"}
    assert recipe["tasks"]["code"]["density"] == 1
    recipe = imported(config("dare_ties"), faithful=True).recipe
    expected = {"name": "dare_ties", "density": 1, "rescale": "l1", "merge": "sum"}
    assert recipe["method"] == expected
    assert recipe["seed"] == 0
    recipe = imported(config("breadcrumbs_ties"), faithful=True).recipe
    assert recipe["method"] == {
        "name": "breadcrumbs", "density": 1, "gamma": 0, "elect": "mass", "merge": "sum",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "faithful", "scales", "merge"),
    [
        ((0.5, 0.5), False, (1, 1), "mean"),
        ((-1, -1), False, (-1, -1), "mean"),
        ((-1, -1), True, (1, 1), "mean"),
        ((0.5, 0.2), False, (0.5, 0.2), "weighted"),
        ((0.5, -0.2), False, (0.5, -0.2), "weighted"),
        ((0, 0), False, (0, 0), "mean"),
    ],
)
def test_normalize_of_ties(weights, faithful, scales, merge):
    models = [{"model": n, "parameters": {"weight": w}}
              for n, w in zip(("a", "b"), weights, strict=True)]  # fmt: skip
    recipe = imported(config("ties", models=models), faithful).recipe
    assert tuple(entry["scale"] for entry in recipe["tasks"].values()) == scales
    assert recipe["method"]["merge"] == merge


@pytest.mark.parametrize(("faithful", "expected"), [(False, (0.7, -0.3)), (True, (1.75, -0.75))])
def test_normalize_without_election(faithful, expected):
    models = [{"model": "a", "parameters": {"weight": 0.7}},
              {"model": "b", "parameters": {"weight": -0.3}}]  # fmt: skip
    text = config("task_arithmetic", models=models, parameters={"normalize": True})
    found = imported(text, faithful)
    assert tuple(entry["scale"] for entry in found.recipe["tasks"].values()) == expected
    assert "signed sum of weights, 0.4" in told(found)


def test_gradients_and_filters_become_scales_by_layer():
    weight = [{"filter": "mlp", "value": 0.5}, {"filter": "layers.1", "value": [0, 1]},
              {"value": [0.25, 0.75]}]  # fmt: skip
    found = imported(config("task_arithmetic", weight))
    assert found.recipe["tasks"]["math"]["scale"] == {
        "depth": [0.25, 0.75],
        "embedding": 0.25,
        "final_norm": 0.75,
        "head": 0.75,
        "outside": 0.25,
        "patterns": {"*mlp*": 0.5, "*layers.1.*": {"depth": [0, 1], "outside": 0}},
    }
    assert "the filter 'layers.1' fits every name that contains it, as in 'layers.10'" in told(
        found
    )
    faithful = imported(config("task_arithmetic", weight), faithful=True).recipe
    scale = faithful["tasks"]["math"]["scale"]
    assert (scale["final_norm"], scale["head"]) == (0.25, 0.25)
    assert "*layers.1*" in scale["patterns"]


DENSITY = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: b
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: c
    parameters:
      density: [{filter: mlp, value: 0.5}, {filter: layers.1, value: [0.2, 0.4]}, {value: 0}]
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
parameters: {normalize: true, int8_mask: true}
"""


def test_lambda_by_layer():
    by_name = [{"filter": "mlp", "value": 0.5}, {"value": 2}]
    recipe = imported(config("task_arithmetic", [0, 0.5, 0.3], parameters={"lambda": by_name}))
    scale = recipe.recipe["tasks"]["math"]["scale"]
    assert scale == {
        "depth": [0, 1, 0.6], "embedding": 0, "final_norm": 0.6, "head": 0.6, "outside": 0,
        "patterns": {"*mlp*": {"depth": [0, 0.25, 0.15], "outside": 0}},
    }  # fmt: skip
    equal = imported(config("ties", -1, parameters={"lambda": [0.5, 1]}))
    assert equal.recipe["tasks"]["math"]["scale"]["depth"] == [-0.5, -1]
    assert "subtracted; theirs: scale: by layer" in told(equal)


def test_gradients_of_which_one_divides_or_multiplies_another_stand_block_by_block(tmp_path):
    write_family(tmp_path)  # of three blocks
    parameters = {"normalize": True, "lambda": 0.5}
    models = [{"model": "math", "parameters": {"weight": [1, 0.6]}},
              {"model": "code", "parameters": {"weight": [0.25, -0.4]}}]  # fmt: skip
    text = config("task_arithmetic", base_model="base", models=models, parameters=parameters)
    found = imported(text, folder=tmp_path)
    scales = [entry["scale"] for entry in found.recipe["tasks"].values()]
    assert scales[0]["depth"] == [0.4, plain(0.5 * 0.8 / 0.875), 0.3]
    assert scales[1]["depth"] == [0.1, plain(0.5 * -0.075 / 0.875), -0.2]
    assert (scales[1]["embedding"], scales[1]["head"]) == (0.1, -0.2)
    assert (
        "normalize divides by the signed sum of weights\n   here: by the sum of |weight|;"
        in told(found)
    )
    scales = [entry["scale"] for entry in imported(text, True, tmp_path).recipe["tasks"].values()]
    assert scales[1]["depth"] == [0.1, plain(0.5 * -0.075 / 0.725), -1]
    assert scales[1]["head"] == 0.1


def test_densities_by_layer():
    found = imported(DENSITY)
    tasks = found.recipe["tasks"]
    assert tasks["a"]["density"] == {
        "depth": [1, 0.7, 0.1], "embedding": 1, "final_norm": 0.1, "head": 0.1, "outside": 1,
    }  # fmt: skip
    assert tasks["b"]["density"] == 0.5
    assert tasks["c"]["density"] == {
        "depth": 0,
        "outside": 0,
        "patterns": {"*mlp*": 0.5, "*layers.1.*": {"depth": [0.2, 0.4], "outside": 0.2}},
    }
    assert found.recipe["method"] == {"name": "ties", "scope": "tensor", "merge": "weighted"}
    text = told(found)
    assert (
        "line 5: mergekit: the gradient density of a gives final norm and head its first value\n"
        "   here: its last value, written out; theirs: final_norm and head 1" in text
    )
    assert (
        "entries are ranked within each tensor\n"
        "   here: the same, by scope: tensor, because a density differs by layer" in text
    )
    assert "line 10: mergekit: the filter 'layers.1' fits every name" in text
    faithful = imported(DENSITY, faithful=True).recipe["tasks"]
    assert (faithful["a"]["density"]["head"], faithful["a"]["density"]["final_norm"]) == (1, 1)
    assert "*layers.1*" in faithful["c"]["density"]["patterns"]


def test_a_density_by_layer_of_all_models_stands_at_the_method():
    found = imported(config("ties", parameters={"density": [1, 0.5]}))
    assert found.recipe["method"]["density"]["depth"] == [1, 0.5]
    assert "density" not in found.recipe["tasks"]["math"]
    assert found.text.count("depth: [1, 0.5]") == 1
    assert "&id" not in found.text


def test_what_belongs_to_a_density_may_differ_too():
    della = {"density": [0.6, 0.4], "epsilon": [0.1, 0.2]}
    found = imported(config("della", parameters=della))
    assert found.recipe["method"]["epsilon"]["depth"] == [0.2, 0.4]
    assert (
        "epsilon by layer is half the range of probabilities\n   here: the whole range, doubled"
        in told(found)
    )
    crumbs = {"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.9}], "gamma": 0.2}
    method = imported(config("breadcrumbs", parameters=crumbs)).recipe["method"]
    assert method["gamma"] == {"depth": 0.1, "outside": 0.1, "patterns": {"*mlp*": 0.2}}
    crumbs = {"density": [0.5, 0.4], "gamma": [0.1, 0.2]}
    method = imported(config("breadcrumbs", parameters=crumbs)).recipe["method"]
    assert (method["density"]["head"], method["gamma"]["head"]) == (0.4, 0.2)


@pytest.mark.parametrize(("method", "theirs", "ours"), [
    ("nearswap", "t", "t"), ("ram", "epsilon", "epsilon"), ("ramplus_tl", "alpha", "alpha"),
    ("sce", "select_topk", "density"),
])  # fmt: skip
def test_numbers_of_the_whole_may_differ_by_layer(method, theirs, ours):
    models = [{"model": name} for name in ("a", "b")][: 1 if method == "nearswap" else 2]
    found = imported(config(method, models=models, parameters={theirs: [0.25, 0.75]}))
    assert found.recipe["method"][ours]["depth"] == [0.25, 0.75]
    assert found.recipe["method"][ours]["head"] == 0.75
    assert f"the gradient {theirs} gives final norm and head its first value" in told(found)


def test_the_innermost_parameter_that_gives_a_value_counts():
    own = [{"filter": "mlp", "value": 0.5}]
    models = [{"model": "a", "parameters": {"weight": own}}, {"model": "b"}]
    text = config("task_arithmetic", models=models, parameters={"weight": [0.1, 0.2]})
    tasks = imported(text).recipe["tasks"]
    assert tasks["a"]["scale"]["patterns"] == {"*mlp*": 0.5}
    assert tasks["a"]["scale"]["depth"] == tasks["b"]["scale"]["depth"] == [0.1, 0.2]


def test_linear_is_average_or_task_arithmetic():
    text = config("linear", 2, base_model=None)
    assert imported(text).recipe == {
        "target": "math",
        "tasks": {"math": {"model": "math", "scale": 2}, "code": {"model": "code", "scale": 2}},
        "method": {"name": "average"},
    }
    models = [{"model": n, "parameters": {"weight": w}} for n, w in (("a", 1), ("b", -0.5))]
    recipe = imported(config("linear", models=models, base_model=None)).recipe
    assert recipe == {
        "anchor": "a",
        "tasks": {"b": {"model": "b", "scale": -1}},
        "method": {"name": "task_arithmetic"},
    }
    base = imported(config("linear", parameters={"weight": 1})).recipe
    assert base["target"] == "base"
    assert set(base["tasks"]) == {"math", "code", "base"}


def test_slerp_counts_the_base_from_the_other_end():
    text = config("slerp", models=[{"model": "code"}], parameters={"t": [0.25, 1]})
    recipe = imported(text).recipe
    assert recipe["target"] == "base"
    assert recipe["tasks"]["base"]["scale"]["depth"] == [0.75, 0]
    assert recipe["tasks"]["code"]["scale"]["depth"] == [0.25, 1]
    assert recipe["tasks"]["code"]["scale"]["head"] == 1


@pytest.mark.parametrize(
    ("text", "meant", "faithful", "says"),
    [
        (config("sce"), {"name": "sce"},
         {"name": "sce", "density": 1, "merge": "mean", "share_of": "varying", "floor": 1e-6},
         "sum to less than 1e-6, as in a light fine-tune, tasks weigh alike\n"
         "   here: by their energies, as everywhere; theirs: floor: 1e-6"),
        (config("sce", parameters={"select_topk": 0.5}), {"name": "sce", "density": 0.5},
         {"name": "sce", "density": 0.5, "merge": "mean", "share_of": "varying", "floor": 1e-6},
         "of all positions, to the nearest; theirs: share_of: varying"),
        (config("multislerp", base_model=None), {"name": "multislerp"},
         {"name": "multislerp", "projection": "orthogonal"},
         "which cancel: nothing is interpolated"),
        (config("multislerp", parameters={"eps": 1e-6}), {"name": "multislerp"},
         {"name": "multislerp", "projection": "orthogonal"}, "eps is added to lengths"),
        (config("nuslerp", parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
         {"name": "nuslerp", "granularity": "column"},
         {"name": "nuslerp", "granularity": "column"}, "takes the angles along columns"),
        (config("nuslerp", parameters={"nuslerp_flatten": False}),
         {"name": "nuslerp", "granularity": "row"}, {"name": "nuslerp", "granularity": "row"}, ""),
        (config("linear", 0.7, base_model=None, parameters={"normalize": False}),
         {"name": "average"}, {"name": "average", "merge": "sum"},
         "sum to 1; theirs: merge: sum"),
        (config("linear", [0.7, 0.1], base_model=None, parameters={"normalize": False}),
         {"name": "average"}, {"name": "average", "merge": "sum"}, "all of the model grows"),
        (config("linear", 0.5, base_model=None, parameters={"normalize": False}),
         {"name": "average"}, {"name": "average"}, ""),
    ],
)  # fmt: skip
def test_what_is_meant_and_what_they_do(text, meant, faithful, says):
    found = imported(text)
    assert (found.recipe["method"], imported(text, True).recipe["method"]) == (meant, faithful)
    assert says in told(found)


def test_della_has_half_their_epsilon():
    text = config("della", parameters={"density": 0.6, "epsilon": 0.1})
    found = imported(text)
    assert found.recipe["method"]["epsilon"] == 0.2
    assert "the whole range, 0.2" in told(found)
    assert "by its own probability, as in the paper; theirs: rescale: l1" in told(found)
    assert "rescale" not in found.recipe["method"]
    faithful = imported(text, faithful=True).recipe["method"]
    assert (faithful["rescale"], faithful["epsilon"]) == ("l1", 0.2)
    linear = imported(config("della_linear", parameters={"density": 0.6})).recipe["method"]
    assert (linear["elect"], linear["merge"]) == ("none", "sum")


def test_slices_of_whole_models_are_the_models(tmp_path):
    write_family(tmp_path)

    def text(stop):
        sources = [{"model": m, "layer_range": [0, stop]} for m in ("math", "code", "base")]
        slices = [{"sources": sources, "parameters": {"weight": 0.5}}]
        return config("task_arithmetic", slices=slices).replace("models:", "ignored:")

    recipe = imported(text(3), folder=tmp_path).recipe
    assert (recipe["anchor"], recipe["tasks"]["math"]["model"]) == ("base", "math")
    recipe = imported(text(2), folder=tmp_path).recipe
    assert recipe["tasks"]["math"]["model"] == {"stack": [{"model": "math", "blocks": [0, 2]}]}


def test_a_gradient_runs_over_each_slice_anew():
    def piece(model: str, weight: object, *blocks: int) -> dict:
        sources = [{"model": name, "layer_range": list(blocks)} for name in (model, "base")]
        return {"sources": sources, "parameters": {"weight": weight}}

    slices = [piece("a", [0, 1], 0, 3), piece("b", 0.25, 1, 3)]
    text = yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": "base",
                           "slices": slices})  # fmt: skip
    recipe = imported(text).recipe
    assert recipe["tasks"]["a"]["scale"]["depth"] == [0, 0.5, 1, 0.25, 0.25]
    assert recipe["tasks"]["a"]["scale"]["head"] == 0.25
    assert recipe["anchor"]["stack"][1] == {"model": "base", "blocks": [1, 3]}


def test_stacked_layers_and_their_scale():
    zero = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0},
            {"value": 1.0}]  # fmt: skip
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 8]}]},
        {"sources": [{"model": "b", "layer_range": [4, 12], "parameters": {"scale": zero}}]},
    ]
    found = imported(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    assert found.recipe["target"]["stack"] == [
        {"model": "a", "blocks": [0, 8]},
        {"model": "b", "blocks": [4, 12], "scale": 0},
    ]
    slices[1]["sources"][0]["parameters"]["scale"] = 0.5
    text = yaml.safe_dump({"merge_method": "passthrough", "slices": slices})
    found = imported(text)
    assert found.recipe["target"]["stack"][1]["scale"] == 0.5
    assert "multiplies every tensor, norms" in told(found)
    with pytest.raises(RecipeError, match="scale of other tensors than o_proj and down_proj"):
        imported(text, faithful=True)


def test_a_lora_is_a_task_over_the_base_or_a_stage(tmp_path):
    write_family(tmp_path)
    write_adapter(tmp_path / "lora", pair("model.layers.1.self_attn.q_proj", 24, 24))
    models = [{"model": "instruct+lora", "parameters": {"weight": 0.5}},
              {"model": "code+lora", "parameters": {"weight": 0.5}}]  # fmt: skip
    text = config("task_arithmetic", models=models, base_model="instruct", out_dtype="float32")
    recipe = imported(text, folder=tmp_path).recipe
    assert recipe["tasks"]["lora"] == {"model": "lora", "scale": 0.5}
    assert recipe["tasks"]["lora-2"]["model"] == "stage:lora"
    assert recipe["stages"] == {
        "lora": {"anchor": "code", "target": "lora", "method": "passthrough"}
    }
    path = tmp_path / "r.yaml"
    path.write_text(imported(text, folder=tmp_path).text)
    engine.run(load_recipe(path), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    got, start, code = (read_checkpoint(tmp_path / n)[name] for n in ("out", "instruct", "code"))
    assert abs(got - (start + 0.5 * (code - start))).max() < 1e-6


def test_names_of_tasks():
    paths = ("o/a-2", "org/a@v1", "other/a", "x/a/", "./b c/d\\(e)", "o/é")
    models = [{"model": m, "parameters": {"weight": 1}} for m in paths]
    tasks = imported(config("task_arithmetic", models=models)).recipe["tasks"]
    assert list(tasks) == ["a-2", "a", "a-3", "a-4", "e-", "model"]
    assert [entry["model"] for entry in tasks.values()] == list(paths)


def test_models_may_be_mappings():
    models = [{"model": {"model": {"path": "org/math", "revision": "v2"}},
               "parameters": {"weight": 1}}]  # fmt: skip
    tasks = imported(config("task_arithmetic", models=models)).recipe["tasks"]
    assert tasks["math"]["model"] == "org/math@v2"


@pytest.mark.parametrize(
    ("given", "out"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float32", "out_dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"dtype": "float64"}, {"dtype": "float64", "precision": "float64"}),
        ({}, None),
    ],
)
def test_dtypes(given, out):
    assert imported(config("task_arithmetic", **given)).recipe.get("out") == out


@pytest.mark.parametrize(
    ("given", "vocabulary"),
    [
        ({"tokenizer_source": "base"}, "by-token"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer": {"source": "base"}}, "by-token"),
        ({"tokenizer": {}}, "union"),
        ({}, None),
    ],
)
def test_tokenizers(given, vocabulary):
    assert imported(config("ties", **given)).recipe.get("vocabulary") == vocabulary


def test_the_tokenizer_of_a_mean_may_be_any_members():
    recipe = imported(config("linear", base_model=None, tokenizer_source="code")).recipe
    assert (recipe["target"], recipe["vocabulary"]) == ("code", "by-token")


# Files of several documents

MULTI = """\
merge_method: task_arithmetic
base_model: instruct
models:
  - {model: mean, parameters: {weight: 0.5}}
  - {model: noisy, parameters: {weight: 0.25}}
dtype: float32
---
name: noisy
merge_method: dare_linear
base_model: mean
models:
  - {model: math, parameters: {weight: 1, density: 0.5}}
tokenizer_source: base
dtype: bfloat16
---
name: mean
merge_method: linear
models:
  - {model: math, parameters: {weight: 0.25}}
  - {model: code, parameters: {weight: 0.75}}
dtype: float32
"""


def test_documents_that_name_each_other_become_stages(tmp_path):
    found = imported(MULTI, folder=tmp_path).recipe
    assert list(found["stages"]) == ["mean", "noisy"]
    assert found["stages"]["noisy"]["anchor"] == "stage:mean"
    assert found["seed"] == 0
    assert {n: t["model"] for n, t in found["tasks"].items()} == {
        "mean": "stage:mean", "noisy": "stage:noisy",
    }  # fmt: skip
    assert next(note.line for note in imported(MULTI, folder=tmp_path).notes if note.line) > 8


def test_documents_in_turn_give_what_they_say(tmp_path):
    write_family(tmp_path, dtype="F32")
    first, _, third = MULTI.split("---\n")
    path = tmp_path / "r.yaml"
    path.write_text(imported(third + "---\n" + first.replace(
        "  - {model: noisy, parameters: {weight: 0.25}}\n", ""), folder=tmp_path).text)  # fmt: skip
    got = read_checkpoint(engine.run(load_recipe(path), tmp_path / "out").path)
    start, math, code = (read_checkpoint(tmp_path / n) for n in ("instruct", "math", "code"))
    for name, value in got.items():
        mean = 0.25 * math[name] + 0.75 * code[name]
        assert abs(value - (start[name] + 0.5 * (mean - start[name]))).max() < 1e-5, name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MULTI.replace("name: mean\n", ""), "c.yml:1: two documents have no name.*give all but"),
        (MULTI.replace("- {model: math, parameters: {weight: 0.25}}", "- {model: noisy}"),
         "documents need each other: (noisy, mean|mean, noisy)"),
        (MULTI.replace("density: 0.5", "density: [x]"), "c.yml:12: "),
    ],
)  # fmt: skip
def test_documents_that_cannot_be_put_in_turn(text, says):
    with pytest.raises(RecipeError, match=says):
        imported(text)


def test_a_recipe_is_one_document(tmp_path):
    with pytest.raises(RecipeError, match=r"c.yml:3: .* a recipe is one document"):
        read_recipe(parse_yaml("method: lata\n---\nmethod: lata\n", "c.yml"), tmp_path)


# What one model is made of


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "breadcrumbs"])
def test_a_base_with_an_adapter_and_no_other_model_is_that(tmp_path, method):
    write_family(tmp_path, dtype="F32")
    write_adapter(tmp_path / "lora", pair("model.layers.1.self_attn.q_proj", 24, 24))
    own = [{"model": "instruct+lora", "parameters": {"weight": 1}}]
    for models in (own, [{"model": "instruct+lora"}]):
        text = config(method, models=models, base_model="instruct+lora")
        path = tmp_path / "r.yaml"
        path.write_text(imported(text, folder=tmp_path).text)
        recipe = load_recipe(path)
        assert recipe.method.name == "passthrough"
    got = read_checkpoint(engine.run(recipe, tmp_path / "out").path)
    path.write_text(yaml.safe_dump({
        "instruct": "instruct", "tasks": {"lora": {"model": "lora", "scale": 1}},
        "method": "task_arithmetic",
    }))  # fmt: skip
    merged = read_checkpoint(engine.run(load_recipe(path), tmp_path / "merged").path)
    start = read_checkpoint(tmp_path / "instruct")
    moved = [n for n in got if abs(got[n] - start[n]).max() > 0]
    assert moved == ["model.layers.1.self_attn.q_proj.weight"]
    assert all(abs(got[n] - merged[n]).max() < 1e-6 for n in got)


def test_a_base_alone_has_nothing_to_be_merged_with_elsewhere():
    text = config("model_stock", models=[{"model": "base"}])
    with pytest.raises(RecipeError, match="base_model is the only model; add one"):
        imported(text)


# Tokenizers of members


def write_tokenizer(folder: Path, tokens: int = 16, first: str = "w") -> None:
    vocab = {f"{first}{row}": row for row in range(tokens)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": f"{first}0"}
    whole = {"version": "1.0", "added_tokens": [], "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "chat_template.jinja").write_text(f"of {folder.name}")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "nuslerp", "linear"])
def test_the_tokenizer_of_a_member_with_the_same_vocabulary(tmp_path, method):
    write_family(tmp_path)
    for name in ("instruct", "math", "code"):
        write_tokenizer(tmp_path / name)
    base = None if method in ("nuslerp", "linear") else "instruct"
    text = config(method, base_model=base, tokenizer={"source": "code"})
    found = imported(text, folder=tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(found.text)
    out = engine.run(load_recipe(path), tmp_path / "out").path
    assert (out / "chat_template.jinja").read_text() == "of code"
    path.write_text(imported(config(method, base_model=base), folder=tmp_path).text)
    plain_out = engine.run(load_recipe(path), tmp_path / "plain").path
    plain, got = read_checkpoint(plain_out), read_checkpoint(out)
    assert all((got[name] == plain[name]).all() for name in plain)


def test_the_tokenizer_of_a_member_with_other_tokens_is_refused(tmp_path):
    write_family(tmp_path)
    for name, first in (("instruct", "w"), ("math", "w"), ("code", "v")):
        write_tokenizer(tmp_path / name, first=first)
    recipe = {"instruct": "instruct", "method": "task_arithmetic", "out": {"tokenizer": "code"},
              "tasks": {n: {"model": n, "scale": 1} for n in ("math", "code")}}  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(FamilyError, match=r"tokenizer of 'code'.*remove `tokenizer`"):
        engine.run(load_recipe(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("faithful", [False, True])
def test_a_chat_template_is_written(tmp_path, faithful):
    write_family(tmp_path)
    write_tokenizer(tmp_path / "instruct")
    (tmp_path / "instruct" / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    text = config("task_arithmetic", base_model="instruct", chat_template="{{ messages }}")
    path = tmp_path / "r.yaml"
    path.write_text(imported(text, faithful, tmp_path).text)
    out = engine.run(load_recipe(path), tmp_path / "out").path
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    config_of = json.loads((out / "tokenizer_config.json").read_text())
    assert config_of["chat_template"] == "{{ messages }}"
    assert load_recipe(out / "taskvec.yaml").out.chat_template == "{{ messages }}"


# Filters that are not the same


def filtered(**weights: object) -> str:
    models = [{"model": n, "parameters": {"weight": w}} for n, w in weights.items()]
    return config("task_arithmetic", models=models, base_model="instruct",
                  parameters={"normalize": True})  # fmt: skip


@pytest.mark.parametrize("faithful", [False, True])
def test_filters_of_one_model_that_another_has_not(tmp_path, faithful):
    """Each tensor gets w_t / Σ w of its own weights."""
    write_family(tmp_path, dtype="F32")
    one = {"mlp": 0.2, "layers.1": 0.6, None: 0.25}
    two = {"q_proj": 0.3, "up": 0.9, "layers": 0.5, None: 0.75}

    def listed(weights: dict) -> list:
        return [{"value": v} | ({} if k is None else {"filter": k}) for k, v in weights.items()]

    path = tmp_path / "r.yaml"
    text = filtered(math=listed(one), code=listed(two))
    path.write_text(imported(text, faithful, tmp_path).text)
    got = read_checkpoint(engine.run(load_recipe(path), tmp_path / "out").path)
    start, math, code = (read_checkpoint(tmp_path / n) for n in ("instruct", "math", "code"))
    for name, value in got.items():
        a, b = (next(v for k, v in w.items() if k is None or k in name) for w in (one, two))
        step = (a * (math[name] - start[name]) + b * (code[name] - start[name])) / (a + b)
        assert abs(value - (start[name] + step)).max() < 1e-5, name


def test_filters_that_differ_need_the_names_of_tensors():
    mlp = [{"filter": "mlp", "value": 0.5}, {"value": 0.25}]
    with pytest.raises(RecipeError, match=r"weight of math \(mlp\).*weight of code \(norm\)"):
        imported(filtered(math=mlp, code=[{"filter": "norm", "value": 1}, {"value": 0.25}]))
    recipe = imported(filtered(math=mlp, code=0.25)).recipe
    assert recipe["tasks"]["code"]["scale"]["depth"] == 0.5
    assert list(recipe["tasks"]["math"]["scale"]["patterns"]) == ["*mlp*"]


@pytest.mark.parametrize("model", [
    {"model": "a", "weight": 0.6}, {"model": "a", "parameters": {"density": 0.5}, "weight": 0.6},
])  # fmt: skip
def test_a_weight_at_the_wrong_place_is_named(model):
    with pytest.raises(
        RecipeError, match=r"c.yml:\d+: weight of a .*; write it under `parameters`"
    ):
        imported(config("ties", models=[model]))


def test_merge_keys_of_yaml():
    text = TIES.replace("{weight: 0.5, density: 0.4}", "&own {weight: 0.5, density: 0.4}").replace(
        "{weight: 0.5}", "{<<: *own, weight: 0.2}"
    )
    tasks = imported(text).recipe["tasks"]
    assert [(t["scale"], t.get("density")) for t in tasks.values()] == [(0.5, None), (0.2, None)]
    assert imported(text).recipe["method"]["density"] == 0.4


# What is told


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (config("ties", parameters={"densty": 0.3}), "key 'densty' is unknown.*mean 'density'"),
        (config("ties", tokeniser_source="base"), "key 'tokeniser_source' is unknown"),
        (TIES.replace("weight: 0.5, ", "weight: 0.5, normalize: false, "),
         r"'normalize' is unknown at this place.*read from slices, modules and the top only"),
        (TIES, r"line 6: .*density of code is left at 1.0, which drops nothing\n.*: 0.2"),
        (TIES, "ranked within each tensor\n.*whole model.*theirs: scope: tensor"),
        (TIES, "cancels equal weights; 0.5 does nothing"),
        (config("ties", -1), "-1: the task vectors are added, not subtracted\n.*: subtracted"),
        (config("ties", parameters={"density": [{"filter": "mlp", "value": 0.5}]}),
         "density of math is left at 1.0 where no filter fits\n   here: the same"),
        (config("dare_linear"), "L1 norm again\n.*by 1/density.*theirs: rescale: l1"),
        (config("dare_linear"), "without a seed\n.*seed 0"),
        (config("task_arithmetic", [0, 1]), "gradient weight of math.*final norm.*first value"),
        (config("breadcrumbs"), "gamma of math is left at 0.01"),
        (config("task_arithmetic", dtype="float16"), "sum is rounded to float16\n"),
        (config("task_arithmetic", chat_template="chatml"), "writes its own chat template"),
        (config("sce", models=[{"model": "a"}, {"model": "b"}]), "select_topk is left at 1.0"),
    ],
)  # fmt: skip
def test_differences_are_told(text, says):
    import re

    assert re.search(says, told(imported(text))), told(imported(text))


def test_unequal_weights_are_told_to_elect():
    models = [{"model": n, "parameters": {"weight": w}} for n, w in (("a", 1), ("b", 0.2))]
    assert "signs are elected by weighted vectors" in told(imported(config("ties", models=models)))


def test_faithful_says_that_it_does_the_same():
    text = told(imported(TIES, faithful=True))
    assert "here: the same, by scope: tensor" in text
    assert "theirs" not in text


def test_parameters_of_the_base_are_told():
    models = [{"model": "base", "parameters": {"weight": 3}},
              {"model": "a", "parameters": {"weight": 1}}]  # fmt: skip
    found = imported(config("task_arithmetic", models=models))
    assert list(found.recipe["tasks"]) == ["a"]
    assert "parameters of base_model base are ignored" in told(found)


# What is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("experts: []\nbase_model: a\n", r"c.yml:1: building a mixture of experts"),
        ("models: []\n", "merge_method is missing"),
        ("merge_method: tiess\nmodels: [{model: a}]\n", "unknown method 'tiess'.*'ties'"),
        ("merge_method: ties\n", "exactly one of models, slices, modules must be given; got 0"),
        (config("ties", tokenizer={"tokens": {"<x>": {"source": "a"}}}),
         r"c.yml:\d+: transplanting tokens"),
        (config("ties", tokenizer={"pad_to_multiple_of": 8}), "padding the vocabulary"),
        (config("ties", tokenizer_source="other"), "tokenizer of other.* not one of the models"),
        (config("ties", dtype="int8"), "dtype must be in bfloat16"),
        (config("ties", base_model=None), "base_model is missing; mergekit's ties needs it"),
        (config("ties", models=[{"model": "a"}]), r"c.yml:\d+: weight of a is missing"),
        (config("ties", "x"), "must be a finite number; got 'x'"),
        (config("ties", parameters={"lambda": [1, 0.5]}, models=[
            {"model": "a", "parameters": {"weight": 1}},
            {"model": "b", "parameters": {"weight": 2}}]),
         "lambda with normalize and weights that differ is not supported; leave it out"),
        (config("task_arithmetic", [0, 1], parameters={"lambda": [1, 0.5]}),
         r"c.yml:\d+: gradients of weight of math and lambda .*; give one as a number"),
        (config("task_arithmetic", [{"filter": "mlp", "value": 1}, {"value": 2}],
                parameters={"lambda": [{"filter": "norm", "value": 1}, {"value": 2}]}),
         r"the filters of weight of math \(mlp\) and lambda \(norm\) .*; use the same filters"),
        (config("karcher", base_model=None, parameters={"tol": [1, 2]}),
         "tol that differs by layer is not supported; give one number"),
        (config("ties", parameters={"density": [2, 1]}), r"density of ties must be in \[0, 1\]"),
        (config("dare_linear", parameters={"density": [{"filter": "mlp", "value": 0.5},
                                                       {"value": 0}]}),
         r"density of dare must be in \[1e-06, 1\]; got 0"),
        (config("breadcrumbs", parameters={"density": [1, 0.5]}),
         "density and gamma of math that differ by layer and sum to more than 1 in some are not "
         "supported; lower one of them"),
        (config("ties", parameters={"rescale": True}), "rescale: true of ties"),
        (config("ties", parameters={"normalize": "maybe"}), "normalize must be true or false"),
        (config("ties", models=[{"model": "a+b+c"}]), "a model is PATH or PATH.LORA"),
        (config("ties", models=[{"model": "a"}, {"model": "a"}]), "a occurs twice"),
        (config("ties", models=[{"model": {"model": "a", "override_architecture": "X"}}]),
         "override_architecture is not supported"),
        ("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0]}]\n",
         r"c.yml:3: .*layer_range must be \[first"),
        ("merge_method: passthrough\nslices:\n- {residual_weight: 1, sources: [{model: a,"
         " layer_range: [0, 1]}]}\n", "residual_weight is not supported"),
        ("merge_method: linear\nmodules: {a: {models: []}, b: {models: []}}\n",
         r"c.yml:2: more than one module \(a, b\)"),
        (config("slerp", models=[{"model": "a"}], parameters={"t": 1.5}), r"outside \[0, 1\]"),
        (config("multislerp", -1), "negative weight"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(text, says):
    text = text.replace("base_model: null\n", "")
    with pytest.raises(RecipeError, match=says):
        imported(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (config("task_arithmetic", chat_template="x"), "chat_template 'x' .*write the template"),
        (config("ties", models=[{"model": "a", "parameters": {"weight": 1}},
                                {"model": "b", "parameters": {"weight": -2}}]),
         "this is not reproduced; set normalize: false"),
    ],
)  # fmt: skip
def test_what_cannot_be_faithful_says_so(text, says):
    imported(text)
    text = text.replace("base_model: null\n", "")
    with pytest.raises(RecipeError, match=says):
        imported(text, faithful=True)


# Places


def test_relative_paths_are_those_of_the_recipe(tmp_path):
    for name in ("code", "other/math"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    text = TIES.replace("org/math", "other/math")
    found = imported(text, folder=tmp_path / "run")
    assert relocated(found, tmp_path / "run", tmp_path / "run") is found
    moved = relocated(found, tmp_path / "run", tmp_path / "recipes").recipe
    assert moved["anchor"] == "org/base"
    assert moved["tasks"]["math"]["model"] == "../run/other/math"
    assert moved["tasks"]["code"]["model"] == "../run/code"


def test_patterns_of_filters():
    assert whole_pattern("a[0]") == "*a[[]0]*"
    assert meant_pattern("1.mlp") == "*.1.mlp*"
    assert meant_pattern("") == "**"
    assert meant_pattern("layers.1\nmlp") == "*layers.1.*mlp*"
    assert whole_pattern("layers.1\nmlp") == "*layers.1*mlp*"


def test_an_imported_recipe_merges(tmp_path):
    write_family(tmp_path)
    weight = [{"filter": "mlp", "value": 0.5}, {"value": [0.2, 0.8]}]
    text = config("ties", weight, base_model="instruct", parameters={"density": 0.3})
    path = tmp_path / "r.yaml"
    path.write_text(imported(text, folder=tmp_path).text)
    done = engine.run(load_recipe(path), tmp_path / "out")
    manifest = json.loads((done.path / "taskvec-manifest.json").read_text())
    assert manifest["recipe"]["tasks"]["math"]["scale"]["depth"] == [0.2, 0.8]
