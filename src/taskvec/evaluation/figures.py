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
    parts = _parts(metric, scores)
    value = float(_value(metric, parts.sum(1)))
    if metric.kind == "rate":
        return Figure(value, *wilson(parts[0].sum(), len(scores)), len(scores))
    return Figure(value, *_percentiles(_resampled(metric, parts, seed)), len(scores))


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
    mine, other = _parts(metric, ours), _parts(metric, theirs)
    value = float(_value(metric, mine.sum(1)) - _value(metric, other.sum(1)))
    resampled = _resampled(metric, mine, seed) - _resampled(metric, other, seed)
    return Figure(value, *_percentiles(resampled), len(ours))


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


def _resampled(metric: Metric, parts: Array, seed: int) -> Array:
    """The metric of each resample, shape (RESAMPLES,)."""
    rng, n = np.random.default_rng(seed), parts.shape[1]
    sums = np.empty((2, RESAMPLES))
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


def span(figure: Figure, sign: str = "") -> str:
    """A value and its interval in words.

    Args:
        figure: Which.
        sign: `+` for a difference.

    >>> span(Figure(0.5, 0.4, 0.6, 100)), span(Figure(12.346, 11, 13, 9), "+")
    ('0.500 [0.400, 0.600]', '+12.35 [+11.00, +13.00]')
    >>> span(Figure(1234567.8, 1e6, math.inf, 9))
    '1.23e+06 [1e+06, inf]'
    """
    form = ".3f" if abs(figure.value) < 10 else ".2f" if abs(figure.value) < 1e5 else ".3g"
    value, low, high = (f"{x:{sign}{form}}" for x in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"
