"""`taskvec sweep` and `taskvec pairs` as a user runs them."""

from __future__ import annotations

import csv
import json
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from taskvec import zoo


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {zoo.path('base')}\ninstruct: {zoo.path('instruct')}\n"
        "method: {name: lata, scheme: threshold, threshold: 1}\ntasks:\n"
        f"  math: {{model: {zoo.path('math')}, scale: 1.0}}\n"
        f"  code: {{model: {zoo.path('code')}, scale: 0.5}}\n"
    )
    return path


def table_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_sweep_prints_writes_and_draws(cli, recipe, tmp_path):
    out = tmp_path / "out"
    code, text, err = cli(
        "sweep", recipe, "--vary", "threshold=-1,0.9,1", "--measure", "zoo:math",
        "--limit", "10", "--out", out, "--plot", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert text.splitlines()[0].startswith(
        "zoo:math: accuracy, high is wanted; n = 10, seed 0; the recipe as it is has 0."
    )
    assert "kept: shares of layers, of parameters and of ‖τ‖²" in text
    assert "Safe range of threshold: 1, 1 of 3 values. In it no measure is worse than" in text
    assert "It reaches the end of the sweep at 1." in text.replace("\n", " ")
    assert text.endswith("out/: sweep-threshold.json, sweep-threshold.csv, sweep-threshold.svg\n")
    assert (out / "sweep-threshold.svg").read_text().startswith("<svg")

    told = json.loads((out / "sweep-threshold.json").read_text())
    assert told["recipe"]["method"] == {"name": "lata"}
    assert "torch" in told["versions"]
    first, _, last = table_of(out / "sweep-threshold.csv")
    assert (first["threshold"], first["safe"], last["safe"]) == ("-1.0", "False", "True")
    assert (first["kept_layers math"], last["kept_energy code"]) == ("0.0", "1.0")
    assert float(last["zoo:math"]) == told["points"][2]["scores"]["zoo:math"]["value"]
    assert float(last["less_recipe zoo:math"]) == 0
    assert float(first["less_best zoo:math high"]) < 0


def test_a_sweep_as_json_and_without_measures(cli, recipe, tmp_path):
    code, text, _ = cli(
        "sweep", recipe, "--vary", "threshold=0.9,1", "--out", tmp_path / "out", "--json"
    )
    assert code == 0
    told = json.loads(text)
    assert (told["measures"], told["safe_range"]) == ({}, None)
    assert told["points"][1]["kept"]["code"]["parameters"] == 1.0
    table = table_of(tmp_path / "out" / "sweep-threshold.csv")
    assert list(table[0])[-2:] == ["safe", "error"]


def test_a_sweep_where_low_is_wanted_and_a_value_fails(cli, recipe, tmp_path):
    """Densities of one task; a figure over a logarithmic axis."""
    text = recipe.read_text().replace("name: lata, scheme: threshold, threshold: 1", "name: dare")
    recipe.write_text(text)
    out = tmp_path / "out"
    code, text, err = cli(
        "sweep", recipe, "--vary", "density.math=0.001:1:3log", "--minimize", "zoo:math",
        "--limit", "8", "--out", out, "--quiet", "--plot",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "zoo:math: accuracy, low is wanted" in text
    assert "kept: share of parameters" in text
    assert (out / "sweep-density.math.csv").is_file()
    assert (out / "sweep-density.math.svg").is_file()
    recipe.write_text(
        recipe.read_text().replace(
            "method: {name: dare}",
            "method: {name: lata, scheme: threshold, normalize_weights: norm}",
        )
    )
    code, text, err = cli(
        "sweep", recipe, "--vary", "threshold=-1,0.95,1", "--measure", "zoo:math",
        "--limit", "4", "--out", out, "--quiet",
    )  # fmt: skip
    assert code == 0
    assert err.startswith("taskvec: warning: threshold = -1 failed: normalize_weights of task")
    assert table_of(out / "sweep-threshold.csv")[0]["error"].startswith("normalize_weights")


def test_no_value_is_safe_where_goals_disagree(cli, recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace(f"  code: {{model: {zoo.path('code')}", "  #"))
    code, text, _ = cli(
        "sweep", recipe, "--vary", "scale=0,1", "--measure", "zoo:math", "--minimize",
        "zoo:math@accuracy", "--limit", "8", "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert code == 0
    told = text.replace("\n", " ")
    assert "No value of scale is safe, that is, none where no measure is worse than" in told
    assert "Closest: 0, where only zoo:math is worse." in told


def test_pairs_print_write_and_draw(cli, recipe, tmp_path):
    out = tmp_path / "out"
    code, text, err = cli(
        "pairs", recipe, "--measure", "math=zoo:math", "--measure", "code=zoo:code",
        "--limit", "6", "--out", out, "--plot", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert re.search(r"task +measure +metric +target +alone at its λ", text)
    assert "task  with  merged" in text
    assert "pair        cosine  of pure vectors  sign conflict  rank correlation" in text
    assert "Of 2 effects: synergy in " in text
    assert (out / "pairs.svg").read_text().startswith("<svg")
    told = json.loads((out / "pairs.json").read_text())
    table = table_of(out / "pairs.csv")
    assert [(row["task"], row["with"]) for row in table] == [("math", "code"), ("code", "math")]
    (pair,) = told["pairs"]
    for row in table:
        assert float(row["cosine"]) == pair["cosine"]
        assert float(row["less_single"]) == pair["effects"][row["task"]]["less_single"]["value"]
    code, text, _ = cli(
        "pairs", recipe, "--measure", "math=zoo:math", "--measure", "code=zoo:code",
        "--limit", "6", "--out", out, "--json", "--quiet",
    )  # fmt: skip
    assert json.loads(text) == {key: told[key] for key in ("tasks", "pairs")}


@pytest.mark.parametrize("verb", [["sweep", "--vary", "scale=1"], ["pairs"]])
def test_a_recipe_without_lambda_is_refused(cli, recipe, verb):
    """The recipe as it is has to be merged as well."""
    recipe.write_text(recipe.read_text().replace(", scale: 0.5", ""))
    code, out, err = cli(*verb, recipe)
    assert (code, out) == (2, "")
    assert err == "taskvec: error: scale of task 'code' is missing; lata has no default λ\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "--vary", "scale=1", "--trials", "3"], "No such option '--trials'"),
        (["pairs", "--trade-off"], "No such option '--trade-off'"),
        (["pairs", "--minimize", "zoo:math"], "No such option '--minimize'"),
        (["search", "--measure", "zoo:math"], "No such option '--measure'"),
        (["search", "--propose"], "No such option '--propose'"),
        (["sweep", "--vary", "scale"], "NAME=VALUES or NAME.TASK=VALUES; got 'scale'"),
        (["sweep", "--vary", "scale=1", "--vary", "threshold=1"], "given twice"),
        (["pairs", "--measure", "zoo:math"], "--measure takes TASK=MEASURE; got 'zoo:math'"),
        (["pairs", "--measure", "math=a", "--measure", "math=b"], "--measure math is given twice"),
    ],
)
def test_flags_that_do_not_go_together(cli, recipe, words, message):
    code, out, err = cli(*words, recipe)
    assert (code, out) == (2, "")
    assert message in err
