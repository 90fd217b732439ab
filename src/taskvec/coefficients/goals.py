"""Goals: what a candidate is to be good at, bad at, and what it must keep.

A goal is a task of the evaluation, with one of its metrics. Values are **oriented**, so that more
is better: a perplexity p enters as −ln p (nats), any other metric that is better low as its
negative. With the oriented values v of the candidate and v₀ of the target:

    maximize   v counts, or the share (v − v₀)/(v₁ − v₀) of the gain that the task's vector alone
               brings at λ = 1 (v₁), where a single task is named for every goal
    minimize   the same, negated
    keep       a constraint: the metric at least `share` of the target's; one that is better low at
               most the target's over `share`
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.errors import TaskvecError, UsageError, nearest
from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.task import Metric

MAXIMIZE, MINIMIZE, KEEP = "maximize", "minimize", "keep"
AGGREGATES = ("mean", "min")
KEEP_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Goal:
    """One task of the evaluation, and what is wanted of it.

    Attributes:
        task: Its name.
        way: `maximize`, `minimize` or `keep`.
        metric: Which of its metrics; empty: the main one.
        single: Task of the recipe that was tuned for it alone; None: it is not measured by that.
    """

    task: str
    way: str
    metric: str = ""
    single: str | None = None

    @property
    def key(self) -> str:
        """As it is asked for: `TASK` or `TASK@METRIC`."""
        return f"{self.task}@{self.metric}" if self.metric else self.task

    def of(self, results: Sequence[Result]) -> tuple[Result, str]:
        """The result of its task, and the name of its metric."""
        (result,) = [result for result in results if result.task == self.task]
        return result, self.metric or result.metrics[0].name


@dataclass(frozen=True, slots=True)
class Goals:
    """All that is wanted.

    Attributes:
        goals: What is measured.
        aggregate: How several become one: `mean`, or `min`, the worst.
        keep_share: Least share of the target's value in what must be kept, in (0, 1].
        trade_off: Whether each is an objective of its own.
    """

    goals: tuple[Goal, ...]
    aggregate: str = "mean"
    keep_share: float = KEEP_SHARE
    trade_off: bool = False

    @property
    def aims(self) -> tuple[Goal, ...]:
        """What is maximised or minimised."""
        return tuple(goal for goal in self.goals if goal.way != KEEP)

    @property
    def kept(self) -> tuple[Goal, ...]:
        """What must be kept."""
        return tuple(goal for goal in self.goals if goal.way == KEEP)

    @property
    def is_normalised(self) -> bool:
        """Whether values are shares of what single tasks gain."""
        return any(goal.single is not None for goal in self.aims)


def make_goals(
    maximize: Sequence[str] = (),
    minimize: Sequence[str] = (),
    keep: Sequence[str] = (),
    *,
    single: Mapping[str, str] | None = None,
    tasks: Sequence[str] = (),
    **how: Any,
) -> Goals:
    """Goals as they are asked for.

    Args:
        maximize: `TASK` or `TASK@METRIC` of what the candidate is to be good at.
        minimize: Of what it is to be bad at.
        keep: Of what it must keep.
        single: Task of the recipe by goal; for all that is maximised or minimised, or for none.
        tasks: Tasks of the recipe.
        **how: `aggregate`, `keep_share` and `trade_off` of `Goals`.

    Raises:
        UsageError: they are contradictory or incomplete.
    """
    single = dict(single or {})
    ways = ((MAXIMIZE, maximize), (MINIMIZE, minimize), (KEEP, keep))
    goals: list[Goal] = []
    for way, texts in ways:
        for text in texts:
            task, _, metric = text.partition("@")
            goals.append(Goal(task, way, metric, single.pop(text, None) if way != KEEP else None))
    if single:
        raise UsageError(f"--single names {next(iter(single))!r}, which is not a goal")
    made = Goals(tuple(goals), **how)
    _check(made, tasks)
    return made


def _check(goals: Goals, tasks: Sequence[str]) -> None:
    if not goals.aims:
        raise UsageError("no goal is named; give --maximize TASK or --minimize TASK")
    keys = [goal.key for goal in goals.goals]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"{key!r} is named twice among the goals")
    singles = [goal for goal in goals.aims if goal.single is not None]
    for goal in singles:
        if goal.single not in tasks:
            hint = nearest(str(goal.single), list(tasks))
            raise UsageError(f"--single {goal.key}={goal.single}: no such task; {hint}")
    if singles and len(singles) < len(goals.aims):
        (missing, *_) = [goal.key for goal in goals.aims if goal.single is None]
        raise UsageError(
            f"--single is given for some goals only; give {missing}=TASK too, so that all values "
            "are shares"
        )
    if goals.aggregate not in AGGREGATES:
        raise UsageError(f"aggregate must be mean or min; got {goals.aggregate!r}")
    if not 0 < goals.keep_share <= 1:
        raise UsageError(f"keep_share must be above 0 and at most 1; got {goals.keep_share:g}")
    if goals.trade_off and len(goals.aims) < 2:
        raise UsageError("a trade-off needs two or more goals to maximise or minimise")


Metrics = Mapping[str, Metric]  # by key of the goal
Values = Mapping[str, float]


def metrics_of(goals: Goals, results: Sequence[Result]) -> dict[str, Metric]:
    """The metric of every goal, from results of its task.

    Raises:
        UsageError: there is none of that name, it cannot be oriented, or values of several kinds
            are to become one.
    """
    found = {}
    for goal in goals.goals:
        result, name = goal.of(results)
        known = {metric.name: metric for metric in result.metrics}
        if name not in known:
            hint = nearest(name, list(known))
            raise UsageError(f"task {goal.task!r} has no metric {name!r}; {hint}")
        metric = known[name]
        if metric.higher_is_better is None:
            raise UsageError(
                f"{goal.key}: neither more nor less {metric.name} is better; name another metric: "
                f"{goal.task}@METRIC"
            )
        if goal.way == MINIMIZE and not metric.higher_is_better:
            raise UsageError(
                f"--minimize {goal.key}: {metric.name} is better when it is low; to lower it, give "
                f"--maximize {goal.key}; to be bad at the task, name a metric that is better high"
            )
        found[goal.key] = metric
    _check_kinds(goals, found)
    return found


def _check_kinds(goals: Goals, metrics: Metrics) -> None:
    if goals.trade_off or goals.is_normalised:
        return
    kinds = {goal.key: _kind(metrics[goal.key]) for goal in goals.aims}
    (first, *others) = kinds
    for other in others:
        if kinds[other] != kinds[first]:
            raise UsageError(
                f"{first} ({metrics[first].name}) and {other} ({metrics[other].name}) are of "
                "different kinds and cannot become one value; measure them as shares with --single "
                f"{first}=TASK --single {other}=TASK, or give --trade-off"
            )


def _kind(metric: Metric) -> tuple[str, ...]:
    """What values must have in common to be averaged: all rates are shares of the samples."""
    return ("rate",) if metric.kind == "rate" else (metric.kind, metric.name)


def values_of(goals: Goals, results: Sequence[Result]) -> dict[str, float]:
    """The metric of every goal, not oriented.

    Raises:
        TaskvecError: there is none, or it is not finite.
    """
    found = {}
    for goal in goals.goals:
        result, name = goal.of(results)
        value = result.figures[name].value if name in result.figures else math.nan
        if not math.isfinite(value):
            raise TaskvecError(f"{goal.key}: {name} of this candidate is {value}")
        found[goal.key] = value
    return found


def oriented(metric: Metric, value: Any) -> Any:
    """A value so that more is better; numbers or arrays."""
    import numpy as np

    if metric.kind == "perplexity":
        return -np.log(value)
    return value if metric.higher_is_better else -value


@dataclass(frozen=True, slots=True)
class Scale:
    """What values are measured by: those of the target and of single tasks.

    Attributes:
        metrics: By goal.
        target: Value of the target by goal.
        single: Value of the target with the single task's vector at λ = 1, by goal that has one.
    """

    metrics: Metrics
    target: Values
    single: Values

    def gain(self, goal: Goal) -> float:
        """What the single task gains over the target, oriented."""
        metric = self.metrics[goal.key]
        one, zero = (oriented(metric, v[goal.key]) for v in (self.single, self.target))
        return float(one - zero)

    def signed(self, goal: Goal, value: Any) -> Any:
        """What a goal counts, more being better; numbers or arrays."""
        metric = self.metrics[goal.key]
        counts = oriented(metric, value)
        if goal.single is not None:
            counts = (counts - oriented(metric, self.target[goal.key])) / self.gain(goal)
        return -counts if goal.way == MINIMIZE else counts


def check_gains(goals: Goals, scale: Scale) -> None:
    """Refuse shares of a gain that there is not.

    Raises:
        UsageError: a single task is no better than the target.
    """
    for goal in goals.aims:
        if goal.single is not None and not scale.gain(goal) > 0:
            raise UsageError(
                f"--single {goal.key}={goal.single}: alone at λ = 1 it has "
                f"{scale.single[goal.key]:.3g}, the target {scale.target[goal.key]:.3g}; there is "
                "no gain to take a share of"
            )


def objectives(goals: Goals, scale: Scale, values: Mapping[str, Any]) -> list[Any]:
    """What the study maximises: one number, or one a goal in a trade-off; numbers or arrays."""
    import numpy as np

    counts = [scale.signed(goal, values[goal.key]) for goal in goals.aims]
    if goals.trade_off:
        return counts
    return [(np.min if goals.aggregate == "min" else np.mean)(counts, axis=0)]


def bound(metric: Metric, target: float, share: float) -> float:
    """The worst value of a metric that still keeps a share of the target's.

    >>> bound(Metric("right"), 0.8, 0.95), round(bound(Metric("p", "perplexity", False), 19, 0.95))
    (0.76, 20)
    """
    grows = (target >= 0) == bool(metric.higher_is_better)
    return target * share if grows else target / share


def violations(goals: Goals, scale: Scale, values: Values) -> dict[str, float]:
    """By how much each kept metric is on the wrong side of its bound, as a share of the target's.

    At most 0 where the constraint holds. Where the target's value is 0, the difference itself.
    """
    found = {}
    for goal in goals.kept:
        metric, target = scale.metrics[goal.key], scale.target[goal.key]
        apart = bound(metric, target, goals.keep_share) - values[goal.key]
        found[goal.key] = (apart if metric.higher_is_better else -apart) / (abs(target) or 1.0)
    return found
