"""Goals: orientation, shares of single tasks, aggregates, constraints; what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.coefficients.made_up import result

from taskvec.coefficients.goals import (
    Scale,
    bound,
    check_gains,
    make_goals,
    metrics_of,
    objectives,
    oriented,
    values_of,
    violations,
)
from taskvec.errors import TaskvecError, UsageError
from taskvec.evaluation.task import Metric

RATE, HARM = Metric("right"), Metric("attack_success", "rate", higher_is_better=False)
PERPLEXITY = Metric("perplexity", "perplexity", higher_is_better=False)
LOG = Metric("log_likelihood_per_token", "ratio")


def test_orientation():
    assert oriented(RATE, 0.25) == 0.25
    assert oriented(HARM, 0.25) == -0.25
    assert oriented(PERPLEXITY, math.e**3) == pytest.approx(-3)
    assert oriented(LOG, -2.0) == -2.0


def test_mean_and_worst():
    goals = make_goals(["a", "b"], ["c"], tasks=[])
    scale = Scale(dict.fromkeys("abc", RATE), dict.fromkeys("abc", 0.0), {})
    values = {"a": 0.9, "b": 0.6, "c": 0.3}
    assert objectives(goals, scale, values) == [pytest.approx((0.9 + 0.6 - 0.3) / 3)]
    worst = make_goals(["a", "b"], ["c"], aggregate="min")
    assert objectives(worst, scale, values) == [-0.3]
    each = make_goals(["a", "b"], ["c"], trade_off=True)
    assert objectives(each, scale, values) == [0.9, 0.6, -0.3]


def test_arrays_of_values():
    """Resamples go through the same functions."""
    goals = make_goals(["a", "p"], trade_off=True)
    scale = Scale({"a": RATE, "p": PERPLEXITY}, {}, {})
    one, two = objectives(goals, scale, {"a": np.array([0.1, 0.2]), "p": np.exp([1.0, 2.0])})
    assert one.tolist() == [0.1, 0.2]
    assert two.tolist() == pytest.approx([-1, -2])


def test_shares_of_what_single_tasks_gain():
    """math from 0.2 to 0.8; perplexity from e² to e¹: half of each gain is the same."""
    goals = make_goals(["m", "p"], single={"m": "math", "p": "text"}, tasks=["math", "text"])
    scale = Scale(
        {"m": RATE, "p": PERPLEXITY},
        {"m": 0.2, "p": math.e**2},
        {"m": 0.8, "p": math.e},
    )
    check_gains(goals, scale)
    assert objectives(goals, scale, {"m": 0.5, "p": math.e**1.5}) == [pytest.approx(0.5)]
    assert objectives(goals, scale, {"m": 0.8, "p": math.e**2}) == [pytest.approx(0.5)]
    with pytest.raises(UsageError, match=r"alone at λ = 1 it has 0.1, the target 0.2; there is no"):
        check_gains(goals, Scale(scale.metrics, scale.target, {"m": 0.1, "p": math.e}))


@pytest.mark.parametrize(
    ("metric", "target", "share", "expected"),
    [
        (RATE, 0.8, 0.95, 0.76),
        (PERPLEXITY, 19.0, 0.95, 20.0),
        (HARM, 0.19, 0.95, 0.2),
        (LOG, -1.9, 0.95, -2.0),
        (RATE, 0.0, 0.95, 0.0),
    ],
)
def test_bounds(metric, target, share, expected):
    assert bound(metric, target, share) == pytest.approx(expected)


def test_violations():
    """At most 0 exactly where the metric is on the right side of its bound."""
    goals = make_goals(["m"], keep=["a", "p", "z"])
    metrics = {"m": RATE, "a": RATE, "p": PERPLEXITY, "z": RATE}
    scale = Scale(metrics, {"m": 0.0, "a": 0.8, "p": 19.0, "z": 0.0}, {})
    kept = violations(goals, scale, {"m": 0, "a": 0.8 * 0.95, "p": 19.0 / 0.95, "z": 0.0})
    assert kept == {"a": 0.0, "p": 0.0, "z": 0.0}
    lost = violations(goals, scale, {"m": 0, "a": 0.6, "p": 38.0, "z": 0.1})
    assert lost == {
        "a": pytest.approx(0.95 - 0.75),
        "p": pytest.approx(2 - 1 / 0.95),
        "z": pytest.approx(-0.1),
    }


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "no goal is named; give --maximize TASK or --minimize TASK"),
        ({"keep": ["a"]}, "no goal is named"),
        ({"maximize": ["a"], "keep": ["a"]}, "'a' is named twice among the goals"),
        ({"maximize": ["a"], "single": {"b": "math"}}, "--single names 'b', which is not a goal"),
        ({"maximize": ["a"], "single": {"a": "maths"}}, "--single a=maths: no such task; did you"),
        (
            {"maximize": ["a", "b"], "single": {"a": "math"}},
            "--single is given for some goals only; give b=TASK too",
        ),
        ({"maximize": ["a"], "aggregate": "sum"}, "aggregate must be mean or min; got 'sum'"),
        ({"maximize": ["a"], "keep_share": 0}, "keep_share must be above 0 and at most 1; got 0"),
        ({"maximize": ["a"], "trade_off": True}, "a trade-off needs two or more goals"),
    ],
)
def test_goals_that_cannot_be_meant(about, message):
    with pytest.raises(UsageError) as error:
        make_goals(**{"tasks": ["math"]} | about)
    assert message in str(error.value)


def test_metrics_by_name():
    goals = make_goals(["a@right"], keep=["p"])
    results = [result("a", 0.5), result("p", 9.0, "perplexity")]
    found = metrics_of(goals, results)
    assert {key: metric.name for key, metric in found.items()} == {
        "a@right": "right",
        "p": "perplexity",
    }
    assert values_of(goals, results) == {"a@right": 0.5, "p": pytest.approx(9.0)}
    with pytest.raises(UsageError, match="task 'a' has no metric 'rite'; did you mean 'right'"):
        metrics_of(make_goals(["a@rite"]), results)


def test_different_kinds_do_not_become_one_value():
    results = [result("a", 0.5), result("p", 9.0, "perplexity"), result("b", 0.4)]
    metrics_of(make_goals(["a", "b"]), results)
    metrics_of(make_goals(["a", "p"], trade_off=True), results)
    singles = {"a": "math", "p": "math"}
    metrics_of(make_goals(["a", "p"], single=singles, tasks=["math"]), results)
    with pytest.raises(UsageError) as error:
        metrics_of(make_goals(["a", "p"]), results)
    assert str(error.value) == (
        "a (right) and p (perplexity) are of different kinds and cannot become one value; measure "
        "them as shares with --single a=TASK --single p=TASK, or give --trade-off"
    )


def test_directions():
    """To minimise what is better low can be read both ways, so it is refused."""
    with pytest.raises(UsageError) as error:
        metrics_of(make_goals(minimize=["p"]), [result("p", 9.0, "perplexity")])
    assert str(error.value) == (
        "--minimize p: perplexity is better when it is low; to lower it, give --maximize p; to be "
        "bad at the task, name a metric that is better high"
    )
    from dataclasses import replace

    neither = replace(result("a", 0.5), metrics=(Metric("length", higher_is_better=None),))
    with pytest.raises(UsageError, match="a: neither more nor less length is better; name another"):
        metrics_of(make_goals(["a"]), [neither])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_values_that_are_none(value):
    from dataclasses import replace

    odd = result("a", 0.5)
    figure = replace(odd.figures["right"], value=value)
    with pytest.raises(TaskvecError, match=f"a: right of this candidate is {value}"):
        values_of(make_goals(["a"]), [replace(odd, figures={"right": figure})])
