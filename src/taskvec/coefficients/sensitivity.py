"""Sensitivity: what one number of a recipe does to what is kept of the vectors, and to scores.

A sweep sets one number, such as LATA's threshold σ, a density or λ, to one value after another;
everything else is the recipe's. Each point has the share of layers, of parameters and of ‖τ_t‖²
that is kept, and the scores of a merge in memory.

A point is **safe** if no goal is worse there than at its own best point by more than the paired
interval: d is the goal's metric at the point less that at the point of the sweep where it is best,
[d_low, d_high] its 95 % interval over the same samples, and the point is safe where d_high ≥ 0 for
every goal (d_low ≤ 0 where low is wanted). The **safe range** is the longest run of neighbouring
safe points, counted in points; of equally long ones, the first.

The threshold is that of Drop-with-Threshold, LATA, arXiv:2502.20186, section 4; what it keeps
follows from the scan alone. A density is the share of entries kept, as the method's page says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import numpy as np

from taskvec.coefficients.goals import MINIMIZE, Goal, make_goals, metrics_of
from taskvec.coefficients.sweeps import Sweep, owner_of, parse_sweep, set_value
from taskvec.errors import TaskvecError, UsageError
from taskvec.evaluation.evaluate import EvaluationOptions, Result, TaskSamples, prepare
from taskvec.evaluation.intervals import Figure, difference
from taskvec.evaluation.loading import Models
from taskvec.evaluation.options import EvaluationKeywords, evaluation_options
from taskvec.evaluation.task import Metric
from taskvec.journal import fields_to_json, finite
from taskvec.keywords import takes
from taskvec.merging.decide import check_scales
from taskvec.merging.prepare import open_with_base
from taskvec.merging.scans import scan_members
from taskvec.methods.lata import drop_above
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.scan import Scan, layer_statistics

Results = Mapping[str, Result]  # by task of the evaluation


@dataclass(frozen=True, slots=True)
class KeptShares:
    """Shares of one task's vector that are kept, in [0, 1]; None where unknown.

    Attributes:
        layers: Of the layers that the task changed.
        parameters: Of the elements in them.
        energy: Of ‖τ_t‖².
    """

    layers: float | None
    parameters: float
    energy: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One goal at one value of a sweep.

    Attributes:
        figure: Its metric.
        less_recipe: Less that of the recipe as it is, paired.
        less_best: Less that at the goal's best point, paired; of equally good points, the first.
        is_worse: Whether it is worse than there by more than the interval.
    """

    figure: Figure
    less_recipe: Figure
    less_best: Figure
    is_worse: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        apart = {"less_recipe": self.less_recipe, "less_best": self.less_best}
        return self.figure.to_json() | {**finite(apart), "worse": self.is_worse}


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a sweep.

    Attributes:
        value: Of the number that is swept.
        kept: By task of the recipe; empty where the number drops nothing.
        scores: By key of the goal; empty where nothing was measured, or the merge failed.
        error: Why the merge failed.
    """

    value: float
    kept: Mapping[str, KeptShares] = field(default_factory=dict)
    scores: Mapping[str, Measured] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_safe(self) -> bool:
        """Whether no goal is worse than at its best."""
        return bool(self.scores) and not any(score.is_worse for score in self.scores.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return fields_to_json(self) | {"safe": self.is_safe}


@dataclass(frozen=True, slots=True)
class Measure:
    """A goal, and what the recipe as it is has of it.

    Attributes:
        goal: Which.
        metric: Of its task.
        recipe: Result of the recipe.
    """

    goal: Goal
    metric: Metric
    recipe: Result

    @property
    def wants_high(self) -> bool:
        """Whether a high metric is wanted."""
        return bool(self.metric.higher_is_better) != (self.goal.way == MINIMIZE)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        about = {name: self.recipe.about[name] for name in ("n", "available", "seed")}
        return {
            "task": self.goal.task,
            "metric": self.metric.name,
            "wanted": "high" if self.wants_high else "low",
            "recipe": self.recipe.figures[self.metric.name].to_json(),
            **about,
        }


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a sweep found.

    Attributes:
        sweep: Which.
        points: One for each value.
        measures: What was measured, by key of the goal.
    """

    sweep: Sweep
    points: Sequence[Point]
    measures: Mapping[str, Measure] = field(default_factory=dict)

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
            "measures": finite(self.measures),
            "safe_range": list(self.safe[0]) if self.safe else None,
            "safe_ranges": [list(run) for run in self.safe],
            "points": finite(self.points),
        }


def kept_of(recipe: Recipe, sweep: Sweep, value: float, scan: Scan | None) -> dict[str, KeptShares]:
    """What a value keeps of the vectors, by task that the sweep sets; empty where it drops nothing.

    Args:
        recipe: Any of the sweep.
        sweep: Which parameter.
        value: Of it.
        scan: Statistics of the family; only a threshold of LATA needs them.
    """
    tasks = sorted(recipe.family.tasks) if sweep.task is None else [sweep.task]
    if sweep.name == "density":
        return {task: KeptShares(None, value, None) for task in tasks}
    if not drops_layers(recipe, sweep) or scan is None:
        return {}
    owner, _ = owner_of(recipe, sweep)
    by = {task: str(owner.parameters[task]["granularity"]) for task in tasks}
    return {task: kept_below(scan, task, by[task], value) for task in tasks}


