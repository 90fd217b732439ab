"""What `taskvec scan` shows, against the formulas and the vectors themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.statistics.in_memory import as_stored, scanned, small_family

from taskvec.layers import GRANULARITIES, classify
from taskvec.merging.layer_report import rank_correlation, summary, weighed_rows
from taskvec.statistics.scan import layer_statistics


def mean_ranks(values):
    """1 + the number of larger values + half the number of others that are equal."""
    return [1 + sum(o > v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]


def spearman(a, b):
    """Pearson's correlation of the ranks, ties sharing the mean."""
    x, y = np.array(mean_ranks(a)), np.array(mean_ranks(b))
    return ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows(granularity):
    threshold = 0.9
    weights = small_family(seed=3)
    weights["task:a"]["model.norm.weight"] = weights["anchor"]["model.norm.weight"]
    scan = scanned(weights)
    rows = weighed_rows(scan, granularity, threshold)
    sizes = dict(zip(scan.names, scan.sizes.tolist(), strict=True))
    for task in scan.tasks:
        mine = [row for row in rows if row["task"] == task]
        statistics = layer_statistics(scan, task, granularity)
        assert sorted(row["layer"] for row in mine) == sorted(statistics.layers)
        blocks = [row["block"] for row in mine if row["block"] is not None]
        assert blocks == sorted(blocks)
        assert (mine[0]["module"], mine[-1]["module"]) == ("embedding", "final_norm")
        moved = [row for row in mine if row["similarity"] is not None]
        similarities = [row["similarity"] for row in moved]
        count = len(moved)
        for row, rank in zip(moved, mean_ranks(similarities), strict=True):
            assert row["rank"] == rank
            assert row["linear"] == pytest.approx((rank - 1) / (count - 1), abs=1e-15)
            assert row["logarithmic"] == pytest.approx(math.log(rank) / math.log(count), abs=1e-15)
            assert row["threshold"] == (1 if row["similarity"] <= threshold else 0)
        for row in mine:
            i = statistics.layers.index(row["layer"])
            members = [n for n in scan.names if classify(n).at(granularity, n) == row["layer"]]
            assert row["elements"] == sum(sizes[n] for n in members)
            key = classify(members[0])
            assert (row["tower"], row["block"]) == (key.tower, key.block)
            expected = None if granularity == "block" and key.block is not None else key.module
            assert row["module"] == expected
            for name in ("norm_ratio", "task_cosine", "task_norm", "instruction_norm",
                         "anchor_norm"):  # fmt: skip
                assert row[name] == getattr(statistics, name)[i]
    still = next(r for r in rows if r["task"] == "a" and r["layer"] == "model.norm.weight")
    for name in ("similarity", "rank", "linear", "logarithmic", "threshold"):
        assert still[name] is None
    assert still["norm_ratio"] == still["task_norm"] == 0


def test_infinite_ratio_is_none():
    """JSON knows no infinity: a layer without an instruction vector shows no ρ."""
    weights = small_family()
    weights["base"]["model.norm.weight"] = weights["anchor"]["model.norm.weight"]
    for row in weighed_rows(scanned(weights), "tensor", 0.95):
        if row["layer"] == "model.norm.weight":
            assert row["norm_ratio"] is None
            assert row["similarity"] == 0
            assert row["instruction_norm"] == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rank_correlation(granularity):
    scan = scanned(small_family(seed=5, tasks=3))
    got = rank_correlation(scan, granularity)
    columns = {t: layer_statistics(scan, t, granularity).similarity for t in scan.tasks}
    for a in scan.tasks:
        assert got[a][a] == pytest.approx(1, abs=1e-14)
        for b in scan.tasks:
            expected = spearman(columns[a].tolist(), columns[b].tolist())
            assert got[a][b] == pytest.approx(expected, abs=1e-14)
            assert got[a][b] == got[b][a]


