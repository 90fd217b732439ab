"""`taskvec extract` and `taskvec inspect` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tests.conftest import read_raw, run_cli

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def flags(family: dict[str, Path]) -> list[Any]:
    roles = ["--base", family["base"], "--instruct", family["instruct"], "--quiet"]
    return [*roles, "--task", f"math={family['math']}:0.5", "--task", f"code={family['code']}"]


@pytest.fixture
def recipe(tmp_path: Path, family: dict[str, Path]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: family/base\ninstruct: family/instruct\ntasks:\n"
        "  math: {model: family/math, scale: 0.5}\n  code: family/code\n"
        "method: {name: lata, scheme: linear}\n"
    )
    return path


def test_extract_and_merge_in_processes_of_their_own(tmp_path, family, recipe):
    out = tmp_path / "math.safetensors"
    code, stdout, err = run_cli("extract", recipe, out, "--task", "math", "--threads", "2")
    assert (code, err) == (0, "")
    size = out.stat().st_size / 1e3
    assert f"{out}  (task vector of 'math'; {size:.2f} kB; " in stdout
    assert "fingerprint " in stdout
    merged = {}
    for name, task in (("whole", family["math"]), ("apart", out)):
        code, _, err = run_cli(
            "merge", tmp_path / name, "--instruct", family["instruct"], "--task",
            f"math={task}:0.5", "--method", "task_arithmetic", "--threads", "2",
        )  # fmt: skip
        assert (code, err) == (0, "")
        merged[name] = read_raw(tmp_path / name)
    assert merged["whole"] == merged["apart"]


def test_recipe_and_flags_give_the_same(cli, tmp_path, flags, recipe):
    options = ["--what", "pure", "--scaled", "--task", "math", "--json"]
    code, out, err = cli("extract", recipe, tmp_path / "a.safetensors", *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["name"] == "pure vector of 'math'"
    assert result["tensors"] + len(result["left_out"]) == 32
    assert len(result["left_out"]) == 1  # the lowest rank has weight 0
    code, out, err = cli(
        "extract", tmp_path / "b.safetensors", *flags, *options, "--scheme", "linear"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["fingerprint"] == result["fingerprint"]
    code, out, err = cli(
        "extract", recipe, tmp_path / "c.safetensors", *options, "--dtype=bfloat16"
    )
    assert json.loads(out)["bytes"] < 0.6 * result["bytes"]


def test_a_table_from_a_file(cli, tmp_path, recipe):
    table, out = tmp_path / "table.csv", tmp_path / "v.safetensors"
    assert cli("scan", recipe, "--save-table", table, "--quiet")[0] == 0
    lines = table.read_text().splitlines()
    zeros = [lines[0]] + [f"{line.split(',')[0]},0,{int(Q in line)}" for line in lines[1:]]
    table.write_text("\n".join(zeros) + "\n")
    arguments = ["extract", recipe, out, "--task", "math", "--table", table]
    assert cli(*arguments, "--what", "pure")[0] == 0
    assert set(load_file(out)) == {Q}
    code, _, err = cli(*arguments, "--force")
    assert code == 2
    assert "layer weights go with a pure vector; got task" in err


def test_the_instruction_vector_needs_no_task(cli, tmp_path, family):
    out = tmp_path / "i.safetensors"
    roles = ["--base", family["base"], "--instruct", family["instruct"]]
    code, stdout, err = cli("extract", out, "--what", "instruction", *roles)
    assert (code, err) == (0, "")
    assert "instruction vector" in stdout
    code, _, err = cli("extract", out, "--what", "complex", *roles)
    assert code == 2
    assert "give a recipe, or --task NAME=MODEL[:SCALE] and the roles it needs" in err


def test_lora_is_reported_tensor_by_tensor(cli, tmp_path, flags):
    lora = ["extract", tmp_path / "lora", *flags, "--task", "math", "--form", "lora"]
    code, out, err = cli(*lora, "--rank", "4")
    assert code == 2
    assert "are no weights of linear layers" in err
    code, out, err = cli(*lora, "--rank", "4", "--rest", "drop")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert lines[Q][:2] == ["lora", "4"]
    assert lines["model.norm.weight"][:2] == ["dropped", "–"]
    assert "% of ‖τ‖² is not in the adapter" in out
    code, out, err = cli(*lora, "--energy", "0.5", "--rest", "drop", "--force", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    lost = sum((row["norm"] * row["error"]) ** 2 for row in result["factored"])
    assert result["lost"] == pytest.approx(lost / sum(r["norm"] ** 2 for r in result["factored"]))
    assert {row["kept"] for row in result["factored"]} == {"lora", "dropped"}
    assert all(row["error"] ** 2 < 0.5 + 1e-6 for row in result["factored"] if row["rank"])


def test_a_failed_extraction_leaves_nothing(cli, tmp_path, flags):
    code, _, err = cli("extract", tmp_path / "v.safetensors", *flags)
    assert code == 2
    assert err == "taskvec: error: tasks are code, math; name one of them\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family"]


def test_inspect(cli, tmp_path, family):
    code, out, err = cli("inspect", family["math"], "--tensors")
    assert (code, err) == (0, "")
    assert "24×24" in next(line for line in out.splitlines() if line.startswith(Q))
    assert "blocks    model 3" in out
    assert "other     2: odd, temperature" in out
    assert "NaN" not in out
    code, out, err = cli("inspect", family["math"], "--norms", "--threads", "2", "--quiet")
    assert "NaN       0; infinite 0" in out
    code, out, err = cli("inspect", family["math"], "--json")
    assert "layers" not in json.loads(out)
    code, out, err = cli("inspect", family["math"], "--json", "--tensors", "--norms")
    assert {row["name"] for row in json.loads(out)["layers"]} > {Q}
    code, out, err = cli("inspect", tmp_path / "absent")
    assert (code, out) == (1, "")
    assert "no such folder" in err
