"""Kill merges before each operation where the system cannot exchange two folders' names in a step.

python fallback.py FAMILY WORK STEP
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cli")]
from killing import Trials, at_operations, digest  # noqa: E402

from taskvec import files as exchange  # noqa: E402
from taskvec.cli.main import main  # noqa: E402
from taskvec.outputs import staging  # noqa: E402


def run(family: str, work: str, step: str) -> None:
    """Every `step`-th operation, and all renames, which are what this is about."""
    # A C library without renameat2. Here, since pytest imports every module for its doctests.
    exchange.ctypes = SimpleNamespace(CDLL=lambda *args, **options: object())
    staging.SYNC_BYTES = 40_000  # so that the journal is written several times
    trials = Trials(Path(family), Path(work), "old")
    with contextlib.redirect_stdout(sys.stderr):
        main(trials.arguments)
    trials.reset()
    new = trials.finish()
    points = list(at_operations(trials, 1))
    renaming = len(points) - 12  # the renames and what follows are the last operations
    for limit, kill in points:
        if limit % int(step) and limit < renaming:
            continue
        old = trials.reset()
        _, status = os.waitpid(kill(), 0)
        aside = trials.work / ".out.taskvec-old"
        left = digest(trials.out)
        state = {new: "new", old: "old"}.get(left, "broken")
        if left is None and digest(aside) == old:
            state = "aside"
        result = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "state": state,
            "again": "new" if trials.finish() == new else "broken",
        }
        print(json.dumps(result), flush=True)
    shutil.rmtree(trials.work)


if __name__ == "__main__":
    run(*sys.argv[1:])
