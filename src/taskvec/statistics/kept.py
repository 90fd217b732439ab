"""What a random mask keeps of a task's pure vector: Σ |x| and Σ m |x| of every tensor.

Their quotient is the factor that gives what is kept the L1 norm of the whole. Sums run over chunks
counted from the start of a tensor and are added in that order, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.checkpoints.views import size
from taskvec.statistics.collect import Sources
from taskvec.statistics.trim import Counting, Source, sweep
from taskvec.streaming import CHUNK

Array = np.ndarray[Any, Any]

Sums = dict[str, dict[str, tuple[float, float]]]  # (all, kept) by task, then by tensor


def kept_sums(
    sources: Sequence[Sources],
    weights: Mapping[str, Mapping[str, float]],
    bounds: Mapping[str, Mapping[str, int]],
    keys: Mapping[str, Mapping[str, int]],
    how: Counting,
) -> Sums:
    """Σ |x| and Σ m |x| of every task in every tensor that it has.

    Args:
        sources: Floating-point tensors in name order.
        weights: w_t by task, then by tensor.
        bounds: Below which a draw keeps an entry, by task, then by tensor; see
            `kernels.randomness`.
        keys: What draws depend on besides the entry, likewise.
        how: How to run.
    """
    from taskvec.kernels.select import sum_magnitudes

    found: Sums = {}
    for task in sorted(bounds):
        mine = [s for s in sources if f"task:{task}" in s.views]
        sums = {s.name: np.zeros((-(-size(s.views[f"task:{task}"]) // CHUNK), 2)) for s in mine}

        def begin(
            task: str = task, sums: dict[str, Array] = sums
        ) -> Callable[[Source, int, int], None]:
            def add(source: Source, start: int, stop: int) -> None:
                name = source.name
                part = sums[name][start // CHUNK : -(-stop // CHUNK)]
                given = np.uint64(bounds[task][name]), np.uint64(keys[task][name])
                sum_magnitudes(*source.block(start, stop), *given, start, source.rows, part)

            return add

        sweep(mine, task, weights[task], begin, how, "sum")
        found[task] = {name: _added(chunks) for name, chunks in sums.items()}
    return found


def kept_by_rank(
    sources: Sequence[Sources],
    weights: Mapping[str, Mapping[str, float]],
    shares: Mapping[str, Mapping[str, tuple[float, float]]],
    keys: Mapping[str, Mapping[str, int]],
    how: Counting,
) -> Sums:
    """The same where the larger entries of a row are kept more often; see `kernels.magprune`.

    Args:
        sources: See `kept_sums`.
        weights: See `kept_sums`.
        shares: Density and ε by task, then by tensor.
        keys: See `kept_sums`.
        how: See `kept_sums`.
    """
    from taskvec.kernels.magprune import add_magnitudes, prune
    from taskvec.kernels.select import load_vector

    found: Sums = {}
    for task in sorted(shares):
        mine = [s for s in sources if f"task:{task}" in s.views]
        shapes = {s.name: s.views[f"task:{task}"].shape for s in mine}
        sums = {n: np.zeros((-(-math.prod(shape) // CHUNK), 2)) for n, shape in shapes.items()}

        def begin(
            task: str = task,
            shapes: dict[str, tuple[int, ...]] = shapes,
            sums: dict[str, Array] = sums,
        ) -> Callable[[Source, int, int], None]:
            def add(source: Source, start: int, stop: int) -> None:
                shape = shapes[source.name]
                part = sums[source.name][start // CHUNK : -(-stop // CHUNK)]
                rows = np.zeros((2, stop - start), source.rows.dtype)
                load_vector(*source.block(start, stop)[:4], 0, stop - start, rows, 1)
                add_magnitudes(rows[1], part[:, 0])
                lines = rows[1].reshape(-1, shape[-1] if shape else 1)
                key = np.uint64(keys[task][source.name])
                prune(lines, *shares[task][source.name], False, key, start)
                add_magnitudes(rows[1], part[:, 1])

            return add

        sweep(mine, task, weights[task], begin, how, "sum", by_row=True)
        found[task] = {name: _added(chunks) for name, chunks in sums.items()}
    return found


def _added(chunks: Array) -> tuple[float, float]:
    total = kept = 0.0
    for all_of_it, kept_of_it in chunks.tolist():
        total += all_of_it
        kept += kept_of_it
    return total, kept
