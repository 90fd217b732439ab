"""One run at a time writes to a place."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from taskvec.errors import OutputError
from taskvec.files import hold, open_lock


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out`; folders above it are made, and removed again if nothing is in them.

    The system drops the lock with its holder, however that ends; the file may then stay, and the
    next run takes it over.

    Raises:
        OutputError: another run holds it.
        OSError: the folder cannot be made or written.
    """
    missing = [folder for folder in out.parents if not folder.exists()]
    lock = out.parent / f".{out.name}.taskvec-lock"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fd = open_lock(lock)
        try:
            if not (_hold(fd) and _is(lock, fd)):  # its holder removed it just now
                raise OutputError(f"{out}: another run is writing there; wait for it")
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # a lock file that nobody holds does no harm
                    if _is(lock, fd):
                        lock.unlink()
        finally:
            os.close(fd)
    finally:
        with contextlib.suppress(OSError):  # not empty: the output, or what an interruption left
            for folder in missing:
                folder.rmdir()


def _hold(fd: int) -> bool:
    """Take the lock; `leftovers` holds it for a moment, to see whether somebody does."""
    for _ in range(5):
        if hold(fd, waits=False):
            return True
        time.sleep(0.01)
    return False


def _is(lock: Path, fd: int) -> bool:
    """Whether the lock file is still the one that was opened."""
    try:
        return os.path.samestat(os.fstat(fd), lock.stat())
    except FileNotFoundError:
        return False
