"""Pairs of tasks: how their vectors lie, and what one does to the other in a merge of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.statistics.in_memory import as_stored, scanned, small_family

import taskvec as tv
from taskvec import zoo
from taskvec.coefficients.pairs import (
    geometry,
    measure_pairs,
    only,
    outcome,
    pure_weights,
)
from taskvec.errors import UsageError
from taskvec.evaluation.intervals import Figure
from taskvec.evaluation.task import Metric
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe

# --- geometry -----------------------------------------------------------------------------------


def vectors(weights, task):
    return {n: weights[task][n] - weights["anchor"][n] for n in sorted(weights["anchor"])}


def flat(vector, weights=None):
    return np.concatenate(
        [
            (1.0 if weights is None else weights[i]) * v.ravel()
            for i, v in enumerate(vector.values())
        ]
    )


def cosine_by_hand(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_cosines_and_conflicts_are_those_of_the_vectors():
    family = small_family(tasks=3)
    weights = as_stored(family, "F32")
    scan = scanned(family, "F32")
    rows = np.random.default_rng(3).uniform(0, 2, (3, len(scan.names)))
    a, c = vectors(weights, "task:a"), vectors(weights, "task:c")
    found = geometry(scan, rows, "tensor", "c", "a")
    assert found.cosine == pytest.approx(cosine_by_hand(flat(a), flat(c)), abs=1e-7)
    pure = cosine_by_hand(flat(a, rows[0]), flat(c, rows[2]))
    assert found.pure_cosine == pytest.approx(pure, abs=1e-7)
    x, y = flat(a), flat(c)
    both = (x != 0) & (y != 0)
    assert found.sign_conflict == pytest.approx((x * y < 0)[both].mean(), abs=1e-12)


def ranks(values):
    return np.argsort(np.argsort(values)).astype(float)


def test_rank_correlation_is_that_of_the_similarities():
    family = small_family(tasks=2)
    weights = as_stored(family, "F32")
    similarities = []
    for task in ("task:a", "task:b"):
        row = []
        for name in sorted(weights["anchor"]):
            comp = (weights[task][name] - weights["base"][name]).ravel()
            instr = (weights["anchor"][name] - weights["base"][name]).ravel()
            row.append(cosine_by_hand(comp, instr))
        similarities.append(ranks(row))
    scan = scanned(family, "F32")
    found = geometry(scan, np.ones((2, len(scan.names))), "tensor", "a", "b")
    expected = np.corrcoef(*similarities)[0, 1]
    assert found.rank_correlation == pytest.approx(expected, abs=1e-9)


def test_a_task_that_changes_nothing_has_no_cosine():
    family = small_family(tasks=2)
    family["task:b"] = family["anchor"]
    scan = scanned(family, "F32")
    found = geometry(scan, np.ones((2, len(scan.names))), "tensor", "a", "b")
    assert (found.cosine, found.pure_cosine, found.sign_conflict) == (None, None, None)


def test_pure_weights_are_latas_own_or_those_that_a_method_weighs_layers_by():
    family = small_family(tasks=2)
    scan = scanned(family, "F32")
    members = tv.Family(base="b", instruct="i", tasks={"a": "a", "b": "b"})
    scales = {"a": 1.0, "b": 1.0}
    plain = as_recipe(members, {"method": "ties", "scale": scales})
    assert (pure_weights(plain, scan) == 1).all()
    lata = as_recipe(members, {"method": {"name": "lata", "scheme": "linear"}, "scale": scales})
    expected = tv.lata(scan, scheme="linear").weights
    np.testing.assert_array_equal(pure_weights(lata, scan), expected)
    weighing = recipe_with(layer_weights={"name": "lata", "scheme": "linear"}, names="ab")
    np.testing.assert_array_equal(pure_weights(weighing, scan), expected)


# --- recipes of some tasks ----------------------------------------------------------------------


def recipe_with(names="abc", **more):
    data = {
        "base": "b", "instruct": "i", "method": "dare",
        "tasks": {name: {"model": name, "scale": 0.5, "density": 0.3} for name in names},
    }  # fmt: skip
    data["tasks"]["a"] |= {"over": "base", "scale": {"depth": [0, 1], "outside": 1}}
    return read_recipe(Document(data | more, "here"), Path())


def test_a_recipe_of_some_tasks_has_nothing_of_the_others():
    whole = recipe_with(layer_weights="lata")
    small = only(whole, ("b", "a"))
    assert small.to_dict()["tasks"].keys() == {"a", "b"}
    for task in ("a", "b"):
        assert small.to_dict()["tasks"][task] == whole.to_dict()["tasks"][task]
    assert [task.over for task in small.tasks.values()] == ["base", None]
    assert only(whole, ("c",)).profiles == {}
    assert only(whole, ("c",)).tasks["c"].over is None
    assert small.weigher.family.members == small.family.members


# --- effects ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "higher", "expected"),
    [
        (0.1, 0.3, True, "synergy"),
        (-0.3, -0.1, True, "interference"),
        (-0.1, 0.3, True, "neither"),
        (0.0, 0.3, True, "neither"),
        (0.1, 0.3, False, "interference"),
        (-0.3, -0.1, False, "synergy"),
        (float("nan"), float("nan"), True, "neither"),
    ],
)
def test_outcome_by_the_side_of_zero(low, high, higher, expected):
    apart = Figure((low + high) / 2, low, high, 40)
    assert outcome(Metric("m", "mean", higher_is_better=higher), apart) == expected


def recipe_of_zoo(method, scale=0.7, tasks=("math", "code", "unsafe")):
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        tasks={task: zoo.path(task) for task in tasks},
    )
    return as_recipe(family, {"method": method, "scale": dict.fromkeys(tasks, scale)})


@pytest.fixture
def _torch():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


def found_in(recipe, tasks, n):
    return measure_pairs(recipe, {t: f"zoo:{t}" for t in tasks}, limit=n)


@pytest.mark.usefixtures("_torch")
def test_a_pair_is_compared_with_each_task_alone_and_with_the_fine_tunes():
    recipe = recipe_of_zoo("task_arithmetic")
    found = found_in(recipe, ("math", "code"), 16)
    (pair,) = found.pairs
    assert pair.tasks == ("math", "code")
    names = ["zoo:code", "zoo:math"]
    merged = tv.evaluate(only(recipe, ("math", "code")), names, limit=16)
    for task in ("math", "code"):
        alone, effect, name = found.alone[task], pair.effects[task], f"zoo:{task}"
        assert effect.merged == merged[name].main
        single = tv.evaluate(only(recipe, (task,)), [name], limit=16)[name]
        tuned = tv.evaluate(zoo.path(task), [name], limit=16)[name]
        target = tv.evaluate(zoo.path("instruct"), [name], limit=16)[name]
        got = [r.main for r in (alone.single, alone.tuned, alone.target)]
        assert got == [single.main, tuned.main, target.main]
        apart = [
            ours.values["accuracy"] - theirs.values["accuracy"]
            for ours, theirs in zip(merged[name].scores, single.scores, strict=True)
        ]
        assert effect.less_single.value == pytest.approx(np.mean(apart))
        # n differences of 0 and ±1: the interval of their mean holds it
        assert effect.less_single.low <= effect.less_single.value <= effect.less_single.high
    told = found.to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["pairs"][0]["effects"]["math"]["outcome"] == pair.effects["math"].outcome


@pytest.mark.usefixtures("_torch")
def test_what_a_method_cannot_merge_is_told_and_the_rest_goes_on():
    found = found_in(recipe_of_zoo("arcee_fusion"), ("math", "code"), 3)
    assert "arcee_fusion takes one task" in found.pairs[0].error
    assert found.pairs[0].effects == {}
    assert found.alone["math"].single is not None
    found = found_in(recipe_of_zoo({"name": "slerp"}, tasks=("math", "code")), ("math", "code"), 3)
    assert found.alone["math"].single is None
    assert "slerp takes exactly 2 tasks" in found.alone["math"].error
    effect = found.pairs[0].effects["math"]
    assert (effect.less_single, effect.outcome) == (None, None)
    assert effect.less_tuned.n == 3


def test_what_cannot_be_meant_is_refused():
    recipe = recipe_of_zoo("task_arithmetic")

    def refused(measure):
        with pytest.raises(UsageError) as error:
            measure_pairs(recipe, measure)
        return str(error.value)

    assert refused({"math": "zoo:math"}) == (
        "pairs need two measured tasks or more; got 1; give --measure TASK=MEASURE for each"
    )
    assert refused({"math": "zoo:math", "maths": "zoo:math"}) == (
        "a measure is given for 'maths', no task of the recipe; did you mean 'math'?"
    )
