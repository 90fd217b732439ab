"""The merged block against NumPy: float64 with one rounding, and bit for bit as written."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.reference import address, code, decode, encode, rounded, step

from taskvec.kernels.combine import combine
from taskvec.kernels.gram import STRETCH

DTYPES = ("BF16", "F16", "F32", "F64")


def run(members, dtypes, coefficients, out, *, scratch=np.float32, anchor=True, differences=()):
    """Merged elements and the finite flag; members in the order target, anchor, tasks."""
    count = len(members[0])
    addresses = np.array([address(m) for m in members], np.int64)
    if not anchor:
        addresses[1] = 0
    result = encode(np.full(count, 9.0), out)
    finite = combine(
        addresses,
        np.array([code(d) for d in dtypes]),
        np.array([i in differences for i in range(len(members))]),
        np.array(coefficients, scratch),
        count,
        np.full((3, STRETCH), 5, scratch),
        address(result),
        code(out),
        code(out),
    )
    return result, finite


def exact(members, dtypes, coefficients, anchor=True):
    """Σ of the formula in float64, and Σ of the sizes of its terms."""
    target, start, *tasks = (decode(m, d) for m, d in zip(members, dtypes, strict=True))
    start = start if anchor else np.zeros_like(target)
    total, size = coefficients[0] * target, np.abs(coefficients[0] * target)
    for c, task in zip(coefficients[2:], tasks, strict=True):
        total = total + c * (task - start)
        size = size + np.abs(c * (task - start))
    return total, size


def in_order(members, dtypes, coefficients, kind, anchor=True):
    """The formula in arithmetic of `kind`, operation by operation as the kernel says."""
    target, start, *tasks = (
        decode(m, d).astype(kind) for m, d in zip(members, dtypes, strict=True)
    )
    c = np.array(coefficients, kind)
    total = c[0] * target if c[0] != 0 else np.zeros_like(target)
    for factor, task in zip(c[2:], tasks, strict=True):
        total = total + factor * (task - start if anchor else task)
    return total.astype(np.float64)


def family(count, dtype, tasks=2, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.normal(0, 0.05, count)
    rows = [start + rng.normal(0, 0.02, count), start]
    rows += [start + rng.normal(0, 0.01, count) for _ in range(tasks)]
    return [encode(row, dtype) for row in rows]


# float64 tensors are always worked out in float64.
ARITHMETIC = [(d, np.float32) for d in DTYPES if d != "F64"] + [(d, np.float64) for d in DTYPES]


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize(("dtype", "scratch"), ARITHMETIC)
def test_one_rounding_of_the_formula(dtype, scratch, out):
    members, dtypes = family(2 * STRETCH + 77, dtype), (dtype,) * 4
    coefficients = [1.0, 0.0, 0.3, -0.7]
    got, finite = run(members, dtypes, coefficients, out, scratch=scratch)
    assert finite
    # Bit for bit: operations in the order written, then one rounding to nearest even.
    np.testing.assert_array_equal(
        got, encode(in_order(members, dtypes, coefficients, scratch), out)
    )
    # Against float64: half a step of the stored type, and per task four roundings of arithmetic
    # (coefficient, difference, product, sum), each a part in 2^24 (2^53) of the terms' sizes.
    expected, size = exact(members, dtypes, coefficients)
    arithmetic = (4 * 2 + 1) * np.finfo(scratch).eps / 2 * size
    error = np.abs(decode(got, out) - expected)
    assert (error <= step(np.abs(expected) + arithmetic, out) / 2 + arithmetic).all()


@pytest.mark.parametrize("count", [1, 2, STRETCH - 1, STRETCH, STRETCH + 1, 3 * STRETCH + 5])
def test_lengths_around_a_stretch(count):
    members, dtypes = family(count, "BF16", seed=count), ("BF16",) * 4
    got, finite = run(members, dtypes, [1.0, 0.0, 0.5, 0.25], "BF16")
    assert finite
    expected = in_order(members, dtypes, [1.0, 0.0, 0.5, 0.25], np.float32)
    np.testing.assert_array_equal(got, encode(expected, "BF16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_where_arithmetic_is_exact(dtype):
    """Whole numbers and powers of two: no rounding anywhere, so the formula is met exactly."""
    rng = np.random.default_rng(4)
    members = [encode(rng.integers(-8, 9, 500).astype(float), dtype) for _ in range(4)]
    coefficients = [1.0, 0.0, 2.0, -0.5]
    got, _ = run(members, (dtype,) * 4, coefficients, dtype)
    np.testing.assert_array_equal(decode(got, dtype), exact(members, (dtype,) * 4, coefficients)[0])


def test_members_of_different_types():
    dtypes = ("BF16", "F32", "F16", "F64")
    rng = np.random.default_rng(5)
    members = [encode(rng.normal(0, 1, 300), d) for d in dtypes]
    got, _ = run(members, dtypes, [1.0, 0.0, 0.5, -0.3], "F32", scratch=np.float64)
    expected = in_order(members, dtypes, [1.0, 0.0, 0.5, -0.3], np.float64)
    np.testing.assert_array_equal(got, encode(expected, "F32"))


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 1.5])
def test_scaled_target(factor):
    members, dtypes = family(900, "BF16", seed=6), ("BF16",) * 4
    coefficients = [factor, 0.0, 0.75, 0.25]
    got, _ = run(members, dtypes, coefficients, "BF16")
    np.testing.assert_array_equal(
        got, encode(in_order(members, dtypes, coefficients, np.float32), "BF16")
    )


def test_target_of_factor_zero_is_not_looked_at():
    members, dtypes = family(900, "BF16", seed=7), ("BF16",) * 4
    expected, _ = run(members, dtypes, [0.0, 0.0, 0.75, 0.25], "BF16")
    members[0][:] = encode(np.array([np.nan]), "BF16")
    got, finite = run(members, dtypes, [0.0, 0.0, 0.75, 0.25], "BF16")
    assert finite
    np.testing.assert_array_equal(got, expected)


def test_without_anchor_it_is_a_weighted_average():
    members, dtypes = family(900, "F16", tasks=3, seed=8), ("F16",) * 5
    third = 1 / 3
    coefficients = [0.0, 0.0, third, third, third]
    got, _ = run(members, dtypes, coefficients, "F16", anchor=False)
    expected = in_order(members, dtypes, coefficients, np.float32, anchor=False)
    np.testing.assert_array_equal(got, encode(expected, "F16"))
    mean = np.mean([decode(m, "F16") for m in members[2:]], axis=0)
    slack = 8 * 2.0**-24 * np.abs([decode(m, "F16") for m in members[2:]]).max(0)
    assert (np.abs(decode(got, "F16") - mean) <= step(mean, "F16") / 2 + slack).all()


def test_without_tasks_the_target_is_converted():
    members = family(5_000, "F32", tasks=0, seed=9)
    got, finite = run(members, ("F32",) * 2, [1.0, 0.0], "BF16")
    assert finite
    np.testing.assert_array_equal(got, encode(decode(members[0], "F32"), "BF16"))


@pytest.mark.parametrize("position", [0, 1, STRETCH - 1, STRETCH, STRETCH + 8])
@pytest.mark.parametrize("member", [0, 1, 2, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_flagged(position, member, bad):
    members, dtypes = family(STRETCH + 9, "BF16", seed=10), ("BF16",) * 4
    members[member][position] = encode(np.array([bad]), "BF16")[0]
    _, finite = run(members, dtypes, [1.0, 0.0, 0.5, 0.5], "BF16")
    assert not finite


@pytest.mark.parametrize(("out", "largest"), [("F16", 65504.0), ("BF16", 2.0**128 - 2.0**120)])
def test_overflow_of_the_stored_type_is_flagged(out, largest):
    """The first value that rounds to infinity lies half a step above the largest one."""
    half = step(np.array([largest]), out)[0] / 2
    for value, fits in ((largest, True), (np.nextafter(largest + half, 0), True),
                        (largest + half, False), (-largest - half, False)):  # fmt: skip
        target = np.zeros(STRETCH + 1)
        target[-1] = value
        _, finite = run([target, target], ("F64",) * 2, [1.0, 0.0], out, scratch=np.float64)
        assert finite == fits, value


def test_nothing_outside_the_block_is_written():
    members, dtypes = family(100, "BF16"), ("BF16",) * 4
    result = np.full(104, 7, np.uint16)
    combine(
        np.array([address(m) for m in members], np.int64),
        np.array([code(d) for d in dtypes]),
        np.zeros(4, np.bool_),
        np.array([1, 0, 0.5, 0.5], np.float32),
        100,
        np.zeros((3, STRETCH), np.float32),
        address(result[2:]),
        code("BF16"),
        code("BF16"),
    )
    np.testing.assert_array_equal(result[[0, 1, 102, 103]], 7)
    expected = rounded(in_order(members, dtypes, [1, 0, 0.5, 0.5], np.float32), "BF16")
    np.testing.assert_array_equal(decode(result[2:102], "BF16"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_difference_is_added_as_it_is(dtype):
    count = 2 * STRETCH + 5
    target, start, _, other = family(count, "F64")
    vector = encode(np.random.default_rng(4).normal(0, 0.01, count), dtype)
    dtypes = ("F64", "F64", dtype, "F64")
    coefficients = [1.0, 0.0, 0.5, -0.25]
    result, finite = run(
        [target, start, vector, other], dtypes, coefficients, "F64",
        scratch=np.float64, differences=(2,),
    )  # fmt: skip
    expected = target + 0.5 * decode(vector, dtype) + -0.25 * (other - start)
    assert finite
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 1.0, 0.75])
def test_target_and_anchor_may_be_one_array(dtype, factor):
    members = family(2500, dtype)
    same = [members[0], members[0], *members[2:]]
    apart = [members[0], members[0].copy(), *members[2:]]
    coefficients = [factor, 0, 0.5, -0.25]
    got, finite = run(same, [dtype] * 4, coefficients, "F32")
    expected, _ = run(apart, [dtype] * 4, coefficients, "F32")
    assert finite
    np.testing.assert_array_equal(got, expected)
    wanted = in_order(apart, [dtype] * 4, coefficients, np.float32)
    np.testing.assert_array_equal(decode(got, "F32"), wanted)
