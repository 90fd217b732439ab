"""Thresholds of magnitude against sorting, however many entries are equal."""

from __future__ import annotations

import numpy as np
import pytest
from tests.statistics.in_memory import sources

from taskvec.statistics.trim import thresholds
from taskvec.streaming import CHUNK, RunOptions

SIZES = {"a": 3 * CHUNK + 11, "b": 40, "c": CHUNK, "d": 1}
WEIGHTS = {"a": 0.5, "b": 2.0, "c": 1.0, "d": 1.0}


def family(step: float = 1 / 512) -> dict[str, dict[str, np.ndarray]]:
    """An anchor of zeros and one task of few different magnitudes, exact in every type."""
    rng = np.random.default_rng(1)
    task = {n: rng.integers(-9, 10, size) * step for n, size in SIZES.items()}
    return {"anchor": {n: np.zeros(size) for n, size in SIZES.items()}, "task:x": task}


def found(weights, density, scope, dtype="BF16", **how):
    return thresholds(
        sources(weights, dtype), {"x": WEIGHTS}, {"x": density}, scope, RunOptions(**how)
    )["x"]


def kept(weights, threshold):
    """Which entries of each tensor a trim keeps, as the kernel counts them."""
    result = {}
    for name, values in weights["task:x"].items():
        mine = threshold[name]
        bits = np.abs(np.float32(WEIGHTS[name] * values)).view(np.uint32)
        equal = np.flatnonzero(bits == mine.lower)[: mine.kept]
        result[name] = bits > mine.lower
        result[name][equal] = True
    return result


def by_sorting(weights, density, scope):
    """The k first entries of a stable sort by falling magnitude, tensors by name."""
    result = {}
    groups = [sorted(SIZES)] if scope == "model" else [[name] for name in sorted(SIZES)]
    for group in groups:
        together = np.concatenate([np.abs(WEIGHTS[n] * weights["task:x"][n]) for n in group])
        keep = np.zeros(len(together), bool)
        order = np.argsort(-together, kind="stable")
        keep[order[: round(density * len(together))]] = True
        ends = np.cumsum([SIZES[n] for n in group])[:-1]
        result |= dict(zip(group, np.split(keep, ends), strict=True))
    return result


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.0, 1e-5, 0.2, 0.5, 0.937, 1.0])
def test_the_k_largest_are_kept_and_of_equals_the_first(scope, density):
    weights = family()
    got = kept(weights, found(weights, density, scope))
    expected = by_sorting(weights, density, scope)
    for name in SIZES:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_distinct_magnitudes(scope):
    weights = family()
    rng = np.random.default_rng(2)
    task = {n: rng.normal(0, 1, s).astype(np.float32) for n, s in SIZES.items()}
    weights["task:x"] = task
    got = kept(weights, found(weights, 0.3, scope, "F32"))
    entries = sum(SIZES.values())
    assert sum(int(k.sum()) for k in got.values()) == (
        round(0.3 * entries) if scope == "model" else sum(round(0.3 * s) for s in SIZES.values())
    )
    if scope == "model":
        inside = np.concatenate([np.abs(WEIGHTS[n] * task[n])[got[n]] for n in SIZES])
        outside = np.concatenate([np.abs(WEIGHTS[n] * task[n])[~got[n]] for n in SIZES])
        assert inside.min() > outside.max()


@pytest.mark.parametrize("how", [{"threads": 1}, {"threads": 3, "block": CHUNK},
                                 {"threads": 2, "block": 4 * CHUNK}])  # fmt: skip
def test_threads_and_blocks_change_nothing(how):
    weights = family()
    assert found(weights, 0.4, "model", **how) == found(weights, 0.4, "model", threads=1)


def test_what_is_left_to_keep_where_a_block_begins():
    weights = family()
    threshold = found(weights, 0.4, "tensor")["a"]
    values = np.abs(np.float32(WEIGHTS["a"] * weights["task:x"]["a"])).view(np.uint32)
    equal = values == threshold.lower
    assert 0 < threshold.kept < equal.sum()  # the trim falls inside the equal ones
    for start in (0, CHUNK, 3 * CHUNK):
        assert threshold.left(start) == max(0, threshold.kept - int(equal[:start].sum()))


def test_a_tensor_that_a_task_leaves_alone_does_not_count():
    weights = family()
    family_sources = sources(weights, "BF16")
    del family_sources[0].views["task:x"]
    got = thresholds(family_sources, {"x": WEIGHTS}, {"x": 0.5}, "model")["x"]
    assert sorted(got) == ["b", "c", "d"]
