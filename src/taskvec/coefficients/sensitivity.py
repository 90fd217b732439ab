"""Sensitivity: what one number of a recipe does to what is kept of the vectors, and to scores.

A sweep sets one number, such as LATA's threshold σ, a density or λ, to one value after another;
everything else is the recipe's. Each point has the share of layers, of parameters and of ‖τ_t‖²
that is kept, and the scores of a merge in memory.

A point is **safe** if no measured task is worse there than at its own best point by more than the
paired interval: d is the main metric of the task at the point less that at the point of the sweep
where it is best, [d_low, d_high] its 95 % interval over the same samples, and the point is safe
where d_high ≥ 0 for every task (d_low ≤ 0 where low is better). The **safe range** is the longest
run of neighbouring safe points, counted in points; of equally long ones, the first.

The threshold is that of Drop-with-Threshold, LATA, arXiv:2502.20186, section 4; what it keeps
follows from the scan alone. A density is the share of entries kept, as the method's page says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taskvec.coefficients.sweeps import Sweep, owner_of, swept
from taskvec.engine.recipe import Recipe
from taskvec.errors import TaskvecError, UsageError
from taskvec.evaluation.evaluate import Options, Prepared, Result
from taskvec.evaluation.figures import Figure, difference
from taskvec.evaluation.loading import Candidate, Models
from taskvec.methods.lata import drop_above
from taskvec.methods.table import Table
from taskvec.statistics.scan import Scan, layer_statistics


@dataclass(frozen=True, slots=True)
class Kept:
    """Shares of one task's vector that are kept, in [0, 1]; None where unknown.

    Attributes:
        layers: Of the layers that the task changed.
        parameters: Of the elements in them.
        energy: Of ‖τ_t‖².
    """

    layers: float | None
    parameters: float
    energy: float | None

    def to_json(self) -> dict[str, float | None]:
        """A JSON object."""
        return {"layers": self.layers, "parameters": self.parameters, "energy": self.energy}


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a sweep.

    Attributes:
        value: Of the number that is swept.
        kept: By task; empty where the number drops nothing.
        results: By measured task; empty where nothing was measured, or the merge failed.
        to_recipe: Main metric less that of the recipe as it is, paired, by measured task.
        to_best: Main metric less that at the best point, likewise; the first of equal ones is best.
            Without tasks that have no better direction.
        worse: Tasks that are worse than at their best by more than the interval.
        error: Why the merge failed.
    """

    value: float
    kept: Mapping[str, Kept] = field(default_factory=dict)
    results: Mapping[str, Result] = field(default_factory=dict)
    to_recipe: Mapping[str, Figure] = field(default_factory=dict)
    to_best: Mapping[str, Figure] = field(default_factory=dict)
    worse: tuple[str, ...] = ()
    error: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether no measured task is worse than at its best."""
        return bool(self.to_best) and not self.worse

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "value": self.value,
            "kept": {task: kept.to_json() for task, kept in self.kept.items()},
            "scores": {task: result.main.to_json() for task, result in self.results.items()},
            "less_recipe": {task: figure.to_json() for task, figure in self.to_recipe.items()},
            "less_best": {task: figure.to_json() for task, figure in self.to_best.items()},
            "worse": list(self.worse),
            "safe": self.is_safe,
            "error": self.error or None,
        }


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a sweep found.

    Attributes:
        sweep: Which.
        points: One for each value.
        reference: Results of the recipe as it is, by measured task.
        directions: 1 where a high main metric is wanted of a measured task, −1 low, 0 neither.
    """

    sweep: Sweep
    points: tuple[Point, ...]
    reference: Mapping[str, Result] = field(default_factory=dict)
    directions: Mapping[str, int] = field(default_factory=dict)

    @property
    def safe(self) -> list[tuple[float, float]]:
        """Runs of neighbouring safe points, (first value, last value), the longest first.

        Points are neighbours in the order of their values.
        """
        runs: list[list[float]] = [[]]
        for point in sorted(self.points, key=lambda point: point.value):
            if point.is_safe:
                runs[-1].append(point.value)
            else:
                runs.append([])
        runs = sorted(filter(None, runs), key=len, reverse=True)
        return [(run[0], run[-1]) for run in runs]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "sweep": self.sweep.label,
            "values": list(self.sweep.values),
            "measures": {
                task: {
                    "metric": result.metrics[0].name,
                    "wanted": {1: "high", -1: "low", 0: None}[self.directions[task]],
                    "recipe": result.main.to_json(),
                    **{name: result.about[name] for name in ("n", "available", "seed")},
                }
                for task, result in self.reference.items()
            },
            "safe_range": list(self.safe[0]) if self.safe else None,
            "safe_ranges": [list(run) for run in self.safe],
            "points": [point.to_json() for point in self.points],
        }


def kept_of(recipe: Recipe, sweep: Sweep, value: float, scan: Scan | None) -> dict[str, Kept]:
    """What a value keeps of the vectors, by task that the sweep sets; empty where it drops nothing.

    Args:
        recipe: Any of the sweep.
        sweep: Which parameter.
        value: Of it.
        scan: Statistics of the family; only a threshold of LATA needs them.
    """
    tasks = sorted(recipe.family.tasks) if sweep.task is None else [sweep.task]
    if sweep.name == "density":
        return {task: Kept(None, value, None) for task in tasks}
    if not drops_layers(recipe, sweep) or scan is None:
        return {}
    owner, _ = owner_of(recipe, sweep)
    by = {task: str(owner.parameters[task]["granularity"]) for task in tasks}
    return {task: kept_below(scan, task, by[task], value) for task in tasks}


