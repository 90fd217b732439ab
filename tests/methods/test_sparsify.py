"""Methods that sparsify: what they ask for and hand over, and single blocks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from taskvec.kernels.competition import BINS, count_scores, score, score_of
from taskvec.kernels.magprune import magprune, prune
from taskvec.kernels.randomness import draw
from taskvec.methods import consensus, dare, dare_ties, della, pcb
from taskvec.methods.method import Block, Inputs, Need
from taskvec.methods.selection import Selection, fused
from taskvec.methods.table import Table
from taskvec.methods.table_file import SelectionEntry

TASKS = ("a", "b")


def inputs(method, given=None, **known):
    chosen = {p.name: p.default for p in method.METHOD.parameters} | (given or {})
    return Inputs(TASKS, ("w",), {"a": 0.5, "b": -1.0}, dict.fromkeys(TASKS, chosen), **known)


def block(method, vectors, target=None, scales=(1, 1), dtype=np.float32, **given):
    vectors = np.array(vectors, dtype)
    target = np.zeros(vectors.shape[1:], dtype) if target is None else np.array(target, dtype)
    chosen = {p.name: p.default for p in method.METHOD.parameters} | given
    limits = {"smallest": 0.0, "largest": 1.0, "cut": -1.0, "top": 1.0}
    selection = Selection(limits=dict.fromkeys(TASKS, limits))
    return Block("w", target, vectors, TASKS, np.array(scales, dtype), dict.fromkeys(TASKS, chosen),
                 selection=selection)  # fmt: skip


# --- what is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [dare, dare_ties])
def test_only_the_l1_norm_needs_a_pass(method):
    assert isinstance(method.decide(inputs(method)), Table)
    asked = method.decide(inputs(method, {"rescale": "l1", "density": 0.2}))
    assert isinstance(asked, Need)
    assert (asked.statistic, asked.densities) == ("masked_sums", {"a": 0.2, "b": 0.2})
    sums = {"a": {"w": (6.0, 2.0)}, "b": {"w": (5.0, 0.0)}}  # of b nothing was drawn
    table = method.decide(inputs(method, {"rescale": "l1", "density": 0.2}, passes=(sums,)))
    assert table.selection.factors == {"a": {"w": 3.0}, "b": {"w": 1.0}}
    assert table.selection.rescale == {}


def test_pcb_asks_with_vectors_turned_round_where_they_are_subtracted():
    given = inputs(pcb, table=Table(TASKS, ("w",), np.array([[0.5], [2.0]])))
    asked = pcb.decide(given)
    assert isinstance(asked, Need)
    assert (asked.statistic, asked.table.weights.tolist()) == ("competition", [[0.5], [-2.0]])
    limits = {t: {"smallest": 0.0, "largest": 1.0, "cut": 0.1, "top": 2.0} for t in TASKS}
    table = pcb.decide(inputs(pcb, table=given.table, passes=(limits,)))
    assert table.selection.limits == limits
    assert table.weights.tolist() == [[0.5], [2.0]]


def test_a_selection_comes_back_from_json_and_old_ones_do_too():
    whole = Selection(
        factors={"a": {"w": 3.0}}, limits={"a": {"cut": 0.25}}, election="mass", merge="mean"
    )
    data = json.loads(json.dumps(whole.to_json()))
    assert SelectionEntry(**data).to_selection() == whole
    del data["factors"], data["limits"]
    assert SelectionEntry(**data).to_selection() == Selection(election="mass", merge="mean")


# --- single blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [consensus, della, pcb])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minus_zero_of_the_target_stays_and_types_do(method, dtype):
    vectors, target = np.zeros((2, 3), dtype), np.array([-0.0, 0.0, -0.0])
    vectors[:, 2] = 1
    if method is della:  # it sees rows
        vectors, target = vectors[:, None], target[None]
    given = {"density": 1.0} if method is not consensus else {}
    given |= {"epsilon": 0.0} if method is della else {}
    out = method.combine(block(method, vectors, target, dtype=dtype, **given))
    assert out.dtype == dtype
    assert np.signbit(out).ravel().tolist() == [True, False, False]
    assert out.ravel()[2] == (2 if method is consensus else 1)


@pytest.mark.parametrize("election", ["none", "mass", "count"])
@pytest.mark.parametrize("merge", ["sum", "mean", "weighted"])
def test_fused_is_the_formula(election, merge):
    random = np.random.default_rng(2)
    rows = random.integers(-2, 3, (3, 4, 5)).astype(np.float64)
    scales, target = np.array([0.5, -1.25, 0.75]), random.normal(size=(4, 5))
    y = scales[:, None, None] * rows
    ballot = (np.sign(y) if election == "count" else y).sum(0)
    agrees = (y != 0) & ((np.sign(y) == np.sign(ballot)) | (election == "none"))
    share = np.abs(scales)[:, None, None] if merge == "weighted" else np.ones((3, 1, 1))
    divisor = (agrees * share).sum(0)
    divisor = np.where((divisor > 0) & (merge != "sum"), divisor, 1)
    expected = target + (y * agrees).sum(0) / divisor
    np.testing.assert_allclose(fused(target, rows, scales, election, merge), expected, rtol=1e-14)


def test_equal_entries_of_a_row_are_equally_likely():
    """All are at the mean rank, so that each is kept with the density; also zeros and ±."""
    values = np.array([[2.0, -2.0, 2.0, -2.0] * 50])
    order = np.argsort(np.abs(values), axis=1, kind="stable").astype(np.uint64)
    magprune(values, order, 0.5, 1.0, True, np.uint64(9), 400)
    kept = np.array([draw(np.uint64(9), np.uint64(400 + i)) < 2**31 for i in range(200)])
    assert (values[0] != 0).tolist() == kept.tolist()
    np.testing.assert_array_equal(np.abs(values[0][kept]), 4.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 2, 97])
def test_prune_is_the_formula_however_many_entries_are_equal(dtype, columns):
    random = np.random.default_rng(7)
    values = (random.integers(-6, 7, (40, columns)) / 8).astype(dtype)
    got, key, first = values.copy(), np.uint64(3), 1000
    prune(got, 0.6, 0.4, True, key, first)
    for row, line in enumerate(values):
        size = np.sort(np.abs(line))
        ends = [np.searchsorted(size, np.abs(line), side) for side in ("left", "right")]
        rank = (ends[0] + ends[1] - 1) / 2
        place = rank / (columns - 1) if columns > 1 else np.full(1, 0.5)
        keep = 0.6 + 0.4 * (place - 0.5)
        places = range(first + row * columns, first + (row + 1) * columns)
        kept = np.array([draw(key, np.uint64(i)) for i in places]) < np.rint(keep * 2.0**32)
        expected = np.where(kept, line.astype(np.float64) / keep, 0).astype(dtype)
        np.testing.assert_array_equal(got[row], expected)


def test_the_largest_of_a_row_is_always_kept_where_its_probability_is_one():
    random = np.random.default_rng(4)
    values = random.normal(size=(500, 7)).astype(np.float32)
    before, order = values.copy(), np.argsort(np.abs(values), axis=1)
    magprune(values, order.astype(np.uint64), 0.75, 0.5, True, np.uint64(1), 0)
    rows = np.arange(500)
    np.testing.assert_array_equal(values[rows, order[:, -1]], before[rows, order[:, -1]])
    assert (values[rows, order[:, 0]] != 0).mean() == pytest.approx(0.5, abs=0.12)


def test_scores_are_ordered_by_their_bits():
    random = np.random.default_rng(3)
    scores = (random.normal(size=5_000) * 10.0 ** random.integers(-12, 5, 5_000)).astype(np.float32)
    scores[:9] = 0
    high = np.zeros(BINS, np.int64)
    count_scores(scores, -1, high)
    found = []
    for upper in np.flatnonzero(high):
        low = np.zeros(BINS, np.int64)
        count_scores(scores, int(upper), low)
        found += [score_of(int(upper), int(b)) for b in np.flatnonzero(low) for _ in range(low[b])]
    np.testing.assert_array_equal(np.array(found, np.float32), np.sort(scores))


def test_a_task_whose_entries_are_all_as_large_is_scored_by_agreement_alone():
    vectors, out = np.array([[0.5, -0.5], [0.5, 0.5]]), np.empty((2, 2), np.float32)
    score(vectors, np.array([0.5, 0.5]), np.array([0.5, 0.5]), out)
    np.testing.assert_allclose(out, [[np.tanh(0.5), 0], [np.tanh(0.5), 0]], rtol=1e-6)
    same = block(pcb, vectors.astype(np.float32))
    limits = {"smallest": 0.5, "largest": 0.5, "cut": float(out[0, 0]), "top": float(out[0, 0])}
    same.selection.limits.update(dict.fromkeys(TASKS, limits))
    np.testing.assert_array_equal(pcb.combine(same), np.array([0.5, 0], np.float32))
