"""Pairs: what two tasks of a family do to each other when they are merged, beside their geometry.

For each pair {a, b}, at the recipe's method and λ, θ_ab is the merge of both and θ_a that of a
alone. What b does to a is the difference of a's own metric between θ_ab and θ_a, over the same
samples:

    synergy        its 95 % interval lies on the better side of 0
    interference   it lies on the worse side
    neither        0 is in it

The fine-tune θ_ft,a itself is compared in the same way. With P pairs these are 2P intervals, of
which one in twenty misses even if no pair did anything.

Beside that stand, from the scan alone, over the whole model:

    cosine            ⟨τ_a, τ_b⟩ / (‖τ_a‖ ‖τ_b‖)
    pure_cosine       the same of the pure vectors w_a τ_a and w_b τ_b
    sign_conflict     share of the elements changed by both in which their signs differ
    rank_correlation  Spearman's, of the similarities of their layers to instruction tuning

Related and unrelated pairs are compared by LATA, arXiv:2502.20186, section 5.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Unpack

import numpy as np

from taskvec.coefficients.goals import make_goals, metrics_of
from taskvec.coefficients.sensitivity import prepare_each
from taskvec.errors import TaskvecError, UsageError, nearest
from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.intervals import Figure, difference
from taskvec.evaluation.loading import Models
from taskvec.evaluation.options import EvaluationKeywords, evaluation_options
from taskvec.evaluation.task import Metric
from taskvec.journal import fields_to_json, finite
from taskvec.keywords import takes
from taskvec.merging.decide import check_scales
from taskvec.merging.layer_report import rank_correlation, sign_conflicts
from taskvec.merging.prepare import open_with_base
from taskvec.merging.scans import scan_members
from taskvec.methods.method import Inputs
from taskvec.methods.table import Table
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.scan import Scan

Array = np.ndarray[Any, Any]
Ask = Callable[[Recipe, str, Sequence[str]], dict[str, Result]]  # by task, for those named

SYNERGY, INTERFERENCE, NEITHER = "synergy", "interference", "neither"


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the vectors of two tasks lie to each other; None where that cannot be known.

    Attributes:
        cosine: Of the task vectors, in [−1, 1].
        pure_cosine: Of the pure vectors.
        sign_conflict: In [0, 1].
        rank_correlation: In [−1, 1].
    """

    cosine: float | None
    pure_cosine: float | None
    sign_conflict: float | None
    rank_correlation: float | None


