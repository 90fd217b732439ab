"""`taskvec plan`: what it says, and flags beside a recipe."""

from __future__ import annotations

import json
from typing import Any

from tests.cli.conftest import strict


def test_plan_reads_no_weights(family, cli, flags):
    path = family["math"] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xc0\x7f"  # a NaN that only reading would find
    path.write_bytes(content)
    code, out, err = cli("plan", *flags)
    assert (code, err) == (0, "")
    assert "tensors   32 merged, 0 copied from the target, 0 compared\n" in out
    assert "decided   when the weights are read\n" in out
    assert cli("scan", *flags)[0] == 1


def test_plan_needs_no_scales(family, cli):
    code, out, _ = cli("plan", "--instruct", family["instruct"], "--task", f"math={family['math']}",
                       "--method", "task_arithmetic")  # fmt: skip
    assert code == 0
    assert "math: scale not given" in out


def test_plan_checks_the_output(family, cli, flags):
    code, out, err = cli("plan", *flags, "--out", family["math"])
    assert (code, out) == (1, "")
    assert f"{family['math']}: is the input folder of task 'math'" in err


def settled(cli: Any, *arguments: Any) -> dict[str, Any]:
    code, out, err = cli("plan", *arguments, "--json")
    assert code == 0, err
    return strict(out)


def test_flags_replace_what_a_recipe_says(tmp_path, family, cli, recipe, monkeypatch):
    monkeypatch.chdir(
        family["base"].parent
    )  # paths in flags are relative to here, not to the recipe
    plan = settled(
        cli, recipe, "--task", "math=code:0.25", "--scheme", "linear", "--target", "math"
    )
    assert plan["scale"] == {"math": 0.25, "code": 0.5}
    assert plan["method"]["parameters"]["math"]["scheme"] == "linear"
    assert plan["inputs"]["task 'math'"]["path"] == str(family["code"])
    assert plan["inputs"]["target"]["path"] == str(family["math"])
    assert settled(cli, recipe, "--method", "task_arithmetic")["method"] == {
        "name": "task_arithmetic", "parameters": {"math": {}, "code": {}},
    }  # fmt: skip
    assert settled(cli, recipe, "--shard-size", "20kB")["shards"][0]["file"].endswith(
        "00004.safetensors"
    )
    assert settled(cli, recipe, "--exclude", "lm_head*")["tensors"]["copied"] == 1


def test_method_by_flag_drops_the_parameters_of_the_recipes_method(cli, recipe):
    recipe.write_text(
        recipe.read_text().replace("lata", "{name: lata, scheme: linear, threshold: 0.5}")
    )
    assert settled(cli, recipe, "--method", "average")["method"]["name"] == "average"
    plan = settled(cli, recipe, "--threshold", "0.9")
    assert plan["method"]["parameters"]["math"] == {
        "scheme": "linear", "granularity": "tensor", "threshold": 0.9, "normalize_weights": "none",
    }  # fmt: skip


def test_plan_says_how_often_weights_are_read_to_decide(family, cli):
    flags = ["--instruct", family["instruct"], "--task", f"math={family['math']}:1"]
    code, out, _ = cli("plan", *flags, "--method", "ties", "--json")
    assert code == 0
    both = 2 * sum(f.stat().st_size for f in family["math"].glob("*.safetensors"))
    asked = json.loads(out)["asks_for"]
    assert (asked["statistic"], asked["times"]) == ("thresholds", "2 or 3 times")
    assert 0.9 * both < asked["bytes"] < both  # headers are not read again
    _, out, _ = cli("plan", *flags, "--method", "ties")
    assert "decided   when the weights are read" in out
    assert " 2 or 3 times for thresholds, at most " in out
