"""The sums Σ |x| and Σ m |x| of a pure vector x and a random mask m, for every tensor.

Their quotient is the factor that gives the kept entries the L1 norm of the whole. Sums run over
chunks counted from the start of a tensor and are added in that order, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.statistics.collect import Sources
from taskvec.statistics.trim import PureVector, TaskTensor, sweep
from taskvec.streaming import CHUNK, RunOptions

Array = np.ndarray[Any, Any]

Sums = dict[str, dict[str, tuple[float, float]]]  # (all, kept) by task, then by tensor


def masked_sums(
    sources: Sequence[Sources],
    weights: Mapping[str, Mapping[str, float]],
    bounds: Mapping[str, Mapping[str, int]],
    keys: Mapping[str, Mapping[str, int]],
    options: RunOptions,
) -> Sums:
    """Σ |x| and Σ m |x| of every task in every tensor that it has.

    Args:
        sources: Floating-point tensors in name order.
        weights: w_t by task, then by tensor.
        bounds: A draw below its bound keeps an entry; by task, then by tensor; see
            `kernels.randomness`.
        keys: Keys of the draws, which also depend on the entry; by task, then by tensor.
        options: How to run.
    """
    from taskvec.kernels.select import sum_magnitudes

    def add(task: str, source: TaskTensor, start: int, stop: int, part: Array) -> None:
        given = np.uint64(bounds[task][source.name]), np.uint64(keys[task][source.name])
        sum_magnitudes(*source.block(start, stop), *given, start, source.rows, part)

    return _sweep_sums(sources, weights, add, options)


def masked_sums_by_rank(
    sources: Sequence[Sources],
    weights: Mapping[str, Mapping[str, float]],
    shares: Mapping[str, Mapping[str, tuple[float, float]]],
    keys: Mapping[str, Mapping[str, int]],
    options: RunOptions,
) -> Sums:
    """The same sums if larger entries of a row are kept more often; see `kernels.magprune`.

    Args:
        sources: See `masked_sums`.
        weights: See `masked_sums`.
        shares: Density and ε by task, then by tensor.
        keys: See `masked_sums`.
        options: See `masked_sums`.
    """
    from taskvec.kernels.magprune import add_magnitudes, prune
    from taskvec.kernels.select import load_vector

    shapes = {source.name: next(iter(source.views.values())).shape for source in sources}

    def add(task: str, source: TaskTensor, start: int, stop: int, part: Array) -> None:
        rows = np.zeros((2, stop - start), source.rows.dtype)
        load_vector(*source.block(start, stop)[:4], 0, stop - start, rows, 1)
        add_magnitudes(rows[1], part[:, 0])
        columns = max((1, *shapes[source.name][-1:]))
        key = np.uint64(keys[task][source.name])
        prune(rows[1].reshape(-1, columns), *shares[task][source.name], False, key, start)
        add_magnitudes(rows[1], part[:, 1])

    return _sweep_sums(sources, weights, add, options, by_row=True)


def _sweep_sums(
    sources: Sequence[Sources],
    weights: Mapping[str, Mapping[str, float]],
    add: Callable[[str, TaskTensor, int, int, Array], None],
    options: RunOptions,
    *,
    by_row: bool = False,
) -> Sums:
    """Sums of every task, from a function that adds a block to its chunks, shape (chunks, 2)."""
    found: Sums = {}
    for task in sorted(weights):
        vector = PureVector.of(task, sources, weights)
        names = [each.name for each in vector.sources]
        sums = {n: np.zeros((-(-k // CHUNK), 2)) for n, k in zip(names, vector.sizes, strict=True)}

        def begin(
            task: str = task, sums: dict[str, Array] = sums
        ) -> Callable[[TaskTensor, int, int], None]:
            def count(source: TaskTensor, start: int, stop: int) -> None:
                part = sums[source.name][start // CHUNK : -(-stop // CHUNK)]
                add(task, source, start, stop, part)

            return count

        sweep(vector, begin, options, "sum", by_row=by_row)
        found[task] = {name: _add_chunks(chunks) for name, chunks in sums.items()}
    return found


def _add_chunks(chunks: Array) -> tuple[float, float]:
    total = kept = 0.0
    for all_of_it, kept_of_it in chunks.tolist():
        total += all_of_it
        kept += kept_of_it
    return total, kept
