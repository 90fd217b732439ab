"""Atomic writes and renames of files and folders."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from taskvec.errors import OutputError

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


def exchange(new: Path, old: Path) -> None:
    """Exchange two folders' names in one step, or with renames where the system cannot.

    Raises:
        OSError: nothing was changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(new), os.fsencode(old))
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = _aside(old)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    with contextlib.suppress(OSError):  # `recover` removes it some day
        aside.rename(new)


def recover(out: Path) -> None:
    """Put the old folder back if a kill hit between the renames of `exchange`."""
    aside = _aside(out)
    if aside.exists():
        if out.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(out)


def _aside(out: Path) -> Path:
    return out.parent / f".{out.name}.taskvec-old"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, which is made if it is not there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def hold(fd: int, *, waits: bool = True, shared: bool = False) -> bool:
    """Take the lock of a descriptor; the system drops it when the descriptor is closed.

    Args:
        fd: See `open_lock`.
        waits: Whether to wait for another holder.
        shared: Whether others may hold it at the same time.

    Returns:
        False if another process holds it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, kind | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a system error about writing a file into an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, in UTF-8; parent folders are created.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically; the old one stays until the new one is complete.

    Devices and pipes are written to directly.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with replacing(Path(os.path.realpath(path))) as draft:
        draft.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside a file, which takes its place if the context ends without an error."""
    draft = path.with_name(f".{path.name}.taskvec-{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):  # mostly because it has its name by now
            draft.unlink()


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM, for a step that takes a moment and must not be cut in half.

    An interruption in the middle would report a folder that is in place as missing. A kill is
    still possible; see `recover`.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals reach only the main thread
        yield
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not None]
    handlers = {n: signal.signal(n, lambda *_: None) for n in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
