"""What methods on whole matrices share: singular vectors, and the mean for other tensors.

LAPACK decomposes matrices, through NumPy, in the dtype of the block: float32, or float64 if
precision or a member is float64. float32 is precise enough for weights that are mostly stored in 16
bits; float64 takes the same time but twice the memory (docs/log.md). The last bits depend on the
number of threads in BLAS, so it uses one (`one_blas_thread`), and each of taskvec's threads takes
one matrix. Another processor or another LAPACK may still give other last bits.
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
    """Σ_t λ_t τ'_t / K over the K tasks with λ_t ≠ 0."""
    mean: Array = weighted_sum(block) / block.scales.dtype.type(np.count_nonzero(block.scales))
    return mean


def changing(block: Block) -> list[int]:
    """The tasks that take part: λ_t ≠ 0, and the task changes the tensor."""
    return [i for i, scale in enumerate(block.scales) if scale != 0 and block.vectors[i].any()]


def decompose(matrix: Array, name: str, size: float | None = None) -> tuple[Array, Array, Array]:
    """Left singular vectors (m, r), singular values (r,), right singular vectors (r, n).

    Singular values that are 0 within the precision of the data type are left out, because rounding
    would decide their vectors. The limit is `size` × the larger dimension × the epsilon of the
    dtype, as in `numpy.linalg.matrix_rank`.

    Args:
        matrix: Shape (m, n).
        name: The tensor, for messages.
        size: Default: the largest singular value.

    Raises:
        OutputError: the matrix cannot be decomposed.
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

    If A does not have full rank, there are many such matrices. This one leaves out the directions
    that A lacks, so it does not depend on rounding.
    """
    left, _, right = decompose(matrix, name)
    product: Array = left @ right
    return product


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread while any of our threads is inside; overflow is reported later."""
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
    """Let this thread set limits: threadpoolctl may allow only the first thread that did so."""
    for library in _blas().lib_controllers:
        clear = getattr(library, "clear_controlling_thread", None)
        if clear is not None:
            clear(force=True)
