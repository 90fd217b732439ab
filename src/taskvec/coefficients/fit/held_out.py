"""Whether fitted weights are worth it: losses on held-out prompts, with paired intervals.

A prompt is a sample: prompts of each source are drawn with replacement, the same for everything
that is compared, and each resample gives Σ_s ω_s (Σ losses / Σ positions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.coefficients.fit.objective import HeldOutLoss
from taskvec.evaluation.intervals import RESAMPLES, Bootstrap, Figure, figure_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Standing:
    """What one choice of weights is worth on the held-out prompts, in nats a position.

    Attributes:
        name: `target`, `start`, `one weight`, `layers`, …
        loss: Σ_s ω_s of all sources.
        sources: Of each source.
        gain: Loss of one weight a task less this one's, paired; None for that itself.
    """

    name: str
    loss: Figure
    sources: Mapping[str, Figure]
    gain: Figure | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "loss": self.loss.to_json(),
            "sources": {name: each.to_json() for name, each in self.sources.items()},
            "gain": None if self.gain is None else self.gain.to_json(),
        }


class Resamples:
    """Prompts drawn with replacement, the same for everything that is compared."""

    def __init__(
        self, measured: Mapping[str, HeldOutLoss], weights: Mapping[str, float], seed: int
    ) -> None:
        """Draw.

        Args:
            measured: Anything that was measured, for the numbers of prompts.
            weights: ω by source.
            seed: Of the draws.
        """
        self.weights = weights
        self.draws = {
            name: Bootstrap(len(measured[name].sums), seed + place)
            for place, name in enumerate(sorted(measured))
        }

    def of(self, name: str, measured: HeldOutLoss) -> Array:
        """The value of a source, then that of each resample."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value = measured.sums.sum() / measured.counts.sum()
        resampled = self.draws[name].ratios(measured.sums, measured.counts)
        return np.concatenate([[value], resampled])

    def total(self, measured: Mapping[str, HeldOutLoss]) -> Array:
        """Σ_s ω_s of the sources, then that of each resample."""
        found: Array = sum(
            (self.weights[name] * self.of(name, each) for name, each in measured.items()),
            np.zeros(RESAMPLES + 1),
        )
        return found

    def standing(
        self,
        name: str,
        measured: Mapping[str, HeldOutLoss],
        against: Mapping[str, HeldOutLoss] | None,
    ) -> Standing:
        """What was measured, with intervals, against something else."""
        n = sum(len(each.sums) for each in measured.values())
        total = self.total(measured)
        sources = {
            source: figure_of(self.of(source, each), len(each.sums))
            for source, each in measured.items()
        }
        gain = None if against is None else figure_of(self.total(against) - total, n)
        return Standing(name, figure_of(total, n), sources, gain)
