"""Values over the whole model that PCB-Merging needs to score and weight single entries.

For each task: two bounds of magnitude, the smallest score of a kept entry, and the largest score.
Tensors are streamed; only histograms are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import size
from taskvec.statistics.collect import Sources
from taskvec.statistics.trim import place, thresholds
from taskvec.streaming import RunOptions, Stretch, Unit, cut, stream

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Mapping[str, float]]

CLIPPED = 1e-4  # share of entries beyond each bound of magnitude


def competition(
    sources: Sequence[Sources],
    weights: Weights,
    densities: Mapping[str, float],
    options: RunOptions,
) -> dict[str, dict[str, float]]:
    """`smallest`, `largest`, `cut` and `top` of every task.

    Args:
        sources: Floating-point tensors in name order.
        weights: By task, then by tensor, what its vector is multiplied with; with −1 for a task
            that is subtracted.
        densities: Share of entries kept, by task; only these tasks compete.
        options: How to run.

    Returns:
        By task, without tasks that have no entries. `cut` is the k-th largest score, k = density ×
        entries (of the tensors that the task has), at least 1. Bounds of magnitude leave out
        `CLIPPED` of the entries at each end; where that is less than one entry, they are 0 and the
        largest magnitude.
    """
    densities = {t: d for t, d in sorted(densities.items()) if entries_of(sources, t)}
    limits = {task: _bounds(sources, weights, task, options) for task in densities}
    found: dict[str, dict[str, float]] = {}
    for task, (cut_off, top) in _scores(sources, weights, densities, limits, options).items():
        smallest, largest = limits[task]
        found[task] = {"smallest": smallest, "largest": largest, "cut": cut_off, "top": top}
    return found


def entries_of(sources: Sequence[Sources], task: str) -> int:
    """Entries of the tensors that a task has."""
    return sum(size(s.views[f"task:{task}"]) for s in sources if f"task:{task}" in s.views)


def _bounds(
    sources: Sequence[Sources], weights: Weights, task: str, options: RunOptions
) -> tuple[float, float]:
    """The bounds to which the magnitudes of a task are clipped."""
    entries = entries_of(sources, task)
    beyond = round(CLIPPED * entries)
    wanted = entries - beyond, max(1, beyond)
    bits = []
    for k in wanted:
        found = thresholds(sources, weights, {task: k / entries}, "model", options)[task].values()
        bits.append(max((t.lower for t in found), default=0))
    smallest, largest = np.array(bits, np.uint32).view(np.float32).tolist()
    return smallest, largest


def _scores(
    sources: Sequence[Sources],
    weights: Weights,
    densities: Mapping[str, float],
    limits: Mapping[str, tuple[float, float]],
    options: RunOptions,
) -> dict[str, tuple[float, float]]:
    """The k-th largest score of each task, and the largest."""
    from taskvec.kernels.competition import BINS, count_scores, score, score_of

    tasks = sorted(densities)
    smallest, largest = np.array([limits[task] for task in tasks]).reshape(-1, 2).T.copy()

    def histograms(uppers: Array) -> Array:
        """Counts of upper bits, or of lower bits for given upper bits, shape (N, …, BINS)."""
        parts: list[Array] = []

        def begin() -> Callable[[Sources, Array], None]:
            mine = np.zeros((*uppers.shape, BINS), np.int64)
            parts.append(mine)

            def count(source: Sources, vectors: Array) -> None:
                scores = np.empty(vectors.shape, np.float32)
                score(vectors, smallest, largest, scores)
                for t, task in enumerate(tasks):
                    if f"task:{task}" in source.views:
                        for counts, upper in zip(mine[t], uppers[t], strict=True):
                            count_scores(scores[t], int(upper), counts)

            return count

        _sweep(sources, tasks, weights, begin, options)
        total: Array = np.stack(parts).sum(0)
        return total

    ranks = [
        [max(1, round(densities[task] * entries_of(sources, task))), 1] for task in tasks
    ]  # of the cut and of the top
    high = histograms(np.full((len(tasks), 1), -1))[:, 0]
    places = [[place(high[t], k) for k in ranks[t]] for t in range(len(tasks))]
    low = histograms(np.array([[upper for upper, _ in mine] for mine in places]).reshape(-1, 2))
    found = {}
    for t, task in enumerate(tasks):
        cut_off, top = (
            score_of(upper, place(low[t, j], k - above)[0])
            for j, (k, (upper, above)) in enumerate(zip(ranks[t], places[t], strict=True))
        )
        found[task] = cut_off, top
    return found


def _sweep(
    sources: Sequence[Sources],
    tasks: Sequence[str],
    weights: Weights,
    begin: Callable[[], Callable[[Sources, Array], None]],
    options: RunOptions,
) -> None:
    """Give every block of all vectors to a function that each thread begins for itself."""
    sizes = [size(source.views["anchor"]) for source in sources]

    def make() -> Callable[[Unit], int]:
        count = begin()

        def work(unit: Unit) -> int:
            done = 0
            for stretch in unit:
                tensor, start, stop = stretch
                source = sources[tensor]
                count(source, _vectors(source, tasks, weights, stretch, options.precision))
                done += source.nbytes * (stop - start) // max(1, sizes[tensor])
            return done

        return work

    with options.progress("score", sum(source.nbytes for source in sources)) as advance:
        for done in stream(cut(sizes, options.block), make, options.workers):
            advance(done)


def _vectors(
    source: Sources, tasks: Sequence[str], weights: Weights, stretch: Stretch, precision: str
) -> Array:
    """x_t of a block, shape (N, n), in the arithmetic in which the block is merged."""
    _, start, stop = stretch
    is_wide = precision == "float64" or 8 in [v.dtype.itemsize for v in source.views.values()]
    kind = np.float64 if is_wide else np.float32
    anchor = source.views["anchor"]
    start_from = widened(anchor.read(start, stop), anchor.dtype).astype(kind)
    found = np.zeros((len(tasks), stop - start), kind)
    with np.errstate(invalid="ignore"):  # infinite weights are an error of the merge
        for vector, task in zip(found, tasks, strict=True):
            weight, view = weights[task][source.name], source.views.get(f"task:{task}")
            if view is None or weight == 0:
                continue
            vector[:] = widened(view.read(start, stop), view.dtype)
            if not view.is_difference:
                vector -= start_from
            if weight != 1:
                vector *= kind(weight)
    return found
