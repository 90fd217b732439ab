"""Thresholds of magnitude: which entries of a task's pure vector are among its k largest.

The result is exact for any number of equal magnitudes; fine-tunes in 16 bits have many. Of the
entries that equal the threshold, the first ones (tensors by name) are kept until k entries are.
Tensors are read two or three times; only histograms are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taskvec.checkpoints.views import size
from taskvec.statistics.collect import Sources, address
from taskvec.streaming import CHUNK, RunOptions, Unit, cut, row_step, stream

Array = np.ndarray[Any, Any]

SCOPES = ("model", "tensor")


@dataclass(frozen=True, slots=True)
class Threshold:
    """The entries that a trim keeps of one task in one tensor.

    Attributes:
        lower: Bits of the smallest magnitude that is kept.
        kept: How many entries with exactly that magnitude are kept, from the first one.
        equal: How many such entries each chunk of `CHUNK` elements has, if not all are kept.
    """

    lower: int
    kept: int
    equal: tuple[int, ...] = ()

    def left(self, start: int) -> int:
        """How many equal entries may still be kept from element `start` on, a chunk's first."""
        return max(0, self.kept - sum(self.equal[: start // CHUNK])) if self.equal else self.kept


@dataclass(frozen=True, slots=True)
class PureVector:
    """w_t τ_t of one task.

    Attributes:
        task: Name.
        sources: The tensors that the task has.
        weights: w_t by tensor.
    """

    task: str
    sources: Sequence[Sources]
    weights: Mapping[str, float]

    @classmethod
    def of(
        cls, task: str, sources: Sequence[Sources], weights: Mapping[str, Mapping[str, float]]
    ) -> PureVector:
        """That of a task, from the sources of a family and weights by task."""
        return cls(task, [s for s in sources if f"task:{task}" in s.views], weights[task])

    def by_tensor(self) -> list[PureVector]:
        """Each tensor by itself."""
        return [replace(self, sources=[source]) for source in self.sources]

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [size(source.views[f"task:{self.task}"]) for source in self.sources]


def thresholds(
    sources: Sequence[Sources],
    weights: Mapping[str, Mapping[str, float]],
    densities: Mapping[str, float | Mapping[str, float]],
    scope: str,
    options: RunOptions = RunOptions(),
) -> dict[str, dict[str, Threshold]]:
    """The threshold of every task in every tensor.

    Args:
        sources: Floating-point tensors in name order.
        weights: w_t by task, then by tensor.
        densities: Share of kept entries by task, in [0, 1]; one for each tensor if `scope` is
            `tensor` and the share differs between tensors.
        scope: `model`: the largest of all entries of a task; `tensor`: of each tensor.
        options: How to run.

    Returns:
        By task, then by tensor. k is density × entries, rounded to the nearest, half to even.
    """
    found: dict[str, dict[str, Threshold]] = {}
    for task, density in sorted(densities.items()):
        whole = PureVector.of(task, sources, weights)
        groups = [whole] if scope == "model" else whole.by_tensor()
        found[task] = {}
        for group in groups:
            first = group.sources[0].name
            share = density[first] if isinstance(density, Mapping) else density
            found[task] |= _of_group(group, share, options)
    return found


def _of_group(vector: PureVector, density: float, options: RunOptions) -> dict[str, Threshold]:
    """Thresholds of tensors whose entries are ranked together."""
    from taskvec.kernels.select import LOWER, UPPER, count_equal, count_magnitudes

    group, entries = vector.sources, sum(vector.sizes)
    wanted = round(density * entries)
    if wanted == 0:
        return {source.name: Threshold(0x7FFFFFFF, 0) for source in group}
    if wanted == entries:
        return {source.name: Threshold(0, entries) for source in group}

    def histogram(bins: int, upper: int) -> Array:
        parts: list[Array] = []  # one a thread; whole numbers, so their order does not matter

        def begin() -> Callable[[TaskTensor, int, int], None]:
            mine = np.zeros(bins, np.int64)
            parts.append(mine)

            def count(source: TaskTensor, start: int, stop: int) -> None:
                count_magnitudes(*source.block(start, stop), upper, source.rows, mine)

            return count

        sweep(vector, begin, options)
        total: Array = np.stack(parts).sum(0)
        return total

    upper, above = place(histogram(UPPER, -1), wanted)
    lower = histogram(LOWER, upper)
    low, higher = place(lower, wanted - above)
    magnitude = (upper << 15) | low
    kept, equal = wanted - above - higher, int(lower[low])
    if kept == equal:
        return {source.name: Threshold(magnitude, 2**62) for source in group}
    chunks = {
        source.name: np.zeros(-(-entries // CHUNK), np.int64)
        for source, entries in zip(group, vector.sizes, strict=True)
    }

    def begin() -> Callable[[TaskTensor, int, int], None]:
        def count(source: TaskTensor, start: int, stop: int) -> None:
            out = chunks[source.name][start // CHUNK : -(-stop // CHUNK)]
            count_equal(*source.block(start, stop), np.uint32(magnitude), source.rows, out)

        return count

    sweep(vector, begin, options)
    found = {}
    for source in group:
        here = int(chunks[source.name].sum())
        take = min(kept, here)
        kept -= take
        partial = 0 < take < here
        found[source.name] = Threshold(
            magnitude,
            take if partial else 2**62 if take else 0,
            tuple(chunks[source.name].tolist()) if partial else (),
        )
    return found


def place(histogram: Array, wanted: int) -> tuple[int, int]:
    """The bin with the `wanted`-th largest entry, and how many entries are in higher bins."""
    from_above = np.cumsum(histogram[::-1])
    first = int(np.searchsorted(from_above, wanted))
    bin_ = len(histogram) - 1 - first
    return bin_, int(from_above[first] - histogram[bin_])


class TaskTensor:
    """One tensor of one task, as the counting kernels take it; one object a thread."""

    def __init__(self, source: Sources, task: str, weight: float, rows: Array) -> None:
        self.name, self.rows = source.name, rows
        self._vector = source.views[f"task:{task}"]
        self._anchor = source.views["anchor"]
        self._weight = rows.dtype.type(weight)

    def block(self, start: int, stop: int) -> tuple[Array, Array, bool, Any, int]:
        """Addresses, codes, is_difference, weight and count of a block."""
        held = [self._vector.read(start, stop)]
        if not self._vector.is_difference:
            held.append(self._anchor.read(start, stop))
        self._held = held  # what the addresses point to
        addresses = np.array([address(held[-1]), address(held[0])], np.int64)
        codes = np.array([self._anchor.dtype.code, self._vector.dtype.code], np.int64)
        return addresses, codes, self._vector.is_difference, self._weight, stop - start


def sweep(
    vector: PureVector,
    begin: Callable[[], Callable[[TaskTensor, int, int], None]],
    options: RunOptions,
    label: str = "rank",
    *,
    by_row: bool = False,
) -> None:
    """Give every block of every tensor to a function that each thread begins for itself."""
    from taskvec.kernels.gram import STRETCH

    sizes, role = vector.sizes, f"task:{vector.task}"

    def make() -> Callable[[Unit], int]:
        count = begin()
        single = np.zeros((2, STRETCH), np.float32)
        double = np.zeros((2, STRETCH), np.float64)

        def work(unit: Unit) -> int:
            done = 0
            for tensor, start, stop in unit:
                source = vector.sources[tensor]
                views = source.views["anchor"], source.views[role]
                is_wide = options.precision == "float64" or 8 in [v.dtype.itemsize for v in views]
                weight = vector.weights[source.name]
                mine = TaskTensor(source, vector.task, weight, double if is_wide else single)
                count(mine, start, stop)
                done += source.nbytes * (stop - start) // max(1, sizes[tensor])
            return done

        return work

    total = sum(source.nbytes for source in vector.sources)
    steps = [row_step(source.views[role].shape) for source in vector.sources] if by_row else None
    with options.progress(f"{label} {vector.task}", total) as advance:
        for done in stream(cut(sizes, options.block, steps), make, options.workers):
            advance(done)
