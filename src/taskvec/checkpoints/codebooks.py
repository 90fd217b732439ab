"""The values that codes of quantised weights stand for, and how far apart those values are.

A codebook is a float32 table, one entry a code. `spreads` gives for each code the root of the mean
square of the rounding error, if the weight that was rounded to it lies anywhere in its cell with
the same probability. A cell ends half way to the neighbours, h and k away; the mean square is
(h³ + k³) / (3 (h + k)), or step² / 12 where values are evenly spaced. The cells of the largest and
the smallest value end at that value.

Sources: FP8 E4M3 and E5M2: arXiv:2209.05433; E2M1 and E8M0: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]


def _float8(exponent_bits: int, bias: int, *, finite: bool, unsigned_zero: bool) -> Array:
    """Values of an 8-bit floating-point format.

    Args:
        exponent_bits: Bits of the exponent; the mantissa has 7 − `exponent_bits`.
        bias: Of the exponent.
        finite: Whether the largest exponent is one of numbers (no infinity).
        unsigned_zero: Whether the code of −0 is the only NaN.
    """
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    subnormal = exponent == 0
    value = np.ldexp(mantissa + ~subnormal, np.where(subnormal, 1, exponent) - bias)
    if unsigned_zero:
        value[0x80] = np.nan
    elif finite:
        value[[0x7F, 0xFF]] = np.nan
    else:
        top = exponent == (1 << exponent_bits) - 1
        value[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    signed: Array = np.where(codes < 128, value, -value).astype(np.float32)
    return signed


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1: Final = np.array([*_E2M1, *(-value for value in _E2M1)], np.float32)
E8M0: Final = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
BYTES: Final = {  # by the name of the element type
    "F8_E4M3": _float8(4, 7, finite=True, unsigned_zero=False),
    "F8_E5M2": _float8(5, 15, finite=False, unsigned_zero=False),
    "F8_E4M3FNUZ": _float8(4, 8, finite=True, unsigned_zero=True),
    "F8_E5M2FNUZ": _float8(5, 16, finite=True, unsigned_zero=True),
    "I8": np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32),
}


def integers(bits: int, offset: int = 0) -> Array:
    """Values of unsigned codes from which `offset` is taken."""
    return np.arange(1 << bits, dtype=np.float32) - np.float32(offset)


def spreads(codebook: Array) -> Array:
    """Root mean square of the rounding error at each code, in units of the scale.

    >>> [f"{spread:.3f}" for spread in spreads(integers(2))]
    ['0.289', '0.289', '0.289', '0.289']
    """
    values = np.unique(codebook[np.isfinite(codebook)]).astype(np.float64)
    if len(values) < 2:
        return np.zeros_like(codebook)
    halves = np.diff(values) / 2
    below, above = np.append(0, halves), np.append(halves, 0)
    square = (below**3 + above**3) / (3 * (below + above))
    found = np.searchsorted(values, np.where(np.isfinite(codebook), codebook, values[0]))
    roots: Array = np.sqrt(square[found]).astype(np.float32)
    return roots