def drops_layers(recipe: Recipe, sweep: Sweep) -> bool:
    """Whether a sweep is that of LATA's σ, whose effect follows from a scan."""
    return sweep.name == "threshold" and owner_of(recipe, sweep)[0].method.name == "lata"


def kept_below(scan: Scan, task: str, granularity: str, threshold: float) -> KeptShares:
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
        return KeptShares(None, 0.0, None)
    chosen = drop_above(statistics.similarity[ranked], threshold)
    energy = statistics.task_norm[ranked] ** 2
    return KeptShares(
        float(chosen.mean()),
        float(np.average(chosen, weights=statistics.sizes[ranked])),
        float(np.average(chosen, weights=energy)),
    )


@takes(EvaluationKeywords)
def measure_sweep(
    recipe: Recipe | str | os.PathLike[str],
    sweep: Sweep | str,
    *,
    measure: Sequence[str] = (),
    minimize: Sequence[str] = (),
    **options: Unpack[EvaluationKeywords],
) -> Sensitivity:
    """Try every value of a sweep.

    A value whose merge fails is a point with the error; the others go on.

    Args:
        recipe: Everything but the number that is swept, or the file of a recipe.
        sweep: Which number, and its values; as on the command line, `"threshold=0.5:1:0.05"`.
        measure: Tasks of the evaluation, `TASK` or `TASK@METRIC`, to be good at; none, with
            `minimize` empty: only what is kept is reported, and no model is loaded.
        minimize: To be bad at, such as a skill to be forgotten.
        {options}

    Raises:
        UsageError: the recipe has no such number or lacks λ, or a value is outside its range.
        TaskvecError: the recipe itself cannot be merged or measured.
    """
    how = evaluation_options(options)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    sweep = parse_sweep(sweep) if isinstance(sweep, str) else sweep
    check_scales(recipe)
    recipes = [set_value(recipe, sweep, value) for value in sweep.values]
    if not measure and not minimize:
        return Sensitivity(sweep, blank_points(recipe, sweep))
    goals = make_goals(measure, minimize, trade_off=len(measure) + len(minimize) > 1)
    prepared = prepare_each([goal.task for goal in goals.goals], how)
    points = blank_points(recipe, sweep)
    found: list[Results] = []
    with Models(how) as models:
        models.check(recipe, prepared)
        reference = models.evaluate(recipe, prepared, "recipe")
        metrics = metrics_of(goals, reference)
        for i, (point, candidate) in enumerate(zip(points, recipes, strict=True)):
            try:
                name = f"{sweep.label}={point.value:.12g}"
                found.append(_by_task(models.evaluate(candidate, prepared, name)))
            except TaskvecError as error:
                points[i] = replace(point, error=str(error))
                found.append({})
    by_task = _by_task(reference)
    measures = {g.key: Measure(g, metrics[g.key], by_task[g.task]) for g in goals.goals}
    return Sensitivity(sweep, add_scores(points, found, measures), measures)


def prepare_each(names: Sequence[str], options: EvaluationOptions) -> list[TaskSamples]:
    """Tasks of the evaluation with their samples, each once.

    Raises:
        UsageError: a name stands for several tasks.
        TaskvecError: as `prepare`.
    """
    names = list(dict.fromkeys(names))
    prepared = prepare(names, options)
    if [each.task.name for each in prepared] != names:
        raise UsageError("a group of tasks cannot be measured as one; name the tasks themselves")
    return prepared


def blank_points(recipe: Recipe, sweep: Sweep) -> list[Point]:
    """The points of a sweep with what they keep; a threshold reads the scan."""
    scan = None
    if drops_layers(recipe, sweep):
        scan = scan_members(open_with_base(recipe))
    return [Point(value, kept_of(recipe, sweep, value, scan)) for value in sweep.values]


def _by_task(results: Sequence[Result]) -> Results:
    return {result.task: result for result in results}


def add_scores(
    points: Sequence[Point], found: Sequence[Results], measures: Mapping[str, Measure]
) -> list[Point]:
    """The points with their scores.

    Args:
        points: Without scores.
        found: Results of each point; empty where its merge failed.
        measures: What was measured.
    """
    measured = [results for results in found if results]
    best = {key: _best(measured, measure) for key, measure in measures.items() if measured}

    def score(results: Results, key: str) -> Measured:
        measure, mine = measures[key], results[measures[key].goal.task]
        less_best = _apart(mine, best[key], measure.metric)
        less_recipe = _apart(mine, measure.recipe, measure.metric)
        figure = mine.figures[measure.metric.name]
        return Measured(figure, less_recipe, less_best, _is_worse(less_best, measure.wants_high))

    return [
        replace(point, scores={key: score(results, key) for key in measures} if results else {})
        for point, results in zip(points, found, strict=True)
    ]


def _best(found: Sequence[Results], measure: Measure) -> Result:
    """The result of the point where a goal is best; NaN is worst."""
    results = [each[measure.goal.task] for each in found]
    sign = 1 if measure.wants_high else -1
    values = [sign * result.figures[measure.metric.name].value for result in results]
    ranked = [-math.inf if math.isnan(value) else value for value in values]
    return results[ranked.index(max(ranked))]


def _apart(ours: Result, theirs: Result, metric: Metric) -> Figure:
    return difference(metric, ours.scores, theirs.scores, seed=ours.about["seed"])


def _is_worse(apart: Figure, wants_high: bool) -> bool:
    if math.isnan(apart.value):
        return True
    return apart.high < 0 if wants_high else apart.low > 0
