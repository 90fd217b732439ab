"""The element types of the safetensors format, and which of them taskvec computes with.

Names are the format's own (`BF16`). numpy has no bfloat16, so its elements are held as their bits
(uint16).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: Name in a safetensors header.
        bits: Size of one element in bits (below 8 for packed types).
        storage: numpy type string of the stored bits.
        code: Number that the kernels know it by; −1 for types that are not computed with.
        config_name: Name in a Hugging Face `config.json`; None for types that models are not stored
            in.
        itemsize: Bytes of one element; 0 for packed types.
    """

    name: str
    bits: int
    storage: str
    code: int = -1
    config_name: str | None = None
    itemsize: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "itemsize", self.bits // 8)

    @property
    def is_float(self) -> bool:
        """Whether it is a type that taskvec computes with."""
        return self.code >= 0

    @property
    def is_quantised(self) -> bool:
        """Whether the type is a packed or scaled one, whose bits alone are not the weights."""
        return self.name.startswith(("F8_", "F6_", "F4"))


# Codes of the types that kernels compute with; compiled code branches on these numbers.
BF16, F16, F32, F64 = 0, 1, 2, 3

DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("BF16", 16, "<u2", BF16, "bfloat16"),
        DType("F16", 16, "<u2", F16, "float16"),
        DType("F32", 32, "<f4", F32, "float32"),
        DType("F64", 64, "<f8", F64, "float64"),
        DType("BOOL", 8, "|u1"),
        DType("U8", 8, "|u1"),
        DType("I8", 8, "|i1"),
        DType("U16", 16, "<u2"),
        DType("I16", 16, "<i2"),
        DType("U32", 32, "<u4"),
        DType("I32", 32, "<i4"),
        DType("U64", 64, "<u8"),
        DType("I64", 64, "<i8"),
        DType("C64", 64, "<u8"),
        DType("F8_E4M3", 8, "|u1"),
        DType("F8_E5M2", 8, "|u1"),
        DType("F8_E8M0", 8, "|u1"),
        DType("F8_E4M3FNUZ", 8, "|u1"),
        DType("F8_E5M2FNUZ", 8, "|u1"),
        DType("F6_E2M3", 6, "|u1"),
        DType("F6_E3M2", 6, "|u1"),
        DType("F4", 4, "|u1"),
    )
}

FLOATS: dict[str, DType] = {
    dtype.config_name: dtype for dtype in DTYPES.values() if dtype.config_name is not None
}

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def float_name(word: str) -> str:
    """The name in `FLOATS` of a floating-point type, which also has a short one.

    >>> float_name("bf16"), float_name("float32"), float_name("int3")
    ('bfloat16', 'float32', 'int3')
    """
    return _SHORT.get(word.lower(), word)
