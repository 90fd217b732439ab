"""Views whose rows are picked from other views: embeddings whose rows were matched by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import View
from taskvec.dtypes import DTYPES, DType

Array = np.ndarray[Any, Any]
NOTHING = -1  # in `which`: a row of zeros, for differences
_FEW_RUNS = 8
_GAP = 16_384  # elements read in vain rather than read around: one more reading costs as much
_PIECE = 65_536  # elements read at once; small enough that their memory is reused, not mapped again


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Rows of several views, in any order; made by `gather`.

    Attributes:
        parts: Where rows come from; all have the same shape except for the number of rows.
        which: Part of each row, or NOTHING, shape (rows,), int16.
        row: Row in that part, shape (rows,), int64.
        runs: Where a stretch of rows that lie one after another in one part begins, and the end of
            the last one, shape (runs + 1,), int64.
        dtype: See `View`.
        shape: See `View`.
        is_difference: See `View`.
    """

    parts: tuple[View, ...]
    which: Array
    row: Array
    runs: Array
    dtype: DType
    shape: tuple[int, ...]
    is_difference: bool

    def read(self, start: int, stop: int) -> Array:
        """See `View.read`."""
        width = math.prod(self.shape[1:])
        if stop <= start or width == 0:
            return np.empty(0, self.dtype.storage)
        first, last = start // width, -(-stop // width)  # rows
        run = int(np.searchsorted(self.runs, first, "right")) - 1
        end = int(np.searchsorted(self.runs, last, "left"))
        if end - run == 1:
            return self._piece(run, start, stop, width)
        if end - run > _FEW_RUNS:
            return self._rows(first, last, width)[start - first * width : stop - first * width]
        out = np.empty(stop - start, self.dtype.storage)
        edges = self.runs[run : end + 1].tolist()
        for begin, finish in pairwise(edges):
            a, b = max(start, begin * width), min(stop, finish * width)
            out[a - start : b - start] = self._piece(run, a, b, width)
            run += 1
        return out

    def _rows(self, first: int, last: int, width: int) -> Array:
        """Whole rows [first, last), each part read in its own order and in few pieces."""
        row_type = f"V{width * self.dtype.itemsize}"  # numpy moves a row as one element
        out = np.zeros((last - first) * width, self.dtype.storage)
        for i, part in enumerate(self.parts):
            mine = np.flatnonzero(self.which[first:last] == i)
            mine = mine[np.argsort(self.row[first + mine], kind="stable")]
            rows = self.row[first + mine]
            cuts = np.flatnonzero(np.diff(rows) > 1 + _GAP // width) + 1
            cuts = np.union1d(cuts, np.arange(0, len(rows), 1 + _PIECE // width))
            places, numbers = mine.tolist(), rows.tolist()  # numpy's own integers are slow here
            for a, b in pairwise([*cuts.tolist(), len(rows)]):
                low, high = numbers[a], numbers[b - 1] + 1
                block = self._converted(part.read(low * width, high * width), part)
                if b - a == 1:
                    out[places[a] * width : (places[a] + 1) * width] = block
                else:
                    out.view(row_type)[mine[a:b]] = block.view(row_type)[rows[a:b] - low]
        return out

    def _piece(self, run: int, start: int, stop: int, width: int) -> Array:
        """Elements of one run."""
        begin = int(self.runs[run])
        if self.which[begin] == NOTHING:
            return np.zeros(stop - start, self.dtype.storage)
        shift = (int(self.row[begin]) - begin) * width
        part = self.parts[self.which[begin]]
        return self._converted(part.read(start + shift, stop + shift), part)

    def _converted(self, block: Array, part: View) -> Array:
        if part.dtype == self.dtype:
            return block
        return widened(block, part.dtype).astype(self.dtype.storage, copy=False)


def gather(parts: Sequence[View], which: Array, row: Array) -> View:
    """The view whose row i is row `row[i]` of part `which[i]`.

    Where that is one part as it stands, it is that part. Parts of different dtypes are read as
    float32, as float64 if one of them is that.

    Args:
        parts: Views that differ only in the number of rows; all weights, or all differences.
        which: Index of a part, or NOTHING for zeros (differences only), shape (rows,).
        row: Row in that part, shape (rows,); not used without a part.
    """
    numbers: dict[int, int] = {}  # by the identity of a part that is used
    used: list[View] = []
    renumber = np.full(len(which), NOTHING, np.int16)
    for i, part in enumerate(parts):
        mine = which == i
        if mine.any():
            if numbers.setdefault(id(part), len(used)) == len(used):
                used.append(part)
            renumber[mine] = numbers[id(part)]
    like = used[0] if used else parts[0]
    if (
        len(row) == like.shape[0]
        and not renumber.any()
        and np.array_equal(row, np.arange(len(row)))
    ):
        return like
    is_nothing = renumber == NOTHING
    joined = (renumber[1:] == renumber[:-1]) & ((row[1:] == row[:-1] + 1) | is_nothing[1:])
    runs = np.concatenate([[0], np.flatnonzero(~joined) + 1, [len(row)]])
    return Gathered(
        parts=tuple(used),
        which=renumber,
        row=np.asarray(row, np.int64),
        runs=runs.astype(np.int64),
        dtype=_common([part.dtype for part in used or [like]]),
        shape=(len(row), *like.shape[1:]),
        is_difference=like.is_difference,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """The mean of views of one shape, added in float32 (float64 if one is) in their order."""

    parts: tuple[View, ...]
    is_difference: bool = False

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return DTYPES["F64" if any(part.dtype.itemsize == 8 for part in self.parts) else "F32"]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.parts[0].shape

    def read(self, start: int, stop: int) -> Array:
        """See `View.read`."""
        total = np.zeros(stop - start, self.dtype.storage)
        for part in self.parts:
            total += widened(part.read(start, stop), part.dtype)
        total /= total.dtype.type(len(self.parts))
        return total


def _common(dtypes: Sequence[DType]) -> DType:
    """The dtype that holds them all without rounding."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return DTYPES["F64" if any(dtype.itemsize == 8 for dtype in dtypes) else "F32"]
