"""Sparsify and combine: masks, election and merging against NumPy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.reference import address, code, decode, encode, rounded

from taskvec.kernels.elect import ALL, COUNT, MASS, MEAN, NONE, SUM, elect
from taskvec.kernels.gram import STRETCH
from taskvec.kernels.randomness import draw
from taskvec.methods.selection import bound, mask_key

TOP = 0x7FFFFFFF
COUNTS = (1, 31, STRETCH, 2 * STRETCH + 7)


def family(count, dtype, tasks=3, seed=0):
    """Stored target, anchor and tasks; small whole steps, so that ties and zeros are many."""
    rng = np.random.default_rng(seed)
    anchor = rng.normal(0, 0.1, count)
    rows = [anchor + rng.normal(0, 0.1, count), anchor]
    rows += [anchor + rng.integers(-3, 4, count) / 64 for _ in range(tasks)]
    return [encode(row, dtype) for row in rows]


def run(members, dtype, *, weights, scales, lower=0, upper=TOP, draws=1.0, ties=ALL,
        election=NONE, merge=SUM, first=0, differences=()):  # fmt: skip
    tasks, count = len(members) - 2, len(members[0])
    out = encode(np.full(count, 9.0), "F32")
    finite = elect(
        np.array([address(m) for m in members]),
        np.full(len(members), code(dtype)),
        np.array([i in differences for i in range(len(members))]),
        np.array(weights, np.float32),
        np.array(scales, np.float32),
        np.array([[lower, upper, bound(draws)]] * tasks, np.uint64),
        np.full(tasks, ties, np.int64),
        np.array([mask_key(0, f"t{t}", "w") for t in range(tasks)], np.uint64),
        election, merge, first, count,
        np.full((3 + tasks, STRETCH), 5, np.float32),
        address(out), code("F32"), code("F32"),
    )  # fmt: skip
    assert finite
    return out.view(np.float32)


def vectors(members, dtype, weights):
    target, anchor, *tasks = (decode(m, dtype).astype(np.float32) for m in members)
    return target, [np.float32(w) * (t - anchor) for w, t in zip(weights, tasks, strict=True)]


def reference(target, rows, scales, election, merge):
    """The formula, operation by operation in float32; rows are masked already."""
    rows = [np.float32(s) * row for s, row in zip(scales, rows, strict=True)]
    ballot = np.zeros_like(target)
    for row in rows:
        ballot = ballot + (np.sign(row) if election == COUNT else row)
    total, agreeing = np.zeros_like(target), np.zeros_like(target)
    for row in rows:
        agrees = np.full(len(target), True)
        if election != NONE:
            agrees = (np.sign(row) == np.sign(ballot)) & (row != 0)
        total = np.where(agrees, total + row, total)
        agreeing += agrees & (row != 0)
    if merge == MEAN:
        total = np.where(agreeing > 0, total / np.maximum(agreeing, 1), total)
    return target + total


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("election", [NONE, MASS, COUNT])
@pytest.mark.parametrize("merge", [SUM, MEAN])
def test_election_and_merging(count, election, merge):
    weights, scales = (1.0, 0.5, 1.5), (0.7, -1.0, 0.3)
    members = family(count, "BF16")
    target, rows = vectors(members, "BF16", weights)
    got = run(members, "BF16", weights=weights, scales=scales, election=election, merge=merge)
    np.testing.assert_array_equal(got, reference(target, rows, scales, election, merge))


def test_the_sign_of_the_larger_mass_wins_and_that_of_the_larger_number():
    """One entry moved by +3, −1, −1: mass elects plus, count elects minus."""
    members = [encode(np.array([v]), "F32") for v in (0.0, 0.0, 3.0, -1.0, -1.0)]
    options = {"weights": (1, 1, 1), "scales": (1, 1, 1)}
    assert run(members, "F32", election=MASS, merge=MEAN, **options) == 3.0
    assert run(members, "F32", election=COUNT, merge=MEAN, **options) == -1.0
    assert run(members, "F32", election=COUNT, merge=SUM, **options) == -2.0
    assert run(members, "F32", merge=MEAN, **options) == np.float32(1) / np.float32(3)


def test_one_task_at_minus_one_points_against_its_vector():
    members = family(500, "F32", tasks=1)
    target, (row,) = vectors(members, "F32", (1.0,))
    for election in (NONE, MASS, COUNT):
        for merge in (SUM, MEAN):
            got = run(members, "F32", weights=(1,), scales=(-1,), election=election, merge=merge)
            np.testing.assert_array_equal(got, target - row)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("lower", "upper"), [(1 / 64, 2 / 64), (2 / 64, 1.0), (0.0, 1 / 64)])
def test_bounds_of_magnitude_include_both_ends(count, lower, upper):
    members = family(count, "F32")
    members[1][:] = encode(np.zeros(count), "F32")  # so that τ is whole steps exactly
    steps = np.random.default_rng(3).integers(-3, 4, (3, count)) / 64
    members[2:] = [encode(row, "F32") for row in steps]
    target, rows = vectors(members, "F32", (1, 1, 1))
    kept = [np.where((np.abs(r) >= lower) & (np.abs(r) <= upper), r, 0) for r in rows]
    bits = [int(np.float32(v).view(np.uint32)) for v in (lower, upper)]
    got = run(members, "F32", weights=(1, 1, 1), scales=(1, 1, 1), lower=bits[0], upper=bits[1])
    np.testing.assert_array_equal(got, reference(target, kept, (1, 1, 1), NONE, SUM))


@pytest.mark.parametrize("ties", [0, 1, 3, 700, 5_000])
def test_ties_are_kept_from_the_first_on(ties):
    count = STRETCH + 300
    values = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)
    values[5] = 2.0
    members = [encode(v, "F32") for v in (np.zeros(count), np.zeros(count), values)]
    one = int(np.float32(1).view(np.uint32))
    got = run(members, "F32", weights=(1,), scales=(1,), lower=one, ties=ties)
    expected = np.zeros(count, np.float32)
    at_one = np.flatnonzero(np.abs(values) == 1)[:ties]
    expected[at_one], expected[5] = values[at_one], 2.0
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_draws_keep_their_share_and_depend_on_element_and_key_alone(probability):
    count, tasks = 40_000, 2
    members = [encode(np.zeros(count), "F32")] * 2 + [
        encode(np.full(count, 4.0**t), "F32") for t in range(tasks)
    ]
    options = {"weights": (1, 1), "scales": (1, 1), "draws": probability}
    got = run(members, "F32", **options)
    kept = np.stack([got % 4 == 1, got >= 4])
    spread = 5 * np.sqrt(probability * (1 - probability) / count)
    assert (np.abs(kept.mean(1) - probability) <= spread).all()
    both = (kept[0] & kept[1]).mean()  # independent of one another
    assert abs(both - probability**2) <= 5 * np.sqrt(0.25 / count)
    part = run([m[1_000:] for m in members], "F32", first=1_000, **options)
    np.testing.assert_array_equal(part, got[1_000:])


def test_draws_are_splitmix64():
    """The published finaliser, in Python's whole numbers."""

    def splitmix(state):
        mask = 2**64 - 1
        z = state & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    for key in (0, 1, 2**63 + 12345, mask_key(7, "math", "w")):
        for element in (0, 1, 2, 2**33 + 5):
            state = key + element * 0x9E3779B97F4A7C15
            assert int(draw(np.uint64(key), np.uint64(element))) == splitmix(state) >> 32


def test_keys_differ_by_seed_task_and_tensor():
    keys = {mask_key(s, t, n) for s in (0, 1) for t in ("a", "b") for n in ("w", "v")}
    assert len(keys) == 8


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_block_may_hold_the_difference_itself(dtype):
    members = family(70, dtype, tasks=2)
    members[3] = encode(np.random.default_rng(1).normal(0, 0.01, 70), dtype)
    target, rows = vectors(members, dtype, (1, 2))
    rows[1] = np.float32(2) * decode(members[3], dtype).astype(np.float32)
    got = run(members, dtype, weights=(1, 2), scales=(0.5, 0.5), differences=(3,))
    expected = reference(target, rows, (0.5, 0.5), NONE, SUM)
    np.testing.assert_array_equal(rounded(got, "F32"), rounded(expected, "F32"))


def test_minus_zero_of_the_target_stays():
    members = [encode(np.array([-0.0, 1.0]), "F32")] * 3
    got = run(members, "F32", weights=(1,), scales=(1,))
    assert np.signbit(got).tolist() == [True, False]