@dataclass(frozen=True, slots=True)
class Alone:
    """One task by itself, by its own metric.

    Attributes:
        metric: What it is measured by.
        target: The target without any task.
        single: The target with this task's vector at its λ; None where the method cannot merge one.
        tuned: The fine-tune.
        error: Why there is no single.
    """

    metric: Metric
    target: Result
    single: Result | None
    tuned: Result
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        about = {name: self.target.about[name] for name in ("n", "available", "seed")}
        results = {name: getattr(self, name) for name in ("target", "single", "tuned")}
        return {
            "measure": self.target.task,
            "metric": self.metric.name,
            "higher_is_better": self.metric.higher_is_better,
            **about,
            **{n: finite(r and r.figures[self.metric.name]) for n, r in results.items()},
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Effect:
    """What the other task of a pair does to one.

    Attributes:
        merged: Its metric in the merge of both.
        less_single: Less that of the task's vector alone, paired; None without a single.
        less_tuned: Less that of the fine-tune, paired.
        outcome: `synergy`, `interference` or `neither`; None without a single.
    """

    merged: Figure
    less_single: Figure | None
    less_tuned: Figure
    outcome: str | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tasks.

    Attributes:
        tasks: Their names, sorted.
        geometry: Of their vectors.
        effects: By task; empty where the merge failed.
        error: Why it failed.
    """

    tasks: tuple[str, str]
    geometry: Geometry
    effects: Mapping[str, Effect]
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return fields_to_json(self, without=("geometry",)) | asdict(self.geometry)


@dataclass(frozen=True, slots=True)
class Pairs:
    """What every pair of the measured tasks of a family does.

    Attributes:
        alone: By task.
        pairs: Each pair once.
    """

    alone: Mapping[str, Alone]
    pairs: tuple[Pair, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"tasks": finite(self.alone), "pairs": finite(self.pairs)}


@takes(EvaluationKeywords)
def measure_pairs(
    recipe: Recipe | str | os.PathLike[str],
    measure: Mapping[str, str],
    **options: Unpack[EvaluationKeywords],
) -> Pairs:
    """Merge every pair of tasks in memory and compare it with each task alone.

    A pair whose merge fails has the error; the others go on.

    Args:
        recipe: Names the tasks, λ and the method; or the file of a recipe.
        measure: What each task of the recipe is measured by, `TASK` or `TASK@METRIC` of the
            evaluation; tasks without one are left out.
        {options}

    Raises:
        UsageError: λ is missing, a measure is of no task of the recipe, or there are too few.
        TaskvecError: the target or a fine-tune cannot be measured.
    """
    how = evaluation_options(options)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    check_scales(recipe)
    tasks = _check(recipe, measure)
    keys = list(dict.fromkeys(measure.values()))
    goals = make_goals(keys, trade_off=len(keys) > 1)
    asked = {task: measure[task].partition("@")[0] for task in tasks}
    by_name = {each.task.name: each for each in prepare_each(list(asked.values()), how)}
    scan = scan_members(open_with_base(recipe))
    weights = pure_weights(recipe, scan)
    granularity = str(recipe.parameters[tasks[0]].get("granularity", "tensor"))

    def ask(candidate: Recipe, name: str, tasks: Sequence[str]) -> dict[str, Result]:
        wanted = [by_name[each] for each in dict.fromkeys(asked[task] for task in tasks)]
        found = {r.task: r for r in models.evaluate(candidate, wanted, name)}
        return {task: found[asked[task]] for task in tasks}

    pairs = []
    with Models(how) as models:
        untouched = ask(_target_recipe(recipe, tasks[0]), "target", tasks)
        metrics = metrics_of(goals, list(untouched.values()))
        alone = {
            task: _alone(recipe, task, metrics[measure[task]], untouched[task], ask)
            for task in tasks
        }
        for a, b in itertools.combinations(tasks, 2):
            lie = geometry(scan, weights, granularity, a, b)
            try:
                merged = ask(only(recipe, (a, b)), f"{a} + {b}", (a, b))
            except TaskvecError as error:
                pairs.append(Pair((a, b), lie, {}, str(error)))
                continue
            effects = {task: _effect(merged[task], alone[task]) for task in (a, b)}
            pairs.append(Pair((a, b), lie, effects))
    return Pairs(alone, tuple(pairs))


def _check(recipe: Recipe, measure: Mapping[str, str]) -> list[str]:
    """The tasks that are measured, in the order of the recipe."""
    for task in measure:
        if task not in recipe.family.tasks:
            hint = nearest(task, list(recipe.family.tasks))
            raise UsageError(f"a measure is given for {task!r}, no task of the recipe; {hint}")
    if len(measure) < 2:
        raise UsageError(
            f"pairs need two measured tasks or more; got {len(measure)}; "
            "give --measure TASK=MEASURE for each"
        )
    return [task for task in recipe.family.tasks if task in measure]


def only(recipe: Recipe, tasks: Sequence[str]) -> Recipe:
    """The recipe with some of its tasks."""
    return replace(recipe, family=recipe.family.only(tasks))


def _whole(recipe: Recipe, task: str) -> Recipe:
    """The fine-tune of a task: all of its vector, added to where it starts from."""
    family = replace(only(recipe, (task,)).family, target=None)
    return replace(
        as_recipe(family.members, {"method": "task_arithmetic", "scale": 1.0}), out=recipe.out
    )


def _target_recipe(recipe: Recipe, task: str) -> Recipe:
    """The target with nothing of a task's vector."""
    family = only(recipe, (task,)).family
    return replace(
        as_recipe(family.members, {"method": "task_arithmetic", "scale": 0.0}), out=recipe.out
    )


def _alone(recipe: Recipe, task: str, metric: Metric, target: Result, ask: Ask) -> Alone:
    tuned = ask(_whole(recipe, task), f"{task} tuned", (task,))[task]
    try:
        single = ask(only(recipe, (task,)), f"{task} alone", (task,))[task]
    except TaskvecError as error:
        return Alone(metric, target, None, tuned, str(error))
    return Alone(metric, target, single, tuned)


def _effect(merged: Result, alone: Alone) -> Effect:
    metric, single = alone.metric, alone.single
    less_single = None if single is None else _apart(metric, merged, single)
    return Effect(
        merged.figures[metric.name],
        less_single,
        _apart(metric, merged, alone.tuned),
        None if less_single is None else outcome(metric, less_single),
    )


def _apart(metric: Metric, ours: Result, theirs: Result) -> Figure:
    return difference(metric, ours.scores, theirs.scores, seed=ours.about["seed"])


def outcome(metric: Metric, apart: Figure) -> str:
    """What a difference to the single task says; `neither` where it is NaN.

    >>> outcome(Metric("right"), Figure(0.1, 0.05, 0.15, 100))
    'synergy'
    """
    if apart.low <= 0 <= apart.high or math.isnan(apart.value):
        return NEITHER
    return SYNERGY if (apart.value > 0) == bool(metric.higher_is_better) else INTERFERENCE


def pure_weights(recipe: Recipe, scan: Scan) -> Array:
    """Layer weights of every task, shape (tasks, tensors), float64; 1 where a method has none."""
    owner = recipe.weigher
    method = owner.method
    if method.needs_scan and not method.sparsifies and method.combine is None:
        table = method.decide(Inputs(scan.tasks, scan.names, recipe.scales, owner.parameters, scan))
        if isinstance(table, Table):
            return table.weights
    return np.ones((len(scan.tasks), len(scan.names)))


def geometry(scan: Scan, weights: Array, granularity: str, a: str, b: str) -> Geometry:
    """How two tasks' vectors lie to each other.

    Args:
        scan: Statistics of the family.
        weights: Layer weights, shape (tasks, tensors).
        granularity: Of the layers whose similarities are ranked.
        a: One task.
        b: The other.
    """
    i, j = scan.task_index(a), scan.task_index(b)

    def cosine(weights: Array) -> float | None:
        def product(x: int, y: int) -> float:
            return float((weights[x] * weights[y] * scan.gram[:, 2 + x, 2 + y]).sum())

        norms = math.sqrt(product(i, i) * product(j, j))
        return product(i, j) / norms if norms > 0 else None

    first, second = sorted((a, b))
    return Geometry(
        cosine(np.ones_like(weights)),
        cosine(weights),
        sign_conflicts(scan)[f"{first}, {second}"],
        rank_correlation(scan, granularity)[a][b],
    )
