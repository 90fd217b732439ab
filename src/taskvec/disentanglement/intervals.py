"""Intervals of what is measured on examples: shares, means, and sums of both, at 95 %.

A share of examples has Wilson's interval. Where an example has several rows (the positions of a
text), or a row is worth more than 0 or 1, the interval is the percentile interval of a bootstrap
over examples. A sum of independent figures has the interval of the method of variance estimates
recovery: with x_t in [l_t, u_t], the sum is in
[Σ x_t − √(Σ (x_t − l_t)²), Σ x_t + √(Σ (u_t − x_t)²)].

Source: Zou and Donner, Construction of confidence limits about effect measures: a general approach,
Statistics in Medicine 27 (2008), 1693–1702.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskvec.evaluation.intervals import RESAMPLES, Figure, wilson

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Bootstrap:
    """Resamples of a number of examples, the same for everything that is measured on them.

    Attributes:
        n: Examples.
        seed: Of the draws.
        counts: How often each example is in each resample, float32, shape (resamples, n).
    """

    n: int
    seed: int
    counts: Array = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        even = np.full(self.n, 1 / self.n)
        self.counts = rng.multinomial(self.n, even, RESAMPLES).astype(np.float32)

    def ratios(self, above: Array, below: Array) -> Array:
        """Σ above / Σ below of each resample, shape (resamples,)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((self.counts @ above) / (self.counts @ below))


def ratio(above: Array, below: Array, bootstrap: Bootstrap | None) -> Figure:
    """Σ above / Σ below over examples, with its interval.

    Args:
        above: Of each example, float64, shape (examples,).
        below: Likewise.
        bootstrap: Of so many examples; None: `above` are 0 or 1 and `below` 1, so that Wilson's
            interval applies.
    """
    n = len(above)
    value = float(above.sum() / below.sum())
    if math.isnan(value):
        return Figure(value, value, value, n)
    if bootstrap is None:
        return Figure(value, *wilson(float(above.sum()), n), n)
    return Figure(value, *percentiles(bootstrap.ratios(above, below)), n)


def percentiles(values: Array) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points; NaN where there is nothing."""
    known = values[np.isfinite(values)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def total(figures: Sequence[Figure]) -> Figure:
    """The sum of independent figures.

    >>> total([Figure(0.5, 0.2, 0.8, 10), Figure(0.5, 0.1, 0.9, 10)])
    Figure(value=1.0, low=0.5, high=1.5, n=20)
    """
    value = sum(each.value for each in figures)
    low = math.hypot(*(each.value - each.low for each in figures))
    high = math.hypot(*(each.high - each.value for each in figures))
    return Figure(value, value - low, value + high, sum(each.n for each in figures))
