"""The choice among candidates, and intervals of what several tasks come to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.coefficients.made_up import result

from taskvec.coefficients.goals import Scale, make_goals
from taskvec.coefficients.winner import Trial, _differences, choose
from taskvec.evaluation.task import Metric, Score

RATE = Metric("right")


def trial(number, *objectives, **violations):
    return Trial(number, {"scale": number}, {"a": 0.5, **violations}, objectives, violations)


def test_the_best_that_is_allowed():
    goals = make_goals(["a"], keep=["k"])
    scale = Scale({"a": RATE, "k": RATE}, {"a": 0, "k": 1.0}, {})
    trials = [trial(0, 0.9, k=0.1), trial(1, 0.5, k=-0.1), trial(2, 0.5, k=0.0)]
    failed = Trial(3, {"scale": 3}, error="out of paper")
    twin = replace(trial(4, 0.8, k=0.0), same_as=2)
    choice = choose(goals, scale, [*trials, failed, twin])
    assert choice.winner == trials[1]  # of equal ones the one that keeps more
    assert choose(goals, scale, [trials[2], trials[1]]).winner == trials[1]
    assert choose(goals, scale, [trials[1], replace(trials[1], number=9)]).winner == trials[1]
    assert choose(goals, scale, [failed]).winner is None
    assert choose(goals, scale, [failed]).miss is None


def test_the_nearest_miss():
    """That whose worst control is least off; the control that is told is that one."""
    goals = make_goals(["a"], keep=["k", "m"])
    scale = Scale({"a": RATE, "k": RATE, "m": RATE}, {"a": 0, "k": 0.8, "m": 0.6}, {})
    trials = [
        trial(0, 0.9, k=0.5, m=-1.0),
        trial(1, 0.5, k=0.2, m=0.3),
        trial(2, 0.1, k=0.1, m=0.4),
    ]
    miss = choose(goals, scale, trials).miss
    assert (miss.trial.number, miss.goal, miss.share) == (1, "m", 0.3)
    assert miss.bound == pytest.approx(0.57)


def test_the_front():
    goals = make_goals(["a", "b"], trade_off=True)
    scale = Scale({"a": RATE, "b": RATE}, {"a": 0, "b": 0}, {})
    values = [(0.0, 1.0), (0.6, 0.7), (0.5, 0.7), (1.0, 0.0), (0.6, 0.7), (0.2, 0.9)]
    choice = choose(goals, scale, [trial(i, *each) for i, each in enumerate(values)])
    assert [each.number for each in choice.front] == [3, 1, 5, 0]
    assert choice.winner.number == 1


def of(task, scores):
    made = result(task, 0.0)
    return replace(made, scores=[Score({"right": float(score)}) for score in scores])


def test_tasks_are_resampled_apart():
    """Where one task is right exactly where the other is wrong, their mean still has a spread."""
    goals = make_goals(["a", "b"])
    scale = Scale({"a": RATE, "b": RATE}, {"a": 0, "b": 0}, {})
    first = [i % 2 for i in range(100)]
    ours = [of("a", first), of("b", [1 - x for x in first])]
    theirs = [of("a", [0] * 100), of("b", [0] * 100)]
    apart, (overall,) = _differences(goals, scale, ours, theirs, 0)
    assert apart["a"].value == 0.5
    assert (overall["winner"], overall["reference"]) == (0.5, 0.0)
    low, high = overall["difference"]["interval"]
    # The mean of two rates of 100 each: 1.96 √(0.25 / 200) = 0.069.
    assert low == pytest.approx(0.5 - 0.069, abs=0.012)
    assert high == pytest.approx(0.5 + 0.069, abs=0.012)
    assert overall["difference"]["n"] == 200


def test_models_are_resampled_together():
    """Two models that are right on the same samples do not differ, whichever are drawn."""
    goals = make_goals(["a"])
    scale = Scale({"a": RATE}, {"a": 0}, {})
    scores = [i % 3 == 0 for i in range(90)]
    _, (overall,) = _differences(goals, scale, [of("a", scores)], [of("a", scores)], 0)
    assert overall["difference"]["interval"] == [0.0, 0.0]
