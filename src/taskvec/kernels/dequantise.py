"""Quantised weights to float32: value = (codebook[code] − zero) · scale, one product a weight.

Every kernel fills whole or partial rows of a tensor in row-major order, whatever the order in which
its codes are stored. Scales and zero points are float32 arrays of what the rows need.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from taskvec.kernels.convert import bits_from_float, float_from_bits
from taskvec.kernels.jit import jit

Array = np.ndarray[Any, Any]
TILE = 16  # columns turned into rows at once: a cache line of float32
WIDE = 32  # the same where codes are bytes
# How codes are widened: by their codebook, or by arithmetic that gives the same and is vectorised.
BY_CODEBOOK, E4M3, INT8 = 0, 1, 2
_E4M3_BIAS = np.uint32(120 << 23)  # difference of the exponent biases of float32 and E4M3
_E4M3_NORMAL = np.float32(2.0**-6)
_NAN = np.uint32(0x7FC00000)


@jit
def widen_e4m3(code: np.uint32) -> np.float32:
    """One FP8 E4M3 code (without infinities) to float32, subnormals and NaN included.

    No subnormal float32 is met on the way: processors take a hundred times as long for those.
    """
    magnitude = code & np.uint32(0x7F)
    value = float_from_bits((magnitude << np.uint32(20)) + _E4M3_BIAS)
    if magnitude < np.uint32(8):
        value = np.float32(2) * value - _E4M3_NORMAL
    bits = bits_from_float(value)
    if magnitude == np.uint32(0x7F):
        bits = _NAN
    return float_from_bits(bits | ((code & np.uint32(0x80)) << np.uint32(24)))  # type: ignore[no-any-return]


@jit
def widen_e2m1(code: np.uint32) -> np.float32:
    """One FP4 E2M1 code to float32."""
    magnitude = code & np.uint32(7)
    value = float_from_bits((magnitude << np.uint32(22)) + np.uint32(0x3F000000))
    if magnitude < np.uint32(2):  # subnormal
        value = np.float32(2) * value - np.float32(1)
    sign = (code & np.uint32(8)) << np.uint32(28)
    return float_from_bits(bits_from_float(value) | sign)  # type: ignore[no-any-return]


@jit
def scaled_bytes(
    codes: Array,
    how: int,
    codebook: Array,
    scales: Array,
    zeros: Array,
    grid: tuple[int, int, int, int],
    start: int,
    out: Array,
) -> None:
    """One code a byte; a scale for every rectangle of a grid that is laid over each matrix.

    Args:
        codes: Shape (n,), uint8, elements [start, start + n) of the tensor.
        how: `BY_CODEBOOK`, or by what arithmetic.
        codebook: Shape (256,).
        scales: Rows of the grid from that of the first element on, shape (≥ 1, grid columns).
        zeros: As `scales`, or with no rows.
        grid: Rows and columns of a matrix, rows and columns of a rectangle.
        start: Of the first element.
        out: Shape (n,), float32.
    """
    rows, columns, high, wide = grid
    each = (rows + high - 1) // high  # rows of the grid a matrix
    row = start // columns
    origin = row // rows * each + row % rows // high
    position, stop = start, start + out.shape[0]
    while position < stop:
        row = position // columns
        line = row // rows * each + row % rows // high - origin
        column = position - row * columns
        place = column // wide - 1
        while column < columns and position < stop:
            place += 1
            count = min(min(columns, (place + 1) * wide) - column, stop - position)
            scale = scales[line, place]
            zero = zeros[line, place] if zeros.shape[0] else np.float32(0)
            at = position - start
            into, code = out[at : at + count], codes[at : at + count]  # slices: vectorised
            if how == E4M3:
                for i in range(count):
                    into[i] = (widen_e4m3(np.uint32(code[i])) - zero) * scale
            elif how == INT8:
                for i in range(count):
                    into[i] = (np.float32(np.int8(code[i])) - zero) * scale
            else:
                for i in range(count):
                    into[i] = (codebook[code[i]] - zero) * scale
            position += count
            column += count


@jit
def packed_rows(
    words: Array,
    layout: tuple[int, int, int],
    codebook: Array,
    scales: Array,
    zeros: Array,
    groups: Array,
    out: Array,
) -> None:
    """Codes of `bits` bits, as many as fit into a word of 32, along the rows.

    Args:
        words: Shape (rows, words a row), uint32.
        layout: Bits a code; codes a word; whether `zeros` are used.
        codebook: Shape (2^bits,).
        scales: Shape (rows, groups).
        zeros: As `scales`.
        groups: Group of each column, shape (columns,).
        out: Shape (rows, columns), float32.
    """
    bits, per_word, has_zeros = layout
    mask = np.uint32((1 << bits) - 1)
    columns = out.shape[1]
    for i in range(out.shape[0]):
        row = out[i]
        j = 0
        for k in range(words.shape[1]):
            word = words[i, k]
            for _ in range(min(per_word, columns - j)):
                row[j] = codebook[word & mask]
                word >>= np.uint32(bits)
                j += 1
        if has_zeros:
            for j in range(columns):
                row[j] -= zeros[i, groups[j]]
        for j in range(columns):
            row[j] *= scales[i, groups[j]]


@jit
def flat_nibbles(codes: Array, codebook: Array, scales: Array, block: int, out: Array) -> None:
    """Two codes a byte, the first in the upper half; a scale for every `block` elements.

    Args:
        codes: Shape (≥ n / 2,), uint8.
        codebook: Shape (16,).
        scales: From that of the first element on, which begins a block; shape (blocks,).
        block: Even.
        out: Shape (n,), n even, float32.
    """
    half = block // 2
    count = out.shape[0] // 2
    for b in range(scales.shape[0]):
        scale = scales[b]
        for i in range(b * half, min((b + 1) * half, count)):
            code = codes[i]
            out[2 * i] = codebook[code >> np.uint8(4)] * scale
            out[2 * i + 1] = codebook[code & np.uint8(15)] * scale


@jit
def microscaled_columns(
    blocks: Array, scales: Array, codebook: Array, powers: Array, first: int, out: Array
) -> None:
    """Rows of the transpose of a matrix in MXFP4: 32 codes with one power of two, 16 bytes.

    Args:
        blocks: Shape (columns of the result, groups, 16), uint8; the first code in the lower half.
        scales: Shape (columns of the result, groups), uint8, index into `powers`.
        codebook: Shape (16,).
        powers: Shape (256,).
        first: Row of the result that comes first.
        out: Shape (rows, columns); float32, or bits of bfloat16, which holds values of E2M1 times
            a power of two exactly and is half as large: those are computed, not looked up.
    """
    rows, columns = out.shape
    turned, power = np.zeros((16, WIDE), np.uint8), np.zeros(WIDE, np.float32)
    for group in range(first // 32, (first + rows - 1) // 32 + 1):
        low, high = max(first, 32 * group), min(first + rows, 32 * group + 32)
        for left in range(0, columns, WIDE):
            width = min(WIDE, columns - left)
            for c in range(width):
                power[c] = powers[scales[left + c, group]]
                line = blocks[left + c, group]
                for b in range(16):
                    turned[b, c] = line[b]
            for i in range(low, high):
                codes, shift = turned[(i - 32 * group) // 2], np.uint32(4 * (i % 2))
                into = out[i - first, left : left + width]
                if out.itemsize == 2:
                    for c in range(width):
                        value = widen_e2m1(np.uint32(codes[c]) >> shift) * power[c]
                        into[c] = np.uint16(bits_from_float(value) >> np.uint32(16))
                else:
                    for c in range(width):
                        into[c] = codebook[(codes[c] >> shift) & np.uint32(15)] * power[c]


@jit
def packed_columns(
    words: Array,
    bits: int,
    codebook: Array,
    scales: Array,
    zeros: Array,
    groups: Array,
    first: int,
    out: Array,
) -> None:
    """Rows of the transpose of a matrix whose columns are packed: a stream of bits down each.

    Args:
        words: Shape (words a column, columns at hand), uint32.
        bits: A code; codes may lie across two words.
        codebook: Shape (2^bits,).
        scales: Shape (groups, columns at hand).
        zeros: As `scales`; taken from codebook values.
        groups: Group of each column of the result, shape (columns,).
        first: Which of the columns at hand is the first row of the result.
        out: Shape (rows, columns), float32.
    """
    mask = np.uint32((1 << bits) - 1)
    rows, columns = out.shape
    for top in range(0, rows, TILE):
        bottom = min(rows, top + TILE)
        for j in range(columns):
            at, shift, group = (j * bits) // 32, np.uint32((j * bits) % 32), groups[j]
            is_split = shift + np.uint32(bits) > np.uint32(32)
            for i in range(top, bottom):
                c = first + i
                code = words[at, c] >> shift
                if is_split:
                    code |= words[at + 1, c] << (np.uint32(32) - shift)
                out[i, j] = (codebook[code & mask] - zeros[group, c]) * scales[group, c]


@jit
def interleaved_columns(
    words: Array, codebook: Array, scales: Array, zeros: Array, size: int, first: int, out: Array
) -> None:
    """Rows of the transpose of a matrix whose rows are packed, 8 codes a word, as AWQ orders them.

    Args:
        words: Shape (columns of the result, words at hand), uint32.
        codebook: Shape (16,).
        scales: Shape (groups, 8 · words at hand).
        zeros: As `scales`; taken from codebook values.
        size: Columns of the result in a group.
        first: Which of the words at hand begins the first row of the result.
        out: Shape (rows, columns), rows a multiple of 8, float32.
    """
    rows, columns = out.shape
    for k in range(rows // 8):
        for j in range(columns):
            word, group = words[j, first + k], j // size
            for slot in range(8):  # codes 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on
                i = 8 * k + (2 * slot if slot < 4 else 2 * slot - 7)
                c = 8 * first + i
                code = (word >> np.uint32(4 * slot)) & np.uint32(15)
                out[i, j] = (codebook[code] - zeros[group, c]) * scales[group, c]
