"""Ctrl-C and SIGTERM at any moment, once or twice; two runs at once; renaming in three steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import told, write_checkpoint
from tests.faults.states import digest, merging, names, old_model

from taskvec import files as exchange
from taskvec.cli.main import main
from taskvec.errors import OutputError
from taskvec.outputs import locking, staging
from taskvec.outputs import run as engine
from taskvec.streaming import cut, stream

HERE = Path(__file__).parent
HINT = "; the same command continues where it stopped"
LINES = {130: "taskvec: interrupted", 143: "taskvec: terminated"}


def driven(script: str, family: dict[str, Path], folder: Path, *words: Any) -> list[dict]:
    """What each trial of a driver left."""
    (folder / "work").mkdir()
    done = subprocess.run(
        [sys.executable, HERE / script, family["base"].parent, folder / "work", *map(str, words)],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- signals -------------------------------------------------------------------------------------


SLOW = [(kind, verb, 400) for kind in ("SIGINT", "SIGTERM", "twice") for verb in ("merge", "scan")]


@pytest.mark.parametrize(
    ("kind", "verb", "trials"),
    [
        ("SIGINT", "merge", 10),
        ("SIGTERM", "scan", 8),
        ("twice", "merge", 10),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_signals_at_random_moments(tmp_path, family, kind, verb, trials):
    found = driven("forking.py", family, tmp_path, "signal", kind, verb, trials)
    assert len(found) == trials
    stopped = [t for t in found if t["code"] != 0]
    assert len(stopped) > trials / 4
    for t in stopped:
        assert t["code"] in {"SIGINT": [130], "SIGTERM": [143]}.get(kind, [130, 143]), t
        assert t["err"] == LINES[t["code"]] + (HINT if verb == "merge" else "") + "\n", t
        if kind != "twice":  # the second signal ends a run on the spot, as a kill does
            assert t["drafts"] == []
    if kind != "twice":  # a signal within the few lines that take the lock may leave its file
        assert sum(".out.taskvec-lock" in t["left"] for t in stopped) <= 1 + trials / 100
    for t in found:
        assert t["state"] == "new" or (t["code"] != 0 and t["state"] == "old"), t
        assert t["code"] != 0 or t["err"] == "", t
        assert t["again"] == [0, "", True, ["out"]], t
    if verb == "merge" and kind != "twice" and trials > 100:
        assert any(t["journal"] > 1 for t in found)  # there is something to go on from


def test_ctrl_c_twice_in_python_waits_for_threads():
    """In a notebook the process lives on, so no thread may write to a file that is closed."""
    started, finished = threading.Event(), threading.Event()

    def work(unit: Any) -> None:
        started.set()
        time.sleep(0.6)
        finished.set()

    def press() -> None:
        started.wait(5)
        for _ in range(2):
            time.sleep(0.15)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        list(stream(cut([1]), lambda: work, 1))
    assert finished.is_set()


STUCK = """
import os, sys, time
from taskvec.checkpoints import stored
from taskvec.cli.main import main

def stuck(*args):
    print("stuck", flush=True)
    time.sleep(60)

