"""Task addition: how well one model does all tasks, with coefficients chosen on other data.

A merge of all vectors is measured by its normalised accuracy: on each task, its accuracy over that
of the single-task model θ0 + τ_t of the same vectors. Coefficients are those with the highest mean
normalised accuracy on validation data; what is reported is measured on test data.

- `shared`: one coefficient λ for all tasks, the best of a list; the smallest of several that tie.
- `by-task`: a λ for each task. Beginning at the best shared one, each λ in turn is set to the best
  of the list while the others stay, until a round over all tasks changes nothing. That is a local
  optimum, not the best of all |list|^tasks combinations.

Source: Ortiz-Jimenez et al., arXiv:2305.12827, section 5 and appendix (21 coefficients between 0
and 1, chosen on validation data); the search by task is this project's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.disentanglement.accuracy import PLAIN, Accuracies, Counts, Methods
from taskvec.disentanglement.error import check_tasks, coefficients
from taskvec.disentanglement.records import key_of, open_records
from taskvec.disentanglement.tasks import ModelTask
from taskvec.disentanglement.weights import points
from taskvec.errors import DataError, UsageError
from taskvec.evaluation.intervals import Figure, percentiles
from taskvec.journal import finite
from taskvec.recipes.recipe import Model
from taskvec.streaming import Progress, silent

SEARCHES = ("shared", "by-task")
VERSION = 1  # of stored measurements; other versions are measured again


@dataclass(frozen=True, slots=True)
class Tried:
    """Coefficients and their scores on validation data.

    Attributes:
        scales: λ by task.
        accuracy: On validation data, by task.
        normalised: Mean over tasks of accuracy over the single-task model's.
    """

    scales: Mapping[str, float]
    accuracy: Mapping[str, float]
    normalised: float


@dataclass(frozen=True, slots=True)
class Addition:
    """Task addition by one method.

    Attributes:
        method: As given.
        search: One of `SEARCHES`.
        scales: The chosen λ, by task.
        tried: All of them, in order.
        accuracy: Of the merge on test data, by task.
        normalised: That over the single-task model's, by task.
        single: Accuracy of the single-task models on test data, by task.
        pretrained: Accuracy of θ0 on test data, by task.
        mean_accuracy: Over tasks.
        mean_normalised: Over tasks.
    """

    method: str
    search: str
    scales: Mapping[str, float]
    tried: tuple[Tried, ...]
    accuracy: Mapping[str, Figure]
    normalised: Mapping[str, Figure]
    single: Mapping[str, Figure]
    pretrained: Mapping[str, Figure]
    mean_accuracy: Figure
    mean_normalised: Figure

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is not finite is None."""
        by_task = ("accuracy", "normalised", "single", "pretrained")
        data: dict[str, Any] = {"method": self.method, "search": self.search}
        data["scales"] = dict(self.scales)
        for name in by_task:
            data[name] = {task: f.to_json() for task, f in getattr(self, name).items()}
        data["mean_accuracy"] = self.mean_accuracy.to_json()
        data["mean_normalised"] = self.mean_normalised.to_json()
        data["tried"] = [
            {"scales": dict(t.scales), "accuracy": dict(t.accuracy), "normalised": t.normalised}
            for t in self.tried
        ]
        return dict(finite(data))


def task_addition(
    module: Any,
    vectors: Mapping[str, Model],
    validation: Mapping[str, ModelTask],
    test: Mapping[str, ModelTask],
    *,
    methods: Methods = PLAIN,
    base: Model | None = None,
    search: str = "shared",
    scales: Sequence[float] = coefficients(21, 0.0, 1.0),
    out: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Addition]:
    """Choose coefficients on validation data and measure the merge on test data.

    Args:
        module: The pre-trained model, θ0, which is the same bit for bit afterwards.
        vectors: Task vectors by name; see `disentanglement_error`.
        validation: Data by task that coefficients are chosen on.
        test: Data by task that are reported.
        methods: What the vectors are merged by, under the names that results have.
        base: Model before instruction tuning, for methods that need it.
        search: `shared` or `by-task`.
        scales: The λ that are tried.
        out: Folder for measurements as they are made; the same call resumes from it.
        seed: Of intervals, and of methods that draw random numbers.
        progress: Told the merges tried.

    Returns:
        By the names of the methods.

    Raises:
        UsageError: tasks do not fit together, or a method needs what is not given.
        DataError: labels are missing, or a single-task model has no correct answer.
        TaskvecError: anything else foreseen; the module is what it was.
    """
    for given in (validation, test):
        check_tasks(vectors, given)
    if search not in SEARCHES:
        raise UsageError(f"search must be in {' | '.join(SEARCHES)}; got {search!r}")
    if not len(scales) or not np.isfinite(scales).all():
        raise UsageError(f"scales must be finite numbers; got {list(scales)}")
    splits = {"validation": validation, "test": test}
    with points(module, vectors, base=base, seed=seed) as space:
        for method in methods.values():
            space.by(method)  # what is wrong with a method is found before anything is measured
        identities = {s: {t: task.identity for t, task in by.items()} for s, by in splits.items()}
        key = key_of([VERSION, space.identity(), identities, seed])
        records = open_records(None if out is None else Path(out), "addition", key)
        run = _Run(Accuracies(space, splits, records, seed), sorted({float(s) for s in scales}))
        with progress("addition", len(methods) * len(run.scales)) as advance:
            found = {}
            for name, method in methods.items():
                tried = run.shared(method, advance)
                if search == "by-task":
                    tried = run.by_task(method, tried)
                found[name] = run.report(name, method, search, tried)
    return found


