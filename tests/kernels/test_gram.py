"""Gram matrices and sign counts against NumPy float64, for every mixture of stored types."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.reference import address, code, decode, encode

from taskvec.kernels.gram import STRETCH, gram, gram_scratch
from taskvec.streaming import CHUNK

DTYPES = ("BF16", "F16", "F32", "F64")
LENGTHS = (1, 2, 31, STRETCH - 1, STRETCH, STRETCH + 1, CHUNK - 1, CHUNK, CHUNK + 1,
           2 * CHUNK + STRETCH + 3)  # fmt: skip


def run(members, dtypes, scratch=np.float32, base=True, differences=(), absent=()):
    """What the kernel gives for stored members in the order anchor, base, tasks."""
    count = len(members[0])
    k, chunks = len(members) - 2, -(-count // CHUNK)
    addresses = np.array([address(m) for m in members], np.int64)
    if not base:
        addresses[1] = 0
    products = np.full((chunks, 2 + k, 2 + k), np.nan)  # the kernel must overwrite what is there
    signs = np.full((chunks, k, k, 2), -5, np.int64)
    space = gram_scratch(2 + k, scratch)
    space[:] = 3
    addresses[list(absent)] = 0
    flags = np.array([i in differences for i in range(2 + k)])
    codes = np.array([code(d) for d in dtypes])
    gram(addresses, codes, flags, count, space, products, signs)
    return products, signs


def vectors(members, dtypes, base=True):
    """θ_pre, τ_instr, τ_1 … in float64."""
    anchor, instruct_base, *tasks = (decode(m, d) for m, d in zip(members, dtypes, strict=True))
    instruction = anchor - instruct_base if base else np.zeros_like(anchor)
    return np.stack([anchor, instruction, *(task - anchor for task in tasks)])


def reference(v, first, stop):
    """G, upper triangle, and Σ|v_i v_j| of elements [first, stop)."""
    part = v[:, first:stop]
    return np.triu(part @ part.T), np.abs(part) @ np.abs(part).T


def sign_reference(v, first, stop):
    tasks = v[2:, first:stop]
    agree = np.triu((tasks[:, None] * tasks[None] > 0).sum(-1))
    support = np.triu(((tasks[:, None] != 0) & (tasks[None] != 0)).sum(-1))
    return np.stack([agree, support], -1)


def stored(values, dtypes):
    return [encode(row, dtype) for row, dtype in zip(values, dtypes, strict=True)]


def whole_numbers(count, members, seed):
    """Small integers: exact in every type, and so are all sums of their products over a stretch."""
    return np.random.default_rng(seed).integers(-4, 5, (members, count)).astype(np.float64)


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("base", [True, False])
def test_exact_where_arithmetic_is_exact(count, base):
    dtypes = ("BF16", "F32", "F16", "BF16")
    members = stored(whole_numbers(count, 4, count), dtypes)
    products, signs = run(members, dtypes, base=base)
    v = vectors(members, dtypes, base)
    for c, first in enumerate(range(0, count, CHUNK)):
        expected, _ = reference(v, first, min(first + CHUNK, count))
        np.testing.assert_array_equal(products[c], expected)
        np.testing.assert_array_equal(signs[c], sign_reference(v, first, first + CHUNK))


@pytest.mark.parametrize("dtypes", [(a, b, c) for a in DTYPES for b in DTYPES for c in DTYPES])
def test_every_mixture_of_types(dtypes):
    """Nothing but the element types differ from the test above, so one odd length will do."""
    members = stored(whole_numbers(77, 3, 5), dtypes)
    products, signs = run(members, dtypes)
    v = vectors(members, dtypes)
    np.testing.assert_array_equal(products[0], reference(v, 0, 77)[0])
    np.testing.assert_array_equal(signs[0], sign_reference(v, 0, 77))


@pytest.mark.parametrize(("dtype", "scratch"), [("BF16", np.float32), ("F16", np.float32),
                                                ("F32", np.float32), ("F32", np.float64),
                                                ("F64", np.float64)])  # fmt: skip
def test_rounding_stays_within_the_arithmetic(dtype, scratch):
    """|error| ≤ γ Σ|v_i v_j|: two roundings of each difference pair, one of each product and, in
    whatever order the compiler chose, at most STRETCH − 1 additions in the type of the scratch;
    adding stretches and the reference itself are float64 (one part in 2^53 an addition)."""
    count = CHUNK + 5 * STRETCH + 17
    rng = np.random.default_rng(3)
    start = rng.normal(0, 0.02, count)
    values = [start, start + rng.normal(0, 0.01, count), start + rng.normal(0, 0.002, count),
              start + rng.normal(0, 0.01, count)]  # fmt: skip
    dtypes = (dtype,) * 4
    members = stored(values, dtypes)
    products, signs = run(members, dtypes, scratch)
    v = vectors(members, dtypes)
    unit = np.finfo(scratch).eps / 2
    gamma = (STRETCH + 2) * unit + (CHUNK + 2) * 2.0**-53
    for c, first in enumerate(range(0, count, CHUNK)):
        expected, scale = reference(v, first, first + CHUNK)
        assert (np.abs(products[c] - expected) <= gamma * np.triu(scale)).all()
        np.testing.assert_array_equal(signs[c], sign_reference(v, first, first + CHUNK))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_may_begin_at_any_element(dtype):
    values = whole_numbers(3_000, 3, 9)
    dtypes = (dtype,) * 3
    members = stored(values, dtypes)
    for offset in (1, 3, 7):
        shifted = [m[offset + i :][:2_500] for i, m in enumerate(members)]
        products, _ = run(shifted, dtypes)
        np.testing.assert_array_equal(products[0], reference(vectors(shifted, dtypes), 0, 2_500)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_may_begin_at_an_odd_byte(dtype):
    """The format does not promise alignment: a header may end anywhere."""
    dtypes = (dtype,) * 3
    members = stored(whole_numbers(2_500, 3, 10), dtypes)
    unaligned = []
    for m in members:
        raw = np.zeros(m.nbytes + 1, np.uint8)
        raw[1:] = m.view(np.uint8)
        unaligned.append(np.frombuffer(raw.data, m.dtype, len(m), 1))
    assert not unaligned[0].flags.aligned
    products, signs = run(unaligned, dtypes)
    v = vectors(members, dtypes)
    np.testing.assert_array_equal(products[0], reference(v, 0, 2_500)[0])
    np.testing.assert_array_equal(signs[0], sign_reference(v, 0, 2_500))


def test_signs_of_zeros_and_of_the_smallest_difference():
    """−0 and +0 are equal; two elements one subnormal step apart are not."""
    tiny = np.array([0x0001], np.uint16)
    anchor = np.array([0x8000, 0x0000, 0x3F80, 0x0000], np.uint16)
    first = np.array([0x0000, 0x8000, 0x3F81, tiny[0]], np.uint16)
    second = np.array([0x0001, 0x8001, 0x3F7F, 0x8000], np.uint16)
    _, signs = run([anchor, anchor, first, second], ("BF16",) * 4)
    # τ_1: 0, 0, +, +; τ_2: +, −, −, 0
    np.testing.assert_array_equal(signs[0, ..., 0], [[2, 0], [0, 3]])
    np.testing.assert_array_equal(signs[0, ..., 1], [[2, 1], [0, 3]])


@pytest.mark.parametrize("position", [0, 1, STRETCH, CHUNK - 1, CHUNK, CHUNK + 7])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_chunk(position, bad):
    values = np.ones((3, CHUNK + 8))
    for member in range(3):
        members = stored(values, ("F32",) * 3)
        members[member][position] = bad
        products, _ = run(members, ("F32",) * 3)
        is_finite = np.isfinite(products).all((1, 2))
        np.testing.assert_array_equal(is_finite, [position >= CHUNK, position < CHUNK])


def test_no_task_is_fine():
    members = stored(whole_numbers(50, 2, 1), ("BF16",) * 2)
    products, signs = run(members, ("BF16",) * 2)
    np.testing.assert_array_equal(products[0], reference(vectors(members, ("BF16",) * 2), 0, 50)[0])
    assert signs.shape == (1, 0, 0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_block_may_hold_the_difference_itself_or_be_absent(dtype, tasks):
    """The last task gives τ in another type; its neighbour, where there is one, changes nothing."""
    count = CHUNK + 77
    values = whole_numbers(count, 2 + tasks, 6)
    dtypes = ("F32",) * (1 + tasks) + (dtype,)
    members = stored(values, dtypes)
    absent = (2,) if tasks > 1 else ()
    products, signs = run(members, dtypes, differences=(1 + tasks,), absent=absent)
    v = vectors(members, dtypes)
    v[-1] = decode(members[-1], dtype)
    v[list(absent)] = 0
    for c, first in enumerate(range(0, count, CHUNK)):
        np.testing.assert_array_equal(products[c], reference(v, first, first + CHUNK)[0])
        np.testing.assert_array_equal(signs[c], sign_reference(v, first, first + CHUNK))
