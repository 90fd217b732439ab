"""Source views: where the elements of one tensor come from.

Whatever stands behind a view (a stored tensor, later a LoRA product, rows matched by vocabulary, an
earlier stage), everything after it sees a dtype, a shape and blocks of stored elements.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from taskvec.dtypes import DType


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
    """A tensor as it lies in a memory-mapped file; blocks are read without copying.

    Two views are the same where they are one object, so that roles that share a folder read once.
    """

    dtype: DType
    shape: tuple[int, ...]
    mapped: mmap.mmap
    offset: int
    is_difference: ClassVar[bool] = False

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `View.read`."""
        first = self.offset + start * self.dtype.itemsize
        return np.frombuffer(self.mapped, self.dtype.storage, stop - start, first)


def size(view: View) -> int:
    """Number of elements of a view."""
    return math.prod(view.shape)
