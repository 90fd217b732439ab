"""The raw floor: moving the same bytes between page cache, memory and disk, and nothing else.

It runs as a process of its own, so that the start of Python counts here as it does for what is
compared with it. It imports the standard library only. Reading and writing follow one another.

    python benchmarks/floor.py --threads 2 --read FILE... --write FOLDER --bytes N
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

READ_BYTES = 1 << 20
WRITE_BYTES = 4 << 20


def read_files(files: Sequence[str], *, threads: int) -> int:
    """Read every byte of `files` by positional reads into one reused buffer a thread."""
    handles = [os.open(file, os.O_RDONLY) for file in files]
    sizes = [os.fstat(handle).st_size for handle in handles]
    pieces = [
        (handle, offset)
        for handle, size in zip(handles, sizes, strict=True)
        for offset in range(0, size, READ_BYTES)
    ]
    read_bytes = _in_threads(partial(_read, pieces), threads)
    for handle in handles:
        os.close(handle)
    if read_bytes != sum(sizes):
        raise OSError(f"read {read_bytes} bytes of {sum(sizes)}")
    return read_bytes


def write_file(folder: str, size: int, *, threads: int) -> int:
    """Write `size` bytes to one file in `folder` and see them safely on disk."""
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103 (pathlib is slow to import)
    handle = os.open(f"{folder}/floor.bin", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    source = memoryview(os.urandom(WRITE_BYTES))
    written_bytes = _in_threads(partial(_write, handle, source, size), threads)
    os.fdatasync(handle)
    os.close(handle)
    parent = os.open(folder, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
    return written_bytes


def _read(pieces: list[tuple[int, int]], part: slice) -> int:
    buffer = bytearray(READ_BYTES)
    return sum(os.preadv(handle, [buffer], offset) for handle, offset in pieces[part])


def _write(handle: int, source: memoryview, size: int, part: slice) -> int:
    offsets = range(0, size, WRITE_BYTES)[part]
    return sum(os.pwrite(handle, source[: size - offset], offset) for offset in offsets)


def _in_threads(work: Callable[[slice], int], threads: int) -> int:
    """Deal the pieces out in turn: piece i goes to thread i modulo `threads`."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, [slice(first, None, threads) for first in range(threads)]))


def main() -> None:
    parser = argparse.ArgumentParser(description="read and write bytes as fast as that goes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--read", nargs="*", default=[], metavar="FILE")
    parser.add_argument("--write", metavar="FOLDER")
    parser.add_argument("--bytes", type=int, default=0)
    options = parser.parse_args()
    read_files(options.read, threads=options.threads)
    if options.write:
        write_file(options.write, options.bytes, threads=options.threads)


if __name__ == "__main__":
    main()