def test_rank_correlation_is_over_layers_that_both_touched():
    weights = small_family(seed=5)
    names = sorted(weights["anchor"])
    weights["task:a"][names[0]] = weights["anchor"][names[0]]
    weights["task:b"][names[3]] = weights["anchor"][names[3]]
    scan = scanned(weights)
    a, b = (layer_statistics(scan, t, "tensor").similarity for t in "ab")
    both = [i for i in range(len(names)) if i not in (0, 3)]
    expected = spearman(a[both].tolist(), b[both].tolist())
    assert rank_correlation(scan, "tensor")["a"]["b"] == pytest.approx(expected, abs=1e-14)


def test_rank_correlation_of_too_little_is_none():
    weights = small_family()
    for name in list(weights["anchor"])[1:]:
        weights["task:a"][name] = weights["anchor"][name]
    got = rank_correlation(scanned(weights), "tensor")
    assert got["a"]["b"] is None
    assert got["b"]["b"] == pytest.approx(1)
    weights["task:b"] = weights["task:a"]
    weights["task:a"] = weights["anchor"]
    assert summary(scanned(weights), "tensor", 0.95)["tasks"]["a"]["quantiles"] is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_summary(granularity):
    weights = small_family(seed=6)
    weights["task:b"]["model.norm.weight"] = weights["anchor"]["model.norm.weight"]
    scan = scanned(weights)
    threshold = float(np.median(layer_statistics(scan, "a", granularity).similarity))
    got = summary(scan, granularity, threshold)
    assert got["rank_correlation"] == rank_correlation(scan, granularity)
    stored = as_stored(weights)

    def whole(role):
        return np.concatenate([stored[role][name].ravel() for name in scan.names])

    instruction = whole("anchor") - whole("base")
    for task in scan.tasks:
        about = got["tasks"][task]
        statistics = layer_statistics(scan, task, granularity)
        values = statistics.similarity[~np.isnan(statistics.similarity)]
        sizes = statistics.sizes[~np.isnan(statistics.similarity)]
        assert about["layers"] == len(values)
        assert list(about["quantiles"].values()) == pytest.approx(
            np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
        )
        assert about["kept_layers"] == (values <= threshold).sum() / len(values)
        assert about["kept_parameters"] == sizes[values <= threshold].sum() / sizes.sum()
        vector = whole(f"task:{task}") - whole("anchor")
        rho = np.linalg.norm(vector) / np.linalg.norm(instruction)
        cosine = vector @ instruction / (np.linalg.norm(vector) * np.linalg.norm(instruction))
        # float32 sums of at most 108 elements, see tests/kernels/test_gram.py.
        assert about["norm_ratio"] == pytest.approx(rho, rel=2 * 110 * 2.0**-24)
        assert about["task_cosine"] == pytest.approx(cosine, abs=2 * 110 * 2.0**-24)
    a, b = (whole(f"task:{task}") - whole("anchor") for task in "ab")
    both = (a != 0) & (b != 0)
    conflict = (np.sign(a) != np.sign(b))[both].sum() / both.sum()
    assert got["sign_conflict"] == {"a, b": pytest.approx(conflict, abs=1e-15)}


def test_sign_conflicts_of_opposite_and_of_separate_tasks():
    weights = small_family(tasks=3)
    names = sorted(weights["anchor"])
    for name in names:
        anchor = np.round(weights["anchor"][name], 1)
        weights["anchor"][name] = anchor
        weights["task:a"][name] = anchor + 1
        weights["task:b"][name] = anchor - 1
        weights["task:c"][name] = anchor.copy()
    got = summary(scanned(weights, "F32"), "tensor", 0.95)["sign_conflict"]
    assert got == {"a, b": 1.0, "a, c": None, "b, c": None}


def test_threshold_that_keeps_all():
    got = summary(scanned(small_family()), "tensor", 1.0)["tasks"]["a"]
    assert got["kept_layers"] == got["kept_parameters"] == 1
