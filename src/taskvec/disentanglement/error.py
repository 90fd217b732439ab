"""The disentanglement error of two task vectors on a grid of coefficients.

ξ(α1, α2) = Σ_t E_{x ∈ D_t} [ dist(f(x; θ0 + α_t τ_t), f(x; θ0 + α1 τ1 + α2 τ2)) ]

It measures how much the other vector changes the model's answers on a task's own
data: 0 where the two do not interfere. The distance is one of

- `prediction`: 1 where the most likely classes differ, else 0, so that ξ is in [0, 2];
- `symmetric_kl`: KL(p ‖ q) + KL(q ‖ p) of the softmax over a row of outputs, in nats. On features
  it compares representations, without any head.

The expectation is over the rows that were seen. A row with a NaN among its outputs counts as a
prediction that differs from every other.

Every point of the grid is one set of weights, and each is asked once about both tasks' data: the
points on the axes are the single-task models that all others are compared with. For a grid of k × k
that has 0 on both axes this is k² points; working out both sides in every cell would be twice that.

Source: Ortiz-Jimenez et al., Task Arithmetic in the Tangent Space, arXiv:2305.12827, section 4,
equation 4; the symmetric distance on features is this project's choice.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.disentanglement.records import Records, key_of, open_records
from taskvec.disentanglement.tasks import ModelTask, by_example, rows_of
from taskvec.disentanglement.weights import Points, points
from taskvec.errors import UsageError
from taskvec.evaluation.intervals import Bootstrap, Figure, ratio, total
from taskvec.extras import require
from taskvec.files import write_whole, writing
from taskvec.journal import finite
from taskvec.recipes.recipe import Model
from taskvec.streaming import Progress, silent

Array = np.ndarray[Any, Any]

DISTANCES = ("prediction", "symmetric_kl")
UNKNOWN = -1  # the prediction where an output is NaN
VERSION = 1  # of stored measurements; other versions are measured again


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid.

    Attributes:
        alphas: Coefficient by task.
        error: ξ.
        by_task: The two terms of ξ, by task.
        accuracy: Of the point on each task's data, by task; empty where labels are not known.
        broken: Rows with a NaN among their outputs, at this point or alone.
    """

    alphas: Mapping[str, float]
    error: Figure
    by_task: Mapping[str, Figure]
    accuracy: Mapping[str, Figure]
    broken: int


@dataclass(frozen=True, slots=True)
class Disentanglement:
    """The error on a grid.

    Attributes:
        tasks: The two, in the order of the axes.
        alphas: Coefficients along both axes.
        distance: One of `DISTANCES`.
        examples: Examples of each task.
        rows: Rows of each task that the expectation is over.
        cells: By place along the axes, shape (alphas, alphas).
    """

    tasks: tuple[str, str]
    alphas: tuple[float, ...]
    distance: str
    examples: Mapping[str, int]
    rows: Mapping[str, int]
    cells: tuple[tuple[Cell, ...], ...]

    @property
    def values(self) -> Array:
        """ξ, float64, shape (alphas, alphas)."""
        return np.array([[cell.error.value for cell in row] for row in self.cells])

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is not finite is None."""
        measured = {
            "tasks": list(self.tasks),
            "alphas": list(self.alphas),
            "distance": self.distance,
            "examples": dict(self.examples),
            "rows": dict(self.rows),
            "cells": [
                {
                    "alphas": dict(cell.alphas),
                    "error": cell.error.to_json(),
                    "by_task": {t: f.to_json() for t, f in cell.by_task.items()},
                    "accuracy": {t: f.to_json() for t, f in cell.accuracy.items()},
                    "broken": cell.broken,
                }
                for row in self.cells
                for cell in row
            ],
        }
        return dict(finite(measured))

    def to_csv(self) -> str:
        """A table with a line for each cell: coefficients, ξ with its interval, both terms."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        known = self.cells[0][0].accuracy
        head = [*(f"alpha {task}" for task in self.tasks), "error", "low", "high"]
        head += [f"error {task}" for task in self.tasks]
        writer.writerow([*head, *(f"accuracy {task}" for task in known)])
        for cell in (cell for row in self.cells for cell in row):
            numbers = [*cell.alphas.values(), cell.error.value, cell.error.low, cell.error.high]
            numbers += [figure.value for figure in cell.by_task.values()]
            writer.writerow([*numbers, *(figure.value for figure in cell.accuracy.values())])
        return text.getvalue()


def coefficients(count: int = 15, low: float = -2.0, high: float = 2.0) -> tuple[float, ...]:
    """Evenly spaced coefficients, both ends included.

    >>> coefficients(5, -1, 1)
    (-1.0, -0.5, 0.0, 0.5, 1.0)

    Raises:
        UsageError: the number of values is 0, or the range is invalid.
    """
    if count < 1 or not low <= high or (count > 1 and low == high):
        raise UsageError(
            f"a grid needs points between two ends; got {count} of [{low:g}, {high:g}]"
        )
    step = (high - low) / max(1, count - 1)
    # 0 is worth being met exactly: the single-task models lie there.
    found = [low + i * step for i in range(count - 1)] + [high]
    return tuple(0.0 if abs(alpha) < 1e-9 * step else float(alpha) for alpha in found)


