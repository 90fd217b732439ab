"""Losses against their formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from taskvec.coefficients.fit import losses  # noqa: E402


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits(shape, seed, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, shape)


def test_the_divergence_of_a_small_vocabulary_is_exact():
    p, q = softmax(logits((4, 9), 0)), softmax(logits((4, 9), 1))
    teacher = losses.keep_likeliest(torch.from_numpy(np.log(p)))
    assert teacher.tokens is None
    got = losses.divergence(torch.from_numpy(np.log(q)), teacher)
    np.testing.assert_allclose(got, (p * np.log(p / q)).sum(-1), atol=1e-12)


def test_of_a_large_vocabulary_the_rest_is_one_token(monkeypatch):
    monkeypatch.setattr(losses, "TOP", 5)
    p, q = softmax(logits((3, 40), 0)), softmax(logits((3, 40), 1))
    teacher = losses.keep_likeliest(torch.from_numpy(np.log(p)))
    got = losses.divergence(torch.from_numpy(np.log(q)), teacher).numpy()
    expected = []
    for ours, theirs in zip(p, q, strict=True):
        top = np.argsort(-ours)[:5]
        a = np.append(ours[top], 1 - ours[top].sum())
        b = np.append(theirs[top], 1 - theirs[top].sum())
        expected.append((a * np.log(a / b)).sum())
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert (got <= (p * np.log(p / q)).sum(-1) + 1e-12).all()
    same = losses.divergence(torch.from_numpy(np.log(p)), teacher)
    np.testing.assert_allclose(same, 0, atol=1e-12)


def test_a_teacher_that_is_certain_gives_no_nan():
    z = torch.zeros(1, 4, requires_grad=True)
    teacher = losses.keep_likeliest(torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]]))
    value = losses.divergence(z, teacher).sum()
    value.backward()
    assert float(value.detach()) == pytest.approx(np.log(4))
    assert torch.isfinite(z.grad).all()


def test_surprise_and_entropy():
    z = logits((3, 6), 2)
    p = softmax(z)
    labels = torch.tensor([0, 5, 2])
    got = losses.surprise(torch.from_numpy(z), labels)
    np.testing.assert_allclose(got, -np.log(p[np.arange(3), labels]), rtol=1e-9)
    np.testing.assert_allclose(
        losses.entropy(torch.from_numpy(z)), -(p * np.log(p)).sum(-1), rtol=1e-9
    )


def test_distances_are_relative():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 7))
    got = losses.hidden_distance(torch.from_numpy(one), torch.from_numpy(other))
    expected = (((one - other) ** 2).sum(-1) / (other**2).sum(-1)).mean(0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    far = losses.distance(torch.from_numpy(one[0]), torch.from_numpy(other[0]), 4.0)
    np.testing.assert_allclose(far, ((one[0] - other[0]) ** 2).sum(-1) / 4, rtol=1e-5)
