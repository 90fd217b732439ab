"""The winner: chosen by the scores on selection data, and scored again on test data.

The best of many candidates is partly the luckiest: its score on selection data is too good. So it
is scored on test data that had no say, beside the target and the recipe as it was given, with
intervals and the paired difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskvec.coefficients.goals import Goals, Scale, bound, objectives
from taskvec.coefficients.scoring import TEST, Ask, Executor
from taskvec.coefficients.study import ENDED, Study, score_one, single_task
from taskvec.errors import TaskvecError
from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.intervals import Figure, figure_of, paired
from taskvec.journal import finite
from taskvec.recipes.recipe import Recipe

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was tried.

    Attributes:
        number: In the order in which candidates were asked for.
        point: Value by axis.
        values: Metric by goal, on selection data.
        objectives: What was maximised.
        violations: By goal that must be kept; above 0 where it was not.
        error: Why it has no values.
        same_as: Number of the candidate at the same point that was scored in its place.
        switching_s: Seconds until it was in the model.
        scoring_s: Seconds until it was scored.
    """

    number: int
    point: Mapping[str, Any]
    values: Mapping[str, float] = field(default_factory=dict)
    objectives: Sequence[float] = ()
    violations: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    same_as: int | None = None
    switching_s: float = 0.0
    scoring_s: float = 0.0

    @property
    def is_scored(self) -> bool:
        """Whether it has values of its own."""
        return not self.error and self.same_as is None

    @property
    def is_allowed(self) -> bool:
        """Whether it keeps all that must be kept."""
        return self.is_scored and all(violation <= 0 for violation in self.violations.values())


def trials_of(study: Study) -> list[Trial]:
    """The trials that are finished, in their order."""
    return [
        Trial(trial.number, **trial.user_attrs["outcome"])
        if "outcome" in trial.user_attrs
        else Trial(trial.number, trial.params, error=ENDED)
        for trial in study.trials
        if trial.state.is_finished()
    ]


