"""Inputs that change, end early, vanish or fail while they are read: one line, nothing written."""

from __future__ import annotations

import errno
import os
import pwd
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import family_weights, read_raw, write_checkpoint, write_safetensors
from tests.faults.states import merging, names

import taskvec as tv
from taskvec.checkpoints import folder as folders
from taskvec.checkpoints import stored
from taskvec.checkpoints.folder import open_checkpoint
from taskvec.errors import StaleError
from taskvec.merging import scans

FILE = "model.safetensors"


def scanning(family: dict[str, Path], *more: Any) -> list[str]:
    return ["scan", "--base", str(family["base"]), "--instruct", str(family["instruct"]),
            "--task", f"math={family['math']}", "--task", f"code={family['code']}",
            "--quiet", *map(str, more)]  # fmt: skip


class Reading:
    """Something that happens at the k-th reading of a block."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.limit, self.act = 0, 0, (lambda: None)
        real = os.pread

        def pread(*args: Any) -> bytes:
            self.count += 1
            if self.count == self.limit:
                self.act()
            return real(*args)

        patch.setattr(stored.os, "pread", pread)

    def at(self, limit: int, act: Callable[[], Any]) -> None:
        self.count, self.limit, self.act = 0, limit, act


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    """In place: the same file, other weights of the same size, some of them NaN."""
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 1000)


def replace(path: Path) -> None:
    """As most programs save: another file takes the name."""
    weights = {name: array * 2 for name, array in family_weights()["math"].items()}
    write_safetensors(path.with_name("new"), weights)
    path.with_name("new").replace(path)


CHANGES = {
    "cut": (cut, ("was cut short while it was read", "changed while it was read")),
    "emptied": (empty, ("was cut short while it was read", "changed while it was read")),
    "rewritten": (rewrite, ("changed while it was read",)),
    "replaced": (replace, ("changed while it was read",)),
    "removed": (Path.unlink, ("vanished while it was read",)),
    "folder removed": (lambda p: shutil.rmtree(p.parent), ("vanished while it was read",)),
}


@pytest.mark.parametrize("verb", ["scan", "merge", "lata"])
@pytest.mark.parametrize("change", CHANGES)
def test_input_that_changes(tmp_path, family, cli, monkeypatch, verb, change):
    """At a random block, in any role: with memory maps, a file cut short killed the process."""
    act, told = CHANGES[change]
    out = tmp_path / "out"
    lata = ["merge", out, *scanning(family)[1:-5], "--task", f"math={family['math']}:0.5"]
    command = {"scan": scanning(family), "merge": merging(family, out), "lata": lata}[verb]
    reading = Reading(monkeypatch)
    reading.at(0, lambda: None)
    assert cli(*command, "--threads", "1", "--no-cache")[0] == 0
    total = reading.count
    shutil.rmtree(out, ignore_errors=True)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "family", kept)
    draw = random.Random(f"{verb} {change}")
    for threads in (1, 2, 2):
        member = draw.choice(["math", "instruct"])
        reading.at(draw.randint(1, total), lambda p=family[member] / FILE: act(p))
        code, printed, err = cli(*command, "--threads", threads)
        assert (code, printed) == (1, ""), err
        assert err.startswith(f"taskvec: error: {family[member]}/{FILE}: "), err
        assert any(words in err for words in told), err
        assert "; run again" in err
        assert err.count("\n") == 1
        assert names(tmp_path) == ["family", "kept"]
        if verb == "scan":  # what was measured of files that changed is not kept
            assert list(Path(os.environ["TASKVEC_CACHE"]).glob("*")) == []
        reading.at(0, lambda: None)
        shutil.rmtree(tmp_path / "family")
        shutil.copytree(kept, tmp_path / "family")
    assert cli(*command)[0] == 0  # nothing of all that is remembered


@pytest.mark.parametrize("verb", ["scan", "merge"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_disk_that_fails_while_it_is_read(tmp_path, family, cli, monkeypatch, verb, error):
    command = scanning(family) if verb == "scan" else merging(family, tmp_path / "out")

    def fail() -> None:
        raise OSError(error, os.strerror(error))

    reading = Reading(monkeypatch)
    for limit in (1, 7, 50):
        reading.at(limit, fail)
        code, printed, err = cli(*command, "--threads", "2")
        assert (code, printed, err.count("\n")) == (1, "", 1)
        assert any(
            err == f"taskvec: error: {path}/{FILE}: cannot be read: {os.strerror(error)}\n"
            for path in family.values()
        ), err
        assert names(tmp_path) == ["family"]
    reading.at(0, fail)
    assert cli(*command)[0] == 0


def test_message_of_a_file_that_ends_early(tmp_path, family):
    checkpoint = open_checkpoint(family["math"])
    view = checkpoint.view("lm_head.weight")
    os.truncate(family["math"] / FILE, 1000)
    with pytest.raises(StaleError) as caught:
        view.read(0, 10)
    end = checkpoint.tensors["lm_head.weight"].offset + 20
    assert str(caught.value) == (
        f"{family['math']}/{FILE}: was cut short while it was read: 1,000 bytes, at least {end:,} "
        "are expected; run again when it is at rest"
    )


def test_file_that_is_replaced_between_header_and_weights(tmp_path, family, monkeypatch):
    """Offsets of one file must never be used with the bytes of another."""
    path = family["math"] / FILE
    real = folders.read_header

    def read_header(opened: Path) -> Any:
        found = real(opened)
        if opened == path:
            replace(path)
        return found

    monkeypatch.setattr(folders, "read_header", read_header)
    checkpoint = open_checkpoint(family["math"])
    with pytest.raises(StaleError, match=r"model.safetensors: changed while it was read; run ag"):
        checkpoint.view("odd")


def test_file_that_vanishes_before_it_is_read(family):
    checkpoint = open_checkpoint(family["math"])
    (family["math"] / FILE).unlink()
    with pytest.raises(StaleError, match=r"model.safetensors: vanished while it was read; run ag"):
        checkpoint.view("odd")


def test_blocks_do_not_change_after_they_were_read(family):
    """What is merged is what was digested, whoever writes meanwhile."""
    view = open_checkpoint(family["math"]).view("odd")
    block = view.read(0, 7)
    before = block.copy()
    rewrite(family["math"] / FILE)
    assert np.array_equal(block, before)


def test_short_reads_are_completed(tmp_path, family, cli, monkeypatch):
    """Linux gives at most 2 GiB at once, network disks less."""
    assert cli(*merging(family, tmp_path / "whole"))[0] == 0
    real = os.pread
    monkeypatch.setattr(stored.os, "pread", lambda fd, n, at: real(fd, min(n, 999), at))
    assert cli(*merging(family, tmp_path / "out"))[0] == 0
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "whole")


def test_more_files_than_a_process_may_open(tmp_path):
    """A limit that a process may raise itself is raised; a real limit of a real process."""
    weights = {f"t{i}": np.ones(3, np.float32) for i in range(60)}
    many = write_checkpoint(tmp_path / "many", weights, shards=60)
    script = (
        "import resource, sys\n"
        "import taskvec as tv\n"
        "from taskvec.checkpoints.folder import open_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))\n"
        "found = open_checkpoint(sys.argv[1])\n"
        "print(sum(float(found.view(n).read(0, 3).size) for n in found.tensors))\n"
    )

    def run(*limits: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, many, *map(str, limits)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    soft = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert run(40, soft).stdout == "180.0\n"
    assert ": cannot be read: Too many open files" in run(40, 40).stderr


# --- the cache without a home --------------------------------------------------------------------


def test_without_a_home_there_is_no_cache_and_no_error(family, monkeypatch):
    for name in ("HOME", "TASKVEC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert scans.cache_folder() is None
    found = tv.Family(instruct=family["instruct"], tasks={"math": family["math"]})
    assert tv.scan(found).tasks == ("math",)


def test_cache_that_cannot_be_written_or_read_is_no_error(family, monkeypatch):
    monkeypatch.setenv("TASKVEC_CACHE", "/proc/no/such")
    found = tv.Family(instruct=family["instruct"], tasks={"math": family["math"]})
    assert tv.scan(found).tasks == ("math",)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without a home")
def test_real_user_without_a_home(tmp_path):
    script = (
        "import os, pwd\nfrom taskvec.merging.scans import cache_folder\n"
        "os.setuid(54321)\nprint(cache_folder())\n"
    )
    homes = ("HOME", "TASKVEC_CACHE", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in homes}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env,
                          timeout=60)  # fmt: skip
    assert done.stdout == "None\n", done.stderr


# --- who is named --------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["instruct", "anchor"])
@pytest.mark.parametrize("method", ["lata", "task_arithmetic"])
def test_nan_is_told_in_the_words_of_the_recipe(tmp_path, family, cli, word, method):
    weights = family_weights()["instruct"]
    weights["odd"] = weights["odd"] * np.nan
    write_checkpoint(family["instruct"], weights)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{word}: family/instruct\nbase: family/base\n"
        f"tasks:\n  math: {{model: family/math, scale: 1}}\nmethod: {method}\n"
    )
    code, _, err = cli("merge", recipe, tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(
        f"taskvec: error: {word} ({family['instruct']}): tensor 'odd' holds nan at element 0 "
    )


def test_nan_in_a_target_of_its_own(tmp_path, family, cli):
    weights = family_weights()["instruct"]
    weights["odd"] = weights["odd"] * np.nan
    write_checkpoint(tmp_path / "other", weights)
    command = merging(family, tmp_path / "out", "--target", tmp_path / "other")
    code, _, err = cli(*command)
    assert code == 1
    assert err.startswith(f"taskvec: error: target ({tmp_path}/other): tensor 'odd' holds nan at ")
