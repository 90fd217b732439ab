"""Views of weights that are stored as codes with scales, widened to float32 as they are read.

    value = (codebook[code] − zero) · scale, computed in float32

The product is not rounded further, so a result is rounded once, when it is written. What is stored
as the transpose of a weight is read in slabs: a stretch of its columns, at most `SLAB_BYTES` of
codes, of which a source keeps a few. So memory does not grow with the tensor.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from taskvec.checkpoints.codebooks import BYTES, E2M1, E8M0, spreads
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DTYPES, DType

Array = np.ndarray[Any, Any]
SLAB_BYTES = 1 << 23
SLABS = 4  # that a source keeps


@runtime_checkable
class Quantised(View, Protocol):
    """A view of a quantised weight."""

    def errors(self) -> View:
        """Expected rounding error of each element: root mean square, see `codebooks`."""


class Slabs:
    """The last stretches of transposed weights that were read; one for each source."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], tuple[Array, ...]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[str, int], read: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
        """What was read for a key, or is read now; by one thread at a time."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = read()
                if len(self._kept) > SLABS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


def floats(block: Array, dtype: DType) -> Array:
    """Stored scales or zero points as float32."""
    if dtype.name in ("F8_E8M0", "U8"):
        return E8M0[block]
    return widened(block, dtype).astype(np.float32, copy=False)


def unpacked(words: Array, bits: int, count: int) -> Array:
    """The first `count` codes of the streams of bits along the last dimension, as uint32."""
    place = np.arange(count) * bits
    at, shift = place // 32, (place % 32).astype(np.uint32)
    codes = words[..., at] >> shift
    split = np.flatnonzero(shift + bits > 32)
    codes[..., split] |= words[..., at[split] + 1] << (32 - shift[split])
    found: Array = codes & np.uint32((1 << bits) - 1)
    return found


def columns_of(view: View, rows: int, first: int, last: int) -> Array:
    """Columns [first, last) of a matrix of so many rows, shape (rows, last − first)."""
    length = size(view) // rows if rows else 0
    if (first, last) == (0, length):
        return view.read(0, rows * length).reshape(rows, length)
    out = np.empty((rows, last - first), view.dtype.storage)
    for row in range(rows):
        out[row] = view.read(row * length + first, row * length + last)
    return out


def part_of_rows(start: int, stop: int, columns: int, rows: Callable[[int, int], Array]) -> Array:
    """Elements [start, stop) of a matrix of which whole rows can be had."""
    if stop <= start:
        return rows(0, 0).reshape(-1)
    top, bottom = start // columns, -(-stop // columns)
    return rows(top, bottom).reshape(-1)[start - top * columns : stop - top * columns]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledBytes:
    """One code a byte, and a scale for each rectangle of a grid: FP8, 8-bit integers.

    Attributes:
        codes: Shape (…, rows, columns).
        scales: Shape (…, rows of the grid, columns of the grid), in row-major order.
        zeros: As `scales`, in codes, or None.
        codebook: Shape (256,).
        grid: Rows and columns of a matrix, rows and columns of a rectangle.
        factor: What scales are multiplied by.
    """

    codes: View
    scales: View
    zeros: View | None
    codebook: Array
    grid: tuple[int, int, int, int]
    factor: float = 1.0
    dtype: ClassVar[DType] = DTYPES["F32"]
    is_difference: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.codes.shape

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        from taskvec.kernels.dequantise import BY_CODEBOOK, E4M3, INT8, scaled_bytes

        out = np.empty(max(0, stop - start), np.float32)
        if not out.size:
            return out
        rows, columns, high, wide = self.grid
        each, across = -(-rows // high), -(-columns // wide)
        top, bottom = start // columns, (stop - 1) // columns
        lines = (row // rows * each + row % rows // high for row in (top, bottom))
        first, last = next(lines) * across, (next(lines) + 1) * across

        def grid_of(view: View) -> Array:
            return floats(view.read(first, last), view.dtype).reshape(-1, across)

        scales = grid_of(self.scales)
        scales = scales * np.float32(self.factor) if self.factor != 1 else scales
        zeros = np.empty((0, across), np.float32) if self.zeros is None else grid_of(self.zeros)
        codes = self.codes.read(start, stop).view(np.uint8)
        how = INT8 if self.codebook is BYTES["I8"] else BY_CODEBOOK
        how = E4M3 if self.codebook is BYTES["F8_E4M3"] else how
        scaled_bytes(codes, how, self.codebook, scales, zeros, self.grid, start, out)
        return out

    def errors(self) -> Self:
        """See `Quantised`."""
        return replace(self, codebook=spreads(self.codebook), zeros=None)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Integer codes packed into words along the rows, a scale for each group of columns.

    Attributes:
        words: Shape (rows, words a row), int32.
        scales: Shape (rows, groups).
        zeros: Zero points, packed down the columns, shape (⌈rows / codes a word⌉, groups); or None.
        order: Group of each column, or None: groups of equal length in order.
        bits: A code.
        codebook: Shape (2^bits,).
        shape: See `View`; two dimensions.
    """

    words: View
    scales: View
    zeros: View | None
    order: View | None
    bits: int
    codebook: Array
    shape: tuple[int, ...]
    group: int
    dtype: ClassVar[DType] = DTYPES["F32"]
    is_difference: ClassVar[bool] = False

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        return part_of_rows(start, stop, self.shape[1], self._rows)

    def _rows(self, top: int, bottom: int) -> Array:
        from taskvec.kernels.dequantise import packed_rows

        columns = self.shape[1]
        per_word, across = 32 // self.bits, self.scales.shape[-1]
        length = self.words.shape[1]
        words = self.words.read(top * length, bottom * length).view(np.uint32)
        scales = floats(self.scales.read(top * across, bottom * across), self.scales.dtype)
        zeros = np.zeros((0, across), np.float32)
        if self.zeros is not None:
            first, last = top // per_word, -(-bottom // per_word)
            packed = self.zeros.read(first * across, last * across).view(np.uint32)
            streams = packed.reshape(-1, 1, across).transpose(2, 0, 1)
            codes = unpacked(streams, self.bits, per_word).reshape(across, -1).T
            zeros = self.codebook[codes[top - first * per_word :][: bottom - top]]
        out = np.empty((bottom - top, columns), np.float32)
        packed_rows(
            words.reshape(-1, length),
            (self.bits, per_word, int(self.zeros is not None)),
            self.codebook,
            scales.reshape(-1, across),
            np.ascontiguousarray(zeros),
            groups_of(self.order, columns, self.group),
            out,
        )
        return out

    def errors(self) -> Self:
        """See `Quantised`."""
        return replace(self, codebook=spreads(self.codebook), zeros=None)


