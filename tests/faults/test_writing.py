"""Faults while writing: at any operation, all of the old state or all of the new, and one line."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import read_raw, told
from tests.faults.states import digest, merging, names, old_model

from taskvec.files import write_whole
from taskvec.outputs import place, staging

CALLS = ("pwrite", "posix_fallocate", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
TAKES_ROOM = {"pwrite", "posix_fallocate", "mkdir", "write_bytes", "write_text"}


class Faulty:
    """Counts what is asked of the system, and lets the k-th call fail, or all from it on."""

    def __init__(self, patch: pytest.MonkeyPatch, below: Path) -> None:
        self.count, self.limit, self.error, self.on = 0, 0, 0, False
        self.failed: list[str] = []
        self._lock = threading.Lock()
        self._below = str(below)
        for name in CALLS:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        for name in ("write_bytes", "write_text"):
            patch.setattr(Path, name, self._counted(name, getattr(Path, name)))
        patch.setattr(staging, "exchange", self._counted("exchange", staging.exchange))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if str(args[0]).startswith("/") and not str(args[0]).startswith(self._below):
                return function(*args, **options)  # such as what Python keeps of compiled code
            with self._lock:
                self.count += 1
                is_hit = self.count == self.limit
                if self.error == errno.ENOSPC:  # a full disk stays full, but names can be removed
                    is_hit = 0 < self.limit <= self.count and name in TAKES_ROOM
            if is_hit and self.limit:
                self.failed.append(name)
                raise OSError(self.error, os.strerror(self.error))
            return function(*args, **options)

        return call

    def arm(self, limit: int, error: int) -> None:
        self.count, self.limit, self.error, self.failed = 0, limit, error, []


@pytest.mark.parametrize("before", ["absent", "old"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("points", [20, pytest.param(None, marks=pytest.mark.slow)])
def test_fault_at_any_operation(tmp_path, family, cli, monkeypatch, before, error, points):
    monkeypatch.setattr(staging, "SYNC_BYTES", 40_000)  # so that the journal is written often
    work, out = tmp_path / "work", tmp_path / "work" / "out"
    command = merging(family, out, "--force", "--threads", "2")
    work.mkdir()
    assert cli(*command)[0] == 0
    new = digest(out)
    faulty = Faulty(monkeypatch, work)

    def reset() -> str | None:
        faulty.arm(0, 0)
        shutil.rmtree(work)
        work.mkdir()
        return old_model(out) if before == "old" else None

    reset()
    faulty.arm(0, 0)
    assert cli(*command)[0] == 0
    total = faulty.count
    assert total > 60
    draw = random.Random(f"{before} {error}")
    limits = range(1, total + 1) if points is None else sorted(draw.sample(range(1, total), points))
    states = set()
    for limit in limits:
        old = reset()
        faulty.arm(limit, error)
        code, _, err = cli(*command)
        failed, faulty.limit = list(faulty.failed), 0
        left = digest(out)
        where = f"operation {limit} of {total}: {failed}: {err}"
        if code == 0:  # the fault hit what is only cleaning up, or nothing at all
            assert left == new, where
            assert set(failed) <= {"unlink", "rmdir", "mkdir"}, where
            assert err == "" or "old output could not be removed" in err, where
        else:
            assert code == 1, where
            assert err.startswith(f"taskvec: error: {out}: "), where
            assert err.count("\n") == 1, where
            is_in_place = "is in place, but the disk did not confirm it" in err
            assert left == (new if is_in_place else old), where
            if error == errno.ENOSPC:
                assert err.endswith(": the disk is full; nothing was left behind\n"), where
            states.add("new" if is_in_place else "old")
            left_over = set(names(work)) - {"out"}
            # Something stays only if removing failed, or beside a new folder that may not be safe.
            assert not left_over or is_in_place or {"unlink", "rmdir"} & set(failed), where
        assert cli(*command)[0] == 0, where
        assert digest(out) == new, where
        assert names(work) == ["out"], where
    assert "old" in states
    if points is None and error == errno.EIO:
        assert states == {"old", "new"}


def test_last_sync_that_fails_keeps_the_old_folder(tmp_path, family, cli, monkeypatch):
    """Nobody knows whether the renaming survives a crash, so the old state is not removed yet."""
    out = tmp_path / "out"
    old = old_model(out)

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(staging, "sync", sync)
        code, _, err = cli(*merging(family, out, "--force"))
    assert (code, err) == (
        1,
        f"taskvec: error: {out}: is in place, but the disk did not confirm it "
        "(Input/output error); check it with taskvec verify\n",
    )
    assert digest(tmp_path / ".out.taskvec") == old
    assert cli("verify", out)[0] == 0
    assert cli(*merging(family, out, "--force"))[0] == 0
    assert names(tmp_path) == ["family", "out"]


def test_what_cannot_be_removed_is_named(tmp_path, family, cli, monkeypatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        for name in ("pwrite", "unlink", "rmdir"):
            broken.setattr(os, name, refuse)
        code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err) == (
        1,
        f"taskvec: error: {tmp_path}/out: cannot be written: Input/output error; "
        f"remove {tmp_path}/.out.taskvec\n",
    )
    assert cli(*merging(family, tmp_path / "out"))[0] == 0
    assert names(tmp_path) == ["family", "out"]


def test_file_size_limit_of_a_process(tmp_path, family):
    """As on a disk that holds no files above 4 GB; a real limit of a real process."""
    script = (
        "import resource, sys\n"
        "from taskvec.cli.main import main\n"
        "assert main([*sys.argv[1:], '--threads', '1']) == 0  # what is compiled is kept\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(main([*sys.argv[1:], '--force']))\n"
    )
    command = [sys.executable, "-c", script, *merging(family, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, told(done.stderr)) == (
        1,
        f"taskvec: error: {tmp_path}/out: a file is too large for this place "
        "(try a smaller --shard-size); nothing was left behind\n",
    )
    assert names(tmp_path) == ["family", "out"]


def test_a_disk_that_is_really_full(tmp_path, family, cli, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk can be mounted by root only")
    try:
        (code, _, err), found = cli(*merging(family, disk / "out")), names(disk)
        assert (code, found) == (1, [])
        assert "of disk" in err  # known before
        monkeypatch.setattr(place, "free_bytes", lambda out: 10**9)  # somebody else fills it
        (code, _, err), found = cli(*merging(family, disk / "out")), names(disk)
        at_mount, _, there = cli(*merging(family, disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (code, found) == (1, [])
    assert err == f"taskvec: error: {disk}/out: the disk is full; nothing was left behind\n"
    assert at_mount == 1
    assert there == f"taskvec: error: {disk}: is where a disk is mounted; give a folder inside it\n"


# --- the place -----------------------------------------------------------------------------------


def test_folders_above_a_failed_output_are_removed(tmp_path, family, cli, monkeypatch):
    out = tmp_path / "a" / "b" / "out"

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", refuse)
        assert cli(*merging(family, out))[0] == 1
    assert names(tmp_path) == ["family"]
    (tmp_path / "a").mkdir()  # this one is somebody's, and stays
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", refuse)
        assert cli(*merging(family, out))[0] == 1
    assert (names(tmp_path), names(tmp_path / "a")) == (["a", "family"], [])
    assert cli(*merging(family, out))[0] == 0
    assert names(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("at", ["begin", "half way", "publish"])
def test_place_that_vanishes(tmp_path, family, cli, monkeypatch, at):
    """Somebody removes the folder that the output is to lie in, with what is written there."""
    place = tmp_path / "place"
    called = {"begin": "_open", "half way": "complete", "publish": "publish"}[at]
    real = getattr(staging.Staging, called)

    def vanish(self: Any, *args: Any) -> None:
        shutil.rmtree(place, ignore_errors=True)
        real(self, *args)

    monkeypatch.setattr(staging, "SYNC_BYTES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(staging.Staging, called, vanish)
        code, _, err = cli(*merging(family, place / "out"))
    assert (code, err) == (
        1,
        f"taskvec: error: {place}/out: cannot be written: No such file or directory; "
        "nothing was left behind\n",
    )
    assert names(tmp_path) == ["family"]
    assert cli(*merging(family, place / "out"))[0] == 0


def test_current_folder_that_vanishes(tmp_path, family):
    (tmp_path / "here").mkdir()
    script = (
        "import os, sys; os.rmdir(os.getcwd()); from taskvec.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *merging(family, tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path / "here", timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert told(done.stderr).startswith("taskvec: error: ")
    assert told(done.stderr).endswith("No such file or directory\n")
    assert told(done.stderr).count("\n") == 1


def test_standard_output_that_is_full(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "taskvec.cli.main", "methods"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1, "taskvec: error: standard output or a temporary file: No space left on device\n",
    )  # fmt: skip


# --- a staging folder that somebody touched ------------------------------------------------------


class Stopped(BaseException):
    """As little caught as a kill."""


@pytest.fixture
def left(tmp_path, family, cli, monkeypatch):
    """The staging folder of an interrupted merge, with the journal of what was done."""
    monkeypatch.setattr(staging, "SYNC_BYTES", 1)
    real = staging.Staging.complete

    def complete(self: Any, tensor: int, record: Any) -> None:
        real(self, tensor, record)
        if tensor > 9:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(staging.Staging, "complete", complete)
        with pytest.raises(Stopped):
            cli(*merging(family, tmp_path / "out", "--threads", "1"))
    return tmp_path / ".out.taskvec"


@pytest.mark.parametrize("line", [
    "[1]", "5", "null", '"word"', '{"odd": 5}', '{"odd": {"output": 3}}', '{"odd": {}}',
    '{"no such tensor": {"output": "0"}}', '{"odd": {"output": "0", "anchor": "0"}}', "\0\0\0",
])  # fmt: skip
def test_garbage_in_the_journal(tmp_path, family, cli, left, line):
    with (left / staging.JOURNAL).open("a") as journal:
        journal.write(f"{line}\n")
    assert cli(*merging(family, tmp_path / "out"))[0] == 0
    assert cli(*merging(family, tmp_path / "whole"))[0] == 0
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "whole")
    assert cli("verify", tmp_path / "out", "--replay")[0] == 0


def test_weights_that_changed_in_the_staging_folder(tmp_path, family, cli, left):
    """A byte of a tensor that the journal says is done: noticed, and worked out again."""
    shard = min(left.glob("*.safetensors"))
    done = len((left / staging.JOURNAL).read_text().splitlines()) - 1
    assert done >= 10
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert cli(*merging(family, tmp_path / "out"))[0] == 0
    assert cli(*merging(family, tmp_path / "whole"))[0] == 0
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "whole")


def test_files_that_somebody_put_into_the_staging_folder(tmp_path, family, cli, left):
    (left / "tokenizer.json").write_text("of another day")
    (left / "more").mkdir()
    assert cli(*merging(family, tmp_path / "out"))[0] == 0
    assert not {"tokenizer.json", "more"} & set(names(tmp_path / "out"))


# --- small files ---------------------------------------------------------------------------------


def test_small_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text("old")
    real = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        real(self, content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"new content")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["table.csv"]


def test_small_file_through_a_link_and_into_a_pipe(tmp_path):
    """A link stays one; a pipe (or /dev/null) is written to and not replaced by a file."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_whole(pipe, b"through")
    reader.join(10)
    assert got == [b"through"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("flag", ["--csv", "--save-table", "--save-scan", "--plot"])
def test_files_of_a_scan_are_written_whole(tmp_path, family, cli, monkeypatch, flag):
    path = tmp_path / "file.png"
    path.write_text("old")
    real = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.name.startswith(".file.png"):
            real(self, content[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = cli("scan", "--base", family["base"], "--instruct", family["instruct"],
                       "--task", f"math={family['math']}", flag, path)  # fmt: skip
    assert code == 1
    assert err.endswith(f"taskvec: error: {path}: cannot be written: No space left on device\n")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["family", "file.png"]


def test_copy_of_the_zoo_that_fails_leaves_nothing(tmp_path, cli, monkeypatch):
    def full(source: Any, target: Any, **options: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(shutil.copytree, "__kwdefaults__", None)
        broken.setattr(shutil.copytree, "__defaults__", (False, None, full, False, False))
        code, _, err = cli("zoo", "copy", "math", "--to", tmp_path / "zoo")
    assert code == 1
    assert err.startswith(f"taskvec: error: {tmp_path}/zoo/math: cannot be written: ")
    assert err.count("\n") == 1
    assert names(tmp_path / "zoo") == []
    assert cli("zoo", "copy", "math", "--to", tmp_path / "zoo")[0] == 0
