"""The command in processes of its own: JSON, pipes, signals of what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.cli.conftest import strict
from tests.conftest import run_cli

from taskvec.methods import METHODS


def test_known_failure_in_a_real_process(tmp_path):
    code, out, err = run_cli(
        "scan", "--base", "a", "--instruct", "b", "--task", "m=c", cwd=tmp_path
    )
    assert (code, out) == (1, "")
    assert err == (
        f"taskvec: error: {tmp_path}/b: no such folder or file; a model is a folder, a "
        ".safetensors file, or org/name on the hub\n"
    )


def test_json_in_a_real_process(tmp_path, flags):
    code, out, err = run_cli("merge", tmp_path / "out", *flags, "--json")
    assert code == 0
    assert strict(out)["path"] == str(tmp_path / "out")
    assert "Traceback" not in err


def test_failure_with_json_prints_no_json(tmp_path, cli):
    code, out, err = cli("verify", tmp_path, "--json")
    assert (code, out) == (1, "")
    assert err.startswith("taskvec: error: ")


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