def disentanglement_error(
    module: Any,
    vectors: Mapping[str, Model],
    tasks: Mapping[str, ModelTask],
    *,
    alphas: Sequence[float] = coefficients(),
    distance: str = "prediction",
    out: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Disentanglement:
    """Measure the disentanglement error of two task vectors on a grid.

    Args:
        module: The pre-trained model, θ0; a `torch.nn.Module`, which is the same bit for bit
            afterwards. Given as it is asked: a classifier's backbone, if heads are in the tasks.
        vectors: The two task vectors by name, in the order of the axes: files of `taskvec extract`,
            or fine-tunes (folders, hub names, adapters, modules, state dicts).
        tasks: By the same names, what each is about.
        alphas: Coefficients along both axes, each once.
        distance: `prediction` or `symmetric_kl`.
        out: Folder for cells as they are measured; the same call resumes from it.
        seed: Of intervals that are bootstrapped.
        progress: Told the cells done.

    Raises:
        UsageError: not two tasks, or the arguments are contradictory or incomplete.
        TaskvecError: anything else foreseen; the module is what it was.
    """
    names = _check(vectors, tasks, alphas, distance)
    places = tuple(float(alpha) + 0.0 for alpha in alphas)  # no −0, whose name is another
    folder = None if out is None else Path(out)
    with points(module, vectors) as space:
        data = [[task, tasks[task].identity] for task in names]
        key = key_of([VERSION, space.identity(), data, distance, seed])
        records = open_records(folder, "cells", key)
        singles = folder / f"single.{key}" if folder is not None else None
        grid = _Grid(space, names, tasks, distance, seed, records, singles)
        todo = [(a, b) for a in places for b in places]
        with progress("disentanglement", len(todo)) as advance:
            # The axes first: their points are what the others are compared with.
            for a, b in sorted(todo, key=lambda cell: (cell[0] != 0) + (cell[1] != 0)):
                grid.measure(a, b)
                advance(1)
    cells = [[_cell(names, a, b, records.known[_name(a, b)]) for b in places] for a in places]
    first = records.known[_name(places[0], places[0])]["terms"]
    return Disentanglement(
        names,
        places,
        distance,
        {task: first[task]["figure"][3] for task in names},
        {task: first[task]["rows"] for task in names},
        tuple(map(tuple, cells)),
    )


def _check(
    vectors: Mapping[str, Model],
    tasks: Mapping[str, ModelTask],
    alphas: Sequence[float],
    distance: str,
) -> tuple[str, str]:
    if len(vectors) != 2:
        raise UsageError(
            f"the disentanglement error is of two tasks; got {len(vectors)}: "
            f"{', '.join(vectors) or 'none'}"
        )
    check_tasks(vectors, tasks)
    if distance not in DISTANCES:
        raise UsageError(f"distance must be in {' | '.join(DISTANCES)}; got {distance!r}")
    if not len(alphas) or len(set(alphas)) < len(alphas) or not np.isfinite(alphas).all():
        raise UsageError(f"alphas must be finite numbers, each once; got {list(alphas)}")
    one, two = vectors
    return one, two


def check_tasks(vectors: Mapping[str, Model], tasks: Mapping[str, ModelTask]) -> None:
    """Refuse vectors without data, and data without a vector.

    Raises:
        UsageError: names differ.
    """
    for name in vectors.keys() ^ tasks.keys():
        there, lacking = ("a vector", "no data") if name in vectors else ("data", "no vector")
        raise UsageError(f"task {name!r} has {there} but {lacking}; give both under one name")


def outcomes(task: ModelTask, module: Any, distance: str) -> tuple[Array, Array | None, Array]:
    """The answers of a module on a task's data.

    Args:
        task: Which.
        module: In evaluation mode.
        distance: What the answers are for.

    Returns:
        Predictions, int32, shape (rows,), with `UNKNOWN` where an output is NaN, or
        log-probabilities, float32, shape (rows, classes); whether the most likely class is the
        label, shape (rows,), None without labels; the number of each row's example.
    """
    torch = require("torch", "train")
    values, right, examples = [], [], []
    for rows in rows_of(task, module):
        predicted = rows.logits.argmax(-1).to(torch.int32)
        predicted[rows.logits.isnan().any(-1)] = UNKNOWN
        if rows.labels is not None:
            right.append(predicted.cpu().numpy() == rows.labels)
        values.append(
            predicted if distance == "prediction" else rows.logits.float().log_softmax(-1)
        )
        examples.append(rows.examples)
    found = np.concatenate([each.cpu().numpy() for each in values])
    return found, np.concatenate(right) if right else None, np.concatenate(examples)


def distances(one: Array, other: Array, distance: str) -> Array:
    """The distance of each row.

    Args:
        one: Answers, as from `outcomes`.
        other: The same.
        distance: One of `DISTANCES`.

    Returns:
        float64, shape (rows,); of `symmetric_kl` NaN where an output is.
    """
    if distance == "prediction":
        apart: Array = (one != other) | (one == UNKNOWN) | (other == UNKNOWN)
        return apart.astype(np.float64)
    p, q = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        # A class that neither gives any probability adds nothing, although log 0 - log 0 is NaN.
        terms = np.where(p == q, 0.0, (np.exp(p) - np.exp(q)) * (p - q))
    return np.asarray(terms.sum(-1))


@dataclass(slots=True)
class _Grid:
    """Measures cells; knows the single-task models' answers."""

    space: Points
    names: tuple[str, str]
    tasks: Mapping[str, ModelTask]
    distance: str
    seed: int
    records: Records
    folder: Path | None
    singles: dict[tuple[str, float], Array] = field(default_factory=dict)
    bootstraps: dict[str, Bootstrap] = field(default_factory=dict)

    def measure(self, a: float, b: float) -> None:
        """Measure a cell, unless it is stored."""
        if _name(a, b) in self.records.known:
            return
        one, two = self.names
        alone = {t: self.single(t, x) for t, x, other in ((one, a, b), (two, b, a)) if other != 0}
        self.space.at({one: a, two: b})
        measured: dict[str, Any] = {"terms": {}, "accuracy": {}, "broken": 0}
        for task, alpha in ((one, a), (two, b)):
            values, right, examples = outcomes(self.tasks[task], self.space.module, self.distance)
            if task not in alone:  # the point is the single-task model
                alone[task] = self.keep(task, alpha, values)
            apart = distances(alone[task], values, self.distance)
            measured["broken"] += int(_broken(alone[task], values).sum())
            asked = self.tasks[task]
            counts = np.bincount(examples, apart), np.bincount(examples).astype(np.float64)
            is_share = self.distance == "prediction" and not asked.has_many_rows
            figure = self.figure(task, *counts, is_share=is_share)
            measured["terms"][task] = {"figure": astuple(figure), "rows": len(apart)}
            if right is not None:
                counts = by_example(asked, right, examples)
                is_share = asked.is_exact or not asked.has_many_rows
                measured["accuracy"][task] = astuple(self.figure(task, *counts, is_share=is_share))
        self.records.add(_name(a, b), measured)

    def single(self, task: str, alpha: float) -> Array:
        """The answers of the single-task model on the task's data; this may change the weights."""
        known = self.singles.get((task, alpha))
        if known is None and self.folder is not None:
            known = _load(self.folder / self.file(task, alpha))
        if known is not None:
            self.singles[task, alpha] = known
            return known
        self.space.at({task: alpha})
        return self.keep(
            task, alpha, outcomes(self.tasks[task], self.space.module, self.distance)[0]
        )

    def keep(self, task: str, alpha: float, values: Array) -> Array:
        """Store the answers of a single-task model."""
        self.singles[task, alpha] = values
        if self.folder is not None:
            raw = io.BytesIO()
            np.save(raw, values)
            path = self.folder / self.file(task, alpha)
            with writing(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, raw.getvalue())
        return values

    def file(self, task: str, alpha: float) -> str:
        """Name of the file of a single-task model's answers."""
        return f"{self.names.index(task) + 1}.{alpha!r}.npy"

    def figure(self, task: str, above: Array, below: Array, *, is_share: bool) -> Figure:
        """Σ above / Σ below over examples, with its interval."""
        if is_share:
            return ratio(above, below, None)
        if task not in self.bootstraps:
            self.bootstraps[task] = Bootstrap(len(above), self.seed)
        return ratio(above, below, self.bootstraps[task])


def _broken(one: Array, other: Array) -> Array:
    """Whether an output of either is NaN, shape (rows,)."""
    if one.ndim == 1:
        return np.asarray((one == UNKNOWN) | (other == UNKNOWN))
    return np.asarray(np.isnan(one).any(-1) | np.isnan(other).any(-1))


def _name(a: float, b: float) -> str:
    return f"{a!r} {b!r}"


def _load(path: Path) -> Array | None:
    """Stored answers; None if they are missing or damaged."""
    try:
        found: Array = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return found


def _cell(names: tuple[str, str], a: float, b: float, measured: Mapping[str, Any]) -> Cell:
    by_task = {task: Figure(*measured["terms"][task]["figure"]) for task in names}
    accuracy = {task: Figure(*each) for task, each in measured["accuracy"].items()}
    alphas = dict(zip(names, (a, b), strict=True))
    return Cell(alphas, total(list(by_task.values())), by_task, accuracy, measured["broken"])