def groups_of(order: View | None, columns: int, length: int) -> Array:
    """Group of each column, int32."""
    if order is None:
        return (np.arange(columns) // length).astype(np.int32)
    return order.read(0, columns).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Nested:
    """Scales that are quantised themselves: code of a scale → codebook · scale of a block + offset.

    Attributes:
        codes: uint8.
        codebook: Shape (256,).
        scales: float32, one for each `block` codes.
        block: Codes with one scale.
        offset: Added.
    """

    codes: View
    codebook: Array
    scales: View
    block: int
    offset: float
    dtype: ClassVar[DType] = DTYPES["F32"]
    is_difference: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.codes.shape

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        codes = self.codes.read(start, stop)
        first, last = start // self.block, -(-stop // self.block)
        scales = self.scales.read(first, last)[np.arange(start, stop) // self.block - first]
        found: Array = self.codebook[codes] * scales + np.float32(self.offset)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class FlatNibbles:
    """Two codes a byte over the whole tensor, a scale for each block of elements: bitsandbytes.

    Attributes:
        codes: ⌈n / 2⌉ bytes.
        scales: float32, one for each `block` elements.
        block: Elements with one scale; even.
        codebook: Shape (16,).
        shape: See `View`.
    """

    codes: View
    scales: View
    block: int
    codebook: Array
    shape: tuple[int, ...]
    dtype: ClassVar[DType] = DTYPES["F32"]
    is_difference: ClassVar[bool] = False

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        from taskvec.kernels.dequantise import flat_nibbles

        first, last = start // self.block, -(-stop // self.block)
        begin, end = first * self.block // 2, -(-stop // 2)
        out = np.empty(2 * (end - begin) if stop > start else 0, np.float32)
        if out.size:
            scales = floats(self.scales.read(first, last), self.scales.dtype)
            codes = self.codes.read(begin, end)
            flat_nibbles(codes, self.codebook, scales, self.block, out)
        return out[start - 2 * begin : stop - 2 * begin]

    def errors(self) -> Self:
        """See `Quantised`."""
        return replace(self, codebook=spreads(self.codebook))


@dataclass(frozen=True, slots=True, eq=False)
class MicroscaledColumns:
    """The transposes of matrices in MXFP4, as the experts of gpt-oss are stored.

    Attributes:
        name: Of the weight.
        blocks: Shape (experts, columns, groups, 16).
        scales: Shape (experts, columns, groups).
        codebook: Shape (16,).
        slabs: Where matrices are kept.
    """

    name: str
    blocks: View
    scales: View
    codebook: Array
    slabs: Slabs
    is_difference: ClassVar[bool] = False

    @property
    def dtype(self) -> DType:
        """See `View`; bfloat16 holds all values exactly."""
        return DTYPES["BF16" if self.codebook is E2M1 else "F32"]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        experts, columns, groups, _ = self.blocks.shape
        return experts, 32 * groups, columns

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        return part_of_rows(start, stop, self.shape[2], self._rows)

    def _rows(self, top: int, bottom: int) -> Array:
        from taskvec.kernels.dequantise import microscaled_columns

        _, rows, columns = self.shape
        out = np.empty((bottom - top, columns), self.dtype.storage)
        for expert in range(top // rows, (bottom - 1) // rows + 1):
            low, high = max(top, expert * rows), min(bottom, (expert + 1) * rows)
            blocks, scales = self._expert(expert)
            first = low - expert * rows
            into = out[low - top : high - top]
            microscaled_columns(blocks, scales, self.codebook, E8M0, first, into)
        return out

    def _expert(self, expert: int) -> tuple[Array, ...]:
        def read() -> tuple[Array, ...]:
            found = []
            for view in (self.blocks, self.scales):
                count = math.prod(view.shape[1:])
                matrix = view.read(expert * count, (expert + 1) * count)
                found.append(matrix.reshape(view.shape[1:]))
            return tuple(found)

        return self.slabs.get((self.name, expert), read)

    def errors(self) -> Self:
        """See `Quantised`."""
        return replace(self, codebook=spreads(self.codebook))


@dataclass(frozen=True, slots=True, eq=False)
class PackedColumns:
    """The transpose of a matrix of packed integer codes, with scales and zero points: GPTQ, AWQ.

    Attributes:
        name: Of the weight.
        words: Shape (words a column, rows) for GPTQ, (columns, words a row) for AWQ; int32.
        scales: Shape (groups, rows).
        zeros: Shape (groups, words), packed along the rows.
        order: Group of each column, or None.
        bits: A code.
        shape: See `View`; two dimensions.
        group: Columns in a group, where there is no `order`.
        above: What stored zero points lack: 1 where a quantiser stored zero − 1.
        interleaved: Whether codes are ordered as AWQ does.
        slabs: Where slabs are kept.
    """

    name: str
    words: View
    scales: View
    zeros: View
    order: View | None
    bits: int
    shape: tuple[int, ...]
    group: int
    above: int
    interleaved: bool
    slabs: Slabs
    is_error: bool = False
    codebook: Array = field(init=False)
    dtype: ClassVar[DType] = DTYPES["F32"]
    is_difference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        from taskvec.checkpoints.codebooks import integers

        codebook = integers(self.bits)
        object.__setattr__(self, "codebook", spreads(codebook) if self.is_error else codebook)

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        return part_of_rows(start, stop, self.shape[1], self._rows)

    def _rows(self, top: int, bottom: int) -> Array:
        out = np.empty((bottom - top, self.shape[1]), np.float32)
        width = self._width()
        for slab in range(top // width, (bottom - 1) // width + 1):
            begin = slab * width
            low, high = max(top, begin), min(bottom, begin + width)
            self._decode(slab, low - begin, high - begin, out[low - top : high - top])
        return out

    def _width(self) -> int:
        """Rows of the weight in a slab."""
        column = 4 * self.words.shape[0] if not self.interleaved else self.words.shape[0] / 2
        return max(32, int(SLAB_BYTES // max(1, column)) // 32 * 32)

    def _decode(self, slab: int, low: int, high: int, out: Array) -> None:
        from taskvec.kernels.dequantise import interleaved_columns, packed_columns

        words, scales, zeros = self.slabs.get((self.name, slab), lambda: self._slab(slab))
        zeros = np.zeros_like(zeros) if self.is_error else zeros
        if not self.interleaved:
            groups = groups_of(self.order, self.shape[1], self.group)
            packed_columns(words, self.bits, self.codebook, scales, zeros, groups, low, out)
            return
        first, last = low // 8, -(-high // 8)
        whole = np.empty((8 * (last - first), out.shape[1]), np.float32)
        interleaved_columns(words, self.codebook, scales, zeros, self.group, first, whole)
        out[:] = whole[low - 8 * first :][: high - low]

    def _slab(self, slab: int) -> tuple[Array, ...]:
        """Words, scales and zero points of a stretch of rows of the weight."""
        first = slab * self._width()
        last = min(self.shape[0], first + self._width())
        groups, count = self.scales.shape[0], last - first
        scales = floats(columns_of(self.scales, groups, first, last), self.scales.dtype)
        packed = (first * self.bits // 32, -(-last * self.bits // 32))
        zeros = columns_of(self.zeros, groups, *packed).view(np.uint32)
        span = packed if self.interleaved else (first, last)
        words = columns_of(self.words, self.words.shape[0], *span).view(np.uint32)
        codes = unpacked(zeros, self.bits, count)
        if self.interleaved:
            codes = codes.reshape(groups, -1, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(codes.shape)
        codes = (codes + np.uint32(self.above)) & np.uint32((1 << self.bits) - 1)
        return words, scales, codes.astype(np.float32)

    def errors(self) -> Self:
        """See `Quantised`."""
        return replace(self, is_error=True)
