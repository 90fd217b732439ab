"""Files of weights, read block by block.

Blocks are copied with pread(2), not looked at through a memory map. There, a file that is cut short
or lies on a failing disk kills the process (SIGBUS), and a block that somebody rewrites can change
between its use and its digest; here both are an error or a copy. It costs no time, see docs/log.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from taskvec.documents import open_regular
from taskvec.errors import CheckpointError, StaleError


class StoredFile:
    """A file opened for reading from several threads; it closes with its last reference.

    A file that is removed or replaced in the folder stays readable here as it was.
    """

    __slots__ = ("_fd", "path")

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.path = path
        self._fd = -1
        try:
            self._fd = with_more_files(lambda: open_regular(path))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error

    def __del__(self) -> None:
        if self._fd >= 0 and os is not None:  # when Python ends, modules go first
            os.close(self._fd)

    def stat(self) -> os.stat_result:
        """The present state of the opened file, also if its name now belongs to another file."""
        return os.fstat(self._fd)

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes [start, start + nbytes).

        Raises:
            CheckpointError: the disk or network fails.
            StaleError: the file ends before that: it was cut short since its header was read.
        """
        parts = []
        while nbytes:
            try:
                part = os.pread(self._fd, nbytes, start)  # Linux gives at most 2 GiB at once
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be read: {error.strerror or error}"
                ) from error
            if not part:
                raise StaleError(
                    f"{self.path}: was cut short while it was read: {self.stat().st_size:,} bytes, "
                    f"at least {start + nbytes:,} are expected; run again when it is at rest"
                )
            parts.append(part)
            start, nbytes = start + len(part), nbytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def open_descriptor(path: Path, flags: int) -> int:
    """`os.open`, as `with_more_files`."""
    return with_more_files(lambda: os.open(path, flags | os.O_CLOEXEC))


def with_more_files(open_one: Callable[[], int]) -> int:
    """A descriptor, with more files allowed if the limit of the process is met.

    Families of large models have thousands of shards; a process may often open 1,024 files and
    raise that itself.
    """
    try:
        return open_one()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
    with contextlib.suppress(ValueError, OSError):  # then the next line says that it was in vain
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return open_one()
