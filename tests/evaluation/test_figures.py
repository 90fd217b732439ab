"""Figures: values, intervals, pairing, and samples that lack a metric."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from taskvec.evaluation.intervals import Figure, by_name, difference, figure, wilson
from taskvec.evaluation.task import Metric, Score

RATE = Metric("right")
MEAN = Metric("x", "mean")
RATIO = Metric("bits", "ratio", value="bits", per="bytes")
PERPLEXITY = Metric("perplexity", "perplexity", value="nll", per="tokens")


def scores(key: str, values: Sequence[float]) -> list[Score]:
    return [Score({key: float(value)}) for value in values]


def wilson_by_roots(k: float, n: int) -> tuple[float, float]:
    """The rates p that k/n lies z standard errors away from: (k/n - p)² = z² p(1 - p)/n."""
    z2 = 1.959964**2
    return tuple(sorted(np.roots([1 + z2 / n, -2 * k / n - z2 / n, (k / n) ** 2]).real))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 3), (5, 10), (95, 100), (7, 7), (1319, 1320)])
def test_wilson_is_the_score_test_inverted(k: int, n: int) -> None:
    assert wilson(k, n) == pytest.approx(wilson_by_roots(k, n), abs=1e-12)


def test_wilson_of_known_tables() -> None:
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    assert [round(x, 4) for x in wilson(81, 263)] == [0.2553, 0.3662]
    assert [round(x, 4) for x in wilson(15, 148)] == [0.0624, 0.1605]
    assert [round(x, 4) for x in wilson(0, 20)] == [0.0, 0.1611]
    assert [round(x, 4) for x in wilson(1, 29)] == [0.0061, 0.1718]


@pytest.mark.parametrize("n", [1, 3, 10, 49, 1000])
def test_wilson_holds_the_rate_and_stays_within_0_and_1(n: int) -> None:
    for k in range(n + 1):
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1
    assert wilson(0, n)[0] == 0
    assert wilson(n, n)[1] == 1


def test_rate_is_the_mean_with_wilsons_interval() -> None:
    found = figure(RATE, scores("right", [1, 0, 1, 1]))
    assert found == Figure(0.75, *wilson(3, 4), 4)
    assert (found.low, found.high) == pytest.approx(wilson_by_roots(3, 4))


def test_mean_has_a_bootstrap_interval_near_the_normal_one() -> None:
    x = np.random.default_rng(3).normal(2, 5, 400)
    found = figure(MEAN, scores("x", x))
    half = 1.96 * x.std() / math.sqrt(400)
    assert found.value == pytest.approx(x.mean())
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.08)
    assert found.n == 400


def test_ratio_is_of_sums_not_the_mean_of_ratios() -> None:
    rows = [Score({"bits": 1.0, "bytes": 1.0}), Score({"bits": 2.0, "bytes": 8.0})]
    assert figure(RATIO, rows).value == pytest.approx(3 / 9)


def test_perplexity_is_exp_of_the_ratio_of_sums_and_so_is_its_interval() -> None:
    rows = [Score({"nll": 4.0, "tokens": 2.0}), Score({"nll": 10.0, "tokens": 8.0})]
    found = figure(PERPLEXITY, rows)
    assert found.value == pytest.approx(math.exp(14 / 10))
    # resamples are 00, 01, 11: exp(8/4), exp(14/10), exp(20/16)
    assert found.low == pytest.approx(math.exp(10 / 8))
    assert found.high == pytest.approx(math.exp(4 / 2))


def test_bootstrap_intervals_cover_the_truth_about_95_times_of_100() -> None:
    rng = np.random.default_rng(20)
    hits = 0
    for seed in range(120):
        found = figure(MEAN, scores("x", rng.exponential(1, 60)), seed=seed)
        hits += found.low <= 1 <= found.high
    assert 0.86 <= hits / 120 <= 0.995  # 95 % less what the skew of 60 exponentials costs, ± 3 s.e.


def test_same_seed_same_interval_another_seed_another() -> None:
    x = scores("x", np.random.default_rng(1).normal(size=50))
    assert figure(MEAN, x, seed=5) == figure(MEAN, x, seed=5)
    assert figure(MEAN, x, seed=5) != figure(MEAN, x, seed=6)


def test_no_global_generator_is_read_or_set() -> None:
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    x = scores("x", range(9))
    first = figure(MEAN, x)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert figure(MEAN, x) == first


# Differences


def test_difference_is_ours_minus_theirs() -> None:
    found = difference(RATE, scores("right", [1, 1, 1, 0]), scores("right", [0, 1, 0, 0]))
    assert found.value == pytest.approx(0.5)
    assert found.n == 4
    assert found.low <= 0.5 <= found.high


def test_difference_of_perplexities_is_taken_after_exp() -> None:
    ours, theirs = [Score({"nll": 2.0, "tokens": 1.0})], [Score({"nll": 3.0, "tokens": 2.0})]
    assert difference(PERPLEXITY, ours, theirs).value == pytest.approx(math.exp(2) - math.exp(1.5))


def test_pairing_narrows_the_interval_of_correlated_scores() -> None:
    rng = np.random.default_rng(7)
    hard = rng.normal(0, 3, 300)
    a, b = hard + rng.normal(0.3, 0.3, 300), hard + rng.normal(0, 0.3, 300)
    paired = difference(MEAN, scores("x", a), scores("x", b))
    unpaired = difference(MEAN, scores("x", a), scores("x", rng.permutation(b)))
    width = paired.high - paired.low
    normal = 2 * 1.96 * (a - b).std() / math.sqrt(300)
    assert width == pytest.approx(normal, rel=0.1)
    assert width < (unpaired.high - unpaired.low) / 5
    assert paired.value == pytest.approx(unpaired.value)


def test_a_model_does_not_differ_from_itself() -> None:
    x = scores("x", np.random.default_rng(0).normal(size=30))
    assert difference(MEAN, x, x) == Figure(0.0, 0.0, 0.0, 30)


def test_runs_of_different_length_are_no_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        difference(MEAN, scores("x", [1, 2]), scores("x", [1]))


# What is missing, or not finite


def test_samples_without_the_metric_do_not_count() -> None:
    mixed = [Score({"right": 1.0}), Score({"other": 0.0}), Score({"right": 0.0}), Score({})]
    assert figure(RATE, mixed) == figure(RATE, scores("right", [1, 0]))
    assert figure(RATE, mixed).n == 2


def test_both_keys_of_a_ratio_are_needed() -> None:
    rows = [Score({"bits": 1.0, "bytes": 4.0}), Score({"bits": 5.0}), Score({"bytes": 9.0})]
    found = figure(RATIO, rows)
    assert (found.value, found.n) == (0.25, 1)
    assert math.isnan(found.low)  # one sample says nothing of how samples differ


def test_a_difference_is_over_samples_that_both_have() -> None:
    ours = [Score({"x": 1.0}), Score({"x": 2.0}), Score({}), Score({"x": 9.0})]
    theirs = [Score({"x": 0.0}), Score({}), Score({"x": 5.0}), Score({"x": 4.0})]
    found = difference(MEAN, ours, theirs)
    assert (found.value, found.n) == (3.0, 2)  # (1 - 0 + 9 - 4) / 2
    assert (found.low, found.high) == (1.0, 5.0)


@pytest.mark.parametrize("metric", [RATE, MEAN, RATIO, PERPLEXITY])
def test_where_no_sample_has_the_metric_there_is_no_value(metric: Metric) -> None:
    for found in (figure(metric, [Score({})]), difference(metric, [Score({})], [Score({})])):
        assert found.n == 0
        assert all(math.isnan(x) for x in (found.value, found.low, found.high))


@pytest.mark.parametrize("metric", [Metric("x"), MEAN])
def test_one_nan_makes_the_figure_nan_and_is_not_left_out(metric: Metric) -> None:
    rows = scores("x", [1, math.nan, 0])
    for found in (figure(metric, rows), difference(metric, rows, scores("x", [1, 1, 1]))):
        assert found.n == 3
        assert all(math.isnan(x) for x in (found.value, found.low, found.high))


def test_infinite_values_stay_infinite_without_warnings() -> None:
    rows = [Score({"nll": 1e6, "tokens": 1.0}), Score({"nll": 1.0, "tokens": 1.0})]
    found = figure(PERPLEXITY, rows)
    assert (found.value, found.high) == (math.inf, math.inf)
    assert found.low == pytest.approx(math.e)
    assert math.isnan(difference(PERPLEXITY, rows, rows).value)


def test_json_has_none_for_what_is_not_finite() -> None:
    assert Figure(0.5, 0.25, math.inf, 4).to_json() == {
        "value": 0.5,
        "interval": [0.25, None],
        "n": 4,
    }
    text = json.dumps(Figure(math.nan, math.nan, math.nan, 0).to_json(), allow_nan=False)
    assert text == '{"value": null, "interval": [null, null], "n": 0}'


def test_by_name_has_every_metric() -> None:
    rows = [Score({"right": 1.0, "x": 3.0}), Score({"right": 0.0, "x": 5.0})]
    assert by_name((RATE, MEAN), rows, seed=4) == {
        "right": figure(RATE, rows, seed=4),
        "x": figure(MEAN, rows, seed=4),
    }


def test_the_main_metric_is_there_even_if_no_sample_has_it() -> None:
    found = by_name((RATE, MEAN), scores("harm", [1.0]), seed=0)
    assert list(found) == [RATE.name]
    assert math.isnan(found[RATE.name].value)
    assert found[RATE.name].n == 0
