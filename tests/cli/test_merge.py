"""`taskvec merge`: flags, recipes, places."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.cli.conftest import strict
from tests.conftest import read_raw


def test_flags_stand_for_a_recipe(tmp_path, cli, recipe, flags):
    assert cli("merge", recipe, tmp_path / "one")[0] == 0
    assert cli("merge", tmp_path / "two", *flags)[0] == 0
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")


def test_error_in_a_recipe_under_flags_has_its_line(tmp_path, cli, recipe):
    recipe.write_text(recipe.read_text() + "sed: 1\n")
    code, _, err = cli("merge", recipe, tmp_path / "out", "--scheme", "linear")
    assert code == 2
    assert err == f"taskvec: error: {recipe}:7: unknown key 'sed'; did you mean 'seed'?\n"


def test_folder_whose_name_ends_like_a_scale(tmp_path, family, cli):
    family["math"].rename(tmp_path / "run:2")
    flags = ["--instruct", family["instruct"], "--method", "task_arithmetic"]
    assert cli("merge", tmp_path / "out", *flags, "--task", f"m={tmp_path}/run:2:0.5")[0] == 0
    code, _, err = cli("merge", tmp_path / "two", *flags, "--task", f"m={tmp_path}/run:2")
    assert code == 1
    assert f"{tmp_path}/run: no such folder" in err


def test_surprising_name_of_a_task_or_folder(tmp_path, family, cli):
    folder = tmp_path / "größe mit leer:zeichen"
    family["math"].rename(folder)
    flags = [
        "--instruct",
        family["instruct"],
        "--method",
        "task_arithmetic",
        "--task",
        f"a.b+c-1={folder}:1",
    ]
    code, _, err = cli("merge", tmp_path / "ö ü", *flags)
    assert code == 0, err
    assert cli("verify", tmp_path / "ö ü", "--replay")[0] == 0
    assert (tmp_path / "ö ü").is_dir()


# --- settings ------------------------------------------------------------------------------------


def planned(cli: Any, *arguments: Any) -> dict[str, Any]:
    code, out, err = cli("plan", *arguments, "--json")
    assert code == 0, err
    return strict(out)


def test_settings_are_parameters_of_the_method_of_a_task_and_keys_of_a_recipe(cli, recipe):
    recipe.write_text(recipe.read_text().replace("method: lata", "method: {name: ties}"))
    plan = planned(
        cli, recipe, "--set", "density=0.3", "--set", "math.density=0.2", "--set", "code.scale=2"
    )
    densities = {t: p["density"] for t, p in plan["method"]["parameters"].items()}
    assert densities == {"math": 0.2, "code": 0.3}
    assert plan["scale"] == {"math": 0.5, "code": 2.0}


def test_a_flag_wins_over_what_tasks_have(cli, recipe):
    text = recipe.read_text().replace("method: lata", "method: {name: ties, density: 0.6}")
    recipe.write_text(text.replace("scale: 0.5}", "scale: 0.5, density: 0.4}", 1))
    plan = planned(cli, recipe, "--set", "density=0.3")
    assert {p["density"] for p in plan["method"]["parameters"].values()} == {0.3}
    assert planned(cli, recipe, "--method", "lata")["method"]["name"] == "lata"


def test_a_setting_is_checked_as_in_a_recipe_and_its_error_names_it(tmp_path, cli, recipe):
    recipe.write_text(recipe.read_text().replace("method: lata", "method: {name: ties}"))
    code, _, err = cli("merge", recipe, tmp_path / "out", "--set", "math.density=1.2")
    assert code == 2
    assert err.startswith("taskvec: error: --set math.density=1.2: density of ties must be")
    assert str(recipe) not in err


def test_seed_changes_what_is_random_and_is_recorded(tmp_path, cli, recipe):
    recipe.write_text(recipe.read_text().replace("method: lata", "method: {name: dare}\nseed: 1"))
    merges = {"as": [], "same": ["--seed", "1"], "other": ["--seed", "2"]}
    for name, seed in merges.items():
        code, _, err = cli("merge", recipe, tmp_path / name, *seed, "--set", "density=0.5")
        assert code == 0, err
    assert read_raw(tmp_path / "as") == read_raw(tmp_path / "same") != read_raw(tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "taskvec-manifest.json").read_text())
    assert manifest["recipe"]["seed"] == 2


@pytest.mark.parametrize("flag", [["--seed", "1"], ["--set", "scheme=linear"], ["--faithful"]])
def test_a_manifest_takes_no_flags(tmp_path, cli, flags, flag):
    assert cli("merge", tmp_path / "out", *flags)[0] == 0
    manifest = tmp_path / "out" / "taskvec-manifest.json"
    code, _, err = cli("merge", manifest, tmp_path / "two", *flag)
    assert code == 2
    assert f"remove {flag[0]}" in err


def test_out_as_an_option(tmp_path, cli, recipe, flags):
    assert cli("merge", recipe, "--out", tmp_path / "one")[0] == 0
    assert cli("merge", "-o", tmp_path / "two", *flags)[0] == 0
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")


def test_a_large_scale_is_a_warning_where_it_is_one(tmp_path, cli, flags):
    warning = "warning: scale of task 'math' is 50; usual values are between"
    assert warning in cli("merge", tmp_path / "a", *flags, "--set", "math.scale=50")[2]
    average = ["--method", "average", "--set", "math.scale=50", "--set", "code.scale=50"]
    assert "usual values" not in cli("merge", tmp_path / "b", *flags, *average)[2]


def test_a_folder_whose_name_ends_in_nan_is_a_folder(tmp_path, family, cli):
    family["math"].rename(tmp_path / "run:nan")
    flags = ["--instruct", family["instruct"], "--method", "task_arithmetic"]
    plan = planned(cli, *flags, "--task", f"m={tmp_path}/run:nan")
    assert plan["inputs"]["task 'm'"]["path"] == f"{tmp_path}/run:nan"


@pytest.mark.parametrize("method", ["ties", "dare", "consensus", "iso_c", "ram"])
def test_a_method_without_layer_weights_is_named_by_itself(tmp_path, cli, flags, method):
    """Not "ties of table": no table was given."""
    density = ["--set", "density=0.5"] if method in ("ties", "dare") else []
    code, out, err = cli("merge", tmp_path / "out", *flags, "--method", method, *density, "--json")
    assert code == 0, err
    assert strict(out)["decided_by"] == method


@pytest.mark.parametrize("verb", ["merge", "forget", "plan", "scan"])
def test_a_model_in_place_of_the_recipe(tmp_path, cli, family, verb):
    out = [tmp_path / "out"] if verb in ("merge", "forget") else []
    code, _, err = cli(verb, family["math"], *out)
    assert code == 2
    assert f"{family['math']}: is a folder" in err
    assert "--task NAME=MODEL" in err
