"""The streaming loop: tensors cut into units of bounded size, units worked on by a few threads.

A unit is a stretch of one large tensor or a run of whole small ones, so that neither a large tensor
nor twenty thousand small ones cost more than their bytes. Results arrive in the order in which
threads finish; the caller must not depend on it.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

CHUNK = (
    65_536  # elements; reductions and digests run over chunks counted from the start of a tensor
)
BLOCK = 16 * CHUNK  # elements of a large tensor that are worked on at once

R = TypeVar("R")


class Stretch(NamedTuple):
    """Elements [start, stop) of the tensor with the given index."""

    tensor: int
    start: int
    stop: int


Unit = list[Stretch]


class _Finished:
    """Marks the end of a thread's results."""


class Progress(Protocol):
    """Called with the progress of each stage; the command line shows a bar."""

    def __call__(
        self, label: str, total: int, /
    ) -> AbstractContextManager[Callable[[int], object]]:
        """Begin; the context gives a function to call with the bytes or items done since."""


def silent(label: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Show no progress."""
    return nullcontext(lambda done: None)


def default_threads() -> int:
    """Processors this process may use, at most 8: beyond that disk or memory is the limit."""
    return max(
        1,
        min(
            8,
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
        ),
    )


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run, as opposed to what.

    Attributes:
        threads: Default: the number of processors, at most 8.
        block: Elements worked on at once; changes no bit of the result.
        precision: Arithmetic, `float32` or `float64`; a recipe brings its own.
        progress: Called with what is being done.
        cache: `use` cached scans and write new ones; `renew`: only write; `off`: neither.
        force: Whether an output that is there may be replaced.
        copy_code: Whether the target's `*.py` files go into an output.
    """

    threads: int | None = None
    block: int = BLOCK
    precision: str = "float32"
    progress: Progress = silent
    cache: str = "use"
    force: bool = False
    copy_code: bool = False

    @property
    def workers(self) -> int:
        """How many threads run."""
        return self.threads or default_threads()


def row_step(shape: Sequence[int]) -> int:
    """A step size at whose multiples a tensor can be cut between rows (its last dimension).

    >>> row_step((5, 3)), row_step((100_000, 48))
    (65536, 196608)
    """
    whole = -(-math.prod(shape) // CHUNK) * CHUNK
    return min(whole, math.lcm(CHUNK, shape[-1])) if shape and whole else max(whole, CHUNK)


def cut(
    sizes: Sequence[int], block: int = BLOCK, steps: Sequence[int] | None = None
) -> Iterator[Unit]:
    """Units that cover every element of every tensor once, in order.

    Args:
        sizes: Elements of each tensor. Empty tensors get one empty stretch, so that every tensor is
            seen.
        block: Largest number of elements in a unit; a multiple of `CHUNK`.
        steps: What the places where each tensor may be cut are multiples of, where that is more
            than `CHUNK`; a unit may then be larger than `block`.

    >>> list(cut([3, 100_000, 5], block=65_536))
    [[Stretch(tensor=0, start=0, stop=3)], [Stretch(tensor=1, start=0, stop=65536)], \
[Stretch(tensor=1, start=65536, stop=100000)], [Stretch(tensor=2, start=0, stop=5)]]
    """
    unit: Unit = []
    held = 0
    for tensor, size in enumerate(sizes):
        if unit and held + size > block:
            yield unit
            unit, held = [], 0
        if size <= block:
            unit.append(Stretch(tensor, 0, size))
            held += size
            continue
        step = CHUNK if steps is None else steps[tensor]
        length = max(step, block - block % step)
        for start in range(0, size, length):
            yield [Stretch(tensor, start, min(start + length, size))]
    if unit:
        yield unit


def stream(
    units: Iterator[Unit], make_worker: Callable[[], Callable[[Unit], R]], threads: int
) -> Iterator[R]:
    """Work on units in threads and yield the results as they arrive.

    Args:
        units: Taken by one thread at a time.
        make_worker: Called once in each thread, so that a worker may keep scratch space.
        threads: How many.

    Raises:
        Whatever a worker raises; the other threads then stop after their unit.
    """
    results: queue.Queue[R | BaseException | _Finished] = queue.Queue(maxsize=4 * threads)
    lock = threading.Lock()
    stop = threading.Event()

    def put(item: R | BaseException | _Finished) -> None:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
            except queue.Full:
                continue
            break

    def run(ended: threading.Event) -> None:
        try:
            worker = make_worker()
            while not stop.is_set():
                with lock:
                    unit = next(units, None)
                if unit is None:
                    break
                put(worker(unit))
        except BaseException as error:
            put(error)
        else:
            put(_Finished())
        finally:
            ended.set()

    _keep_freed_memory()
    ended = [threading.Event() for _ in range(threads)]
    pool = [threading.Thread(target=run, args=(end,), daemon=True) for end in ended]
    try:
        for thread in pool:
            thread.start()
        running = threads
        while running:
            item = results.get()
            if isinstance(item, _Finished):
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        stop.set()
        _wait(pool, ended)


def gather(
    sizes: Sequence[int],
    make_worker: Callable[[], Callable[[Stretch], R]],
    options: RunOptions,
    steps: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[R]]]:
    """Work on every stretch of every tensor; gives each tensor's results, in order, once complete.

    Args:
        sizes: Elements of each tensor.
        make_worker: See `stream`; the worker takes one stretch.
        options: How to run.
        steps: See `cut`.
    """

    def make() -> Callable[[Unit], list[tuple[Stretch, R]]]:
        work = make_worker()
        return lambda unit: [(stretch, work(stretch)) for stretch in unit]

    waiting: dict[int, list[tuple[Stretch, R]]] = {}
    for results in stream(cut(sizes, options.block, steps), make, options.workers):
        for stretch, result in results:
            parts = waiting.setdefault(stretch.tensor, [])
            parts.append((stretch, result))
            if sum([s.stop - s.start for s, _ in parts]) == sizes[stretch.tensor]:
                del waiting[stretch.tensor]
                parts.sort(key=lambda part: part[0].start)
                yield stretch.tensor, [part for _, part in parts]


def _wait(pool: Sequence[threading.Thread], ended: Sequence[threading.Event]) -> None:
    """Wait until no thread works any more, even if Ctrl-C is pressed again.

    Otherwise a thread could write to a file that its user has closed. `join` alone is not enough:
    once interrupted, it treats a thread that still works as ended.
    """
    is_working = True
    while is_working:
        with suppress(KeyboardInterrupt):
            for thread, end in zip(pool, ended, strict=True):
                if thread.ident is not None:  # started
                    end.wait()
                    thread.join()
            is_working = False


def _keep_freed_memory() -> None:
    """Make the C library reuse freed blocks, which it does after a large one was freed.

    Otherwise it returns memory to the system after every block and gets it back page by page, which
    took two thirds of the time of a scan (docs/log/2026-11-22-pread.md). Only glibc needs this; it
    holds at most 64 MiB per thread.
    """
    block = bytearray(2**25 - 2**13)  # its pages are never touched
    del block
