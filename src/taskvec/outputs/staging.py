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
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.checkpoints.fingerprint import chunk_digests, tensor_digest
from taskvec.checkpoints.folder import INDEX
from taskvec.checkpoints.shards import Shard, index_of
from taskvec.checkpoints.stored import open_descriptor
from taskvec.errors import OutputError
from taskvec.files import defer_signals, exchange, recover, sync
from taskvec.outputs.locking import locked
from taskvec.streaming import BLOCK, Progress, silent

JOURNAL = "taskvec-journal.jsonl"
SYNC_BYTES = 512 * 2**20  # how much may be lost and done again after a crash

Array = np.ndarray[Any, Any]
Record = Mapping[str, str]


class Staging:
    """A folder being written. Use `staged`, which locks, cleans up and tells errors in words.

    Attributes:
        done: Record by name of the tensors that an earlier, interrupted run says it has written.
        placed: Whether the result has its name.
        left: The old output, where it could not be removed.
        tensors: In the numbering of `write` and `complete`.
    """

    def __init__(self, out: Path, shards: Sequence[Shard], key: str, *, force: bool) -> None:
        """Take up or begin the staging folder of `out`.

        Args:
            out: The folder to appear.
            shards: What it will hold.
            key: Identity of the job; an interrupted run of the same job is taken up.
            force: Whether `out` may be replaced.
        """
        self.out = out
        self.force = force
        self.placed = False
        self.left: Path | None = None
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
        try:
            self._open()
        except OSError:
            self.close()
            raise

    def _resume(self, key: str) -> dict[str, Record] | None:
        """What the journal says is written, or None if there is nothing to take up."""
        done: dict[str, Record] = {}
        try:
            lines = (self.folder / JOURNAL).read_text().splitlines()
            if not lines or json.loads(lines[0]) != {"key": key}:
                return None
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # the last line may be half-written
                    done |= _records(json.loads(line))
            for shard in self.shards:
                with (self.folder / shard.file).open("rb") as file:
                    cut = os.fstat(file.fileno()).st_size != shard.nbytes
                    if cut or file.read(len(shard.header)) != shard.header:
                        return None
            known = {JOURNAL, *(shard.file for shard in self.shards)}
            for path in self.folder.iterdir():  # such as a tokenizer that may have changed since
                if path.name not in known:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (OSError, ValueError):
            return None
        return {t.name: done[t.name] for t in self.tensors if t.name in done}

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
        sync(journal)
        sync(self.folder)

    def _open(self) -> None:
        for shard in self.shards:
            fd = open_descriptor(self.folder / shard.file, os.O_RDWR)
            self._files.append(fd)
            offset = len(shard.header)
            for tensor in shard.tensors:
                self._place.append((fd, offset))
                offset += tensor.nbytes

    def verified(self, progress: Progress = silent) -> dict[str, dict[str, str]]:
        """Those of `done` whose elements are on the disk as the record's digest says.

        A system that crashed, or somebody who looked into the folder, may have left something else.
        """
        todo = [(i, t) for i, t in enumerate(self.tensors) if t.name in self.done]
        found = {}
        with progress("resume", sum(tensor.nbytes for _, tensor in todo)) as advance:
            for i, tensor in todo:
                if self._digest(i) == self.done[tensor.name].get("output"):
                    found[tensor.name] = dict(self.done[tensor.name])
                advance(tensor.nbytes)
        return found

    def _digest(self, tensor: int) -> str:
        """Digest of a tensor as it is on the disk."""
        dtype, nbytes = self.tensors[tensor].dtype, self.tensors[tensor].nbytes
        fd, offset = self._place[tensor]
        step = BLOCK * dtype.itemsize
        blocks = (
            os.pread(fd, min(step, nbytes - at), offset + at) for at in range(0, nbytes, step)
        )
        return tensor_digest(chunk_digests(np.frombuffer(b, dtype.storage)) for b in blocks)

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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sync(path)

    def publish(self) -> None:
        """Give the finished folder its name. After this, it is there, whole."""
        if self._pending:
            self.flush()
        index = index_of(self.shards)
        if index is not None:
            self.add(INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
        self.close()
        with defer_signals():
            refuse_occupied(self.out, force=self.force)
            (self.folder / JOURNAL).unlink()
            sync(self.folder)
            if self.out.is_dir() and any(self.out.iterdir()):
                exchange(self.folder, self.out)
            else:
                self.folder.rename(self.out)
            self._settle()

    def _settle(self) -> None:
        """After the renaming: wait for the disk, remove what is left."""
        self.placed = True
        try:
            sync(self.out.parent)
        except OSError as error:
            raise OutputError(
                f"{self.out}: is in place, but the disk did not confirm it "
                f"({error.strerror or error}); check it with taskvec verify"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)
        self.left = self.folder if self.folder.exists() else None

    def publish_file(self, header: bytes) -> None:
        """Give the only file the name of `out`, with its final header of the same length."""
        (fd,) = self._files
        (shard,) = self.shards
        assert len(header) == len(shard.header)
        os.pwrite(fd, header, 0)
        os.fsync(fd)
        self.close()
        with defer_signals():
            refuse_occupied(self.out, force=self.force)
            (self.folder / shard.file).replace(self.out)
            self._settle()

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # some network disks fail only now
            self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def staged(
    out: Path, shards: Sequence[Shard], key: str, *, force: bool = False
) -> Iterator[Staging]:
    """A staging folder for `out`, under a lock.

    On an error it is removed. On an interruption (Ctrl-C, or a kill) it stays, and the next run of
    the same job resumes from it.

    Args:
        out: The folder (or file, see `publish_file`) to appear.
        shards: What it will hold.
        key: Identity of the job.
        force: Whether something that is there may be replaced, also if it appears meanwhile.

    Raises:
        OutputError: another run writes there, something is there and `force` is not given, the disk
            is full, or the place cannot be written.
    """
    staging: Staging | None = None
    with in_words(out), locked(out):
        recover(out)
        refuse_occupied(out, force=force)
        try:
            staging = Staging(out, shards, key, force=force)
            yield staging
        except Exception:
            if staging is None:
                shutil.rmtree(staging_folder(out), ignore_errors=True)
            elif not staging.placed:
                staging.discard()
            raise
        finally:
            if staging is not None:
                with contextlib.suppress(OSError):  # an error that matters was raised before
                    staging.close()


def refuse_occupied(out: Path, *, force: bool) -> None:
    """Raise `OutputError` if something that may not be replaced is there."""
    if force:
        return
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out}: is not empty; --force replaces the whole folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: already exists; --force replaces it")


def staging_folder(out: Path) -> Path:
    """Where `out` is written before it appears."""
    return out.parent / f".{out.name}.taskvec"


@contextlib.contextmanager
def in_words(out: Path) -> Iterator[None]:
    """Tell what the system says about writing `out` as an `OutputError`."""
    try:
        yield
    except OSError as error:
        what = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk is full",
            errno.EFBIG: "a file is too large for this place (try a smaller --shard-size)",
        }.get(error.errno or 0, f"cannot be written: {error.strerror or error}")
        folder = staging_folder(out)
        left = f"remove {folder}" if folder.exists() else "nothing was left behind"
        raise OutputError(f"{out}: {what}; {left}") from error


def _records(line: object) -> dict[str, Record]:
    """The records of one line of the journal; `ValueError` if it holds anything else."""
    if isinstance(line, dict) and all(
        isinstance(record, dict) and all(isinstance(digest, str) for digest in record.values())
        for record in line.values()
    ):
        return line
    raise ValueError("no records")


def _allocate(fd: int, nbytes: int) -> None:
    """Reserve the space now, so that a full disk is noticed before the work."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def free_bytes(out: Path) -> int:
    """Free space where `out` would be written."""
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
