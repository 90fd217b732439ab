"""Merges in forked processes: stopped by signals at random moments, or two at once.

    python forking.py FAMILY WORK signal (SIGINT | SIGTERM | twice) (merge | scan) TRIALS
    python forking.py FAMILY WORK race (plain | force) TRIALS

A process that has imported everything forks for each trial, so that a trial costs what the merge
costs. One line of JSON is printed for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from states import digest, merging, names, old_model

from taskvec.cli import stopping
from taskvec.cli.main import main
from taskvec.outputs import staging

ROLES = ("base", "instruct", "math", "code")


class Process:
    """A command in a process of its own that has begun to heed signals when this returns."""

    def __init__(self, command: list[str], log: Path, before: Callable[[], object]) -> None:
        self.log = log
        ready, told = os.pipe()
        self.number = os.fork()
        if self.number == 0:
            self._run(command, told, before)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)

    def _run(self, command: list[str], told: int, before: Callable[[], object]) -> None:
        code = 70
        with contextlib.suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            real = stopping.Stop.install

            def install(stop: stopping.Stop) -> None:
                real(stop)
                os.close(told)
                before()

            stopping.Stop.install = install
            sys.argv[1:] = command
            code = main()  # as the process's own command
        os._exit(code)

    def wait(self) -> tuple[int, str]:
        """Exit code (a signal is negative) and standard error."""
        _, status = os.waitpid(self.number, 0)
        return os.waitstatus_to_exitcode(status), self.log.read_text()


def nothing() -> None:
    """Nothing to do first."""


def reset(work: Path) -> None:
    """An empty place."""
    shutil.rmtree(work)
    work.mkdir()


def signals(family: dict[str, Path], work: Path, kind: str, verb: str, trials: int) -> None:
    """Stop a command at random moments; look; run it again."""
    out, log, cache = work / "out", work.parent / "log", Path(os.environ["TASKVEC_CACHE"])
    command = merging(family, out, "--force", "--threads", "2")
    if verb == "scan":
        command = ["scan", "--quiet", "--json", "--threads", "2",
                   *(f"--{role}={family[role]}" for role in ("base", "instruct")),
                   "--task", f"math={family['math']}", f"--save-scan={out}/scan.json"]  # fmt: skip

    def place() -> str | None:
        reset(work)
        shutil.rmtree(cache, ignore_errors=True)
        return old_model(out)

    durations = []
    for _ in range(5):
        place()
        started = time.monotonic()
        code, err = Process(command, log, nothing).wait()
        durations.append(time.monotonic() - started)
        assert code == 0, err
    new, whole = digest(out), 1.2 * sorted(durations)[2]
    draw = random.Random(f"{kind} {verb}")
    for i in range(trials):
        old = place()
        process = Process(command, log, nothing)
        time.sleep(whole * (i + draw.random()) / trials)
        first = signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT
        os.kill(process.number, first)
        if kind == "twice":
            time.sleep(draw.choice([0, 0.0002, 0.001, 0.004]))
            os.kill(process.number, draw.choice([signal.SIGINT, signal.SIGTERM]))
        code, err = process.wait()
        left = digest(out)
        journal = work / ".out.taskvec" / staging.JOURNAL
        result: dict[str, Any] = {
            "code": code,
            "err": err,
            "state": "new" if left == new else "old" if left == old else "broken",
            "left": names(work),
            "drafts": [n for n in names(cache) if n.startswith(".")] if cache.exists() else [],
            "journal": len(journal.read_text().splitlines()) if journal.exists() else 0,
        }
        again, told = Process(command, log, nothing).wait()
        result["again"] = [again, told, digest(out) == new, names(work)]
        print(json.dumps(result), flush=True)


def race(family: dict[str, Path], work: Path, kind: str, trials: int) -> None:
    """Two merges with other scales into one folder, begun at about the same moment."""
    out = work / "out"
    commands, results = [], []
    for i, scale in enumerate(("0.5", "0.125")):
        task = ["--task", f"math={family['math']}:{scale}", "--threads", "1"]
        command = ["merge", str(out), "--method", "task_arithmetic", "--quiet",
                   "--shard-size", "60kB", f"--instruct={family['instruct']}", *task]  # fmt: skip
        commands.append(command + (["--force"] if kind == "force" else []))
        reset(work)
        code, err = Process(commands[i], work.parent / "log", nothing).wait()
        assert code == 0, err
        results.append(digest(out))
    draw = random.Random(kind)
    for _ in range(trials):
        reset(work)
        delays = [0.0, draw.random() * 0.08]
        draw.shuffle(delays)
        processes = [
            Process(command, work.parent / f"log{i}", lambda delay=delays[i]: time.sleep(delay))
            for i, command in enumerate(commands)
        ]
        ends = [process.wait() for process in processes]
        left = digest(out)
        print(json.dumps({
            "codes": [code for code, _ in ends],
            "errors": [err for _, err in ends],
            "is": results.index(left) if left in results else None,
            "left": names(work),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    staging.SYNC_BYTES = 40_000  # so that the journal is written several times
    root, place_, what, *rest = sys.argv[1:]
    paths = {role: Path(root) / role for role in ROLES}
    with contextlib.redirect_stdout(sys.stderr):  # what is compiled is loaded
        main(merging(paths, Path(place_) / "out"))
        main(["scan", "--quiet", *(f"--{r}={paths[r]}" for r in ("base", "instruct")),
              "--task", f"math={paths['math']}", "--no-cache"])  # fmt: skip
    reset(Path(place_))
    if what == "signal":
        signals(paths, Path(place_), rest[0], rest[1], int(rest[2]))
    else:
        race(paths, Path(place_), rest[0], int(rest[1]))
