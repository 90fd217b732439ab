"""LATA's layer weights against its formulas written out, and on a scan."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.statistics.in_memory import scanned, small_family

import taskvec as tv
from taskvec.errors import ParameterError, UsageError
from taskvec.layers import GRANULARITIES
from taskvec.methods.lata import SCHEMES, drop_above, linear, logarithmic, rank
from taskvec.statistics.scan import layer_statistics

NORMALISATIONS = ("none", "mean", "norm")
similarities = st.lists(st.floats(-1, 1), min_size=1, max_size=30)
few_values = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.75, 1.0]), min_size=1, max_size=12)


def rank_by_hand(similarity):
    """1 + the number of layers more similar + half the number of others that are equally so."""
    return [
        1 + sum(o > s for o in similarity) + (sum(o == s for o in similarity) - 1) / 2
        for s in similarity
    ]


def weights_by_hand(similarity, scheme, threshold=0.95):
    if scheme == "threshold":
        return [1.0 if s <= threshold else 0.0 for s in similarity]
    if len(set(similarity)) == 1:
        return [1.0] * len(similarity)
    count = len(similarity)
    if scheme == "linear":
        return [(r - 1) / (count - 1) for r in rank_by_hand(similarity)]
    return [math.log(r) / math.log(count) for r in rank_by_hand(similarity)]


def weigh(similarity, scheme):
    function = {"linear": linear, "logarithmic": logarithmic}.get(scheme)
    return function(similarity) if function else drop_above(similarity, 0.95)


# --- the formulas -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(similarities | few_values)
def test_rank(similarity):
    got = rank(np.array(similarity))
    assert got.tolist() == rank_by_hand(similarity)
    assert got.sum() == len(similarity) * (len(similarity) + 1) / 2


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=200, deadline=None)
@given(similarity=similarities | few_values)
def test_weights_by_formula(scheme, similarity):
    got = weigh(np.array(similarity), scheme)
    expected = weights_by_hand(similarity, scheme)
    # math.log and np.log may differ in the last bit each, and their quotient in two more.
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * 2.0**-53)


def test_a_case_worked_out_by_hand():
    similarity = np.array([0.5, 0.9, 0.99, 0.7])  # ranks 4, 2, 1, 3
    assert linear(similarity).tolist() == [1, 1 / 3, 0, 2 / 3]
    np.testing.assert_allclose(
        logarithmic(similarity), [1, 0.5, 0, 0.7924812503605781], atol=2.0**-52
    )
    assert drop_above(similarity, 0.9).tolist() == [1, 1, 0, 1]  # at σ itself a layer is kept


def test_ties_share_the_mean_rank():
    similarity = np.array([0.8, 0.9, 0.8, 0.1])  # ranks 2.5, 1, 2.5, 4
    assert rank(similarity).tolist() == [2.5, 1, 2.5, 4]
    assert linear(similarity).tolist() == [0.5, 0, 0.5, 1]
    expected = math.log(2.5) / math.log(4)
    np.testing.assert_allclose(logarithmic(similarity), [expected, 0, expected, 1], atol=2.0**-52)


@pytest.mark.parametrize("function", [linear, logarithmic])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_all_tied_is_plain_task_arithmetic(function, count):
    assert function(np.full(count, 0.3)).tolist() == [1] * count


@pytest.mark.parametrize("function", [linear, logarithmic])
def test_two_layers_get_zero_and_one(function):
    assert function(np.array([0.2, 0.3])).tolist() == [1, 0]
    assert function(np.array([0.3, 0.2])).tolist() == [0, 1]


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=200, deadline=None)
@given(similarity=similarities | few_values)
def test_the_less_similar_the_heavier(scheme, similarity):
    values = np.array(similarity)
    weights = weigh(values, scheme)
    assert ((weights >= 0) & (weights <= 1)).all()
    order = np.argsort(-values, kind="stable")
    assert (np.diff(weights[order]) >= 0).all()
    for i, s in enumerate(similarity):
        assert (weights[values == s] == weights[i]).all()  # equally similar, equally heavy
    if scheme != "threshold" and len(set(similarity)) > 1:
        most, least = values == values.max(), values == values.min()
        assert (weights[most] < weights[least][0]).all()
        if most.sum() == 1:
            assert weights[most] == 0
        if least.sum() == 1:
            assert weights[least] == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=100, deadline=None)
@given(similarity=similarities | few_values, seed=st.integers(0, 999))
def test_the_order_of_layers_does_not_matter(scheme, similarity, seed):
    turned = np.random.default_rng(seed).permutation(len(similarity))
    values = np.array(similarity)
    assert weigh(values[turned], scheme).tolist() == weigh(values, scheme)[turned].tolist()


# --- on a scan ----------------------------------------------------------------------------------


def threshold_that_keeps_some(scan, granularity):
    """σ below which half of the layers lie for one task, and half or more for the others."""
    return max(
        float(np.nanmedian(layer_statistics(scan, task, granularity).similarity))
        for task in scan.tasks
    )


def expected_weights(scan, task, scheme, granularity, normalisation, threshold):
    """The table's row by the formulas, from the statistics that tests/statistics has checked."""
    layers = layer_statistics(scan, task, granularity)
    ranked = ~np.isnan(layers.similarity)
    weights = np.zeros(len(layers.layers))
    weights[ranked] = weights_by_hand(layers.similarity[ranked].tolist(), scheme, threshold)
    if normalisation == "mean":
        sizes = layers.sizes * ranked
        weights = weights * sizes.sum() / (weights * sizes).sum()
    elif normalisation == "norm":
        norms = layers.task_norm
        weights = weights * math.sqrt((norms**2).sum() / ((weights * norms) ** 2).sum())
    return weights[layers.tensor_layer]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_every_combination(scheme, granularity, normalisation):
    weights = small_family(seed=8)
    weights["task:a"]["model.norm.weight"] = weights["anchor"]["model.norm.weight"]
    scan = scanned(weights)
    threshold = threshold_that_keeps_some(scan, granularity)
    table = tv.lata(
        scan, scheme=scheme, granularity=granularity, threshold=threshold,
        normalize_weights=normalisation,
    )  # fmt: skip
    assert table.tasks == ("a", "b")
    assert table.names == scan.names
    assert table.target is None
    for task in table.tasks:
        row = np.array([table.of(task)[name] for name in scan.names])
        expected = expected_weights(scan, task, scheme, granularity, normalisation, threshold)
        # Weighted sums over 14 layers, a square root and a quotient: some 30 float64 roundings.
        np.testing.assert_allclose(row, expected, rtol=32 * 2.0**-53, atol=4 * 2.0**-53)
    assert table.of("a")["model.norm.weight"] == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_normalisation_promises(scheme, granularity):
    weights = small_family(seed=8)
    weights["task:a"]["model.norm.weight"] = weights["anchor"]["model.norm.weight"]
    scan = scanned(weights)
    threshold = threshold_that_keeps_some(scan, granularity)
    common = {"scheme": scheme, "granularity": granularity, "threshold": threshold}
    plain, mean, norm = (tv.lata(scan, normalize_weights=kind, **common) for kind in NORMALISATIONS)
    for t, task in enumerate(scan.tasks):
        moved = scan.gram[:, 2 + t, 2 + t] > 0
        sizes, squares = scan.sizes[moved], scan.gram[moved, 2 + t, 2 + t]
        assert np.average(mean.weights[t][moved], weights=sizes) == pytest.approx(1, rel=1e-14)
        pure = math.sqrt((norm.weights[t][moved] ** 2 * squares).sum())
        assert pure == pytest.approx(math.sqrt(squares.sum()), rel=1e-14)
        for table in (mean, norm):  # one factor for the whole model
            kept = plain.weights[t] > 0
            factors = table.weights[t][kept] / plain.weights[t][kept]
            assert factors == pytest.approx(factors[0], rel=1e-14)
            assert (table.weights[t][~kept] == 0).all()
        assert mean.weights[t].max() > 1 or (plain.weights[t][moved] == 1).all(), task


