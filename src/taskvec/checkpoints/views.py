"""Source views: where the elements of one tensor come from.

Whatever stands behind a view (a stored tensor, a LoRA product, rows matched by vocabulary, an
earlier stage), everything after it sees a dtype, a shape and blocks of stored elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from taskvec.checkpoints.stored import StoredFile
from taskvec.dtypes import DType

_BLOCK = 1 << 20  # elements compared at once


class View(Protocol):
    """One tensor, readable block by block from several threads at once."""

    @property
    def dtype(self) -> DType:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape; () for a scalar."""

    @property
    def is_difference(self) -> bool:
        """Whether the elements are τ (what a task adds to the anchor), not weights."""

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Elements [start, stop) in row-major order, shape (stop − start,), as `dtype.storage`."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as it lies in a file; every reading copies a block.

    Two views are the same where they are one object, so that roles that share a folder read once.
    """

    dtype: DType
    shape: tuple[int, ...]
    file: StoredFile
    offset: int
    is_difference: ClassVar[bool] = False

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `View.read`."""
        itemsize = self.dtype.itemsize
        block = self.file.read(self.offset + start * itemsize, (stop - start) * itemsize)
        return np.frombuffer(block, self.dtype.storage)


def size(view: View) -> int:
    """Number of elements of a view."""
    return math.prod(view.shape)


def same_elements(one: View, other: View) -> bool:
    """Whether two tensors hold the same stored elements; reads up to the first that differs."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    for start in range(0, size(one), _BLOCK):
        stop = min(start + _BLOCK, size(one))
        if not np.array_equal(one.read(start, stop), other.read(start, stop)):
            return False
    return True
