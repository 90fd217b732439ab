"""slerp, nuslerp, multislerp, karcher, model_stock: tables from inner products, against vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from taskvec.errors import ParameterError
from taskvec.methods import karcher, model_stock, multislerp, nuslerp, slerp
from taskvec.methods.method import Block, Inputs, Need
from taskvec.statistics.products import Products

ANY = (multislerp, karcher)
ALL = (slerp, nuslerp, multislerp, karcher, model_stock)


def table(method, tensors, scales, *, of_vectors=True, **given):
    """The table for tensors that are given as vectors, each of shape (K, n)."""
    tasks = tuple("abcdef"[: len(scales)])
    parameters = {p.name: p.default for p in method.METHOD.parameters} | given
    names = tuple(f"x{i}" for i in range(len(tensors)))
    inputs = Inputs(
        tasks, names, dict(zip(tasks, scales, strict=True)), dict.fromkeys(tasks, parameters)
    )
    first = method.decide(inputs)
    if not isinstance(first, Need):
        return first
    assert first.statistic == "products"
    gram = np.array([v @ v.T for v in map(np.asarray, tensors)])
    passes = (Products(gram, of_vectors, {"task:a": {"x0": "digest"}}),)
    return method.decide(
        Inputs(tasks, names, inputs.scales, inputs.parameters, passes=passes)
    )  # fmt: skip


def coefficients(method, vectors, scales, **more):
    """What every vector of one tensor is multiplied with in the end."""
    made = table(method, [vectors], scales, **more)
    is_in = method is nuslerp  # its weights have λ in them
    return made.weights[:, 0] * (1 if is_in else np.array(scales))


def random(count, size=40, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, size) + spread * rng.normal(0, 1, (count, size))


def unit(v):
    return v / np.linalg.norm(v)


def log(x, u):
    cosine = np.clip(x @ u, -1, 1)
    flat = u - cosine * x
    length = np.linalg.norm(flat)
    return np.arccos(cosine) * flat / length if length > 0 else flat


def step(x, units, alpha):
    way = sum(a * log(x, u) for a, u in zip(alpha, units, strict=True))
    angle = np.linalg.norm(way)
    return np.cos(angle) * x + (np.sin(angle) / angle * way if angle > 0 else 0)


def mean(vectors, alpha, steps):
    units = [unit(v) for v in vectors]
    x = unit(sum(a * u for a, u in zip(alpha, units, strict=True)))
    for _ in range(steps):
        x = step(x, units, alpha)
    return x * sum(a * np.linalg.norm(v) for a, v in zip(alpha, vectors, strict=True))


@pytest.mark.parametrize("method", [slerp, nuslerp])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, 0.3), (3.0, 1.0), (0.0, 2.0)])
def test_slerp_goes_along_the_arc(method, scales):
    one, two = random(2, spread=0.8)
    alpha = np.array(scales) / sum(scales)
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    angle = np.arccos(cosine)
    expected = np.sin(alpha * angle) / np.sin(angle)
    got = coefficients(method, [one, two], scales)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)
    if method is slerp:  # at a share of the angle, where the two have one length
        point = got @ np.stack([unit(one), unit(two)])
        assert np.linalg.norm(point) == pytest.approx(1, rel=1e-12)
        assert np.arccos(point @ unit(one)) == pytest.approx(alpha[1] * angle, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("method", [slerp, nuslerp])
@pytest.mark.parametrize("two", [[2.0, 4.0], [1.0, 2.0], [-3.0, -6.0], [0.0, 0.0], [-1.0, -2.01]])
def test_slerp_is_linear_on_one_line_and_at_zero(method, two):
    got = coefficients(method, [[1.0, 2.0], two], (3.0, 1.0))
    np.testing.assert_allclose(got, [0.75, 0.25], rtol=1e-12)


def test_slerp_nears_the_chord_without_a_jump():
    base, off = random(2)
    for size in (1e-3, 1e-5, 1e-7, 1e-9):
        got = coefficients(slerp, [base, base + size * off], (0.6, 0.4))
        np.testing.assert_allclose(got, [0.6, 0.4], rtol=size**2 + 1e-9)


@pytest.mark.parametrize("method", [slerp, nuslerp])
@pytest.mark.parametrize("count", [1, 3])
def test_slerp_takes_two_tasks(method, count):
    name = method.METHOD.name
    with pytest.raises(ParameterError, match=f"{name} takes exactly 2 tasks; got {count}; mult"):
        table(method, [random(count)], (1.0,) * count)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("spread", [1e-4, 0.3, 1.0])
@pytest.mark.parametrize(("method", "steps"), [(multislerp, 1), (karcher, 200)])
def test_means_on_the_sphere(method, steps, count, spread):
    vectors = random(count, spread=spread, seed=count) * np.arange(1, count + 1)[:, None]
    scales = np.arange(1.0, count + 1)
    got = coefficients(method, vectors, tuple(scales)) @ vectors
    expected = mean(vectors, scales / scales.sum(), steps)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_karcher_mean_is_where_the_ways_to_all_cancel():
    vectors, alpha = random(5, spread=1.5), np.array([0.4, 0.1, 0.2, 0.2, 0.1])
    x = unit(coefficients(karcher, vectors, tuple(alpha)) @ vectors)
    pull = sum(a * log(x, unit(v)) for a, v in zip(alpha, vectors, strict=True))
    assert np.linalg.norm(pull) < 1e-8
    cost = [
        sum(a * np.arccos(y @ unit(v)) ** 2 for a, v in zip(alpha, vectors, strict=True))
        for y in (x, *(unit(x + 0.05 * r) for r in random(20, seed=3)))
    ]
    assert min(cost) == cost[0]


def test_two_models_have_the_point_of_the_arc_as_mean():
    one, two = (unit(v) for v in random(2))
    for alpha in ((0.5, 0.5), (0.8, 0.2)):
        expected = coefficients(slerp, [one, two], alpha)
        np.testing.assert_allclose(coefficients(karcher, [one, two], alpha), expected, rtol=1e-9)


@pytest.mark.parametrize("method", ANY)
def test_zero_vectors_have_no_direction_but_count(method):
    one, two, three = random(3)
    zero = np.zeros_like(one)
    got = coefficients(method, [one, zero, two, three], (1.0, 5.0, 2.0, 2.0))
    alone = coefficients(method, [one, two, three], (1.0, 2.0, 2.0))
    np.testing.assert_allclose(got, np.insert(alone / 2, 1, 0), rtol=1e-12)
    np.testing.assert_allclose(coefficients(method, [zero, zero], (1.0, 3.0)), [0.25, 0.75])
    assert table(method, [[zero, zero]], (1.0, 3.0)).warnings == ()


@pytest.mark.parametrize("method", ANY)
@pytest.mark.parametrize("scales", [(1.0,), (2.5,), (0.0, 1.0), (0.0, 2.5, 0.0)])
def test_one_task_is_itself(method, scales):
    got = coefficients(method, random(len(scales)), scales)
    np.testing.assert_allclose(got, np.array(scales) > 0, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("method", ANY)
@pytest.mark.parametrize("vectors", [[[1.0], [-2.0]], [[1.0], [2.0], [-1.0]]])
def test_without_a_mean_direction_it_is_linear_and_said(method, vectors):
    scales = (1.0,) * len(vectors)
    made = table(method, [vectors, [[1.0]] * len(vectors)], scales)
    np.testing.assert_allclose(made.weights[:, 0], 1 / len(vectors))
    assert made.warnings == (
        f"{method.METHOD.name}: the tasks point against each other in 'x0' (1 tensors): no mean "
        "direction, linear mean instead",
    )


@pytest.mark.parametrize("method", ALL)
def test_order_of_tasks_and_origin(method):
    scales = (0.7, 0.3) if method in (slerp, nuslerp) else (0.7, 0.3, 1.0)
    vectors = random(len(scales))
    made = table(method, [vectors], scales)
    assert made.origin == method.METHOD.name
    assert made.digests == {"task:a": {"x0": "digest"}}
    plain = coefficients(method, vectors, scales)
    for order in itertools.permutations(range(len(scales))):
        got = coefficients(method, vectors[list(order)], tuple(scales[i] for i in order))
        np.testing.assert_allclose(got, plain[list(order)], rtol=1e-12)


@pytest.mark.parametrize("method", [slerp, multislerp, karcher])
def test_the_target_is_part_of_it_only_under_task_vectors(method):
    vectors = random(2)
    assert table(method, [vectors], (1.0, 1.0)).target is None
    assert table(method, [vectors], (1.0, 1.0), of_vectors=False).target.tolist() == [0]


@pytest.mark.parametrize("method", [slerp, nuslerp, multislerp, karcher])
def test_all_scales_zero_is_refused(method):
    told = f"scale of {method.METHOD.name} must be above 0 for one task at least; got 0 for all"
    with pytest.raises(ParameterError, match=told):
        table(method, [random(2)], (0.0, 0.0))


# Model Stock


def stock_by_geometry(one, two):
    """Where the foot of the perpendicular from the centre lies, as the paper's figure has it.

    τ_1 and τ_2 of one length from w_0 = 0; the centre μ sees them at a right angle, and sees w_0
    and their mean at one. In the plane of w_0, μ and the mean only two lengths matter.
    """
    middle = (one + two) / 2
    to_middle = np.linalg.norm(middle)
    from_centre = np.linalg.norm(one - two) / 2
    return (to_middle - from_centre**2 / to_middle) / to_middle


@pytest.mark.parametrize("angle", [0.01, 0.5, 1.0, 1.4])
def test_model_stock_of_two_is_the_foot_of_the_perpendicular(angle):
    one, two = np.array([1.0, 0.0]), np.array([np.cos(angle), np.sin(angle)])
    got = table(model_stock, [[one, two]], (1.0, 1.0)).weights[:, 0]
    np.testing.assert_allclose(got, stock_by_geometry(one, two) / 2, rtol=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_of_k(count):
    vectors = random(count, spread=0.9)
    pairs = [unit(a) @ unit(b) for a, b in itertools.combinations(vectors, 2)]
    cosine = np.mean(pairs)
    expected = cosine / (1 + (count - 1) * cosine)
    got = table(model_stock, [vectors], (1.0,) * count)
    np.testing.assert_allclose(got.weights[:, 0], expected, rtol=1e-12)


@pytest.mark.parametrize(("two", "expected"), [
    ([3.0, 0.0], 1), ([0.0, 1.0], 0), ([-1.0, 0.1], 0), ([-1.0, 0.0], 0), ([0.0, 0.0], 0),
])  # fmt: skip
def test_model_stock_at_the_ends(two, expected):
    got = table(model_stock, [[[1.0, 0.0], two]], (1.0, 1.0))
    np.testing.assert_allclose(got.weights[:, 0], expected / 2, atol=1e-15)


def test_model_stock_leaves_out_tasks_at_zero():
    vectors = random(3)
    made = table(model_stock, [vectors], (1.0, 0.0, 0.5)).weights[:, 0]
    alone = table(model_stock, [vectors[[0, 2]]], (1.0, 1.0)).weights[:, 0]
    np.testing.assert_allclose(made, [alone[0], 0, alone[1]], rtol=1e-14)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.0)])
def test_model_stock_needs_two(scales):
    with pytest.raises(ParameterError, match="model_stock takes two tasks or more whose scale is"):
        table(model_stock, [random(len(scales))], scales)


@pytest.mark.parametrize(("method", "word"), [(nuslerp, "row"), (model_stock, "filter")])
def test_rows_need_no_statistics(method, word):
    made = table(method, [random(2)], (1.0, 1.0), granularity=word)
    assert made.weights.tolist() == [[1], [1]]


@pytest.mark.parametrize("has_anchor", [True, False])
def test_nuslerp_by_rows(has_anchor):
    rng = np.random.default_rng(1)
    vectors = rng.normal(0, 1, (2, 5, 7))
    vectors[1, 3] = 0
    target = rng.normal(0, 1, (5, 7))
    given = {task: {"granularity": "row"} for task in "ab"}
    block = Block(
        "x", target, vectors, ("a", "b"), np.array([3.0, 1.0]), given, has_anchor=has_anchor
    )
    got = nuslerp.combine(block)
    for row in range(5):
        weights = coefficients(slerp, vectors[:, row], (3.0, 1.0))
        expected = weights @ vectors[:, row] + (target[row] if has_anchor else 0)
        np.testing.assert_allclose(got[row], expected, rtol=1e-12, atol=1e-14)


def test_model_stock_by_rows():
    vectors, target = np.random.default_rng(1).normal(0.5, 1, (3, 5, 7)), np.zeros((5, 7))
    given = {task: {"granularity": "filter"} for task in "abc"}
    scales = (1.0, 0.0, 0.5)
    got = model_stock.combine(Block("x", target, vectors, ("a", "b", "c"), np.array(scales), given))
    for row in range(5):
        weights = coefficients(model_stock, vectors[:, row], scales)
        np.testing.assert_allclose(got[row], weights @ vectors[:, row], rtol=1e-12, atol=1e-14)