@dataclass(frozen=True, slots=True)
class Miss:
    """The candidate that comes closest to what must be kept, where none keeps it.

    Attributes:
        trial: Which.
        goal: What it fails most.
        value: Its metric there.
        bound: What that would have to be.
        share: By how much it is off, as a share of the target's value.
    """

    trial: Trial
    goal: str
    value: float
    bound: float
    share: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What a study came to.

    Attributes:
        winner: The best candidate that keeps all that must be kept; in a trade-off the most
            balanced of the front; None: there is none.
        front: In a trade-off, the candidates that none is better than in everything.
        miss: The nearest miss, where none keeps all.
    """

    winner: Trial | None
    front: Sequence[Trial] = ()
    miss: Miss | None = None


def choose(goals: Goals, scale: Scale, trials: Sequence[Trial]) -> Choice:
    """The winner among the trials; of equal ones that which keeps most, then the first."""
    allowed = [trial for trial in trials if trial.is_allowed]
    if not allowed:
        known = [trial for trial in trials if trial.is_scored]
        return Choice(None, miss=_nearest(goals, scale, known) if known else None)
    if not goals.trade_off:
        return Choice(max(allowed, key=_merit))
    front = [trial for trial in allowed if not any(_beats(other, trial) for other in allowed)]
    return Choice(_most_balanced(front), sorted(front, key=lambda trial: -trial.objectives[0]))


def _merit(trial: Trial) -> tuple[float, float, int]:
    return trial.objectives[0], -max(trial.violations.values(), default=0.0), -trial.number


def _beats(one: Trial, other: Trial) -> bool:
    """Whether one is as good in everything and better in something, or equal and earlier."""
    pairs = list(zip(one.objectives, other.objectives, strict=True))
    if all(a == b for a, b in pairs):
        return one.number < other.number
    return all(a >= b for a, b in pairs)


def _most_balanced(front: Sequence[Trial]) -> Trial:
    """The one whose worst objective is best, each from 0 to 1 over the front."""
    values = np.array([trial.objectives for trial in front])
    low, high = values.min(axis=0), values.max(axis=0)
    ranked = (values - low) / np.where(high > low, high - low, 1.0)
    return front[int(np.argmax(np.where(high > low, ranked, 1.0).min(axis=1)))]


def _nearest(goals: Goals, scale: Scale, trials: Sequence[Trial]) -> Miss:
    nearest = min(trials, key=lambda trial: (max(trial.violations.values()), trial.number))
    goal = max(nearest.violations, key=lambda key: nearest.violations[key])
    limit = bound(scale.metrics[goal], scale.target[goal], goals.keep_share)
    return Miss(nearest, goal, nearest.values[goal], limit, nearest.violations[goal])


def measure_winner(study: Study, executor: Executor, winner: Trial) -> dict[str, Any]:
    """The winner on test data, beside the target and the recipe as it was given; JSON types.

    What was measured once is taken from the study.
    """
    kept = study.optuna.user_attrs.get("tested")
    if kept is None or kept["number"] != winner.number:
        kept = {"number": winner.number} | _measure(study, executor, winner)
        study.optuna.set_user_attr("tested", kept)
    return dict(kept)


def _measure(study: Study, executor: Executor, winner: Trial) -> dict[str, Any]:
    job, goals = study.job, study.job.goals
    recipe = job.space.recipe
    results = {
        "winner": _results(executor, job.space.recipe_at(winner.point)),
        "target": _results(executor, None),
    }
    if recipe.family.tasks.keys() <= recipe.scales.keys():
        with contextlib.suppress(TaskvecError):  # it may be what the user wants to get away from
            results["given"] = _results(executor, recipe)
    singles = {
        task: _results(executor, single_task(recipe, task))
        for task in dict.fromkeys(goal.single for goal in goals.aims if goal.single is not None)
    }
    scale = Scale(
        study.scale.metrics,
        {key: figure.value for key, figure in _figures(goals, results["target"]).items()},
        {
            goal.key: _figures(goals, singles[goal.single])[goal.key].value
            for goal in goals.aims
            if goal.single is not None
        },
    )
    reference = "given" if "given" in results else "target"
    figures = {name: _figures(goals, found) for name, found in results.items()}
    apart, overall = _differences(goals, scale, results["winner"], results[reference], job.seed)
    return {
        "reference": reference,
        "figures": finite(figures),
        "single": dict(scale.single),
        "differences": finite(apart),
        "objectives": overall,
        "kept": _check_kept(goals, scale, figures["winner"]),
    }


def _results(executor: Executor, recipe: Recipe | None) -> Sequence[Result]:
    return score_one(executor, Ask(-1, recipe, TEST)).results


def _figures(goals: Goals, results: Sequence[Result]) -> dict[str, Figure]:
    found = {goal.key: goal.of(results) for goal in goals.goals}
    return {key: result.figures[name] for key, (result, name) in found.items()}


def _differences(
    goals: Goals,
    scale: Scale,
    ours: Sequence[Result],
    theirs: Sequence[Result],
    seed: int,
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """The winner less the reference, by goal and in what was maximised.

    Tasks are resampled independently of each other, both models by the same samples.
    """
    apart: dict[str, Figure] = {}
    values: dict[str, list[Array]] = {}
    for place, goal in enumerate(goals.goals):
        (mine, name), (other, _) = (goal.of(each) for each in (ours, theirs))
        (metric,) = [metric for metric in mine.metrics if metric.name == name]
        n, (one, two) = paired(metric, mine.scores, other.scores, seed=seed + place)
        apart[goal.key] = figure_of(one - two, n)
        values[goal.key] = [one, two]
    count = min(len(values[goal.key][0]) for goal in goals.aims)  # own metrics have fewer
    counts = [
        objectives(goals, scale, {g.key: values[g.key][i][:count] for g in goals.aims})
        for i in range(2)
    ]
    n = sum(apart[goal.key].n for goal in goals.aims)
    overall = [
        {
            "winner": float(mine[0]),
            "reference": float(other[0]),
            "difference": figure_of(mine - other, n).to_json(),
        }
        for mine, other in zip(*counts, strict=True)
    ]
    return apart, overall


def _check_kept(goals: Goals, scale: Scale, winner: Mapping[str, Figure]) -> dict[str, Any]:
    """Whether what must be kept is kept on test data too."""
    found = {}
    for goal in goals.kept:
        metric, target = scale.metrics[goal.key], scale.target[goal.key]
        limit, value = bound(metric, target, goals.keep_share), winner[goal.key].value
        holds = value >= limit if metric.higher_is_better else value <= limit
        found[goal.key] = {"value": value, "target": target, "bound": limit, "holds": bool(holds)}
    return found
