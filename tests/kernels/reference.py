"""Stored element types as NumPy float64 knows them: what the kernels are compared with.

float64 holds every value of the four types, so a value is decoded exactly. Rounding scales a value
by a power of two so that one step of the stored type is 1 (exact), rounds to an integer, ties to
even (`np.rint`), and scales back: one rounding, whatever the value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from taskvec.dtypes import DTYPES

Array = np.ndarray[Any, Any]


class Format(NamedTuple):
    """Significand bits (the hidden one counted) and exponent of the smallest normal value."""

    significand: int
    smallest: int
    largest: float


FORMATS = {
    "BF16": Format(8, -126, (2 - 2.0**-7) * 2.0**127),
    "F16": Format(11, -14, 65504.0),
    "F32": Format(24, -126, (2 - 2.0**-23) * 2.0**127),
    "F64": Format(53, -1022, float(np.finfo(np.float64).max)),
}


def decode(stored: Array, dtype: str) -> Array:
    """Values of stored elements, float64."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        if dtype == "BF16":
            return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return (stored.view(np.float16) if dtype == "F16" else stored).astype(np.float64)


def step(values: Array, dtype: str) -> Array:
    """Distance of neighbours of the stored type at each value (one unit in the last place)."""
    form = FORMATS[dtype]
    _, exponent = np.frexp(np.abs(values))
    return np.ldexp(1.0, np.maximum(exponent - 1, form.smallest) - (form.significand - 1))


def rounded(values: Array, dtype: str) -> Array:
    """The nearest value of the stored type, ties to even, too large ones infinite; float64."""
    values = np.asarray(values, np.float64)
    form = FORMATS[dtype]
    _, exponent = np.frexp(np.abs(values))
    last = np.maximum(exponent - 1, form.smallest) - (form.significand - 1)
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.ldexp(np.rint(np.ldexp(values, -last)), last)
    near = np.where(np.isfinite(values), near, values)
    return np.where(np.abs(near) > form.largest, np.copysign(np.inf, near), near)


def encode(values: Array, dtype: str) -> Array:
    """Stored elements of the nearest values."""
    near = rounded(values, dtype)
    if dtype == "BF16":
        return (near.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    if dtype == "F16":
        return near.astype(np.float16).view(np.uint16)
    return near.astype(np.float32 if dtype == "F32" else np.float64)


def address(array: Array) -> int:
    """Where the elements of an array begin; the caller keeps it alive."""
    return int(array.ctypes.data)


def code(dtype: str) -> int:
    """The number that kernels know a type by."""
    return DTYPES[dtype].code
