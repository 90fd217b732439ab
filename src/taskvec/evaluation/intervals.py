"""Figures with 95 % intervals: what n samples say about a model.

Rates have Wilson's interval. Everything else, and every difference between two models, has the
percentile interval of a bootstrap over samples: n of them are drawn with replacement, 2,000 times.
A difference draws the same samples for both models (paired), since what is hard for one is mostly
hard for the other. Samples that lack what a metric needs do not count.

A sum of independent figures has the interval of the method of variance estimates recovery: with x_t
in [l_t, u_t], the sum is in [Σ x_t − √(Σ (x_t − l_t)²), Σ x_t + √(Σ (u_t − x_t)²)].

Source: Zou and Donner, Construction of confidence limits about effect measures: a general approach,
Statistics in Medicine 27 (2008), 1693–1702.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskvec.evaluation.task import Metric, Score
from taskvec.journal import finite

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
        return dict(finite({"value": self.value, "interval": [self.low, self.high], "n": self.n}))


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate, within 0 to 1.

    >>> [round(bound, 3) for bound in wilson(95, 100)]
    [0.888, 0.978]
    """
    rate, z2 = correct / n, Z_95**2 / n
    centre = rate + z2 / 2
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / 4))
    low, high = (centre - half) / (1 + z2), (centre + half) / (1 + z2)
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))  # rounding may cross the rate


def figure(metric: Metric, scores: Sequence[Score], *, seed: int = 0) -> Figure:
    """What a metric says over the samples that have it; NaN where none has.

    Args:
        metric: Which scores, and how they become one value.
        scores: One for each sample.
        seed: Of the bootstrap.
    """
    (mine,) = _in_all(metric, scores)
    n = len(mine)
    value = float(_values(metric, mine, [np.arange(n)])[0])
    if math.isnan(value):
        return Figure(value, value, value, n)
    if metric.kind == "rate":
        return Figure(value, *wilson(value * n, n), n)
    if n < 2:
        return Figure(value, math.nan, math.nan, n)
    return Figure(value, *percentiles(_values(metric, mine, _resamples(metric, n, seed))), n)


def difference(
    metric: Metric, ours: Sequence[Score], theirs: Sequence[Score], *, seed: int = 0
) -> Figure:
    """Our value minus theirs, paired, over the samples that have the metric in both.

    Args:
        metric: What is compared.
        ours: Scores of one model, one for each sample.
        theirs: Scores of the other, of the same samples in the same order.
        seed: Of the bootstrap.
    """
    n, (one, two) = paired(metric, ours, theirs, seed=seed)
    with np.errstate(invalid="ignore"):  # infinite minus infinite is NaN
        return figure_of(one - two, n)


def paired(metric: Metric, *runs: Sequence[Score], seed: int = 0) -> tuple[int, list[Array]]:
    """A metric of several models over the samples that have it in all, and over resamples.

    Args:
        metric: What is measured.
        runs: Scores of each model, of the same samples in the same order.
        seed: Of the bootstrap.

    Returns:
        How many samples have it, and for each model the value, then those of the resamples, which
        are the same for all models.
    """
    shared = _in_all(metric, *runs)
    n = len(shared[0])
    picks = [np.arange(n), *(_resamples(metric, n, seed) if n else ())]
    return n, [_values(metric, run, picks) for run in shared]


def figure_of(values: Array, n: int) -> Figure:
    """The figure of a value (the first) and what resamples give (the others)."""
    value = float(values[0])
    if math.isnan(value) or n < 2:  # one sample says nothing of how samples differ
        return Figure(value, math.nan, math.nan, n)
    return Figure(value, *percentiles(values[1:]), n)