def test_tensors_of_one_layer_share_a_weight():
    scan = scanned(small_family())
    table = tv.lata(scan, granularity="block")
    for task in scan.tasks:
        blocks = {}
        for name, weight in table.of(task).items():
            if name.startswith("model.layers."):
                blocks.setdefault(name.split(".")[2], set()).add(weight)
        assert [len(found) for found in blocks.values()] == [1, 1, 1]


def test_parameters_by_task():
    scan = scanned(small_family())
    table = tv.lata(
        scan, scheme="linear",
        per_task={"b": {"scheme": "threshold", "threshold": 0.9, "granularity": "block"}},
    )  # fmt: skip
    assert table.of("a") == tv.lata(scan, scheme="linear").of("a")
    other = tv.lata(scan, scheme="threshold", threshold=0.9, granularity="block")
    assert table.of("b") == other.of("b")
    assert table.origin == (
        "lata: a: scheme linear, granularity tensor, normalize_weights none; "
        "b: scheme threshold, granularity block, threshold 0.9, normalize_weights none"
    )


def test_the_table_carries_what_was_measured():
    scan = scanned(small_family())
    table = tv.lata(scan)
    assert table.origin == "lata: scheme logarithmic, granularity tensor, normalize_weights none"
    assert table.digests == {role: dict(m.digests) for role, m in scan.members.items()}
    assert table.weights.shape == (2, 14)


