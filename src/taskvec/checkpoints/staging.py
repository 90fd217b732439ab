"""Writing a checkpoint folder so that it appears whole or not at all.

Everything goes to a hidden folder beside the target: headers first, then tensors block by block,
with a journal of the tensors that are on disk (synced before they are named there). The finished
folder is renamed to its name; where a folder stands there already, the two are exchanged in one
step. Whatever a killed run leaves behind is taken up by the next run of the same job, or removed by
a run of another.

    OUT                  the old state, or the new one
    .OUT.taskvec         being written; after an exchange, for a moment, the old state
    .OUT.taskvec-lock    held by the run that writes
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.checkpoints.folder import INDEX, SINGLE
from taskvec.checkpoints.safetensors import write_header
from taskvec.dtypes import DType
from taskvec.errors import OutputError

JOURNAL = "taskvec-journal.jsonl"
SYNC_BYTES = 512 * 2**20  # how much may be lost and done again after a crash
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100

Array = np.ndarray[Any, Any]
Record = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header, and the tensors behind it in order."""

    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def lay_out(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[Shard]:
    """Files for the tensors, the same whatever the shards of the inputs.

    Wide dtypes come first, so that every tensor is aligned; then names in order.

    Args:
        tensors: In any order.
        shard_bytes: Largest size of the tensors in one file; a larger tensor gets a file of its
            own.
    """
    groups: list[list[OutputTensor]] = [[]]
    held = 0
    for tensor in sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name)):
        if groups[-1] and held + tensor.nbytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    count = len(groups)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    return [
        Shard(name, write_header([(t.name, t.dtype, t.shape) for t in group]), tuple(group))
        for name, group in zip(names, groups, strict=True)
    ]


