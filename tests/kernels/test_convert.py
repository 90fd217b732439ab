"""Widening and narrowing against NumPy, torch and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.reference import FORMATS, address, code, decode, encode, rounded

from taskvec.kernels.convert import all_finite, narrow, recast, settle, widen

PATTERNS = np.arange(65_536, dtype=np.uint16)  # every 16-bit element there is
HALVES = ("BF16", "F16")
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}


def widened(stored, dtype, out=np.float32):
    values = np.full(len(stored), 7, out)
    widen(code(dtype), address(stored), 0, len(stored), values)
    return values


def narrowed(values, dtype):
    stored = np.zeros(len(values), {"F32": np.float32, "F64": np.float64}.get(dtype, np.uint16))
    narrow(code(dtype), values, address(stored), 0, len(values))
    return stored


def bits(values):
    return values.view(f"u{values.itemsize}")


def by_torch(values, dtype):
    """Stored elements as torch rounds float32."""
    return torch.from_numpy(values).to(TORCH[dtype]).view(torch.int16).numpy().view(np.uint16)


def assert_same_elements(got, expected, dtype):
    """The same bits; of a NaN the sign only, since its payload has no meaning."""
    nan = np.isnan(decode(expected, dtype))
    np.testing.assert_array_equal(np.isnan(decode(got, dtype)), nan)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    np.testing.assert_array_equal(got[nan] >> 15, expected[nan] >> 15)


def neighbours(dtype):
    """float64 values that rounding can get wrong: every element, every halfway point, and what lies
    one float32 step and one float64 step beside them."""
    elements = decode(PATTERNS[:32_768], dtype)
    elements = np.append(
        elements[np.isfinite(elements)], 2 * 2.0 ** (15 if dtype == "F16" else 127)
    )
    halfway = (elements[1:] + elements[:-1]) / 2
    points = np.concatenate([elements, halfway])
    around = [points]
    with np.errstate(over="ignore"):  # 2^128 is beyond float32
        single = points.astype(np.float32)
        for direction in (-np.inf, np.inf):
            around.append(np.nextafter(points, direction))
            around.append(np.nextafter(single, np.float32(direction)).astype(np.float64))
    found = np.concatenate(around)
    return np.concatenate([found, -found])


# --- widening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_is_exact_for_every_16_bit_element(dtype):
    by_torch_widened = torch.from_numpy(PATTERNS.view(np.int16)).view(TORCH[dtype]).float().numpy()
    got = widened(PATTERNS, dtype)
    nan = np.isnan(by_torch_widened)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(bits(got)[~nan], bits(by_torch_widened)[~nan])
    np.testing.assert_array_equal(np.signbit(got), PATTERNS >= 0x8000)
    np.testing.assert_array_equal(got[~nan], decode(PATTERNS, dtype)[~nan])
    np.testing.assert_array_equal(widened(PATTERNS, dtype, np.float64), decode(PATTERNS, dtype))


@pytest.mark.parametrize(("dtype", "out"), [("F32", np.float32), ("F32", np.float64),
                                            ("F64", np.float64)])  # fmt: skip
def test_widening_wide_types_copies(dtype, out):
    stored = np.array([0.0, -0.0, 1e-45, -3.5, np.inf, -np.inf, np.nan, 0.1], np.float32)
    stored = stored.astype(np.float64) / 3 if dtype == "F64" else stored
    np.testing.assert_array_equal(bits(widened(stored, dtype, out)), bits(stored.astype(out)))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_first_and_count_choose_elements(dtype):
    values = np.arange(1.0, 12.0)
    stored = encode(values, dtype)
    out = np.full(6, -1.0)
    widen(code(dtype), address(stored), 3, 5, out)
    np.testing.assert_array_equal(out, [4, 5, 6, 7, 8, -1])
    target = encode(np.zeros(11), dtype)
    narrow(code(dtype), out, address(target), 3, 5)
    np.testing.assert_array_equal(decode(target, dtype), [0, 0, 0, 4, 5, 6, 7, 8, 0, 0, 0])


# --- narrowing --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_gives_back_every_16_bit_element(dtype):
    assert_same_elements(narrowed(widened(PATTERNS, dtype), dtype), PATTERNS, dtype)
    assert_same_elements(narrowed(widened(PATTERNS, dtype, np.float64), dtype), PATTERNS, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_float32_rounds_as_torch_and_the_reference(dtype):
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, as it should
        near = neighbours(dtype).astype(np.float32)
    random = np.random.default_rng(1).integers(0, 2**32, 300_000, np.uint32).view(np.float32)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, 3.4e38, -3.4e38, 1e-45,
                        65519.996, 65520, -65520, 2.0**-25, -(2.0**-25)], np.float32)  # fmt: skip
    signalling = np.array([0x7F800001, 0xFF800001, 0x7F80FFFF], np.uint32).view(np.float32)
    values = np.concatenate([near, random, special, signalling])
    got = narrowed(values, dtype)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(got[number], by_torch(values, dtype)[number])
    np.testing.assert_array_equal(got[number], encode(values[number], dtype))
    assert np.isnan(decode(got[~number], dtype)).all()
    np.testing.assert_array_equal(got[~number] >> 15, np.signbit(values[~number]))


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_float64_rounds_once(dtype):
    values = neighbours(dtype)
    tiny = np.array([5e-324, -5e-324, 1e-300, -1e-300, 1e300, -1e300, np.inf, -np.inf, 0.0, -0.0])
    values = np.concatenate([values, tiny])
    expected = encode(values, dtype)
    np.testing.assert_array_equal(narrowed(values, dtype), expected)
    with np.errstate(over="ignore", under="ignore"):
        twice = encode(values.astype(np.float32), dtype)
    assert (twice != expected).sum() > 1000  # rounding by way of float32 gets these wrong


def test_narrowing_float64_nan_stays_nan():
    for dtype in (*HALVES, "F32", "F64"):
        got = decode(narrowed(np.array([np.nan, -np.nan]), dtype), dtype)
        assert np.isnan(got).all()
        np.testing.assert_array_equal(np.signbit(got), [False, True])


def test_narrowing_to_wide_types():
    random = np.random.default_rng(2).integers(0, 2**64, 100_000, np.uint64).view(np.float64)
    values = np.concatenate([random[np.isfinite(random)], neighbours("BF16"), [1e-46, 0.0, -0.0]])
    np.testing.assert_array_equal(bits(narrowed(values, "F64")), bits(values))
    np.testing.assert_array_equal(bits(narrowed(values, "F32")), bits(encode(values, "F32")))


def exactly_rounded(value: float, dtype: str) -> Fraction | float:
    """Nearest value of the stored type in rational arithmetic, ties to even."""
    form = FORMATS[dtype]
    exact = abs(Fraction(value))
    exponent = form.smallest
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    one = Fraction(2) ** (exponent - form.significand + 1)
    near = round(exact / one) * one  # Python rounds a fraction to the nearest integer, ties to even
    return near if near <= Fraction(form.largest) else np.inf


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(HALVES))
@example(65520.0, "F16")
@example(float(np.nextafter(65520.0, 0)), "F16")
@example(1 + 2.0**-8 + 2.0**-40, "BF16")
@example(-(2.0**-25), "F16")
@example(2.0**-134, "BF16")
def test_narrowing_float64_against_rational_arithmetic(value, dtype):
    got = decode(narrowed(np.array([value]), dtype), dtype)[0]
    assert abs(got) == exactly_rounded(value, dtype)
    assert np.signbit(got) == np.signbit(value)
    assert rounded(np.array([value]), dtype)[0] == got  # the reference of other tests, too


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("place", [0, 5, 999])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_all_finite_sees_one_odd_element(dtype, place, odd):
    values = np.random.default_rng(0).normal(0, 1, 1000)
    values[[1, 2, 3]] = -0.0, FORMATS[dtype].largest, -FORMATS[dtype].largest
    stored = encode(values, dtype)
    assert all_finite(code(dtype), address(stored), 0, 1000)
    values[place] = odd
    stored = encode(values, dtype)
    assert not all_finite(code(dtype), address(stored), 0, 1000)
    assert all_finite(code(dtype), address(stored), place + 1, 1000 - place - 1)
    assert all_finite(code(dtype), address(stored), 0, place)


@pytest.mark.parametrize("dtype", HALVES)
def test_all_finite_of_every_element(dtype):
    for element in PATTERNS[::97]:
        stored = np.array([element])
        assert all_finite(code(dtype), address(stored), 0, 1) == np.isfinite(decode(stored, dtype))


@pytest.mark.parametrize("into", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_recast_rounds_once(dtype, into):
    values = np.random.default_rng(1).normal(0, 1, 2500)
    stored = encode(values, dtype)
    out = encode(np.zeros(2500), into)
    wide = np.float64 if "F64" in (dtype, into) else np.float32
    recast(code(dtype), address(stored), code(into), address(out), 2500, np.empty(1024, wide))
    np.testing.assert_array_equal(out, encode(decode(stored, dtype), into))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("into", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_settle_rounds_and_then_stores(dtype, into, kind):
    """As `narrow` to the one type and NumPy's conversion of that to the other, bit for bit."""
    values = np.random.default_rng(2).normal(0, 1, 1000).astype(kind)
    values[:8] = 0.0, -0.0, 1e-41, -1e-41, 65519.0, -65519.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8
    rounded_once = narrowed(values.copy(), dtype)
    expected = encode(decode(rounded_once, dtype), into)
    out = encode(np.full(1003, 9.0), into)
    assert settle(code(dtype), code(into), values.copy(), address(out), 2, 1000)
    np.testing.assert_array_equal(bits(out[2:1002]), bits(expected))
    np.testing.assert_array_equal(out[[0, 1, 1002]], encode(np.full(3, 9.0), into))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("into", ["BF16", "F32"])
@pytest.mark.parametrize(("dtype", "odd"), [("BF16", 2.0**128 - 2.0**119), ("F16", 65520.0)])
def test_settle_sees_what_overflows_when_rounded(dtype, odd, into, kind):
    """Also where the type that it is stored as could hold the value."""
    values = np.zeros(100, kind)
    out = encode(values, into)
    values[57] = np.nextafter(kind(odd), kind(0))
    assert settle(code(dtype), code(into), values.copy(), address(out), 0, 100)
    for value in (kind(odd), np.inf, -np.inf, np.nan):
        values[57] = value
        assert not settle(code(dtype), code(into), values.copy(), address(out), 0, 100), value
