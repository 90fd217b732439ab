"""What methods on whole matrices share: singular vectors, and what becomes of other tensors.

Decompositions are LAPACK's, through NumPy, in the type of the block: float32 unless precision or a
member is float64. That is as near as what is merged needs, which is mostly stored in 16 bits; in
float64 they take as long, but twice the memory (docs/log.md). BLAS adds in another order with
another number of threads of its own, and the last bits follow; so it works in one
(`one_blas_thread`), and taskvec's threads take one matrix each. Another processor or another LAPACK
may still give other last bits.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from taskvec.errors import OutputError
from taskvec.methods.method import Array, Block

_lock = threading.Lock()
_inside = 0  # threads in `one_blas_thread`
_limit: Any = None


def weighted_sum(block: Block) -> Array:
    """Σ_t λ_t τ'_t, tasks added in their order."""
    total = np.zeros_like(block.target)
    for scale, vector in zip(block.scales, block.vectors, strict=True):
        total += scale * vector
    return total


def weighted_mean(block: Block) -> Array:
    """Σ_t λ_t τ'_t / K over the K tasks whose λ_t is not 0."""
    mean: Array = weighted_sum(block) / block.scales.dtype.type(np.count_nonzero(block.scales))
    return mean


def changing(block: Block) -> list[int]:
    """Which tasks take part: λ_t is not 0, and the task changes the tensor."""
    return [i for i, scale in enumerate(block.scales) if scale != 0 and block.vectors[i].any()]


def decompose(matrix: Array, name: str, size: float | None = None) -> tuple[Array, Array, Array]:
    """Left singular vectors (m, r), singular values (r,), right singular vectors (r, n).

    Singular values that are 0 to the precision of the type are left out with their vectors, which
    rounding alone would decide: those up to `size` × the larger dimension × the type's epsilon, as
    in `numpy.linalg.matrix_rank`.

    Args:
        matrix: Shape (m, n).
        name: The tensor, for messages.
        size: Default: the largest singular value.

    Raises:
        OutputError: it cannot be decomposed.
    """
    try:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise OutputError(
            f"tensor {name!r}: its task vectors are too large to be decomposed; "
            "lower the scale or set out.precision to float64"
        )
    largest = values.max(initial=0) if size is None else size
    count = int((values > largest * max(matrix.shape) * np.finfo(matrix.dtype).eps).sum())
    return left[:, :count], values[:count], right[:count]


def orthogonal(matrix: Array, name: str) -> Array:
    """The nearest matrix with orthonormal rows or columns, U Vᵀ of A = U Σ Vᵀ (Procrustes).

    Where A has not full rank, there are many; this one leaves the directions out that A has not, so
    that it does not depend on rounding.
    """
    left, _, right = decompose(matrix, name)
    product: Array = left @ right
    return product


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS work in one thread while any of our threads is inside; overflow is told later."""
    global _inside, _limit
    with _lock:
        if _inside == 0:
            _take_control()
            _limit = _blas().limit(limits=1)
        else:
            _blas().limit(limits=1)  # where OpenMP has a limit for every thread
        _inside += 1
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _take_control()
                _limit.restore_original_limits()
                _take_control()


@functools.cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _take_control() -> None:
    """Let this thread set limits: threadpoolctl may let only the thread do so that did it first."""
    for library in _blas().lib_controllers:
        clear = getattr(library, "clear_controlling_thread", None)
        if clear is not None:
            clear(force=True)
