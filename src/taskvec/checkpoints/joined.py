"""Views of tensors that lie in other tensors, or that are made of them, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DTYPES, DType

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A stretch of the elements of another tensor, as a tensor.

    Attributes:
        whole: Where it lies.
        offset: Its first element there.
        shape: See `View`.
    """

    whole: View
    offset: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return self.whole.dtype

    @property
    def is_difference(self) -> bool:
        """See `View`."""
        return self.whole.is_difference

    def read(self, start: int, stop: int) -> Array:
        """See `View.read`."""
        return self.whole.read(self.offset + start, self.offset + stop)


@dataclass(frozen=True, slots=True, eq=False)
class Zeros:
    """What a difference leaves as it is."""

    shape: tuple[int, ...]
    dtype: DType = DTYPES["F32"]
    is_difference: bool = True

    def read(self, start: int, stop: int) -> Array:
        """See `View.read`."""
        return np.zeros(stop - start, self.dtype.storage)


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Tensors one after the other, as one.

    Attributes:
        parts: In order; all weights, or all differences.
        shape: See `View`.
        dtype: The parts' own, or float32 (float64 if one is that) where they have several.
    """

    parts: tuple[View, ...]
    shape: tuple[int, ...]
    dtype: DType
    ends: tuple[int, ...]

    @property
    def is_difference(self) -> bool:
        """See `View`."""
        return self.parts[0].is_difference

    def read(self, start: int, stop: int) -> Array:
        """See `View.read`."""
        out = np.empty(stop - start, self.dtype.storage)
        begin = 0
        for part, end in zip(self.parts, self.ends, strict=True):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                block = part.read(low - begin, high - begin)
                if part.dtype != self.dtype:
                    block = widened(block, part.dtype).astype(self.dtype.storage, copy=False)
                out[low - start : high - start] = block
            begin = end
        return out


def joined(parts: Sequence[View], shape: tuple[int, ...]) -> Joined:
    """The tensor of this shape that the parts make, one after the other."""
    dtypes = {part.dtype for part in parts}
    dtype = parts[0].dtype
    if len(dtypes) > 1:
        dtype = DTYPES["F64" if any(each.itemsize == 8 for each in dtypes) else "F32"]
    ends = tuple(accumulate(size(part) for part in parts))
    assert ends[-1] == math.prod(shape)
    return Joined(tuple(parts), shape, dtype, ends)