stored.os.pread = stuck
sys.exit(main())
"""


@pytest.mark.parametrize(("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_ends_a_run_that_cannot_end(tmp_path, family, second, code):
    """The first waits for threads that read; a network disk that is gone can hold them for long."""
    command = [sys.executable, "-c", STUCK, *merging(family, tmp_path / "out", "--threads", "1")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(second)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, told(err)) == (code, f"{LINES[code]}{HINT}\n")
    assert main(merging(family, tmp_path / "out")) == 0
    assert names(tmp_path) == ["family", "out"]


def test_interruption_while_the_result_gets_its_name_comes_too_late(
    tmp_path, family, cli, monkeypatch
):
    """Ctrl-C between the renames: the folder is in place, and the run says so."""
    out = tmp_path / "out"
    old_model(out)
    real = staging.exchange

    def interrupted(*paths: Path) -> None:
        os.kill(os.getpid(), 2)
        real(*paths)
        os.kill(os.getpid(), 15)

    monkeypatch.setattr(staging, "exchange", interrupted)
    code, printed, err = cli(*merging(family, out, "--force"))
    assert (code, err) == (0, "")
    assert str(out) in printed
    assert names(tmp_path) == ["family", "out"]
    assert cli("verify", out)[0] == 0


def test_interruption_while_an_object_is_cleaned_up_is_not_lost(tmp_path, family, cli, monkeypatch):
    """Python swallows what a `__del__` raises, and says so in several lines."""

    class Fragile:
        def __del__(self) -> None:
            os.kill(os.getpid(), 2)
            for _ in range(10):
                pass

    real = staging.Staging.complete

    def complete(self: Any, tensor: int, record: Any) -> None:
        real(self, tensor, record)
        if tensor == 3:
            Fragile()
            time.sleep(5)  # the signal comes again long before

    monkeypatch.setattr(staging.Staging, "complete", complete)
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err) == (130, f"taskvec: interrupted{HINT}\n")
    assert names(tmp_path) == [".out.taskvec", "family"]


def test_ignored_signals_stay_ignored(family, cli, monkeypatch):
    """As for a shell's background jobs, which Ctrl-C in the shell is not meant for."""
    real = engine.prepare

    def interrupted(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(engine, "prepare", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli(*merging(family, family["base"].parent.parent / "out"))[0] == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert cli(*merging(family, family["base"].parent.parent / "two"))[0] == 130
    assert signal.getsignal(signal.SIGINT) is before  # given back to who calls from Python


# --- two runs at once ----------------------------------------------------------------------------

BUSY = "another run is writing there; wait for it"
FULL = "is not empty; --force replaces the whole folder"


@pytest.mark.parametrize("trials", [10, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", "force"])
def test_two_runs_into_one_folder(tmp_path, family, kind, trials):
    found = driven("forking.py", family, tmp_path, "race", kind, trials)
    assert len(found) == trials
    out = tmp_path / "work" / "out"
    refusals = {f"taskvec: error: {out}: {why}\n" for why in (BUSY, FULL)}
    seen = set()
    for t in found:
        winners = [i for i, code in enumerate(t["codes"]) if code == 0]
        assert t["is"] in winners, t
        assert t["left"] == ["out"], t
        assert kind == "force" or len(winners) == 1, t
        for i, code in enumerate(t["codes"]):
            assert code in (0, 1), t
            assert t["errors"][i] in (refusals if code else {""}), t
            seen.add(t["errors"][i])
    assert any(BUSY in err for err in seen)


def test_lock_file_that_its_holder_removes_just_then(tmp_path, monkeypatch):
    """A lock on a file that nobody can find any more keeps nobody out, so it is none."""
    out = tmp_path / "out"
    real = exchange.fcntl.flock

    def flock(fd: int, how: int) -> None:
        (tmp_path / ".out.taskvec-lock").unlink()
        real(fd, how)

    monkeypatch.setattr(exchange.fcntl, "flock", flock)
    with pytest.raises(OutputError, match=BUSY), locking.locked(out):
        pass


def test_lock_of_another_is_not_removed(tmp_path):
    """Somebody removed the folder with the lock in it, and another run began there anew."""
    lock = tmp_path / "a" / ".out.taskvec-lock"
    with locking.locked(tmp_path / "a" / "out"):
        lock.unlink()
        lock.write_text("of another")
    assert lock.read_text() == "of another"


@pytest.mark.parametrize("when", ["before writing", "while writing"])
def test_folder_that_fills_meanwhile_is_not_replaced(tmp_path, family, cli, monkeypatch, when):
    """Checked at first, then again under the lock and before the renaming."""
    out = tmp_path / "out"
    if when == "before writing":
        real = engine.decide
        monkeypatch.setattr(engine, "decide", lambda *args: (old_model(out), real(*args))[1])
        monkeypatch.setattr(engine, "apply", None)  # known before anything is worked out
    else:
        publish = staging.Staging.publish
        monkeypatch.setattr(staging.Staging, "publish", lambda s: (old_model(out), publish(s))[1])
    code, _, err = cli(*merging(family, out))
    assert (code, err) == (1, f"taskvec: error: {out}: {FULL}\n")
    assert digest(out) == old_model(tmp_path / "same")
    assert names(tmp_path) == ["family", "out", "same"]


# --- without an exchange of names in one step ----------------------------------------------------


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_where_names_cannot_be_exchanged(tmp_path, family, step):
    """Between the renames the old folder has another name for a moment; the next run sees to it."""
    found = driven("fallback.py", family, tmp_path, step)
    assert len(found) > 40 / step
    assert all(t["killed"] for t in found)
    assert {t["again"] for t in found} == {"new"}
    assert {t["state"] for t in found} <= {"old", "new", "aside"}
    assert any(t["state"] == "aside" for t in found)


def without_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(CDLL=lambda *args, **options: object())
    monkeypatch.setattr(exchange, "ctypes", library)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_rename_that_fails_where_names_cannot_be_exchanged(
    tmp_path, family, cli, monkeypatch, which
):
    """After the first of three renames, the old folder gets its name back at once."""
    out = tmp_path / "out"
    old = old_model(out)
    real, count = os.rename, [0]

    def rename(*paths: Any) -> None:
        count[0] += 1
        if count[0] == which:
            raise OSError(5, "Input/output error")
        real(*paths)

    without_renameat2(monkeypatch)
    monkeypatch.setattr(os, "rename", rename)
    code, _, err = cli(*merging(family, out, "--force"))
    if which == 3:  # the new one is in place; the old one is put away at the next run
        assert (code, err) == (0, "")
        assert names(tmp_path) == [".out.taskvec-old", "family", "out"]
    else:
        assert (code, err) == (
            1,
            f"taskvec: error: {out}: cannot be written: Input/output error; "
            "nothing was left behind\n",
        )
        assert digest(out) == old
        assert names(tmp_path) == ["family", "out"]
    assert cli(*merging(family, out, "--force"))[0] == 0
    assert names(tmp_path) == ["family", "out"]


def test_old_folder_that_was_put_aside_still_needs_force(tmp_path, family, cli):
    """A kill between two renames, then a run that was not told to replace anything."""
    old = old_model(tmp_path / ".out.taskvec-old")
    code, _, err = cli(*merging(family, tmp_path / "out"))
    assert (code, err) == (1, f"taskvec: error: {tmp_path}/out: {FULL}\n")
    assert digest(tmp_path / "out") == old
    assert names(tmp_path) == ["family", "out"]


# --- clocks --------------------------------------------------------------------------------------


def test_clocks_do_not_matter(tmp_path, family, cli, monkeypatch):
    """Files of the future, and a clock that jumps back: the same bytes, and no complaint."""
    assert cli(*merging(family, tmp_path / "one"))[0] == 0
    write_checkpoint(tmp_path / "unrelated", {"a": [1.0]})
    for path in family.values():
        os.utime(path / "model.safetensors", (4e9, 4e9))
    ticks = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(ticks))
    code, _, err = cli(*merging(family, tmp_path / "two"))
    assert (code, err) == (0, "")
    content = [
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")}
        for name in ("one", "two")
    ]
    assert content[0] == content[1] != {}
