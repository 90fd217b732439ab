"""Where a result may be written, and what is left when it cannot be: nothing, or the old state."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import read_raw

from taskvec import files as exchange
from taskvec.outputs import place, staging

Cli = Callable[..., tuple[int, str, str]]
Merge = Callable[..., tuple[int, str, str]]


@pytest.fixture
def merge(cli: Cli, family: dict[str, Path]) -> Merge:
    """Merge into a folder by the command; more flags can be given."""
    roles = ["--instruct", family["instruct"], "--task", f"math={family['math']}:0.5"]
    return lambda out, *flags: cli("merge", out, "--method", "task_arithmetic", *roles, *flags)


def state(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(result: tuple[int, str, str], message: str) -> None:
    """A known failure: one line, nothing on standard output."""
    assert result == (1, "", f"taskvec: error: {message}\n")


def old_model(folder: Path) -> dict[str, bytes]:
    (folder / "sub").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "sub" / "stale.bin").write_bytes(b"old")
    return state(folder)


# --- overlap with inputs -------------------------------------------------------------------------


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    ("out", "relation", "role", "member"),
    [
        ("family/math", "is", "task 'math'", "math"),
        ("family/instruct", "is", "target", "instruct"),
        ("family/math/merged", "is inside", "task 'math'", "math"),
        ("family/math/a/b/c", "is inside", "task 'math'", "math"),
        ("family", "contains", "target", "instruct"),
        (".", "contains", "target", "instruct"),
        ("family/other/../math", "is", "task 'math'", "math"),
        ("family/code/../../family/math/x", "is inside", "task 'math'", "math"),
        ("link-to-math", "is", "task 'math'", "math"),
        ("link-to-math/new", "is inside", "task 'math'", "math"),
        ("link-to-family", "contains", "target", "instruct"),
    ],
)
def test_overlap_with_an_input(tmp_path, merge, family, out, relation, role, member, force):
    (tmp_path / "family" / "other").mkdir()
    (tmp_path / "link-to-math").symlink_to("family/math")
    (tmp_path / "link-to-family").symlink_to(tmp_path / "family")
    before = state(tmp_path)
    given = os.path.join(tmp_path, out)  # noqa: PTH118 (Path would drop the dots)
    shown = Path(given)
    refused(
        merge(given, *force),
        f"{shown}: {relation} the input folder of {role} ({family[member]}); write elsewhere",
    )
    assert state(tmp_path) == before


def test_input_that_is_a_link_to_the_output(tmp_path, cli, family):
    (tmp_path / "link").symlink_to(family["math"])
    flags = ["--instruct", family["instruct"], "--task", f"math={tmp_path}/link:1"]
    result = cli("merge", family["math"], "--force", "--method", "task_arithmetic", *flags)
    refused(
        result,
        f"{family['math']}: is the input folder of task 'math' ({tmp_path}/link); write elsewhere",
    )


def test_name_that_begins_like_an_input_is_no_overlap(tmp_path, merge, family):
    assert merge(f"{family['math']}-merged")[0] == 0


def test_current_folder(tmp_path, merge, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for out in (".", "..", tmp_path / "here"):
        refused(
            merge(out, "--force"),
            f"{out}: contains the current folder; give another one",
        )
    assert (tmp_path / "here" / "below").is_dir()


# --- something is there already ------------------------------------------------------------------


def test_folder_that_is_not_empty(tmp_path, merge):
    old = old_model(tmp_path / "out")
    refused(
        merge(tmp_path / "out"),
        f"{tmp_path}/out: is not empty; --force replaces the whole folder",
    )
    assert state(tmp_path / "out") == old


def test_force_replaces_the_whole_folder(tmp_path, merge):
    old_model(tmp_path / "out")
    assert merge(tmp_path / "fresh")[0] == 0
    assert merge(tmp_path / "out", "--force")[0] == 0
    fresh, new = state(tmp_path / "fresh"), state(tmp_path / "out")
    assert set(fresh) == set(new)
    assert new["model.safetensors"] == fresh["model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", "fresh", "out"]


def test_force_replaces_shards_by_fewer(tmp_path, merge):
    assert merge(tmp_path / "out", "--shard-size", "20kB")[0] == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert merge(tmp_path / "out", "--force")[0] == 0
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_empty_folder_is_filled(tmp_path, merge):
    (tmp_path / "out").mkdir()
    assert merge(tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_folders_above_are_made(tmp_path, merge):
    assert merge(tmp_path / "a" / "b" / "out")[0] == 0
    assert (tmp_path / "a" / "b" / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("content", ["empty", "full"])
def test_link_to_a_folder_is_followed(tmp_path, merge, content):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    if content == "full":
        old_model(tmp_path / "disk" / "real" / "x")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    assert merge(tmp_path / "out", "--force")[0] == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "model.safetensors").exists()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]


def test_link_to_nothing_is_followed(tmp_path, merge):
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    assert merge(tmp_path / "out")[0] == 0
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_file_in_the_way(tmp_path, merge, force):
    (tmp_path / "out").write_text("precious")
    refused(merge(tmp_path / "out", *force), f"{tmp_path}/out: is a file; give a folder")
    assert (tmp_path / "out").read_text() == "precious"


def test_file_above_in_the_way(tmp_path, merge):
    (tmp_path / "file").write_text("precious")
    code, out, err = merge(tmp_path / "file" / "out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{tmp_path}/file/out: " in err
    assert (tmp_path / "file").read_text() == "precious"


def test_name_that_no_file_system_takes(tmp_path, merge):
    code, out, err = merge(tmp_path / ("x" * 300))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "File name too long" in err


# --- places and disks ----------------------------------------------------------------------------


def test_read_only_place(tmp_path, merge, monkeypatch):
    """Permission bits do not bind root, so the question itself is answered here."""
    monkeypatch.setattr(place.os, "access", lambda path, mode: False)
    refused(
        merge(tmp_path / "out"),
        f"{tmp_path}/out: {tmp_path} cannot be written; choose another place",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_read_only_folder(tmp_path, merge):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(
        merge(tmp_path / "locked" / "out"),
        f"{tmp_path}/locked/out: {tmp_path}/locked cannot be written; choose another place",
    )


def test_place_that_takes_no_files(merge):
    """/proc refuses even root."""
    code, out, err = merge("/proc/taskvec-test")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("taskvec: error: /proc/taskvec-test: ")


def test_not_enough_disk_is_known_before(tmp_path, merge, monkeypatch, family):
    old = old_model(tmp_path / "out")
    monkeypatch.setattr(place, "free_bytes", lambda out: 10_000)
    refused(
        merge(tmp_path / "new"),
        f"{tmp_path}/new: needs 0.30 MB of disk, 0.01 MB are free; free some space or write "
        "elsewhere",
    )
    assert merge(tmp_path / "out", "--force")[0] == 1
    assert state(tmp_path / "out") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", "out"]


def fails(error: int, after: int) -> Callable[..., Any]:
    """`os.pwrite` that fails after so many bytes."""
    left, real = [after], os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(error, os.strerror(error))
        written = real(fd, data[: max(1, left[0])], offset)  # and short writes before
        left[0] -= written
        return written

    return pwrite


def refuse_space(fd: int, offset: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_fsync(fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


FULL = "the disk is full; nothing was left behind"
FAILURES = {
    "no space at first": ("posix_fallocate", lambda: refuse_space, FULL),
    "no space for a byte": ("pwrite", lambda: fails(errno.ENOSPC, 0), FULL),
    "no space half way": ("pwrite", lambda: fails(errno.ENOSPC, 100_000), FULL),
    "quota": ("pwrite", lambda: fails(errno.EDQUOT, 10), FULL),
    "read-only suddenly": (
        "pwrite", lambda: fails(errno.EROFS, 10),
        "cannot be written: Read-only file system; nothing was left behind"),
    "broken disk": (
        "pwrite", lambda: fails(errno.EIO, 10),
        "cannot be written: Input/output error; nothing was left behind"),
    "broken disk at sync": (
        "fsync", lambda: fail_fsync,
        "cannot be written: Input/output error; nothing was left behind"),
}  # fmt: skip


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_while_writing(tmp_path, merge, monkeypatch, failure, exists):
    function, make, message = FAILURES[failure]
    if exists:
        old_model(tmp_path / "out")
    before = state(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(staging.os, function, make())
        refused(merge(tmp_path / "out", "--force", "--threads", "2"), f"{tmp_path}/out: {message}")
    assert state(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", *(["out"] if exists else [])]
    assert merge(tmp_path / "out", "--force")[0] == 0


def test_short_writes_are_completed(tmp_path, merge, monkeypatch):
    assert merge(tmp_path / "one")[0] == 0
    real = os.pwrite
    monkeypatch.setattr(staging.os, "pwrite", lambda fd, data, at: real(fd, data[:999], at))
    assert merge(tmp_path / "two")[0] == 0
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")


def test_disk_that_cannot_reserve_space(tmp_path, merge, monkeypatch):
    """Some file systems cannot; that is no failure."""

    def unsupported(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(staging.os, "posix_fallocate", unsupported)
    assert merge(tmp_path / "out")[0] == 0


# --- two runs ------------------------------------------------------------------------------------


def test_two_runs_into_one_folder(tmp_path, merge):
    old = old_model(tmp_path / "out")
    lock = tmp_path / ".out.taskvec-lock"
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(
            merge(tmp_path / "out", "--force"),
            f"{tmp_path}/out: another run is writing there; wait for it",
        )
        assert lock.exists()
        assert merge(tmp_path / "other")[0] == 0
    assert state(tmp_path / "out") == old
    assert merge(tmp_path / "out", "--force")[0] == 0  # the holder is gone, whatever it left
    assert not lock.exists()


def test_folder_that_was_put_aside_comes_back(tmp_path, merge):
    """Where names cannot be exchanged in one step, a kill can hit between two renames."""
    old = old_model(tmp_path / ".out.taskvec-old")
    (tmp_path / "out").write_text("in the way")
    assert merge(tmp_path / "out")[0] == 1
    (tmp_path / "out").unlink()
    assert merge(tmp_path / "out", "--exclude", "nothing*")[0] == 2
    assert merge(tmp_path / "out", "--force")[0] == 0
    assert not (tmp_path / ".out.taskvec-old").exists()
    assert set(state(tmp_path / "out")).isdisjoint(old)


def test_exchange_by_renames(tmp_path, merge, monkeypatch):
    """Systems without an exchange of names in one step."""
    old_model(tmp_path / "out")

    class Library:
        renameat2 = staticmethod(lambda *names: -1)

    monkeypatch.setattr(exchange.ctypes, "CDLL", lambda *a, **k: Library)
    monkeypatch.setattr(exchange.ctypes, "get_errno", lambda: errno.EINVAL)
    assert merge(tmp_path / "out", "--force")[0] == 0
    assert "notes.txt" not in state(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", "out"]
