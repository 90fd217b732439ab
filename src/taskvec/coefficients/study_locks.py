"""What lets several processes share a study: one lock, a journal whole lines, and who is alive.

The system drops the locks of a process however it ends. So a process that was killed holds nobody
up, and the others see that it is gone.

    OUT/study.jsonl      journal of Optuna
    OUT/.lock            held while a candidate is asked for, and while results are written
    OUT/.workers/ID      held by a process as long as it lives
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from taskvec.files import hold, open_lock, writing
from taskvec.journal import cut_unfinished_line

JOURNAL, LOCK, WORKERS = "study.jsonl", ".lock", ".workers"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a study; waits for its holder.

    Raises:
        OutputError: the folder cannot be written.
    """
    fd = _opened(folder / LOCK)
    try:
        hold(fd)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[str]:
    """A name for this process, under which others see whether it lives."""
    name = uuid.uuid4().hex
    path = folder / WORKERS / name
    fd = _opened(path)
    try:
        hold(fd)
        yield name
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def is_alive(folder: Path, name: str) -> bool:
    """Whether the process of this name lives."""
    try:
        fd = os.open(folder / WORKERS / name, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not hold(fd, waits=False, shared=True):
            return True
    finally:
        os.close(fd)
    (folder / WORKERS / name).unlink(missing_ok=True)
    return False


class JournalLock:
    """Lock of a journal, as Optuna wants one; it cuts off a line that a killed process left."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._fd = -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._fd = _opened(self._journal)
        hold(self._fd)
        cut_unfinished_line(self._journal)
        return True

    def release(self) -> None:
        """Give it back."""
        os.close(self._fd)


def _opened(path: Path) -> int:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_lock(path)