@dataclass(frozen=True, slots=True)
class _Run:
    accuracies: Accuracies
    scales: list[float]

    @property
    def names(self) -> tuple[str, ...]:
        return self.accuracies.space.tasks

    def singles(self, split: str) -> dict[str, Counts]:
        """Correct answers of the single-task models on their own tasks."""
        found = {}
        for task in self.names:
            counts = self.accuracies.of(split, "task_arithmetic", {task: 1.0})[task]
            if not counts.right.any():
                raise DataError(
                    f"the single-task model of {task!r} has no correct answer on its {split} data, "
                    "so that nothing can be normalised by it; check the vector, head and labels"
                )
            found[task] = counts
        return found

    def tried(self, method: str | Mapping[str, Any], scales: Mapping[str, float]) -> Tried:
        singles = self.singles("validation")
        counts = self.accuracies.of("validation", method, scales)
        accuracy = {task: counts[task].accuracy for task in self.names}
        shares = [accuracy[task] / singles[task].accuracy for task in self.names]
        return Tried(dict(scales), accuracy, float(np.mean(shares)))

    def shared(self, method: str | Mapping[str, Any], advance: Any) -> list[Tried]:
        found = []
        for scale in self.scales:
            found.append(self.tried(method, dict.fromkeys(self.names, scale)))
            advance(1)
        return found

    def by_task(self, method: str | Mapping[str, Any], before: Sequence[Tried]) -> list[Tried]:
        """One λ after the other, from the best shared one, until a round improves nothing."""
        found = {tuple(each.scales.values()): each for each in before}
        best = _best(before)
        while True:
            start = best
            for task in self.names:
                near = [self.tried(method, {**best.scales, task: s}) for s in self.scales]
                found |= {tuple(each.scales.values()): each for each in near}
                best = _best([best, *near])
            if best is start:
                return list(found.values())

    def report(
        self,
        name: str,
        method: str | Mapping[str, Any],
        search: str,
        tried: Sequence[Tried],
    ) -> Addition:
        accuracies = self.accuracies
        best = _best(tried)
        merged = accuracies.of("test", method, best.scales)
        singles, start = self.singles("test"), accuracies.of("test", "task_arithmetic", {})
        figure = accuracies.figure
        shares = {t: accuracies.share("test", t, merged[t], singles[t]) for t in self.names}
        figures = {t: figure("test", t, merged[t]) for t in self.names}
        drawn = [accuracies.resample("test", t, merged[t]) for t in self.names]
        drawn_shares = [
            accuracies.resampled_share("test", t, merged[t], singles[t]) for t in self.names
        ]
        return Addition(
            method=name,
            search=search,
            scales=best.scales,
            tried=tuple(tried),
            accuracy=figures,
            normalised=shares,
            single={t: figure("test", t, singles[t]) for t in self.names},
            pretrained={t: figure("test", t, start[t]) for t in self.names},
            mean_accuracy=_mean(figures, drawn),
            mean_normalised=_mean(shares, drawn_shares),
        )


def _best(tried: Sequence[Tried]) -> Tried:
    """The highest mean normalised accuracy; the first of several that tie."""
    return max(tried, key=lambda each: each.normalised)


def _mean(figures: Mapping[str, Figure], drawn: Sequence[Any]) -> Figure:
    value = float(np.mean([figure.value for figure in figures.values()]))
    n = sum(figure.n for figure in figures.values())
    return Figure(value, *percentiles(np.mean(drawn, 0)), n)
