"""Comparison of several models on the same samples: differences, and shares of what is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.intervals import Figure, difference
from taskvec.journal import finite


@dataclass(frozen=True, slots=True)
class Compared:
    """One model in one task beside the others.

    Attributes:
        result: Of the model.
        difference: Its main metric less that of the reference, on the same samples; None for the
            reference itself, or without one.
        share: Its main metric over that of the task's single-task model; None without one, or
            where that is 0 or negative, such as a log-likelihood.
    """

    result: Result
    difference: Figure | None
    share: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        about = {"difference": self.difference, "share_of_single": self.share}
        return self.result.to_json() | dict(finite(about))


def compare(
    results: Mapping[str, Sequence[Result]],
    *,
    reference: str | None = None,
    singles: Mapping[str, str] | None = None,
) -> dict[str, list[Compared]]:
    """Models side by side, by task.

    Args:
        results: By model, of the same tasks in the same order.
        reference: The model that differences are taken to.
        singles: The model that was tuned for a task alone, by task.
    """
    found: dict[str, list[Compared]] = {}
    for model, mine in results.items():
        for place, result in enumerate(mine):
            other = results[reference][place] if reference is not None else None
            apart = None
            if other is not None and model != reference:
                seed = result.about["seed"]
                metric = result.metrics[0]
                apart = difference(metric, result.scores, other.scores, seed=seed)
            single = (singles or {}).get(result.task)
            whole = results[single][place].main.value if single is not None else 0.0
            share = result.main.value / whole if whole > 0 else None
            found.setdefault(result.task, []).append(Compared(result, apart, share))
    return found
