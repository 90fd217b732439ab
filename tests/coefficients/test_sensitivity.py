"""Sensitivity: what a threshold keeps, which points are safe, merges that are measured."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tests.statistics.in_memory import as_stored, scanned, small_family

import taskvec as tv
from taskvec import zoo
from taskvec.coefficients.goals import MAXIMIZE, MINIMIZE, Goal
from taskvec.coefficients.sensitivity import (
    KeptShares,
    Measure,
    Point,
    Sensitivity,
    add_scores,
    kept_below,
    kept_of,
    measure_sweep,
)
from taskvec.coefficients.sweeps import Sweep
from taskvec.errors import UsageError
from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.intervals import figure
from taskvec.evaluation.task import Metric, Score
from taskvec.recipes.coerce import as_recipe

# --- what is kept -------------------------------------------------------------------------------


def similarities_by_hand(weights, task, layer_of):
    """Cosine of (θ_ft − θ_base) and (θ_pre − θ_base), elements and ‖τ‖² of each layer."""
    layers: dict[str, list[str]] = {}
    for name in sorted(weights["anchor"]):
        layers.setdefault(layer_of(name), []).append(name)
    found = []
    for names in layers.values():
        comp, instr, tau = (
            np.concatenate([(weights[a][n] - weights[b][n]).ravel() for n in names])
            for a, b in ((task, "base"), ("anchor", "base"), (task, "anchor"))
        )
        cosine = comp @ instr / (np.linalg.norm(comp) * np.linalg.norm(instr))
        found.append((cosine, len(tau), tau @ tau))
    return found


def block_of(name):
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else name


@pytest.mark.parametrize(("granularity", "layer_of"), [("tensor", str), ("block", block_of)])
def test_kept_shares_are_those_of_the_formula(granularity, layer_of):
    family = small_family()
    scan, weights = scanned(family, "F32"), as_stored(family, "F32")
    layers = similarities_by_hand(weights, "task:a", layer_of)
    cosines = sorted(cosine for cosine, _, _ in layers)
    for threshold in (cosines[2] - 1e-6, cosines[2] + 1e-6, (cosines[4] + cosines[3]) / 2, 1.0):
        kept = kept_below(scan, "a", granularity, threshold)
        chosen = [layer for layer in layers if layer[0] <= threshold]
        assert kept.layers == pytest.approx(len(chosen) / len(layers), abs=1e-12)
        for got, i in ((kept.parameters, 1), (kept.energy, 2)):
            assert got == pytest.approx(sum(c[i] for c in chosen) / sum(c[i] for c in layers))


def test_layers_that_a_task_left_alone_do_not_count():
    family = small_family()
    still = "model.embed_tokens.weight"
    family["task:a"][still] = family["anchor"][still]
    kept = kept_below(scanned(family, "F32"), "a", "tensor", 1.0)
    assert kept == KeptShares(1.0, 1.0, 1.0)
    family["task:a"] = family["anchor"]
    assert kept_below(scanned(family, "F32"), "a", "tensor", 1.0) == KeptShares(None, 0.0, None)


def recipe_of_zoo(method, scale=0.7, tasks=("math",)):
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        tasks={task: zoo.path(task) for task in tasks},
    )
    return as_recipe(family, {"method": method, "scale": dict.fromkeys(tasks, scale)})


def test_a_density_keeps_its_share_and_lambda_drops_nothing():
    recipe = recipe_of_zoo("dare", tasks=("math", "code"))
    both = {"code": KeptShares(None, 0.2, None), "math": KeptShares(None, 0.2, None)}
    assert kept_of(recipe, Sweep("density", ()), 0.2, None) == both
    assert kept_of(recipe, Sweep("density", (), "math"), 0.2, None).keys() == {"math"}
    assert kept_of(recipe, Sweep("scale", ()), 0.2, None) == {}


# --- which points are safe ----------------------------------------------------------------------


RIGHT = Metric("right")


def result(task, right, metric=RIGHT):
    """A result whose samples are worth what `right` says."""
    scores = [Score({metric.value or metric.name: float(x)}) for x in right]
    about = {"seed": 0, "n": len(scores), "available": len(scores)}
    figures = {metric.name: figure(metric, scores)}
    return Result(task, 1, "m", (metric,), figures, (), scores, (), about)


def found_of(by_task, ways, values=None, errors=()):
    """A sensitivity of made-up scores: by task, for each point, the samples' scores."""
    count = len(next(iter(by_task.values())))
    values = values or [i / 10 for i in range(count)]
    found = [
        {} if i in errors else {task: result(task, each[i]) for task, each in by_task.items()}
        for i in range(count)
    ]
    measures = {
        task: Measure(Goal(task, ways[task]), RIGHT, result(task, each[0]))
        for task, each in by_task.items()
    }
    points = add_scores([Point(value) for value in values], found, measures)
    return Sensitivity(Sweep("x", tuple(values)), points, measures)


def worse(found):
    return [
        tuple(key for key, score in point.scores.items() if score.is_worse)
        for point in found.points
    ]


def share(k, n=40):
    return [1] * k + [0] * (n - k)


def test_safe_is_not_worse_than_the_best_by_more_than_the_interval():
    found = found_of({"t": [share(k) for k in (10, 36, 38, 40, 39, 20)]}, {"t": MAXIMIZE})
    assert worse(found) == [("t",), ("t",), (), (), (), ("t",)]
    assert found.safe == [(0.2, 0.4)]
    # 36 of 40 against 40: the four that differ are drawn at least once in 98.6 % of resamples.
    apart = found.points[1].scores["t"].less_best
    assert apart.value == pytest.approx(-0.1)
    assert apart.low < -0.1 < apart.high < 0
    # 38 against 40: neither is drawn in (38/40)^40 = 12.9 % of them.
    assert found.points[2].scores["t"].less_best.high == 0
    assert found.points[3].scores["t"].less_best.value == 0
    assert found.points[5].scores["t"].less_recipe.value == pytest.approx(0.25)


