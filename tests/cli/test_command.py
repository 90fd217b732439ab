"""The contract of the command line: output, exit codes, what is imported, flags beside recipes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import read_checkpoint, read_raw, run_cli

from taskvec.cli import main as entry
from taskvec.cli.main import VERBS
from taskvec.methods import METHODS

LIGHT = """
import contextlib, io, sys
from taskvec.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
heavy = {"numpy", "numba", "torch", "transformers", "yaml", "matplotlib", "tqdm", "safetensors"}
print(sorted(heavy & set(sys.modules)))
"""


def strict(text: str) -> Any:
    """JSON without the NaN and Infinity that Python would let pass."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def flags(family: dict[str, Path]) -> list[Any]:
    """A family with two tasks, as flags."""
    tasks = [f"{task}={family[task]}:0.5" for task in ("math", "code")]
    roles = ["--base", family["base"], "--instruct", family["instruct"]]
    return [*roles, "--task", tasks[0], "--task", tasks[1]]


@pytest.fixture
def recipe(tmp_path: Path, family: dict[str, Path]) -> Path:
    """The same family as a recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: family/base\ninstruct: family/instruct\ntasks:\n"
        "  math: {model: family/math, scale: 0.5}\n  code: {model: family/code, scale: 0.5}\n"
        "method: lata\n"
    )
    return path


# --- help and imports ----------------------------------------------------------------------------


def test_help(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    for verb, text in VERBS.items():
        assert verb in out
        assert text.split()[0] in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(cli, verb):
    code, out, err = cli(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: taskvec {verb} ")
    assert VERBS[verb][1:].split(",")[0] in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["merge", "--help"], ["scan", "-h"], []]
)
def test_nothing_heavy_is_imported_for_help(arguments):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n"


def test_version(cli):
    code, out, err = cli("--version")
    assert (code, err) == (0, "")
    assert out.strip().count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["mrege"], "argument VERB: invalid choice: 'mrege'"),
        (["merge"], "the following arguments are required: [RECIPE] OUT"),
        (["scan", "--sort", "size"], "argument --sort: invalid choice: 'size'"),
        (["merge", "out", "--threads", "0"], "must be a whole number above 0; got '0'"),
        (["merge", "out", "--threads", "two"], "must be a whole number above 0; got 'two'"),
        (["merge", "out", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_usage(cli, arguments, message):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "a", "b", "c"], "expected [RECIPE] OUT; got 3 paths, the third is 'c'"),
        (["merge", "out"], "give a recipe, or --task NAME=DIR[:SCALE] and the roles it needs"),
        (["scan"], "give a recipe, or --task NAME=DIR[:SCALE] and the roles it needs"),
        (["scan", "--task", "math"], "--task must be NAME=DIR or NAME=DIR:SCALE; got 'math'"),
        (["scan", "--task", "=x"], "--task must be NAME=DIR or NAME=DIR:SCALE; got '=x'"),
        (["scan", "--task", "m="], "--task must be NAME=DIR or NAME=DIR:SCALE; got 'm='"),
        (["scan", "--task", "m/x=y"],
         "command line: task name 'm/x' must be letters, digits and _ . + -"),
        (["scan", "--task", "m=y", "--anchor", "a", "--instruct", "b"],
         "command line: anchor and instruct are two names of one role; give one of them"),
        (["scan", "--task", "m=y", "--task", "m=z"],
         "--task m is given twice; give each task a name of its own"),
        (["merge", "out", "--task", "m=y"],
         "command line: scale of task 'm' is missing; lata has no default λ (try 0.5)"),
        (["merge", "out", "--task", "m=y:1e999"],
         "command line: scale of task 'm' must be a finite number; got inf"),
        (["merge", "out", "--task", "m=y:1", "--method", "lta"],
         "command line: unknown method 'lta'; did you mean 'lata'?"),
        (["merge", "out", "--task", "m=y:1", "--threshold", "1.5"],
         "command line: threshold of lata must be in [-1, 1]; got 1.5"),
        (["merge", "out", "--task", "m=y:1", "--scheme", "cubic"],
         "command line: scheme of lata must be in linear | logarithmic | threshold; got 'cubic'"),
        (["merge", "out", "--task", "m=y:1", "--method", "average", "--scheme", "linear"],
         "command line: unknown key 'scheme' in method; known: "),
        (["merge", "out", "--task", "m=y:1", "--dtype", "int8"],
         "command line: dtype must be in bfloat16 | float16 | float32 | float64; got 'int8'"),
        (["merge", "out", "--task", "m=y:1", "--shard-size", "big"],
         "command line: shard_size must be like 5GB or 500MB; got 'big'"),
        (["merge", "out", "--task", "m=y:1", "--precision", "half"],
         "command line: precision must be in float32 | float64; got 'half'"),
        (["merge", "no.yaml", "out"], "no.yaml: cannot be read: No such file or directory"),
        (["methods", "soup"], "unknown method 'soup'; known: "),
        (["forget", "out", "--task", "m=y:-1"],
         "forget subtracts: scale of task 'm' must be positive; got -1"),
        (["zoo", "copy"], "copy needs --to DIR"),
    ],
)  # fmt: skip
def test_usage_that_is_known_later(tmp_path, cli, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"taskvec: error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_known_failure_in_a_real_process(tmp_path):
    code, out, err = run_cli(
        "scan", "--base", "a", "--instruct", "b", "--task", "m=c", cwd=tmp_path
    )
    assert (code, out) == (1, "")
    assert err == (
        f"taskvec: error: {tmp_path}/b: no such folder or file; a model is a folder, a "
        ".safetensors file, or org/name on the hub\n"
    )


def test_folder_whose_name_ends_like_a_scale(tmp_path, family, cli):
    family["math"].rename(tmp_path / "run:2")
    flags = ["--instruct", family["instruct"], "--method", "task_arithmetic"]
    assert cli("merge", tmp_path / "out", *flags, "--task", f"m={tmp_path}/run:2:0.5")[0] == 0
    code, _, err = cli("merge", tmp_path / "two", *flags, "--task", f"m={tmp_path}/run:2")
    assert code == 1
    assert f"{tmp_path}/run: no such folder" in err


# --- JSON ----------------------------------------------------------------------------------------


def test_json_of_every_verb(tmp_path, cli, flags):
    out = tmp_path / "out"
    commands = {
        "scan": ["scan", *flags], "plan": ["plan", *flags, "--out", out],
        "merge": ["merge", out, *flags], "verify": ["verify", out, "--replay"],
        "methods": ["methods"],
        "forget": ["forget", tmp_path / "less", *flags],
    }  # fmt: skip
    got = {}
    for verb, command in commands.items():
        code, text, err = cli(*command, "--json")
        assert code == 0, err
        assert text.count("\n") == 1
        got[verb] = strict(text)
        assert err == "" or verb in ("scan", "merge", "forget")  # where there may be warnings
        assert all(line.startswith("taskvec: ") for line in err.splitlines())
    assert got["merge"]["path"] == str(out)
    assert got["merge"]["scale"] == {"code": 0.5, "math": 0.5}
    assert got["forget"]["scale"] == {"code": -0.5, "math": -0.5}
    assert (
        got["merge"]["fingerprint"]
        == json.loads((out / "taskvec-manifest.json").read_text())["output"]["fingerprint"]
    )
    assert {row["task"] for row in got["scan"]["layers"]} == {"math", "code"}
    assert len(got["scan"]["layers"]) == 2 * 32
    assert got["plan"]["tensors"] == {"merged": 32, "copied": 0, "compared": 0}
    assert got["plan"]["write_bytes"] == (out / "model.safetensors").stat().st_size
    assert [m["name"] for m in got["methods"]] == list(METHODS)


def test_json_where_numbers_are_infinite(family, cli):
    """No instruction vector: ρ is infinite, similarities are nothing."""
    flags = ["--base", family["instruct"], "--instruct", family["instruct"], "--task"]
    for task in (f"math={family['math']}", f"same={family['instruct']}"):
        code, out, _ = cli("scan", *flags, task, "--json")
        assert code == 0
        assert len(strict(out)["layers"]) == 32


def test_json_in_a_real_process(tmp_path, flags):
    code, out, err = run_cli("merge", tmp_path / "out", *flags, "--json")
    assert code == 0
    assert strict(out)["path"] == str(tmp_path / "out")
    assert "Traceback" not in err


def test_failure_with_json_prints_no_json(tmp_path, cli):
    code, out, err = cli("verify", tmp_path, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("taskvec: error: ")


# --- scan ----------------------------------------------------------------------------------------


def test_csv_to_a_file_and_to_standard_output(tmp_path, cli, flags):
    code, text, _ = cli("scan", *flags, "--csv", tmp_path / "rows.csv")
    assert code == 0
    assert text.startswith("task code, by tensor\n")
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


def test_sort(cli, flags):
    def order(text: str) -> list[str]:
        return [line.split()[0] for line in text.split("\n\n")[0].splitlines()[2:]]

    by_name = cli("scan", *flags)[1]
    by_similarity = cli("scan", *flags, "--sort", "similarity")[1]
    assert order(by_name) == sorted(order(by_name))
    assert order(by_similarity) != order(by_name)
    assert sorted(order(by_similarity)) == order(by_name)


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
    ("plot.png", b"\x89PNG\r\n"), ("plot.svg", b"<?xml"), ("plot.pdf", b"%PDF"),
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
    assert out.startswith("task math, by tensor\n")


# --- plan ----------------------------------------------------------------------------------------


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


# --- recipes and flags ---------------------------------------------------------------------------


def settled(cli: Any, *arguments: Any) -> dict[str, Any]:
    code, out, err = cli("plan", *arguments, "--json")
    assert code == 0, err
    return strict(out)


def test_flags_stand_for_a_recipe(tmp_path, cli, recipe, flags):
    assert cli("merge", recipe, tmp_path / "one")[0] == 0
    assert cli("merge", tmp_path / "two", *flags)[0] == 0
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")


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


def test_error_in_a_recipe_under_flags_has_its_line(tmp_path, cli, recipe):
    recipe.write_text(recipe.read_text() + "sed: 1\n")
    code, _, err = cli("merge", recipe, tmp_path / "out", "--scheme", "linear")
    assert code == 2
    assert err == f"taskvec: error: {recipe}:7: unknown key 'sed'; did you mean 'seed'?\n"


def test_forget_is_merge_with_the_sign_turned(tmp_path, family, cli):
    roles = ["--base", family["base"], "--instruct", family["instruct"], "--target", family["code"]]
    method = ["--scheme", "threshold"]
    assert cli("forget", tmp_path / "a", *roles, "--task", f"math={family['math']}:0.5")[0] == 0
    assert (
        cli("merge", tmp_path / "b", *roles, *method, "--task", f"math={family['math']}:-0.5")[0]
        == 0
    )
    assert read_raw(tmp_path / "a") == read_raw(tmp_path / "b")


def test_forget_takes_a_recipe_without_method(tmp_path, family, cli, recipe):
    recipe.write_text(recipe.read_text().replace("method: lata\n", ""))
    assert cli("merge", recipe, tmp_path / "m")[0] == 2
    code, out, _ = cli("forget", recipe, tmp_path / "f", "--json")
    assert code == 0
    assert strict(out)["decided_by"].startswith("lata")


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["table.csv", "table.json"])
def test_table_round_trip(tmp_path, cli, flags, name):
    path = tmp_path / name
    assert cli("scan", *flags, "--scheme", "linear", "--save-table", path)[0] == 0
    assert cli("merge", tmp_path / "one", *flags, "--scheme", "linear")[0] == 0
    assert cli("merge", tmp_path / "two", *flags, "--table", path)[0] == 0
    assert (
        cli("merge", tmp_path / "three", *flags, "--table", path, "--method", "task_arithmetic")[0]
        == 0
    )
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two") == read_raw(tmp_path / "three")


@pytest.mark.parametrize("name", ["table.csv", "table.json"])
def test_edited_table(tmp_path, family, cli, name):
    """Zero everywhere but in one tensor, with the weight that was written there."""
    flags = [
        "--instruct",
        family["instruct"],
        "--task",
        f"math={family['math']}:2",
        "--method",
        "task_arithmetic",
    ]
    path = tmp_path / name
    assert cli("scan", *flags, "--save-table", path)[0] == 0
    text = path.read_text()
    if name.endswith("json"):
        data = json.loads(text)
        data["weights"]["math"] = {n: -0.25 * (n == "odd") for n in data["weights"]["math"]}
        path.write_text(json.dumps(data))
    else:
        lines = text.replace(",1.0", ",0").replace("odd,0", "odd,-.25").splitlines()
        path.write_text("\r\n".join([lines[0], *reversed(lines[1:])]) + "\r\n")
    assert cli("merge", tmp_path / "out", *flags, "--table", path, "--dtype", "float32")[0] == 0
    got, start, task = (
        read_checkpoint(p) for p in (tmp_path / "out", family["instruct"], family["math"])
    )
    for tensor in got:
        expected = start[tensor].astype("f8")
        if tensor == "odd":
            expected = expected + 2 * -0.25 * (task["odd"].astype("f8") - start["odd"])
        assert got[tensor] == pytest.approx(expected, abs=1e-7)


def test_table_of_a_spreadsheet_with_a_byte_order_mark(tmp_path, cli, flags):
    path = tmp_path / "table.csv"
    assert cli("scan", *flags, "--save-table", path)[0] == 0
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert cli("merge", tmp_path / "out", *flags, "--table", path)[0] == 0


def rows(**changes: str) -> str:
    return "tensor,math\n" + "".join(
        f"{k},{v}\n" for k, v in {"a": "1", "b": "0.5", **changes}.items()
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", ": is not a table; the first line must be: tensor,TASK,…"),
        ("t.csv", "name,math\na,1\n", ": is not a table; the first line must be: tensor,TASK,…"),
        ("t.csv", "tensor\na\n", ": is not a table; the first line must be: tensor,TASK,…"),
        ("t.csv", "tensor,math,math\na,1,1\n", ": a task stands twice in the first line"),
        ("t.csv", rows() + "c,1,2\n", ":4: 3 fields, expected 2"),
        ("t.csv", rows() + "c\n", ":4: 1 fields, expected 2"),
        ("t.csv", rows() + "a,1\n", ":4: tensor 'a' stands twice"),
        ("t.csv", rows(a="x"), ": weight of 'math' for 'a' must be a finite number; got 'x'"),
        ("t.csv", rows(a="nan"), ": weight of 'math' for 'a' must be a finite number; got 'nan'"),
        ("t.csv", rows(a="inf"), ": weight of 'math' for 'a' must be a finite number; got 'inf'"),
        ("t.csv", rows(a=""), ": weight of 'math' for 'a' must be a finite number; got ''"),
        ("t.csv", "tensor,math\n" + "x" * 200_000,
         ": is not CSV (field larger than field limit (131072))"),
        ("t.json", "{", ": is not JSON (Expecting property name"),
        ("t.json", "[" * 100_000, ": is not JSON (maximum recursion depth exceeded"),
        ("t.json", "[]", ": is not a JSON object"),
        ("t.json", "{}", ": is not a table; expected weights by task and tensor"),
        ("t.json", '{"weights": {}}', ": is not a table; expected weights by task and tensor"),
        ("t.json", '{"weights": {"math": [1]}}',
         ": is not a table; expected weights by task and tensor"),
        ("t.json", '{"weights": {"math": {"a": 1}}, "target": 3}',
         ": is not a table; expected weights by task and tensor"),
        ("t.json", '{"weights": {"math": {"a": true}}}',
         ": weight of 'math' for 'a' must be a finite number; got True"),
        ("t.json", '{"weights": {"math": {"a": NaN}}}',
         ": weight of 'math' for 'a' must be a finite number; got nan"),
        ("t.json", '{"weights": {"math": {"a": [1]}}}',
         ": weight of 'math' for 'a' must be a finite number; got [1]"),
        ("t.json", '{"weights": {"math": {"a": 1' + "0" * 400 + "}}}",
         ": weight of 'math' for 'a' must be a finite number; got 1000"),
        ("t.json", '{"weights": {"math": {"a": 1}, "code": {"b": 1}}}',
         ": tensor 'a' has no weight for every task (see 'code')"),
    ],
)  # fmt: skip
def test_broken_table(tmp_path, cli, flags, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    code, out, err = cli("merge", tmp_path / "out", *flags, "--table", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"taskvec: error: {path}{message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_table_that_cannot_be_read(tmp_path, cli, flags):
    code, _, err = cli("merge", tmp_path / "out", *flags, "--table", tmp_path / "absent.csv")
    assert code == 2
    assert err.startswith(f"taskvec: error: {tmp_path}/absent.csv: cannot be read as a table: ")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    code, _, err = cli("merge", tmp_path / "out", *flags, "--table", tmp_path / "t.csv")
    assert code == 2
    assert err.startswith(f"taskvec: error: {tmp_path}/t.csv: cannot be read as a table: ")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("code"), "table t.json: has tasks math; the merge has code, math"),
        (lambda w: w.update(third=w["math"]),
         "table t.json: has tasks code, math, third; the merge has code, math"),
        (lambda w: [c.update({"odt": 1}) for c in w.values()],
         "table t.json: tensor 'odt' is not one that is merged; did you mean 'odd'?"),
        (lambda w: [c.pop("odd") for c in w.values()],
         "table t.json: no weight for tensor 'odd' (1 missing); give 0 to leave it alone"),
    ],
)  # fmt: skip
def test_table_that_does_not_fit(tmp_path, cli, flags, edit, message):
    path = tmp_path / "t.json"
    assert cli("scan", *flags, "--save-table", path)[0] == 0
    data = json.loads(path.read_text())
    edit(data["weights"])
    path.write_text(json.dumps(data))
    assert cli("merge", tmp_path / "out", *flags, "--table", path) == (
        2, "", f"taskvec: error: {message}\n",
    )  # fmt: skip


def test_average_takes_no_table(tmp_path, cli, flags):
    (tmp_path / "t.csv").write_text(rows())
    code, _, err = cli(
        "merge", tmp_path / "out", *flags, "--method", "average", "--table", tmp_path / "t.csv"
    )
    assert code == 2
    assert err == "taskvec: error: average takes no table; use task_arithmetic or lata\n"


# --- processes -----------------------------------------------------------------------------------


def test_reader_that_goes_away(flags):
    """As `taskvec scan … | head -1` does."""
    command = [sys.executable, "-m", "taskvec.cli.main", "scan", *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything is written
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"Traceback" not in err
    assert b"Broken" not in err


@pytest.mark.slow
def test_compilation_is_told_once(tmp_path, flags):
    """On a machine that has not compiled the kernels yet."""
    command = [sys.executable, "-m", "taskvec.cli.main", "scan", *map(str, flags), "--no-cache"]
    told = []
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "numba")},
        )  # fmt: skip
        assert done.returncode == 0
        told.append(done.stderr.count("taskvec: compiling kernels, once on this machine …\n"))
    assert told == [1, 0]


def test_progress_goes_to_standard_error(tmp_path, flags, monkeypatch, capsys):
    """Bars that would show after two seconds show at once here."""
    import tqdm

    real = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda *a, **k: real(*a, **{**k, "delay": 0}))
    assert entry.main(["merge", str(tmp_path / "out"), *map(str, flags), "--json"]) == 0
    captured = capsys.readouterr()
    assert strict(captured.out)["path"] == str(tmp_path / "out")
    assert "scan: 100%" in captured.err
    assert "merge: 100%" in captured.err
    assert entry.main(["merge", str(tmp_path / "two"), *map(str, flags), "--quiet"]) == 0
    assert "%|" not in capsys.readouterr().err


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