@dataclass(slots=True)
class Bootstrap:
    """Resamples of a number of samples, the same for everything that is measured on them.

    Attributes:
        n: Samples.
        seed: Of the draws.
        counts: How often each sample is in each resample, float32, shape (resamples, n).
    """

    n: int
    seed: int
    counts: Array = field(init=False)

    def __post_init__(self) -> None:
        picks = resamples(self.n, self.seed)
        self.counts = np.array([np.bincount(p, minlength=self.n) for p in picks], np.float32)

    def ratios(self, above: Array, below: Array) -> Array:
        """Σ above / Σ below of each resample, shape (resamples,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((self.counts @ above) / (self.counts @ below))


def ratio(above: Array, below: Array, bootstrap: Bootstrap | None) -> Figure:
    """Σ above / Σ below over samples, with its interval.

    Args:
        above: Of each sample, float64, shape (samples,).
        below: The same.
        bootstrap: Of so many samples; None: `above` are 0 or 1 and `below` 1, so that Wilson's
            interval applies.
    """
    n = len(above)
    value = float(above.sum() / below.sum())
    if math.isnan(value):
        return Figure(value, value, value, n)
    if bootstrap is None:
        return Figure(value, *wilson(float(above.sum()), n), n)
    return Figure(value, *percentiles(bootstrap.ratios(above, below)), n)


def total(figures: Sequence[Figure]) -> Figure:
    """The sum of independent figures.

    >>> total([Figure(0.5, 0.2, 0.8, 10), Figure(0.5, 0.1, 0.9, 10)])
    Figure(value=1.0, low=0.5, high=1.5, n=20)
    """
    value = sum(each.value for each in figures)
    low = math.hypot(*(each.value - each.low for each in figures))
    high = math.hypot(*(each.high - each.value for each in figures))
    return Figure(value, value - low, value + high, sum(each.n for each in figures))


def items_of(name: str, notes: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the samples that have a metric of kind `own` have in it."""
    return [note["items"][name] for note in notes if name in note.get("items", ())]


def _has(metric: Metric, score: Score) -> bool:
    if metric.aggregate is not None:
        return metric.name in score.notes.get("items", ())
    return {metric.value or metric.name, metric.per} - {""} <= score.values.keys()


def _in_all(metric: Metric, *runs: Sequence[Score]) -> list[list[Score]]:
    """The scores of each run, of the samples that have the metric in all runs."""
    together = [each for each in zip(*runs, strict=True) if all(_has(metric, s) for s in each)]
    return [[each[i] for each in together] for i in range(len(runs))]


def _values(metric: Metric, scores: Sequence[Score], picks: Iterable[Array]) -> Array:
    """The metric of each choice of samples, shape (picks,); NaN where there is none."""
    if metric.aggregate is not None:
        chosen = ([scores[i].notes for i in pick] for pick in picks)
        return np.array([metric.aggregate(items_of(metric.name, notes)) for notes in chosen])
    over = metric.value or metric.name
    above = np.array([score.values[over] for score in scores], np.float64)
    below = np.array([score.values[metric.per] if metric.per else 1.0 for score in scores])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        sums = np.array([(above[pick].sum(), below[pick].sum()) for pick in picks])
        ratio = sums[:, 0] / sums[:, 1]
        return np.exp(ratio) if metric.kind == "perplexity" else np.asarray(ratio)


def _resamples(metric: Metric, n: int, seed: int) -> Iterator[Array]:
    """Which samples each resample has, for a metric."""
    return resamples(n, seed, RESAMPLES if metric.aggregate is None else RESAMPLES_OWN)


def resamples(n: int, seed: int, count: int = RESAMPLES) -> Iterator[Array]:
    """Which of n samples each resample has; the same at every call."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, n, n) for _ in range(count))


def percentiles(values: Array) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points, never between two values: one of them may be infinite."""
    known = np.sort(values[~np.isnan(values)])
    if not known.size:
        return math.nan, math.nan
    last = known.size - 1
    return float(known[math.floor(0.025 * last)]), float(known[math.ceil(0.975 * last)])


def by_name(metrics: Sequence[Metric], scores: Sequence[Score], seed: int) -> Mapping[str, Figure]:
    """The figure of every metric that the scores have, by name.

    A metric that no score has is left out, such as pass@10 of fewer than ten answers; but for the
    main one, the first, which is then NaN of no samples.
    """
    present = [
        metric
        for place, metric in enumerate(metrics)
        if place == 0 or any(_has(metric, score) for score in scores)
    ]
    return {metric.name: figure(metric, scores, seed=seed) for metric in present}


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
    if math.isnan(figure.low) and not math.isnan(figure.value):
        return f"{figure.value:{sign}.4g}"
    form = ".3f" if abs(figure.value) < 10 else ".2f" if abs(figure.value) < 1e5 else ".3g"
    value, low, high = (f"{x:{sign}{form}}" for x in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"
