"""Vectors as directions and lengths, computed only from their inner products.

A vector v_t is a point u_t = v_t / ‖v_t‖ on the unit sphere and a length. Any point in the span of
the u_t is Σ_t c_t u_t. Its coordinates c, shape (…, K), and the cosines C = (⟨u_s, u_t⟩), shape (…,
K, K), give its length and its angle to every u_t. Shares α_t are λ_t / Σ_s λ_s.

A zero vector has no direction. It is left out of the directions, but its length 0 counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from taskvec.errors import ParameterError
from taskvec.methods.method import Inputs
from taskvec.methods.table import Table
from taskvec.statistics.products import Products

Array = np.ndarray[Any, Any]

PARALLEL = 1 - 1e-12  # cosines above this: one direction, and the arc is its chord
OPPOSITE = -0.9995  # cosines below this: which way round the sphere is noise
CENTRED = 1e-3  # a shorter mean direction is undefined
SETTLED = 1e-10  # a step shorter than this, in radians, ends the search of a mean
STEPS = 100


class Directions(NamedTuple):
    """Lengths ‖v_t‖, shape (…, K), and cosines C, shape (…, K, K); 0 where a vector is zero."""

    lengths: Array
    cosines: Array


class Means(NamedTuple):
    """Coefficients of the v_t, shape (N, K), and which means are undefined, shape (N,)."""

    coefficients: Array
    undefined: Array


def directions(gram: Array) -> Directions:
    """Lengths and cosines from inner products, shape (…, K, K)."""
    lengths = np.sqrt(np.maximum(np.einsum("...kk->...k", gram), 0))
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosines = gram * inverse[..., :, None] * inverse[..., None, :]
    return Directions(lengths, np.clip(cosines, -1, 1))


def row_gram(vectors: Array) -> Array:
    """Inner products of rows, of vectors of shape (K, rows, columns): (rows, K, K), float64."""
    wide = vectors.astype(np.float64)
    count = len(wide)
    gram = np.empty((wide.shape[1], count, count))
    for s in range(count):
        for t in range(s, count):
            gram[:, s, t] = gram[:, t, s] = (wide[s] * wide[t]).sum(-1)
    return gram


def column_gram(vectors: Array) -> Array:
    """Inner products along the first dimension, of vectors of shape (K, n, …): (…, K, K)."""
    count = len(vectors)
    gram = np.empty((*vectors.shape[2:], count, count))
    for s in range(count):
        for t in range(s, count):
            product = np.einsum("i...,i...->...", vectors[s], vectors[t], dtype=np.float64)
            gram[..., s, t] = gram[..., t, s] = product
    return gram


def shares(scales: Array) -> Array:
    """α_t of tensors from λ_t, shape (K, N): (N, K)."""
    found: Array = (scales / scales.sum(axis=0)).T
    return found


def check_directions(inputs: Inputs, name: str, *, tasks: int | None = None) -> None:
    """Refuse a wrong number of tasks, and scales that give no shares.

    Args:
        inputs: Inputs of the method.
        name: Name of the method.
        tasks: Number of tasks that it takes; None for any number.

    Raises:
        ParameterError: λ or the number of tasks is not usable; the message has the remedy.
    """
    if tasks is not None and len(inputs.tasks) != tasks:
        raise ParameterError(
            f"{name} takes exactly {tasks} tasks; got {len(inputs.tasks)}; "
            "multislerp and karcher take any number"
        )
    total = inputs.layer_scales.sum(axis=0)
    if not total.all():
        where = "" if not total.any() else f" for {inputs.names[int(np.argmin(total))]!r}"
        raise ParameterError(
            f"scale of {name} must be above 0 for one task at least; got 0 for all{where}"
        )


def arc(cosine: Array, alpha: Array) -> Array:
    """Coefficients of two vectors for the point at the share α_2 of the arc between them.

    Args:
        cosine: Cosine of the angle Ω between them, shape (…); NaN where one is zero.
        alpha: Shares, shape (…, 2), which sum to 1.

    Returns:
        sin(α_t Ω) / sin Ω, shape (…, 2); α_t (on the chord) where the two have equal or opposite
        directions, or one has no direction.
    """
    curved = ((cosine >= OPPOSITE) & (cosine <= PARALLEL))[..., None]
    angle = np.arccos(np.where(curved, cosine[..., None], 0))
    found: Array = np.where(curved, np.sin(alpha * angle) / np.sin(angle), alpha)
    return found


def pair_cosine(found: Directions) -> Array:
    """Cosine of the angle between the two vectors, shape (…); NaN where one is zero."""
    return np.where((found.lengths > 0).all(-1), found.cosines[..., 0, 1], np.nan)


def mean(gram: Array, alpha: Array, steps: int) -> Means:
    """Coefficients of the vectors for their mean on the sphere, with their average length.

    The iteration starts at the direction m of Σ_t α_t u_t. Each step goes to
    exp_m(Σ_t α_t log_m(u_t)), where log_m gives the path along the sphere from m as a tangent
    vector and exp_m follows it. The result is Σ_t α_t ‖v_t‖ times the last point.

    Args:
        gram: ⟨v_s, v_t⟩ of every tensor, shape (N, K, K).
        alpha: Shares, shape (N, K), which sum to 1.
        steps: Largest number of steps; the iteration ends when no point moves any more.

    Returns:
        The coefficients. If the vectors cancel, or one points against their mean, there is no mean
        direction, and the coefficients are α_t.
    """
    lengths, cosines = directions(gram)
    pull = np.where(lengths > 0, alpha, 0)
    total = pull.sum(-1, keepdims=True)
    pull = np.divide(pull, total, out=np.zeros_like(pull), where=total > 0)
    start = _length(pull, cosines)
    found = pull / np.where(start > CENTRED, start, 1)[:, None]
    against = np.where(pull > 0, _cosines_with(found, cosines), 1).min(-1) < OPPOSITE
    has_direction = (start > CENTRED) & ~against
    for _ in range(steps):
        found, moved = _step(found, pull, cosines)
        if (moved[has_direction] < SETTLED).all():
            break
    size = (alpha * lengths).sum(-1, keepdims=True)
    scaled = np.divide(found * size, lengths, out=np.zeros_like(found), where=lengths > 0)
    undefined = ~has_direction & (lengths > 0).any(-1)
    return Means(np.where(has_direction[:, None], scaled, alpha), undefined)


def _step(point: Array, pull: Array, cosines: Array) -> tuple[Array, Array]:
    """The next point and its distance, by tensor."""
    towards = _cosines_with(point, cosines)
    angle = np.arccos(towards)
    stretch = angle / np.maximum(np.sin(angle), 1e-6)
    stretch = np.where(angle < 1e-6, 1, stretch)  # the limit at 0
    weights = pull * stretch
    tangent = weights - (weights * towards).sum(-1, keepdims=True) * point
    way = _length(tangent, cosines)[:, None]
    moved = np.cos(way) * point + np.sinc(way / np.pi) * tangent
    length = _length(moved, cosines)[:, None]
    return moved / np.where(length > 0, length, 1), way[:, 0]


def _cosines_with(point: Array, cosines: Array) -> Array:
    found: Array = np.clip((cosines * point[:, None, :]).sum(-1), -1, 1)
    return found


def _length(point: Array, cosines: Array) -> Array:
    square = (point[:, :, None] * cosines * point[:, None, :]).sum((1, 2))
    found: Array = np.sqrt(np.maximum(square, 0))
    return found


def table_of(
    inputs: Inputs, products: Products, coefficients: Array, name: str, undefined: Array | None
) -> Table:
    """The table that gives Σ_t c_t v_t, on the target if the vectors are task vectors.

    Args:
        inputs: Inputs of the method.
        products: The collected inner products.
        coefficients: c_t, shape (N, K); 0 where λ_t is 0.
        name: Name of the method.
        undefined: Tensors that get the linear mean for lack of a mean direction, shape (N,).
    """
    scales = inputs.layer_scales
    weights = np.divide(coefficients.T, scales, out=np.zeros_like(scales), where=scales != 0)
    target = None if products.of_vectors else np.zeros(len(inputs.names))
    warnings = []
    if undefined is not None and undefined.any():
        first = inputs.names[int(undefined.argmax())]
        warnings = [
            f"{name}: the tasks point against each other in {first!r} ({int(undefined.sum())} "
            "tensors): no mean direction, linear mean instead"
        ]
    return Table(
        inputs.tasks,
        inputs.names,
        weights,
        target,
        digests=products.digests,
        warnings=tuple(warnings),
        origin=name,
    )