def test_a_weight_does_not_depend_on_the_other_tasks():
    family = small_family(tasks=3)
    all_three = tv.lata(scanned(family))
    del family["task:b"]
    two = tv.lata(scanned(family))
    for task in ("a", "c"):
        assert two.of(task) == all_three.of(task)


def test_no_instruction_vector_makes_a_layer_least_similar():
    family = small_family()
    family["base"]["model.norm.weight"] = family["anchor"]["model.norm.weight"]
    table = tv.lata(scanned(family), scheme="linear")
    for task in table.tasks:
        assert table.of(task)["model.norm.weight"] == 1


# --- warnings and errors ------------------------------------------------------------------------


def span(scan, task):
    values = layer_statistics(scan, task, "tensor").similarity
    values = values[~np.isnan(values)]
    return f"similarities of {task!r} lie in [{values.min():.4f}, {values.max():.4f}]"


def test_a_threshold_that_keeps_all_or_nothing_warns():
    scan = scanned(small_family())
    for threshold, outcome in ((1.0, "keeps every layer"), (-1.0, "drops every layer")):
        table = tv.lata(scan, scheme="threshold", threshold=threshold)
        assert table.warnings == tuple(
            f"threshold {threshold:g} {outcome}: {span(scan, task)}" for task in scan.tasks
        )
    some = float(np.median(layer_statistics(scan, "a", "tensor").similarity))
    assert not [w for w in tv.lata(scan, scheme="threshold", threshold=some).warnings if "'a'" in w]


@pytest.mark.parametrize("scheme", ["linear", "logarithmic"])
def test_a_narrow_spread_warns_with_the_figure(scheme):
    rng = np.random.default_rng(3)
    family = small_family(tasks=1)
    for name, anchor in family["anchor"].items():  # ρ = 0.01 everywhere: similarities near 1
        step = anchor - family["base"][name]
        noise = rng.normal(size=anchor.shape)
        noise *= 0.01 * np.linalg.norm(step) / np.linalg.norm(noise)
        family["task:a"][name] = anchor + noise
    scan = scanned(family, "F32")
    assert tv.lata(scan, scheme=scheme).warnings == (
        f"{span(scan, 'a')}, closer than 0.01: ranks amplify noise; consider task_arithmetic",
    )
    assert tv.lata(scanned(small_family()), scheme=scheme).warnings == ()


def test_an_identical_task_warns_and_weighs_nothing():
    family = small_family()
    family["task:a"] = family["anchor"]
    for scheme in SCHEMES:
        for normalisation in NORMALISATIONS:
            table = tv.lata(scanned(family), scheme=scheme, normalize_weights=normalisation,
                            threshold=0.9)  # fmt: skip
            text = "task 'a' is identical to the anchor: its task vector is zero"
            assert text in table.warnings
            assert set(table.of("a").values()) == {0}
            assert set(table.of("b").values()) != {0}


@pytest.mark.parametrize("normalisation", ["mean", "norm"])
def test_a_table_of_zeros_cannot_be_normalised(normalisation):
    scan = scanned(small_family())
    text = (rf"normalize_weights of task 'a' cannot be {normalisation}: "
            r"threshold weights are zero in every layer \(threshold -1\)")  # fmt: skip
    with pytest.raises(ParameterError, match=text):
        tv.lata(scan, scheme="threshold", threshold=-1, normalize_weights=normalisation)
    assert not tv.lata(scan, scheme="threshold", threshold=-1).weights.any()


def test_a_scan_without_base_is_refused():
    family = small_family()
    del family["base"]
    with pytest.raises(ParameterError, match="lata needs a scan with a base"):
        tv.lata(scanned(family))


@pytest.mark.parametrize(("given", "text"), [
    ({"scheme": "lineal"}, r"scheme of lata \(task 'a'\) must be in linear \| logarithmic \| "
                           r"threshold; got 'lineal'; did you mean 'linear'\?"),
    ({"granularity": "head"}, r"granularity of lata .* must be in tensor \| module \| block; "
                              r"got 'head'$"),
    ({"threshold": 1.5}, r"threshold of lata .* must be in \[-1, 1\]; got 1\.5"),
    ({"threshold": math.nan}, r"must be in \[-1, 1\]; got nan"),
    ({"normalize_weights": "max"}, r"normalize_weights of lata .* got 'max'"),
])  # fmt: skip
def test_wrong_parameters(given, text):
    with pytest.raises(ParameterError, match=text):
        tv.lata(scanned(small_family()), **given)


def test_wrong_parameters_by_task():
    scan = scanned(small_family())
    with pytest.raises(UsageError, match="no task 'c' in this scan; it has a, b"):
        tv.lata(scan, per_task={"c": {}})
    text = r"lata \(task 'b'\) has no parameter 'shceme'; did you mean 'scheme'\?"
    with pytest.raises(ParameterError, match=text):
        tv.lata(scan, per_task={"b": {"shceme": "linear"}})
