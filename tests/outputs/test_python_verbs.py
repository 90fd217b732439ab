"""What the verbs take in Python, and what their results look like in a notebook."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from tests.conftest import read_raw

import taskvec as tv
from taskvec.errors import MissingExtraError, ParameterError, UsageError

SCALE = {"math": 0.5, "code": 0.25}


@pytest.fixture
def members(family):
    return {name: str(path) for name, path in family.items()}


@pytest.fixture
def tasks(members):
    return tv.Family(
        {name: members[name] for name in SCALE}, members["instruct"], base=members["base"]
    )


@pytest.fixture
def recipe_file(members, tmp_path):
    data = {
        "base": members["base"],
        "instruct": members["instruct"],
        "tasks": {n: {"model": members[n], "scale": s} for n, s in SCALE.items()},
        "method": {"name": "lata", "scheme": "linear"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    return path


def test_a_family_a_recipe_its_path_a_mapping_and_a_manifest_are_one(tasks, recipe_file, tmp_path):
    recipe = tv.load_recipe(recipe_file)
    first = tv.merge(recipe, tmp_path / "recipe")
    linear = tv.method("lata", scheme="linear")
    found = [
        tv.merge(recipe_file, tmp_path / "path"),
        tv.merge(str(recipe_file), tmp_path / "text"),
        tv.merge(json.loads(recipe_file.read_text()), tmp_path / "mapping"),
        tv.merge(tasks, tmp_path / "of-family", method=linear, scale=SCALE),
        tv.merge(first.path / "taskvec-manifest.json", tmp_path / "manifest"),
        tv.merge(first.path, tmp_path / "folder"),
    ]
    assert {each.fingerprint for each in found} == {first.fingerprint}


def test_options_override_a_recipe(recipe_file, tmp_path):
    recipe = tv.load_recipe(recipe_file)
    options = {"method": "dare", "scale": 0.4, "seed": 7, "dtype": "float16"}
    changed = tv.merge(recipe, tmp_path / "a", **options)
    written = json.loads((changed.path / "taskvec-manifest.json").read_text())["recipe"]
    assert written["method"] == {"name": "dare"}
    assert {task["scale"] for task in written["tasks"].values()} == {0.4}
    assert "scheme" not in written["tasks"]["math"]
    assert (written["seed"], written["out"]["dtype"]) == (7, "float16")
    other = tv.merge(recipe, tmp_path / "b", **options | {"seed": 8})
    assert other.fingerprint != changed.fingerprint


def test_a_parameter_for_all_tasks_replaces_that_of_each(recipe_file):
    prepared = tv.plan(recipe_file, method=tv.method("lata", scheme="threshold"))
    assert {p["scheme"] for p in prepared.recipe.parameters.values()} == {"threshold"}


def test_parameters_scale_and_layer_weights_of_one_task(members, tmp_path):
    spec = tv.TaskSpec(members["math"], scale=0.5, parameters={"density": 0.2})
    family = tv.Family(
        {"math": spec, "code": members["code"]}, members["instruct"], base=members["base"]
    )
    prepared = tv.plan(
        family,
        method=tv.method("dare", density=0.7),
        layer_weights=tv.method("lata", scheme="linear"),
        scale={"code": {"depth": [0.1, 0.9], "outside": 0.5}},
    )
    recipe = prepared.recipe
    assert {n: p["density"] for n, p in recipe.parameters.items()} == {"math": 0.2, "code": 0.7}
    assert recipe.scales["math"] == 0.5
    assert recipe.profiles.keys() == {"code"}
    assert repr(recipe.layer_weights).startswith("lata(scheme='linear'")


def test_stages(members, tasks, tmp_path):
    skills = tv.plan(tasks, method="task_arithmetic", scale=0.5).recipe
    second = tv.Family({"both": "stage:skills"}, members["instruct"])
    got = tv.merge(
        second, tmp_path / "out", method="task_arithmetic", scale=1.0, stages={"skills": skills}
    )
    tv.merge(skills, tmp_path / "skills")
    written = tv.Family({"both": tmp_path / "skills"}, members["instruct"])
    tv.merge(written, tmp_path / "two", method="task_arithmetic", scale=1.0)
    assert read_raw(got.path) == read_raw(tmp_path / "two")


def test_a_table_as_a_file_and_in_a_recipe(tasks, tmp_path):
    table = tv.lata(tv.scan(tasks), scheme="linear")
    table.save(tmp_path / "t.csv")
    one = tv.merge(tasks, tmp_path / "a", table=table, scale=SCALE)
    two = tv.merge(tasks, tmp_path / "b", table=tmp_path / "t.csv", scale=SCALE)
    recipe = tv.plan(tasks, method="task_arithmetic", scale=SCALE).recipe
    three = tv.merge(replace(recipe, table=tmp_path / "t.csv"), tmp_path / "c")
    assert one.fingerprint == two.fingerprint == three.fingerprint
    plain = tv.merge(recipe, tmp_path / "d")
    assert plain.fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({}, UsageError, "method is missing"),
        ({"method": "lata", "scale": {"maths": 1}}, UsageError, "did you mean 'math'"),
        ({"method": {"name": "lata", "shceme": "x"}, "scale": 1}, UsageError, "scheme"),
        ({"method": "task_arithmetic"}, UsageError, "scale of task"),
        ({"mehtod": "lata"}, TypeError, "did you mean 'method'"),
    ],
)
def test_what_is_refused(tasks, tmp_path, options, error, told):
    with pytest.raises(error, match=told):
        tv.merge(tasks, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_manifest_is_not_changed(recipe_file, tmp_path):
    merged = tv.merge(recipe_file, tmp_path / "a")
    with pytest.raises(UsageError, match="remove seed"):
        tv.merge(merged.path, tmp_path / "b", seed=3)


def test_a_method_is_checked_when_it_is_named():
    with pytest.raises(ParameterError, match="did you mean 'scheme'"):
        tv.method("lata", shceme="linear")
    with pytest.raises(ParameterError, match="did you mean 'linear'"):
        tv.method("lata", scheme="liner")


@pytest.mark.parametrize("verb", [tv.merge, tv.forget, tv.extract, tv.scan, tv.plan, tv.verify])
def test_the_same_options_have_the_same_names(verb):
    parameters = inspect.signature(verb).parameters
    assert {"threads", "cache", "progress"} <= parameters.keys()
    assert all(f"        {name}:" in verb.__doc__ for name in parameters)


def test_warnings_are_issued_and_kept(members, tmp_path):
    family = tv.Family({"same": members["instruct"]}, members["instruct"])
    with pytest.warns(tv.TaskvecWarning, match="vector is zero") as issued:
        merged = tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=1.0)
    assert [str(each.message) for each in issued] == list(merged.warnings)
    assert issued[0].filename == __file__


def test_results_in_a_notebook(tasks, tmp_path):
    pytest.importorskip("pandas")
    scan = tv.scan(tasks)
    table = tv.lata(scan)
    merged = tv.merge(tasks, tmp_path / "out", table=table, scale=SCALE)
    vector = tv.extract(tasks, tmp_path / "v.safetensors", task="math")
    seen = tv.inspect(tmp_path / "v.safetensors", norms=True)
    for shown in (scan, table, merged, vector, seen, tv.plan(tasks, method="lata", scale=1.0)):
        assert len(repr(shown)) < 200
        assert "\n" not in repr(shown)
    blocks = scan.to_pandas(granularity="block")
    assert set(blocks["task"]) == set(SCALE)
    assert {"similarity", "norm_ratio", "task_cosine"} <= set(blocks.columns)
    assert len(scan.to_pandas()) == 2 * len(scan.names) == len(table.to_pandas())
    for shown in (scan, table, merged, seen):
        assert shown._repr_html_().startswith("<table>")


def test_without_pandas_the_remedy_is_told(tasks):
    scan = tv.scan(tasks)
    absent = mock.patch.dict("sys.modules", {"pandas": None})
    with absent, pytest.raises(MissingExtraError, match=r"pip install 'taskvec\[report\]'"):
        scan.to_pandas()


def test_a_table_scales_an_adapter(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)

    config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model = peft.get_peft_model(Net(), config)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    names = ("first.weight", "second.weight")
    table = tv.Table(("math",), names, np.array([[0.5, 2.0]]))
    table.scale_adapter(model, 3.0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            factor = 1 if "lora_A" in name else 1.5 if "first" in name else 6.0
            torch.testing.assert_close(parameter.detach(), factor * before[name])
    with pytest.raises(UsageError, match=r"no weight for 'second\.weight'"):
        tv.Table(("math",), names[:1], np.ones((1, 1))).scale_adapter(model)
    with pytest.raises(UsageError, match="no active LoRA adapter"):
        table.scale_adapter(Net())


def test_verify_covers_the_files_beside_the_weights(recipe_file, tmp_path):
    out = tv.merge(recipe_file, tmp_path / "out").path
    assert {check.what: check.outcome for check in tv.verify(out)}["files"] == "same"
    config = (out / "config.json").read_bytes()

    def told():
        (check,) = [c for c in tv.verify(out, inputs=False) if c.what == "files"]
        return check.outcome, check.detail

    (out / "config.json").write_bytes(config + b"\n")
    assert told() == ("different", "changed: config.json")
    (out / "config.json").write_bytes(config)
    (out / "chat_template.jinja").write_text("{{ messages }}")
    assert told() == ("different", "added: chat_template.jinja")


def test_a_manifest_of_before_is_still_read(recipe_file, tmp_path):
    out = tv.merge(recipe_file, tmp_path / "out").path
    path = out / "taskvec-manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["output"]["files"]
    path.write_text(json.dumps(manifest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks = tv.verify(out, replay=True)
    assert {check.outcome for check in checks} == {"same"}
    assert "files" not in {check.what for check in checks}
