"""`taskvec scan`: what it shows, in which order, and what it writes."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from tests.cli.conftest import strict
from tests.conftest import write_checkpoint


def test_csv_to_a_file_and_to_standard_output(tmp_path, cli, flags):
    code, text, _ = cli("scan", *flags, "--csv", tmp_path / "rows.csv")
    assert code == 0
    assert text.startswith("similarity to instruction tuning, by tensor; ")
    written = (tmp_path / "rows.csv").read_text()
    code, out, _ = cli("scan", *flags, "--csv", "-")
    assert (code, out) == (0, written)
    rows = list(csv.DictReader(io.StringIO(written)))
    assert len(rows) == 64
    assert list(rows[0]) == [
        "task", "layer", "tower", "block", "module", "elements", "similarity", "rank", "norm_ratio",
        "task_cosine", "linear", "logarithmic", "threshold", "task_norm", "instruction_norm",
        "anchor_norm",
    ]  # fmt: skip
    row = next(r for r in rows if r["task"] == "math" and r["layer"] == "model.embed_tokens.weight")
    ratio, cosine = float(row["norm_ratio"]), float(row["task_cosine"])
    similarity = (1 + ratio * cosine) / math.sqrt(1 + 2 * ratio * cosine + ratio**2)
    assert float(row["similarity"]) == pytest.approx(similarity, abs=1e-12)


def test_json_and_csv_cannot_both_have_standard_output(cli, flags):
    code, out, err = cli("scan", *flags, "--json", "--csv", "-")
    assert (code, out) == (2, "")
    assert err == (
        "taskvec: error: --json and --csv - both write to standard output; give --csv a file\n"
    )


def layers_of(text: str, head: str) -> list[str]:
    """The first column of the table that begins with a line like `head`."""
    (table,) = [part for part in text.split("\n\n") if part.startswith(head)]
    return [line.split()[0] for line in table.splitlines()[2:]]


def test_sort(cli, flags):
    by_order = layers_of(cli("scan", *flags, "--full")[1], "task math, by tensor")
    by_similarity = layers_of(
        cli("scan", *flags, "--full", "--sort", "similarity")[1], "task math, by tensor"
    )
    assert by_similarity != by_order
    assert sorted(by_similarity) == sorted(by_order)


def test_one_screen_has_summary_then_blocks_and_tasks_as_in_the_recipe(cli, flags):
    code, out, _ = cli("scan", *flags)
    assert code == 0
    summary, _, blocks = out.split("\n\n")[:3]
    assert [line.split()[0] for line in summary.splitlines()[1:]] == ["task", "math", "code"]
    assert blocks.splitlines()[1].split()[2:] == [
        "math", "similarity", "math", "ρ", "math", "weight",
        "code", "similarity", "code", "ρ", "code", "weight",
    ]  # fmt: skip
    assert len(out.splitlines()) < 30
    assert len(cli("scan", *flags, "--full")[1].splitlines()) > 64
    assert "task math, by module" in cli("scan", *flags, "--granularity", "module")[1]


def test_weight_of_a_block_is_the_mean_of_the_weights_that_a_merge_uses(tmp_path, cli, flags):
    path = tmp_path / "table.csv"
    code, out, _ = cli("scan", *flags, "--save-table", path)
    assert code == 0
    blocks = next(part for part in out.split("\n\n") if part.startswith("by block"))
    (line,) = [line.split() for line in blocks.splitlines() if line.startswith("model/1 ")]
    sizes = {row["layer"]: row["elements"] for row in strict(
        cli("scan", *flags, "--json")[1])["layers"]}  # fmt: skip
    rows = [r for r in csv.DictReader(io.StringIO(path.read_text())) if ".layers.1." in r["tensor"]]
    whole = sum(sizes[r["tensor"]] for r in rows)
    mean = sum(float(r["math"]) * sizes[r["tensor"]] for r in rows) / whole
    assert float(line[4]) == pytest.approx(mean, abs=1e-4)


BLOCKS = 13
IN_ORDER = ["model.embed_tokens.weight", *(f"model/{i}" for i in range(BLOCKS)),
            "model.norm.weight", "lm_head.weight"]  # fmt: skip


@pytest.fixture
def deep(tmp_path: Path) -> list[str]:
    """A family with more than ten blocks, as flags; its second task comes first by name."""
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    shapes |= {"lm_head.weight": (8, 4)}
    for block in range(BLOCKS):
        shapes |= {f"model.layers.{block}.{name}.weight": (4, 4) for name in
                   ("self_attn.q_proj", "mlp.up_proj")}  # fmt: skip
        shapes[f"model.layers.{block}.input_layernorm.weight"] = (4,)
    draw = np.random.default_rng(0).standard_normal
    start = {name: draw(shape).astype("f4") for name, shape in shapes.items()}
    for model in ("base", "instruct", "b", "a"):
        moved = {n: (x + 0.1 * draw(x.shape)).astype("f4") for n, x in start.items()}
        write_checkpoint(tmp_path / model, moved)
    tasks = [f"--task={task}={tmp_path / task}:0.5" for task in ("b", "a")]
    return [f"--base={tmp_path}/base", f"--instruct={tmp_path}/instruct", *tasks]


def test_layers_are_in_the_order_of_the_model(tmp_path, cli, deep):
    out = cli("scan", *deep)[1]
    assert layers_of(out, "by block") == IN_ORDER
    assert layers_of(out, "similarity to") == ["b", "a"]
    rows = strict(cli("scan", *deep, "--granularity", "block", "--json")[1])["layers"]
    assert [(r["task"], r["layer"]) for r in rows] == [(t, n) for t in "ba" for n in IN_ORDER]
    printed = csv.DictReader(io.StringIO(cli("scan", *deep, "--csv", "-")[1]))
    blocks = [int(r["block"]) for r in printed if r["block"] and r["task"] == "b"]
    assert blocks == sorted(blocks)
    assert blocks[-1] == BLOCKS - 1
    assert cli("scan", *deep, "--save-table", tmp_path / "t.csv")[0] == 0
    names = [row["tensor"] for row in csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text()))]
    assert names[0] == IN_ORDER[0]
    assert names[-2:] == IN_ORDER[-2:]
    assert [n.split(".")[2] for n in names[1:-2]] == [str(i) for i in range(BLOCKS) for _ in "123"]


def test_inspect_and_plan_are_in_the_order_of_the_model_and_the_recipe(tmp_path, cli, deep):
    layers = strict(cli("inspect", tmp_path / "a", "--tensors", "--json")[1])["layers"]
    assert [row["block"] for row in layers[1:-2]] == [i for i in range(BLOCKS) for _ in "123"]
    plan = strict(cli("plan", *deep, "--method", "task_arithmetic", "--json")[1])
    assert list(plan["inputs"])[-2:] == ["task 'b'", "task 'a'"]
    assert list(plan["decided"]) == ["b", "a"]
    assert list(plan["modules"]) == ["embedding", "attention", "mlp", "norm", "final_norm", "head"]
    adapter = ("--task", "a", "--form", "lora", "--rank", "1", "--rest", "drop", "--json")
    rows = strict(cli("extract", *deep, tmp_path / "lora", *adapter)[1])["factored"]
    assert [row["name"] for row in rows] == [layer["name"] for layer in layers]


def test_granularity(cli, flags):
    for granularity, count in (("tensor", 32), ("module", 3 * 4 + 5), ("block", 3 + 5)):
        code, out, _ = cli("scan", *flags, "--granularity", granularity, "--json")
        assert code == 0
        layers = {row["layer"] for row in strict(out)["layers"]}
        assert len(layers) <= count
        assert strict(out)["granularity"] == granularity


def test_save_scan(tmp_path, cli, flags):
    assert cli("scan", *flags, "--save-scan", tmp_path / "scan.json")[0] == 0
    saved = strict((tmp_path / "scan.json").read_text())
    assert saved["format"] == 1
    assert set(saved["members"]) == {"anchor", "base", "task:math", "task:code"}
    assert len(saved["tensors"]) == 32
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["scan.json"]


@pytest.mark.parametrize(("name", "begin"), [
    ("plot.png", b"\x89PNG\r\n"), ("plot.svg", b"<svg"), ("plot.pdf", b"%PDF"),
])  # fmt: skip
def test_plot(tmp_path, cli, flags, name, begin):
    code, _, err = cli("scan", *flags, "--plot", tmp_path / name)
    assert code == 0, err
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begin)
    assert len(content) > 5_000


@pytest.mark.parametrize("flag", ["--csv", "--plot", "--save-table", "--save-scan"])
def test_place_that_cannot_be_written(tmp_path, cli, flags, flag):
    path = tmp_path / "no" / "such" / "folder" / "x.png"
    code, _, err = cli("scan", *flags, flag, path)
    assert code == 1
    line = err.splitlines()[-1]
    assert line.startswith("taskvec: error: ")
    assert "No such file or directory" in line
    assert "Traceback" not in err


def test_plot_of_an_unknown_kind(tmp_path, cli, flags):
    code, _, err = cli("scan", *flags, "--plot", tmp_path / "plot.xyz")
    assert code in (1, 2)
    assert err.splitlines()[-1].startswith("taskvec: error: ")


def test_scan_without_base_says_so(family, cli):
    code, out, err = cli(
        "scan", "--instruct", family["instruct"], "--task", f"math={family['math']}"
    )
    assert code == 0
    assert "no base is given: similarity to instruction tuning cannot be known" in err
    assert "\nby block" in out


def test_json_where_numbers_are_infinite(family, cli):
    """No instruction vector: ρ is infinite, similarities are nothing."""
    flags = ["--base", family["instruct"], "--instruct", family["instruct"], "--task"]
    for task in (f"math={family['math']}", f"same={family['instruct']}"):
        code, out, _ = cli("scan", *flags, task, "--json")
        assert code == 0
        assert len(strict(out)["layers"]) == 32
