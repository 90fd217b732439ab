"""What killed runs leave: found, named, removed, and never what a running one uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from taskvec.errors import OutputError
from taskvec.outputs.leftovers import clean, leftovers
from taskvec.outputs.locking import locked

DEAD = 2**22 + 1  # above the largest number of a process


def leave(folder):
    """One of each kind; what belongs to an output of this name but is not a leftover."""
    (folder / ".a.taskvec").mkdir(parents=True)
    (folder / ".a.taskvec" / "model.safetensors").write_bytes(bytes(2_000_000))
    (folder / ".a.taskvec-lock").touch()
    (folder / ".b.taskvec-old").mkdir()
    (folder / ".b.taskvec-old" / "config.json").write_text("{}")
    (folder / f".c.json.taskvec-{DEAD}").write_text("[")
    (folder / f".d.json.taskvec-{os.getpid()}").write_text("[")
    (folder / "a").mkdir()
    (folder / ".taskvec").mkdir()
    (folder / "model.taskvec").touch()


def test_leftovers_are_found_with_size_and_age(tmp_path):
    leave(tmp_path)
    then = time.time() - 3 * 86400
    os.utime(tmp_path / ".a.taskvec", (then, then))
    found = {left.path.name: left for left in leftovers(tmp_path)}
    assert {name: left.kind for name, left in found.items()} == {
        ".a.taskvec": "half-written output", ".a.taskvec-lock": "lock",
        ".b.taskvec-old": "old output", f".c.json.taskvec-{DEAD}": "draft",
    }  # fmt: skip
    assert found[".a.taskvec"].nbytes >= 2_000_000
    assert str(found[".a.taskvec"]).endswith("MB, 3 days old")


def test_what_a_run_uses_is_left_alone(tmp_path):
    leave(tmp_path)
    program = (
        "import sys, time; from pathlib import Path; from taskvec.outputs.locking import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        kinds = {left.kind for left in clean(tmp_path)}
        holder.kill()
    assert kinds == {"old output", "draft"}
    assert (tmp_path / ".a.taskvec" / "model.safetensors").exists()


def test_clean_removes_leftovers_and_puts_an_old_output_back(tmp_path):
    leave(tmp_path)
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a", "b", f".d.json.taskvec-{os.getpid()}", ".taskvec", "model.taskvec"]
    )
    assert (tmp_path / "b" / "config.json").read_text() == "{}"
    assert leftovers(tmp_path) == []


def test_a_link_is_no_leftover(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / ".x.taskvec").symlink_to(tmp_path / "precious")
    assert clean(tmp_path) == []
    assert (tmp_path / "precious").is_dir()


def test_no_folder(tmp_path):
    with pytest.raises(OutputError, match="absent: cannot be read"):
        leftovers(tmp_path / "absent")


def test_looking_does_not_stop_a_run(tmp_path):
    with locked(tmp_path / "a"):
        leftovers(tmp_path)
    with locked(tmp_path / "a"):
        pass


def test_the_command_lists_and_removes(tmp_path, cli):
    leave(tmp_path)
    code, out, _ = cli("clean", tmp_path, "--dry-run")
    assert code == 0
    assert "would remove half-written output .a.taskvec" in out
    assert (tmp_path / ".a.taskvec").exists()
    code, out, _ = cli("clean", tmp_path, "--json")
    assert {row["kind"] for row in json.loads(out)} == {
        "half-written output", "lock", "old output", "draft",
    }  # fmt: skip
    code, out, _ = cli("clean", tmp_path)
    assert (code, out) == (0, f"{tmp_path}: nothing is left of earlier runs\n")


LORA = ["--form", "lora", "--rank", "2", "--rest", "drop"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["merge"], "mine"), (["merge", *LORA], "mine"),
        (["extract"], "mine.safetensors"), (["extract", *LORA], "mine"),
    ],
)  # fmt: skip
def test_leftovers_of_others_are_named(tmp_path, cli, family, words, name):
    leave(tmp_path / "outputs")
    roles = ("--base", family["base"], "--instruct", family["instruct"])
    out = tmp_path / "outputs" / name
    code, _, err = cli(*words, *roles, "--task", f"math={family['math']}:0.5", out)
    assert code == 0, err
    assert "half-written output .a.taskvec" in err
    assert f"taskvec clean {tmp_path / 'outputs'}" in err


def test_a_draft_of_a_process_of_another_user_is_left_alone(tmp_path, monkeypatch):
    def refuse(process, number):
        raise PermissionError

    leave(tmp_path)
    monkeypatch.setattr(os, "kill", refuse)
    assert "draft" not in {left.kind for left in leftovers(tmp_path)}
