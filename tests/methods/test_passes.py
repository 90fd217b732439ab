"""`decide` may ask for further collecting passes, up to three in all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.conftest import read_checkpoint, write_checkpoint

import taskvec.merging.decide as engine
import taskvec.merging.scans as scanning
from taskvec.errors import TaskvecError
from taskvec.family.members import Members
from taskvec.merging.decide import MAX_PASSES, decide_from_headers, decide_table
from taskvec.merging.estimate import reading_bytes
from taskvec.merging.prepare import prepare
from taskvec.methods import METHODS
from taskvec.methods.choice import MethodChoice
from taskvec.methods.method import Method, Need
from taskvec.methods.table import Table
from taskvec.outputs.run import run
from taskvec.recipes.recipe import Family, Recipe, TaskSpec
from taskvec.streaming import RunOptions

SCALES = {"a": 0.5}
LATA = MethodChoice(METHODS["lata"], {p.name: p.default for p in METHODS["lata"].parameters})


@pytest.fixture
def asked(monkeypatch):
    """A collector that notes what it is called with and counts its calls."""
    calls = []

    def collect(plan, need):
        calls.append((plan.members, need.table))
        return len(calls)

    monkeypatch.setitem(engine.COLLECTORS, "count", collect)
    return calls


def method_of(function, **declared):
    return Method("toy", "a toy", "none", "θ = θ_target", function, **declared)


@pytest.fixture
def scans(monkeypatch):
    """Notes the options of every reading of the weights for a scan."""
    read, calls = scanning.collect, []

    def collect(*args, **options):
        calls.append(options)
        return read(*args, **options)

    monkeypatch.setattr(scanning, "collect", collect)
    return calls


@pytest.fixture
def recipe_of(tmp_path):
    start = {"w": np.ones((2, 3)), "v": np.arange(4.0)}
    for name, shift in (("base", -1), ("anchor", 0), ("a", 2)):
        write_checkpoint(tmp_path / name, {n: w + shift for n, w in start.items()}, "F32")

    def make(function, **declared):
        tasks = {name: TaskSpec(tmp_path / name, scale) for name, scale in SCALES.items()}
        family = Family(tasks, anchor=tmp_path / "anchor", base=tmp_path / "base")
        return Recipe(family, method_of(function, **declared))

    return make


def weighing(inputs, weight):
    return Table(inputs.tasks, inputs.names, np.full((1, len(inputs.names)), weight))


@pytest.mark.parametrize("wanted", range(MAX_PASSES + 1))
def test_a_method_gets_the_passes_it_asks_for(wanted, recipe_of, asked):
    seen = []

    def toy(inputs):
        seen.append(inputs.passes)
        if len(inputs.passes) < wanted:
            return Need("count", weighing(inputs, 10.0 + len(inputs.passes)))
        return weighing(inputs, float(sum(inputs.passes)))

    plan = prepare(recipe_of(toy))
    table = decide_table(plan)
    assert seen == [tuple(range(1, n + 1)) for n in range(wanted + 1)]
    assert [set(t.weights.ravel()) for _, t in asked] == [{10.0 + i} for i in range(wanted)]
    assert all(isinstance(m, Members) and m is plan.members for m, _ in asked)
    assert set(table.of("a").values()) == {sum(range(1, wanted + 1))}


def test_the_scan_is_given_again_at_every_pass(recipe_of, asked):
    scans = []

    def toy(inputs):
        scans.append(inputs.scan)
        return weighing(inputs, 1.0) if inputs.passes else Need("count", weighing(inputs, 0.0))

    recipe = recipe_of(toy, needs_scan=True, needs_base=True)
    decide_table(prepare(recipe, RunOptions(cache="off")))
    assert len(scans) == 2
    assert scans[0] is scans[1]
    assert scans[0].names == ("v", "w")


def test_weights_are_scanned_once(recipe_of, scans):
    """For the layer weights, for the method, and for the products that it asks for."""

    def toy(inputs):
        assert inputs.scan is not None
        if not inputs.passes:
            return Need("products", weighing(inputs, 0.0))
        np.testing.assert_array_equal(inputs.passes[0].gram, inputs.scan.gram[:, 2:, 2:])
        return inputs.layer_weights()

    recipe = recipe_of(toy, needs_scan=True, sparsifies=True, takes_table=True)
    recipe = dataclasses.replace(recipe, layer_weights=LATA)
    decide_table(prepare(recipe, RunOptions(cache="off")))
    assert len(scans) == 1


def test_no_scan_is_made_for_a_method_that_needs_none(recipe_of, monkeypatch):
    monkeypatch.setattr(engine, "scan_members", None)  # calling it would be a TypeError
    table = decide_table(prepare(recipe_of(lambda inputs: weighing(inputs, 1.0))))
    assert table.names == ("v", "w")


def test_a_method_that_asks_for_ever_is_stopped(recipe_of, asked, tmp_path):
    def toy(inputs):
        return Need("count", weighing(inputs, 0.0))

    with pytest.raises(TaskvecError, match=r"^method toy asks for more than 3 passes$"):
        run(recipe_of(toy), tmp_path / "out")
    assert len(asked) == MAX_PASSES  # none is made that will not be used
    assert not (tmp_path / "out").exists()


def test_what_a_further_pass_found_is_what_is_merged(recipe_of, asked, tmp_path):
    def toy(inputs):
        if not inputs.passes:
            return Need("count", weighing(inputs, 0.0))
        return weighing(inputs, 3.0 * inputs.passes[0])

    run(recipe_of(toy), tmp_path / "out")
    got = read_checkpoint(tmp_path / "out")
    np.testing.assert_array_equal(got["v"], np.arange(4.0) + 0.5 * 3 * 2)
    np.testing.assert_array_equal(got["w"], np.ones((2, 3)) + 0.5 * 3 * 2)


def test_a_plan_shows_no_table_that_needs_weights(recipe_of, asked):
    def toy(inputs):
        return Need("count", weighing(inputs, 0.0))

    plan = prepare(recipe_of(toy))
    need = decide_from_headers(plan)
    assert (need.statistic, reading_bytes(plan, need)) == ("count", 2 * 4 * 10)  # anchor and task
    assert asked == []
    assert decide_from_headers(prepare(recipe_of(toy, needs_scan=True))) is None
    shown = decide_from_headers(prepare(recipe_of(lambda i: weighing(i, 2.0))))
    assert set(shown.of("a").values()) == {2}


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        method_of(None).name = "other"


def test_a_statistic_that_nobody_collects_is_told(recipe_of):
    made = recipe_of(lambda inputs: Need("curvature", weighing(inputs, 1.0)))
    with pytest.raises(TaskvecError, match="toy asks for statistic 'curvature'; known: "):
        decide_table(prepare(made))