def test_every_task_has_a_say_and_low_may_be_wanted():
    skill = [share(k) for k in (40, 40, 40, 0)]
    harm = [share(k) for k in (40, 0, 0, 0)]
    found = found_of({"skill": skill, "harm": harm}, {"skill": MAXIMIZE, "harm": MINIMIZE})
    assert worse(found) == [("harm",), (), (), ("skill",)]
    assert found.safe == [(0.1, 0.2)]


def test_several_stretches_the_longest_first_in_order_of_value():
    scores = [share(k) for k in (40, 0, 40, 40, 40)]
    assert found_of({"t": scores}, {"t": MAXIMIZE}).safe == [(0.2, 0.4), (0.0, 0.0)]
    found = found_of({"t": scores}, {"t": MAXIMIZE}, values=[5, 4, 3, 2, 1])
    assert found.safe == [(1, 3), (5, 5)]


def test_a_failed_merge_is_not_safe_and_parts_a_stretch():
    scores = [share(40)] * 5
    found = found_of({"t": scores}, {"t": MAXIMIZE}, errors=(1,))
    assert found.safe == [(0.2, 0.4), (0.0, 0.0)]
    assert not found.points[1].is_safe
    found = found_of({"t": scores}, {"t": MAXIMIZE}, errors=range(5))
    assert found.safe == []


def test_tasks_that_disagree_leave_no_safe_point():
    found = found_of(
        {"a": [share(40), share(0)], "b": [share(0), share(40)]}, {"a": MAXIMIZE, "b": MAXIMIZE}
    )
    assert found.safe == []
    assert found.to_json()["safe_range"] is None


def test_nan_is_never_the_best_and_never_safe():
    metric = Metric("nats", "mean")
    found = [{"t": result("t", [each] * 3, metric)} for each in (math.nan, -1.0)]
    measure = Measure(Goal("t", MAXIMIZE), metric, result("t", [-2.0] * 3, metric))
    points = add_scores([Point(0.1), Point(0.2)], found, {"t": measure})
    assert [point.is_safe for point in points] == [False, True]
    assert points[1].scores["t"].less_recipe.value == 1.0


# --- with models --------------------------------------------------------------------------------


@pytest.mark.usefixtures("_torch")
def test_merges_are_measured_beside_the_recipe():
    """σ = −1 keeps nothing and σ = 1 everything: the ends are instruct and plain arithmetic."""
    recipe = recipe_of_zoo({"name": "lata", "scheme": "threshold", "threshold": 1}, scale=1.0)
    tasks = ["zoo:math", "zoo:text"]
    found = measure_sweep(recipe, "threshold=-1,1", measure=tasks, limit=20)
    nothing, everything = found.points
    assert (nothing.kept["math"].energy, everything.kept["math"].energy) == (0.0, 1.0)
    plain = tv.evaluate(recipe, ["zoo:math", "zoo:text"], limit=20)
    instruct = tv.evaluate(zoo.path("instruct"), ["zoo:math", "zoo:text"], limit=20)
    for task in plain:
        assert everything.scores[task].figure == plain[task].main
        assert nothing.scores[task].figure == instruct[task].main
        assert everything.scores[task].less_recipe.value == 0
    assert worse(found) == [("zoo:math",), ()]
    assert found.safe == [(1.0, 1.0)]
    told = found.to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["measures"]["zoo:text"]["wanted"] == "low"
    assert told["points"][0]["kept"] == {"math": {"layers": 0.0, "parameters": 0.0, "energy": 0.0}}


@pytest.mark.usefixtures("_torch")
def test_a_merge_that_fails_is_told_and_the_others_go_on():
    method = {"name": "lata", "scheme": "threshold", "normalize_weights": "norm"}
    recipe = recipe_of_zoo(method)
    found = measure_sweep(recipe, "threshold=-1,1", minimize=["zoo:math"], limit=5)
    failed, merged = found.points
    assert "normalize_weights of task 'math' cannot be norm" in failed.error
    assert (failed.scores, failed.is_safe) == ({}, False)
    assert merged.scores["zoo:math"].figure.n == 5
    assert not found.measures["zoo:math"].wants_high
    assert found.to_json()["points"][0]["error"] == failed.error


@pytest.fixture
def _torch():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


def test_without_tasks_no_model_is_loaded(monkeypatch, tmp_path):
    """What is kept follows from the scan."""
    monkeypatch.setattr("taskvec.coefficients.sensitivity.Models", None)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base: {zoo.path('base')}\ninstruct: {zoo.path('instruct')}\n"
        f"tasks: {{math: {{model: {zoo.path('math')}, scale: 1}}}}\n"
        "method: {name: lata, scheme: threshold}\n"
    )
    found = measure_sweep(path, "threshold=0.9,1")
    assert found.points[1] == Point(1.0, {"math": KeptShares(1.0, 1.0, 1.0)})
    assert 0 < found.points[0].kept["math"].layers < 1
    assert found.safe == []
    assert found.to_json()["measures"] == {}


def test_tasks_of_different_kinds_stand_side_by_side():
    """No value is made of several goals, so that they need not be of one kind."""
    recipe = recipe_of_zoo("task_arithmetic")
    with pytest.raises(UsageError, match="named twice among the goals"):
        measure_sweep(recipe, "scale=1", measure=["zoo:math"], minimize=["zoo:math"])
