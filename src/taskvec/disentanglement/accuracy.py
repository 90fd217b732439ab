"""Accuracy of merges on several tasks, example by example, stored as it is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from taskvec.disentanglement.records import Records
from taskvec.disentanglement.tasks import ModelTask, by_example, rows_of
from taskvec.disentanglement.weights import Points
from taskvec.errors import DataError
from taskvec.evaluation.intervals import Bootstrap, Figure, percentiles, ratio

Array = np.ndarray[Any, Any]
Methods = Mapping[str, str | Mapping[str, Any]]  # by label: a name, or as in a recipe
PLAIN: Methods = {"task_arithmetic": "task_arithmetic"}


class Counts(NamedTuple):
    """Right answers of each example, and of how many; float64, shape (examples,)."""

    right: Array
    of: Array

    @property
    def accuracy(self) -> float:
        """Σ right / Σ of."""
        return float(self.right.sum() / self.of.sum())


@dataclass(slots=True)
class Accuracies:
    """Measures merges of the same vectors.

    Attributes:
        space: The module and the vectors.
        tasks: By split and name.
        records: What was measured.
        seed: Of bootstraps.
    """

    space: Points
    tasks: Mapping[str, Mapping[str, ModelTask]]
    records: Records
    seed: int
    bootstraps: dict[tuple[str, str], Bootstrap] = field(default_factory=dict)

    def of(
        self,
        split: str,
        method: str | Mapping[str, Any],
        scales: Mapping[str, float],
    ) -> dict[str, Counts]:
        """Answers of one merge, by task.

        Args:
            split: Which data.
            method: By name, or as in a recipe.
            scales: λ by task.

        Raises:
            DataError: a task has no labels.
        """
        scales = {task: float(scales.get(task, 0.0)) for task in self.space.tasks}
        how = json.dumps([method, scales], sort_keys=True) if any(scales.values()) else "0"
        found, is_there = {}, False
        for name, task in self.tasks[split].items():
            key = f"{split} {name!r} {how}"
            if key not in self.records.known:
                if not is_there:
                    self.space.put(self.space.by(method), scales)
                    is_there = True
                counts = _ask(task, self.space.module)
                self.records.add(key, {"right": counts.right.tolist(), "of": counts.of.tolist()})
            record = self.records.known[key]
            found[name] = Counts(np.array(record["right"]), np.array(record["of"]))
        return found

    def figure(self, split: str, task: str, counts: Counts) -> Figure:
        """Accuracy with its interval."""
        return ratio(*counts, None if _is_share(counts) else self.bootstrap(split, task, counts))

    def share(self, split: str, task: str, counts: Counts, whole: Counts) -> Figure:
        """Accuracy over that of another model on the same examples, paired."""
        resample = self.resampled_share(split, task, counts, whole)
        value = counts.accuracy / whole.accuracy
        return Figure(value, *percentiles(resample), len(counts.of))

    def resampled_share(self, split: str, task: str, counts: Counts, whole: Counts) -> Array:
        """The share in each resample of examples, shape (resamples,)."""
        bootstrap = self.bootstrap(split, task, counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            return bootstrap.ratios(*counts) / bootstrap.ratios(*whole)

    def resample(self, split: str, task: str, counts: Counts) -> Array:
        """The accuracy in each resample of examples, shape (resamples,)."""
        return self.bootstrap(split, task, counts).ratios(*counts)

    def bootstrap(self, split: str, task: str, counts: Counts) -> Bootstrap:
        """The resamples of a task's examples; tasks are drawn independently of each other."""
        if (split, task) not in self.bootstraps:
            place = sorted(self.tasks[split]).index(task)
            self.bootstraps[split, task] = Bootstrap(len(counts.of), self.seed + place)
        return self.bootstraps[split, task]


def _ask(task: ModelTask, module: Any) -> Counts:
    right, examples = [], []
    for rows in rows_of(task, module):
        if rows.labels is None:
            raise DataError(f"data of task {task.name!r} have no labels; accuracy needs them")
        predicted = rows.logits.argmax(-1).cpu().numpy()
        broken = rows.logits.isnan().any(-1).cpu().numpy()
        right.append((predicted == rows.labels) & ~broken)
        examples.append(rows.examples)
    return Counts(*by_example(task, np.concatenate(right), np.concatenate(examples)))


def _is_share(counts: Counts) -> bool:
    return bool((counts.of == 1).all())
