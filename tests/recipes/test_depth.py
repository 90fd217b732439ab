"""Scales that differ by layer, from recipe to folder, against the formula in NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import read_checkpoint, read_raw, run_cli, write_family
from tests.test_docs import DOCS, rows, sections

from taskvec.errors import ParameterError, RecipeError, UsageError
from taskvec.merging.prepare import prepare
from taskvec.outputs import run as engine
from taskvec.outputs.merge import negated
from taskvec.outputs.verify import verify
from taskvec.recipes.depth import interpolated
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Family
from taskvec.recipes.schema import ByLayer
from taskvec.streaming import RunOptions

SCALE = {
    "depth": [0.25, 0.75],
    "embedding": 0.125,
    "final_norm": 0.5,
    "head": -1.5,
    "outside": 2,
    "patterns": {
        "*.mlp.up*": 0.375,
        "*.mlp.*": [1, 0, 3],
        "odd": {"depth": [7], "outside": 0},
        "*layernorm*": {"depth": [0, 1]},
    },
}
BLOCKS = 3


def expected_scale(name: str) -> float:
    """The scale of each tensor, by hand."""
    if ".layers." not in name:
        return {"model.embed_tokens.weight": 0.125, "model.norm.weight": 0.5,
                "lm_head.weight": -1.5, "odd": 0, "temperature": 2}[name]  # fmt: skip
    block = int(name.split(".")[2])
    if ".mlp.up" in name:
        return 0.375
    if ".mlp." in name:
        return [1, 0, 3][block]
    if "layernorm" in name:
        return [0, 0.5, 1][block]
    return [0.25, 0.5, 0.75][block]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_family(tmp_path)
    return tmp_path


def write(root: Path, name: str, scale: object, method: object = "task_arithmetic", **more) -> Path:
    data = {
        "base": "base",
        "instruct": "instruct",
        "tasks": {"math": {"model": "math", "scale": scale}, "code": {"model": "code", "scale": 1}},
        "method": method,
        "out": {"dtype": "float32"},
    } | more
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def merged(root: Path, name: str, scale: object, method: object = "task_arithmetic", **more):
    recipe = load_recipe(write(root, name, scale, method, **more))
    return engine.run(recipe, root / name, options=RunOptions(threads=1))


def by_hand(root: Path, factor: float = 1.0) -> dict[str, np.ndarray]:
    anchor, math, code = (read_checkpoint(root / n) for n in ("instruct", "math", "code"))
    return {
        name: start + factor * expected_scale(name) * (math[name] - start) + (code[name] - start)
        for name, start in anchor.items()
    }


def test_every_tensor_gets_its_own_scale(root):
    got = read_checkpoint(merged(root, "out", SCALE).path)
    for name, value in by_hand(root).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    doubled = read_checkpoint(merged(root, "twice", SCALE | {"times": 2}).path)
    for name, value in by_hand(root, 2.0).items():
        np.testing.assert_allclose(doubled[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_one_number_everywhere_is_that_number(root):
    everywhere = {"patterns": {"*": 0.61}}
    for method in ("lata", "task_arithmetic", "ties", "dare", "dare_ties", "magnitude",
                   "breadcrumbs", "average"):  # fmt: skip
        plain = read_raw(merged(root, f"{method}-plain", 0.61, method).path)
        assert read_raw(merged(root, f"{method}-by-layer", everywhere, method).path) == plain


def test_average_is_weighted_tensor_by_tensor(root):
    scale = {"depth": [1, 3], "outside": 0}
    got = read_checkpoint(merged(root, "out", scale, "average").path)
    math, code = (read_checkpoint(root / n) for n in ("math", "code"))
    for name, value in got.items():
        share = [1, 2, 3][int(name.split(".")[2])] if ".layers." in name else 0
        exact = (share * math[name].astype(float) + code[name]) / (share + 1)
        np.testing.assert_allclose(value, exact, rtol=1e-6, atol=1e-7, err_msg=name)
    path = write(root, "none", scale, "average", tasks={"math": {"model": "math", "scale": scale}})
    with pytest.raises(ParameterError, match=r"got 0 for all for 'lm_head.weight'"):
        engine.run(load_recipe(path), root / "none")


def test_a_trim_over_the_model_is_of_the_vector_and_not_of_its_scale(root):
    """As with one number, λ comes after the selection."""
    method = {"name": "magnitude", "density": 0.3}
    layered = {"depth": [0.5, 2], "outside": 1}
    one = read_checkpoint(merged(root, "one", 1.0, method).path)
    got = read_checkpoint(merged(root, "two", layered, method).path)
    only_code = {"math": {"model": "math", "scale": 0}, "code": {"model": "code", "scale": 1}}
    start = read_checkpoint(merged(root, "start", 0, method, tasks=only_code).path)
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_allclose(got[name] - start[name], 0.5 * (one[name] - start[name]), atol=1e-6)


def test_manifest_replays_and_recipe_repeats(root):
    done = merged(root, "out", SCALE | {"times": 0.5}, "lata")
    assert {check.outcome for check in verify(done.path, replay=True)} == {"same"}
    again = engine.run(load_recipe(done.path / "taskvec.yaml"), root / "again")
    assert again.fingerprint == done.fingerprint
    code, _, err = run_cli("merge", done.path / "taskvec-manifest.json", root / "third")
    assert (code, "error" in err) == (0, False)
    assert read_raw(root / "third") == read_raw(done.path)


def test_a_stage_may_have_one(root):
    merged(root, "written", SCALE)
    stage = yaml.safe_load((root / "written.yaml").read_text())
    data = {"stages": {"first": stage}, "target": "stage:first", "method": "passthrough"}
    path = root / "two.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    assert read_raw(engine.run(load_recipe(path), root / "two").path) == read_raw(root / "written")


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("depth", r"scale of task 'math' has no value for 'model.layers.0.*; give depth: \[FIRST"),
        ("embedding", "'model.embed_tokens.weight', which is in no block; give embedding: NUMBER"),
        ("final_norm", "'model.norm.weight', which is in no block; give final_norm: NUMBER"),
        ("head", "'lm_head.weight', which is in no block; give head: NUMBER"),
        ("outside", "'odd', which is in no block; give outside: NUMBER"),
    ],
)
def test_a_value_that_lacks_is_an_error_and_never_the_first(root, without, says):
    scale = {key: value for key, value in SCALE.items() if key != without}
    if without in ("embedding", "final_norm", "head"):
        del scale["outside"]
    scale["patterns"] = {**SCALE["patterns"], "temperature": 1} if without != "outside" else {}
    recipe = load_recipe(write(root, "out", scale))
    with pytest.raises(UsageError, match=says):
        prepare(recipe)


def test_a_list_at_a_pattern_is_of_blocks_alone(root):
    scale = {"depth": 1, "outside": 1, "patterns": {"*norm*": [0, 1]}}
    with pytest.raises(UsageError, match=r"pattern '\*norm\*' of scale .* give outside: NUMBER"):
        prepare(load_recipe(write(root, "out", scale)))


def test_a_pattern_that_fits_nothing_is_an_error(root):
    scale = {"depth": 1, "outside": 1, "patterns": {"*.attn_x.*": 2}}
    with pytest.raises(UsageError, match=r"pattern '\*.attn_x.\*' fits no tensor"):
        prepare(load_recipe(write(root, "out", scale)))


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ({"dept": [1]}, "unknown key 'dept'.*did you mean 'depth'"),
        ({"depth": []}, "scale.depth must be a list that is not empty"),
        ({"depth": [0, "x"]}, "must be a finite number; got 'x'"),
        ({"depth": [0, float("nan")]}, "must be a finite number"),
        ({"patterns": ["*"]}, "scale.patterns must be a mapping"),
        ({"patterns": {"*": {"head": 1}}}, "unknown key 'head'"),
        ({"times": 2}, "gives no value"),
    ],
)
def test_what_is_wrong_in_it_is_told_with_its_line(root, scale, says):
    with pytest.raises(RecipeError, match=r"out.yaml:\d+: .*" + says):
        load_recipe(write(root, "out", scale))


def test_negative_values_are_refused_where_a_negative_scale_is(root):
    with pytest.raises(RecipeError, match="average takes no negative scale; got -1"):
        load_recipe(write(root, "out", {"depth": [1, -1], "outside": 1}, "average"))
    layered = load_recipe(write(root, "two", {"depth": [1, -1], "outside": 1}))
    with pytest.raises(UsageError, match="must be positive; got -1"):
        negated(layered)


def test_forgetting_negates_every_value(root):
    scale = {"depth": [0.25, 0.75], "outside": 0.5}
    tasks = {"math": {"model": "math", "scale": scale}}
    recipe = negated(load_recipe(write(root, "out", scale, tasks=tasks)))
    got = read_checkpoint(engine.run(recipe, root / "out").path)
    anchor, math = (read_checkpoint(root / n) for n in ("instruct", "math"))
    name = "model.layers.2.self_attn.q_proj.weight"
    expected = anchor[name] - 0.75 * (math[name] - anchor[name])
    np.testing.assert_allclose(got[name], expected, atol=1e-7)


def test_command_line_says_that_it_differs_by_layer(root):
    path = write(root, "out", SCALE)
    code, out, _ = run_cli("merge", path, root / "out", "--json")
    assert code == 0
    assert json.loads(out)["scale"]["math"]["depth"] == [0.25, 0.75]
    code, out, _ = run_cli("plan", path)
    assert code == 0
    assert "math: scale by layer" in out
    assert "| math | by layer |" in (root / "out" / "README.md").read_text()


def test_merging_in_python_takes_one(root):
    from taskvec.outputs.merge import merge

    family = Family({"math": root / "math", "code": root / "code"}, instruct=root / "instruct")
    done = merge(
        family,
        root / "python",
        method="task_arithmetic",
        scale={"math": SCALE, "code": 1},
        dtype="float32",
    )
    assert read_raw(done.path) == read_raw(merged(root, "out", SCALE).path)


def test_interpolation():
    assert [interpolated([5], b, 3) for b in range(3)] == [5, 5, 5]
    assert interpolated([1, 2], 0, 1) == 2
    assert [interpolated([0, 1], b, 5) for b in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_recipe_page_has_every_key_of_a_scale():
    page = sections(DOCS / "reference" / "recipe.md", 2)["Scale by layer"]
    for key in ByLayer.model_fields:
        assert f"| `{key}`" in page or f", `{key}`" in page
    assert rows(page)["depth"][1] == "none"