def drops_layers(recipe: Recipe, sweep: Sweep) -> bool:
    """Whether a sweep is that of LATA's σ, whose effect follows from a scan."""
    return sweep.name == "threshold" and owner_of(recipe, sweep)[0].method.name == "lata"


def kept_below(scan: Scan, task: str, granularity: str, threshold: float) -> Kept:
    """What Drop-with-Threshold keeps of a task, exactly.

    Layers that the task did not touch do not count.

    Args:
        scan: Of a family with a base.
        task: Which.
        granularity: `tensor`, `module` or `block`.
        threshold: σ.
    """
    statistics = layer_statistics(scan, task, granularity)
    ranked = ~np.isnan(statistics.similarity)
    if not ranked.any():
        return Kept(None, 0.0, None)
    chosen = drop_above(statistics.similarity[ranked], threshold)
    energy = statistics.task_norm[ranked] ** 2
    return Kept(
        float(chosen.mean()),
        float(np.average(chosen, weights=statistics.sizes[ranked])),
        float(np.average(chosen, weights=energy)),
    )


def sensitivity(
    recipe: Recipe,
    sweep: Sweep,
    *,
    table: Table | None = None,
    scan: Scan | None = None,
    prepared: Sequence[Prepared] = (),
    options: Options | None = None,
    directions: Mapping[str, int] | None = None,
) -> Sensitivity:
    """Try every value of a sweep.

    A value whose merge fails is a point with the error; the others go on.

    Args:
        recipe: Everything but the number that is swept.
        sweep: Which number, and its values.
        table: Layer weights that take the place of the method's own.
        scan: Statistics of the family, for what a threshold keeps.
        prepared: Evaluation tasks with their samples; empty: nothing is measured, and no weights
            are loaded.
        options: How to evaluate.
        directions: 1 where a high score of an evaluation task is wanted, −1 where a low one, such
            as of a skill to be forgotten; what is not in it has its metric's own direction.

    Raises:
        UsageError: the recipe has no such number, or a value is outside its range.
        TaskvecError: the recipe itself cannot be merged or measured.
    """
    if table is not None and drops_layers(recipe, sweep):
        raise UsageError("a table is given, which σ has no say in; sweep threshold without one")
    options = Options() if options is None else options
    recipes = [swept(recipe, sweep, value) for value in sweep.values]
    blank = [Point(value, kept_of(recipe, sweep, value, scan)) for value in sweep.values]
    unknown = sorted((directions or {}).keys() - {each.task.name for each in prepared})
    if unknown:
        raise UsageError(f"a direction is given for {unknown[0]!r}, which is not measured")
    if not prepared:
        return Sensitivity(sweep, tuple(blank))
    with Models(options) as models:
        models.check((recipe, table), prepared)
        reference = _by_task(models.evaluate((recipe, table), prepared, "recipe"))
        points = [
            _measured(point, models, (each, table), prepared, f"{sweep.label}={point.value:g}")
            for point, each in zip(blank, recipes, strict=True)
        ]
    wanted = {t: _direction(mine) for t, mine in reference.items()} | dict(directions or {})
    return Sensitivity(sweep, compared(points, reference, wanted), reference, wanted)


def _measured(
    point: Point, models: Models, spec: Candidate, prepared: Sequence[Prepared], name: str
) -> Point:
    """The point with its results, or with the error of its merge."""
    try:
        return replace(point, results=_by_task(models.evaluate(spec, prepared, name)))
    except TaskvecError as error:
        return replace(point, error=str(error))


def _by_task(results: Sequence[Result]) -> dict[str, Result]:
    return {result.task: result for result in results}


def _direction(result: Result) -> int:
    higher = result.metrics[0].higher_is_better
    return 0 if higher is None else 1 if higher else -1


def compared(
    points: Sequence[Point], reference: Mapping[str, Result], directions: Mapping[str, int]
) -> tuple[Point, ...]:
    """The points with their differences to the recipe and to the best point.

    Args:
        points: With results, or with an error.
        reference: Results of the recipe as it is.
        directions: See `Sensitivity`.
    """
    measured = [point for point in points if point.results]
    best = {t: _best(measured, t, sign) for t, sign in directions.items() if sign and measured}
    found = []
    for point in points:
        results = point.results
        to_best = {t: _apart(results[t], top) for t, top in best.items() if t in results}
        worse = tuple(t for t, apart in to_best.items() if _is_worse(apart, directions[t]))
        to_recipe = {t: _apart(mine, reference[t]) for t, mine in results.items()}
        found.append(replace(point, to_recipe=to_recipe, to_best=to_best, worse=worse))
    return tuple(found)


def _best(points: Sequence[Point], task: str, sign: int) -> Result:
    """The result of the point where a task is best; NaN is worst."""
    results = [point.results[task] for point in points]
    values = [sign * result.main.value for result in results]
    ranked = [-math.inf if math.isnan(value) else value for value in values]
    return results[ranked.index(max(ranked))]


def _apart(ours: Result, theirs: Result) -> Figure:
    return difference(ours.metrics[0], ours.scores, theirs.scores, seed=ours.about["seed"])


def _is_worse(apart: Figure, sign: int) -> bool:
    if math.isnan(apart.value):
        return True
    return apart.high < 0 if sign > 0 else apart.low > 0
