"""Stored bits to floating point and back: bfloat16, float16, float32, float64.

Every kernel is a loop over one block. Widening is exact; narrowing rounds once, to nearest, ties to
even. Blocks are given as addresses, so one compiled kernel serves every mixture of dtypes. The
caller keeps the arrays alive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from taskvec.dtypes import BF16, F16, F32
from taskvec.kernels.jit import jit


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing_context: Any, address: Any) -> Any:
    """The integer address as a pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_from_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits are the given uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_from_float(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_HALF_SCALE = np.float32(2.0**112)  # difference of the exponent biases of float32 and float16
_HALF_OVERFLOW = np.uint32(0x477FF000)  # 65520: rounds to infinity in float16
_HALF_NORMAL = np.uint32(0x38800000)  # 2^-14: smallest normal float16
_HALF_SUBNORMAL_MAGIC = np.uint32(
    0x3F000000
)  # 0.5: adding it aligns the last bit of a subnormal float16


@jit
def widen_half(bits: np.uint32) -> np.float32:
    """One float16 (as bits) to float32, subnormals, infinities and NaN included."""
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    value = bits_from_float(float_from_bits(magnitude) * _HALF_SCALE)
    if magnitude >= np.uint32(0x0F800000):
        value = magnitude | _INFINITY
    return float_from_bits(value | ((bits & np.uint32(0x8000)) << np.uint32(16)))  # type: ignore[no-any-return]


@jit
def narrow_half(value: np.float32) -> np.uint16:
    """One float32 to float16 bits."""
    bits = bits_from_float(value)
    magnitude = bits & _MAGNITUDE
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = (magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    aligned = float_from_bits(magnitude) + float_from_bits(_HALF_SUBNORMAL_MAGIC)
    half = normal
    if magnitude < _HALF_NORMAL:
        half = bits_from_float(aligned) - _HALF_SUBNORMAL_MAGIC
    if magnitude >= _HALF_OVERFLOW:
        half = np.uint32(0x7C00)
    if magnitude > _INFINITY:
        half = np.uint32(0x7E00)
    return np.uint16(half | ((bits & _SIGN) >> np.uint32(16)))


@jit
def narrow_brain(value: np.float32) -> np.uint16:
    """One float32 to bfloat16 bits."""
    bits = bits_from_float(value)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if (bits & _MAGNITUDE) > _INFINITY:
        rounded = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.uint16(rounded)


@jit
def to_odd(value: np.float64) -> np.float32:
    """float64 to float32, rounded to odd: a further rounding to 16 bits is then the only one."""
    nearest = np.float32(value)
    error = np.float64(nearest) - value
    bits = bits_from_float(nearest)
    if error != 0.0 and np.isfinite(nearest):
        if (error > 0.0) == (nearest > 0.0) and (bits & _MAGNITUDE) != np.uint32(0):
            bits -= np.uint32(1)  # towards zero
        bits |= np.uint32(1)
    return float_from_bits(bits)  # type: ignore[no-any-return]


@jit
def widen(code: int, address: int, first: int, count: int, out: np.ndarray[Any, Any]) -> None:
    """Elements [first, first + count) of the block at `address` into `out`, shape (≥ count,)."""
    if code == BF16:
        brain = carray(pointer(address + 2 * first), (count,), np.uint16)
        for i in range(count):
            out[i] = float_from_bits(np.uint32(brain[i]) << np.uint32(16))
    elif code == F16:
        half = carray(pointer(address + 2 * first), (count,), np.uint16)
        for i in range(count):
            out[i] = widen_half(np.uint32(half[i]))
    elif code == F32:
        single = carray(pointer(address + 4 * first), (count,), np.float32)
        for i in range(count):
            out[i] = single[i]
    else:
        double = carray(pointer(address + 8 * first), (count,), np.float64)
        for i in range(count):
            out[i] = double[i]


@jit
def difference(
    code: int,
    address: int,
    first: int,
    count: int,
    rows: np.ndarray[Any, Any],
    row: int,
    sign: int,
) -> None:
    """Sign · (x − row 0) into `rows[row]`, for elements [first, first + count) of a block x."""
    factor = rows.dtype.type(sign)
    if code == BF16:
        brain = carray(pointer(address + 2 * first), (count,), np.uint16)
        for i in range(count):
            value = float_from_bits(np.uint32(brain[i]) << np.uint32(16))
            rows[row, i] = factor * (value - rows[0, i])
    else:
        widen(code, address, first, count, rows[row])
        for i in range(count):
            rows[row, i] = factor * (rows[row, i] - rows[0, i])


@jit
def narrow(code: int, values: np.ndarray[Any, Any], address: int, first: int, count: int) -> None:
    """`values`, shape (≥ count,), into elements [first, first + count) of the block `address`."""
    if code == BF16:
        brain = carray(pointer(address + 2 * first), (count,), np.uint16)
        if values.itemsize == 4:
            for i in range(count):
                brain[i] = narrow_brain(np.float32(values[i]))
        else:
            for i in range(count):
                brain[i] = narrow_brain(to_odd(np.float64(values[i])))
    elif code == F16:
        half = carray(pointer(address + 2 * first), (count,), np.uint16)
        if values.itemsize == 4:
            for i in range(count):
                half[i] = narrow_half(np.float32(values[i]))
        else:
            for i in range(count):
                half[i] = narrow_half(to_odd(np.float64(values[i])))
    elif code == F32:
        single = carray(pointer(address + 4 * first), (count,), np.float32)
        for i in range(count):
            single[i] = values[i]
    else:
        double = carray(pointer(address + 8 * first), (count,), np.float64)
        for i in range(count):
            double[i] = values[i]


@jit
def all_finite(code: int, address: int, first: int, count: int) -> bool:
    """Whether none of elements [first, first + count) of the block at `address` is NaN or infinite.

    Only NaN and infinity have an exponent of all ones; the bits without the sign sort as magnitude.
    """
    if code in (BF16, F16):
        half = carray(pointer(address + 2 * first), (count,), np.uint16)
        top = np.uint16(0)
        for i in range(count):
            top = max(top, half[i] & np.uint16(0x7FFF))
        return bool(top < np.uint16(0x7F80 if code == BF16 else 0x7C00))
    if code == F32:
        single = carray(pointer(address + 4 * first), (count,), np.uint32)
        highest = np.uint32(0)
        for i in range(count):
            highest = max(highest, single[i] & _MAGNITUDE)
        return bool(highest < _INFINITY)
    double = carray(pointer(address + 8 * first), (count,), np.uint64)
    largest = np.uint64(0)
    for i in range(count):
        largest = max(largest, double[i] & np.uint64(0x7FFFFFFFFFFFFFFF))
    return bool(largest < np.uint64(0x7FF0000000000000))


@jit
def settle(
    code: int,
    stored_as: int,
    values: np.ndarray[Any, Any],
    address: int,
    first: int,
    count: int,
) -> bool:
    """Round `values`, shape (≥ count,), to one dtype and store them as another; True if all finite.

    The result is what `narrow` to `code` and then `recast` to `stored_as` give, as elements
    [first, first + count) of the block at `address`. `values` are changed if the dtypes differ.
    Finite refers to the rounded values, because float16 overflows.
    """
    if code == stored_as:
        narrow(code, values, address, first, count)
        return all_finite(code, address, first, count)
    if code == BF16 and stored_as == F32 and values.itemsize == 4:  # at once: twice as fast
        single = carray(pointer(address + 4 * first), (count,), np.uint32)
        top = np.uint32(0)
        for i in range(count):
            bits = np.uint32(narrow_brain(np.float32(values[i])))
            top = max(top, bits & np.uint32(0x7FFF))
            single[i] = bits << np.uint32(16)
        return bool(top < np.uint32(0x7F80))
    finite = True
    for i in range(count):
        value = values[i]
        nearest = np.float32(value) if values.itemsize == 4 else to_odd(np.float64(value))
        if code == BF16:
            values[i] = float_from_bits(np.uint32(narrow_brain(nearest)) << np.uint32(16))
        elif code == F16:
            values[i] = widen_half(np.uint32(narrow_half(nearest)))
        elif code == F32:
            values[i] = np.float32(values[i])
        finite = finite and np.isfinite(values[i])
    narrow(stored_as, values, address, first, count)
    return finite


@jit
def recast(
    code: int, address: int, out_code: int, out_address: int, count: int, row: np.ndarray[Any, Any]
) -> None:
    """Convert a block to another dtype, rounded once, through `row`, whose dtype holds both."""
    for start in range(0, count, len(row)):
        length = min(len(row), count - start)
        widen(code, address, start, length, row)
        narrow(out_code, row, out_address, start, length)
