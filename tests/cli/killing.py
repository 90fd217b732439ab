"""Kill merges again and again and look at what they leave; run as a process of its own.

    python killing.py FAMILY WORK (time TRIALS | operation STEP) (absent | old)

A process that has imported everything forks for each trial, so that a trial costs what the merge
costs. It stays single-threaded, as forking needs. One line of JSON is printed for each trial.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from taskvec.cli.main import main
from taskvec.outputs import staging


def digest(folder: Path) -> str | None:
    """Digest of every name and file below a folder; None if there is none."""
    if not folder.exists():
        return None
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(repr(path.relative_to(folder)).encode())
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


class Trials:
    """Merges of one family into one folder, each in a forked process."""

    def __init__(self, family: Path, work: Path, before: str) -> None:
        self.out = work / "out"
        self.work = work
        self.before = before
        self.arguments = [
            "merge", str(self.out), "--force", "--quiet", "--threads", "2", "--shard-size", "60kB",
            "--base", f"{family}/base", "--instruct", f"{family}/instruct",
            "--task", f"math={family}/math:0.5", "--task", f"code={family}/code:0.25",
        ]  # fmt: skip

    def fork(self, prepare: Callable[[], object] = lambda: None) -> int:
        """A merge in a process of its own; its number."""
        child = os.fork()
        if child:
            return child
        code = 70
        with contextlib.suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            prepare()
            code = main(self.arguments)
        os._exit(code)

    def reset(self) -> str | None:
        """Put the old state there; its digest."""
        for path in list(self.work.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.before == "old":
            (self.out / "sub").mkdir(parents=True)
            (self.out / "model.safetensors").write_bytes(b"old" * 1000)
            (self.out / "sub" / "stale.txt").write_text("old")
        return digest(self.out)

    def finish(self) -> str | None:
        """A merge that nobody kills; the digest of what it wrote."""
        _, status = os.waitpid(self.fork(), 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert [p.name for p in self.work.iterdir()] == ["out"], sorted(self.work.iterdir())
        return digest(self.out)

    def trial(self, point: object, kill: Callable[[], int], new: str | None) -> None:
        """Kill one merge, look, run again, look again."""
        old = self.reset()
        _, status = os.waitpid(kill(), 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        left = digest(self.out)
        journal = self.work / ".out.taskvec" / staging.JOURNAL
        result = {
            "point": point,
            "killed": killed,
            "state": "new" if left == new else "old" if left == old else "broken",
            "staged": (self.work / ".out.taskvec").exists(),
            "journal": len(journal.read_text().splitlines()) if journal.exists() else 0,
            "again": "new" if self.finish() == new else "broken",
        }
        print(json.dumps(result), flush=True)


def at_times(trials: Trials, count: int) -> Iterator[tuple[float, Callable[[], int]]]:
    """Points spread over the time of a merge, one at random in each of `count` equal parts."""
    times = []
    for _ in range(5):
        trials.reset()
        start = time.monotonic()
        trials.finish()
        times.append(time.monotonic() - start)
    whole = 1.4 * sorted(times)[2]
    draw = random.Random(7)

    def kill_after(delay: float) -> int:
        child = trials.fork()
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        return child

    for i in range(count):
        delay = whole * (i + draw.random()) / count
        yield round(delay, 4), lambda delay=delay: kill_after(delay)


def at_operations(trials: Trials, step: int) -> Iterator[tuple[int, Callable[[], int]]]:
    """Right before and right after every (`step`-th) operation on a file or folder."""
    counter = trials.work.parent / "operations"

    def watch(limit: int | None) -> None:
        seen = 0

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                nonlocal seen
                seen += 1
                if seen == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                if limit is None:
                    counter.write_text(str(seen))
                return function(*args, **options)

            return call

        for name in ("pwrite", "fsync", "mkdir", "rmdir", "unlink", "rename", "posix_fallocate"):
            setattr(os, name, counted(getattr(os, name)))
        staging.exchange = counted(staging.exchange)

    trials.reset()
    os.waitpid(trials.fork(lambda: watch(None)), 0)
    for limit in range(1, int(counter.read_text()) + 1, step):
        yield limit, lambda limit=limit: trials.fork(lambda: watch(limit))


def run(family: str, work: str, kind: str, number: str, before: str) -> None:
    """Run the trials that the command line asks for."""
    trials = Trials(Path(family), Path(work), before)
    with contextlib.redirect_stdout(sys.stderr):
        main(trials.arguments)  # compiled code is loaded, the scan is kept
    trials.reset()
    new = trials.finish()
    points = at_times(trials, int(number)) if kind == "time" else at_operations(trials, int(number))
    for point, kill in points:
        trials.trial(point, kill, new)


if __name__ == "__main__":
    staging.SYNC_BYTES = 40_000  # so that the journal is written several times
    run(*sys.argv[1:])