def index_of(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The index of several shards as transformers writes it; None for a single file."""
    if len(shards) == 1:
        return None
    return {
        "metadata": {"total_size": sum(t.nbytes for s in shards for t in s.tensors)},
        "weight_map": {t.name: s.file for s in shards for t in s.tensors},
    }


class Staging:
    """A folder being written. Use `staged`, which locks, cleans up and tells errors in words.

    Attributes:
        done: Record by name of the tensors that an earlier, interrupted run has written.
        tensors: In the numbering of `write` and `complete`.
    """

    def __init__(self, out: Path, shards: Sequence[Shard], key: str) -> None:
        """Take up or begin the staging folder of `out`.

        Args:
            out: The folder to appear.
            shards: What it will hold.
            key: Identity of the job; an interrupted run of the same job is taken up.
        """
        self.out = out
        self.folder = staging_folder(out)
        self.shards = shards
        self.tensors = [t for shard in shards for t in shard.tensors]
        resumed = self._resume(key)
        self.done: dict[str, Record] = resumed or {}
        self._files: list[int] = []
        self._place: list[tuple[int, int]] = []  # of each tensor: file descriptor, offset
        self._pending: dict[str, Record] = {}
        self._pending_bytes = 0
        self._lock = threading.Lock()
        if resumed is None:
            self._begin(key)
        self._open()

    def _resume(self, key: str) -> dict[str, Record] | None:
        """What the journal says is written, or None if there is nothing to take up."""
        done: dict[str, Record] = {}
        try:
            lines = (self.folder / JOURNAL).read_text().splitlines()
            if not lines or json.loads(lines[0]) != {"key": key}:
                return None
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # the last line may be half-written
                    done |= json.loads(line)
            for shard in self.shards:
                with (self.folder / shard.file).open("rb") as file:
                    cut = os.fstat(file.fileno()).st_size != shard.nbytes
                    if cut or file.read(len(shard.header)) != shard.header:
                        return None
        except (OSError, ValueError):
            return None
        return done

    def _begin(self, key: str) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        for shard in self.shards:
            with (self.folder / shard.file).open("wb") as file:
                file.write(shard.header)
                if hasattr(os, "posix_fallocate"):
                    _allocate(file.fileno(), shard.nbytes)
                file.truncate(shard.nbytes)
                os.fsync(file.fileno())
        journal = self.folder / JOURNAL
        journal.write_text(json.dumps({"key": key}) + "\n")
        _sync(journal)
        _sync(self.folder)

    def _open(self) -> None:
        for shard in self.shards:
            fd = os.open(self.folder / shard.file, os.O_WRONLY)
            self._files.append(fd)
            offset = len(shard.header)
            for tensor in shard.tensors:
                self._place.append((fd, offset))
                offset += tensor.nbytes

    def write(self, tensor: int, start: int, block: Array) -> None:
        """Stored elements from `start` on, shape (n,); threads may write at once."""
        fd, offset = self._place[tensor]
        at = offset + start * block.itemsize
        view = block.view(np.uint8).data
        while view:
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written

    def complete(self, tensor: int, record: Record) -> None:
        """The tensor is whole; its record goes to the journal at the next sync."""
        self._pending[self.tensors[tensor].name] = record
        self._pending_bytes += self.tensors[tensor].nbytes
        if self._pending_bytes >= SYNC_BYTES:
            self.flush()

    def flush(self) -> None:
        """Put everything written so far on the disk, then into the journal."""
        for fd in self._files:
            os.fsync(fd)
        with (self.folder / JOURNAL).open("a") as journal:
            journal.write(json.dumps(self._pending) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._pending, self._pending_bytes = {}, 0

    def add(self, name: str, content: bytes) -> None:
        """A small file."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        _sync(path)

    def publish(self) -> None:
        """Give the finished folder its name. After this, it is there, whole."""
        if self._pending:
            self.flush()
        index = index_of(self.shards)
        if index is not None:
            self.add(INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
        self.close()
        (self.folder / JOURNAL).unlink()
        _sync(self.folder)
        if self.out.is_dir() and any(self.out.iterdir()):
            _exchange(self.folder, self.out)
            _sync(self.out.parent)
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.folder.rename(self.out)
        _sync(self.out.parent)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def discard(self) -> None:
        """Remove what was written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def staged(out: Path, shards: Sequence[Shard], key: str) -> Iterator[Staging]:
    """A staging folder for `out`, under a lock.

    On an error it is removed. On an interruption (Ctrl-C, or a kill) it stays, and the next run of
    the same job goes on from it.

    Raises:
        OutputError: another run writes there, the disk is full, or the place cannot be written.
    """
    lock = out.parent / f".{out.name}.taskvec-lock"
    staging: Staging | None = None
    with in_words(out), _locked(lock, out):
        _recover(out)
        try:
            staging = Staging(out, shards, key)
            yield staging
        except Exception:
            if staging is not None:
                staging.discard()
            else:
                shutil.rmtree(staging_folder(out), ignore_errors=True)
            raise
        finally:
            if staging is not None:
                staging.close()


def staging_folder(out: Path) -> Path:
    """Where `out` is written before it appears."""
    return out.parent / f".{out.name}.taskvec"


@contextlib.contextmanager
def in_words(out: Path) -> Iterator[None]:
    """Tell what the system says about writing `out` as an `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{out}: the disk is full; nothing was left behind") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{out}: cannot be written there: {error.strerror}") from error
        raise OutputError(f"{out}: cannot be written: {error}") from error


@contextlib.contextmanager
def _locked(lock: Path, out: Path) -> Iterator[None]:
    out.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), lock.stat()):
            raise BlockingIOError  # removed by its holder just now
    except (BlockingIOError, FileNotFoundError):
        os.close(fd)
        raise OutputError(f"{out}: another run is writing there; wait for it") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)


def _recover(out: Path) -> None:
    """Put the old folder back if a kill hit between the two renames of `_exchange`."""
    old = out.parent / f".{out.name}.taskvec-old"
    if old.exists():
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders' names in one step, or with renames where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(new), os.fsencode(old))
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = old.parent / f".{old.name}.taskvec-old"
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _allocate(fd: int, nbytes: int) -> None:
    """Reserve the space now, so that a full disk is noticed before the work."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_bytes(out: Path) -> int:
    """Free space where `out` would be written."""
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
