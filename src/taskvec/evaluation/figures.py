"""Figures with intervals: what the scores of n samples say about the model.

Rates have Wilson's interval. Everything else, and every difference between two models, has the
percentile interval of a bootstrap over samples: n of them are drawn with replacement, 2,000 times.
A difference draws the same samples for both models (paired), since what is hard for one is mostly
hard for the other. All intervals are at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.evaluation.task import Metric, Score

Array = np.ndarray[Any, Any]

Z_95 = 1.959964  # two-sided 95 % point of the normal distribution
RESAMPLES = 2000
RESAMPLES_OWN = 200  # of metrics with functions of their own, which may be slow


@dataclass(frozen=True, slots=True)
class Figure:
    """A value, its 95 % interval, and how many samples it is from."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; what is not finite becomes None."""
        bounds = [x if math.isfinite(x) else None for x in (self.value, self.low, self.high)]
        return {"value": bounds[0], "interval": bounds[1:], "n": self.n}


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate, within 0 to 1.

    >>> [round(bound, 3) for bound in wilson(95, 100)]
    [0.888, 0.978]
    """
    rate, z2 = correct / n, Z_95**2 / n
    centre = rate + z2 / 2
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / 4))
    low, high = (centre - half) / (1 + z2), (centre + half) / (1 + z2)
    return max(0.0, low), min(1.0, high)


def figure(metric: Metric, scores: Sequence[Score], *, seed: int = 0) -> Figure:
    """What a metric says over all samples.

    Args:
        metric: Which scores, and how they become one value.
        scores: One for each sample, at least one.
        seed: Of the bootstrap.
    """
    value = _total(metric, scores)
    if metric.kind == "rate":
        return Figure(value, *wilson(value * len(scores), len(scores)), len(scores))
    return Figure(value, *_percentiles(_resampled(metric, scores, seed)), len(scores))


def difference(
    metric: Metric, ours: Sequence[Score], theirs: Sequence[Score], *, seed: int = 0
) -> Figure:
    """Our value minus theirs, paired.

    Args:
        metric: What is compared.
        ours: Scores of one model, one for each sample.
        theirs: Scores of the other, of the same samples in the same order.
        seed: Of the bootstrap.
    """
    value = _total(metric, ours) - _total(metric, theirs)
    resampled = _resampled(metric, ours, seed) - _resampled(metric, theirs, seed)
    return Figure(value, *_percentiles(resampled), len(ours))


def items_of(name: str, notes: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the samples that have a metric of kind `own` have in it."""
    return [note["items"][name] for note in notes if name in note["items"]]


def _total(metric: Metric, scores: Sequence[Score]) -> float:
    """The metric of all samples."""
    if metric.aggregate is not None:
        return metric.aggregate(items_of(metric.name, [score.notes for score in scores]))
    return float(_value(metric, _parts(metric, scores).sum(1)))


def _parts(metric: Metric, scores: Sequence[Score]) -> Array:
    """Numerators and denominators, shape (2, n), float64."""
    over = metric.value or metric.name
    return np.array(
        [
            [score.values[over] for score in scores],
            [score.values[metric.per] if metric.per else 1.0 for score in scores],
        ]
    )


def _value(metric: Metric, sums: Array) -> Array:
    """The value of sums of numerators and denominators, shape (2, …); NaN where there is none."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = sums[0] / sums[1]
        return np.exp(ratio) if metric.kind == "perplexity" else np.asarray(ratio)


def _resampled(metric: Metric, scores: Sequence[Score], seed: int) -> Array:
    """The metric of each resample, shape (RESAMPLES,) or (RESAMPLES_OWN,)."""
    rng, n = np.random.default_rng(seed), len(scores)
    if metric.aggregate is not None:
        drawn = ([scores[i] for i in rng.integers(0, n, n)] for _ in range(RESAMPLES_OWN))
        return np.array([_total(metric, each) for each in drawn])
    parts, sums = _parts(metric, scores), np.empty((2, RESAMPLES))
    for i in range(RESAMPLES):  # one at a time: n may be large
        sums[:, i] = parts[:, rng.integers(0, n, n)].sum(1)
    return _value(metric, sums)


def _percentiles(values: Array) -> tuple[float, float]:
    low, high = (
        np.nanpercentile(values, [2.5, 97.5]) if not np.isnan(values).all() else [np.nan] * 2
    )
    return float(low), float(high)


def by_name(metrics: Sequence[Metric], scores: Sequence[Score], seed: int) -> Mapping[str, Figure]:
    """The figure of every metric, by name."""
    return {metric.name: figure(metric, scores, seed=seed) for metric in metrics}
