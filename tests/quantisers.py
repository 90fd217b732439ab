"""Weights in the formats of quantisers, packed and unpacked by their formulas, without taskvec.

Each function takes a random generator, the name of a weight and its shape, and returns the stored
tensors (safetensors dtype and array by name), the values as float64, and `quantization_config`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Stored = dict[str, tuple[str, Array]]
Made = tuple[Stored, Array, dict[str, Any]]
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def write_quantised(folder: Path, stored: Stored, config: Mapping[str, Any]) -> Path:
    """A model folder with tensors of any dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, array) in stored.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def e4m3(code: int) -> float:
    """Value of an FP8 code: arXiv:2209.05433, table 1."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (
        mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


E4M3 = np.array([e4m3(code) for code in range(256)])


def bits16(values: Array) -> Array:
    """bfloat16 bits of values that bfloat16 holds exactly, and those values."""
    return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2")


def cut16(values: Array) -> Array:
    """Values cut to bfloat16."""
    return (bits16(values).astype("<u4") << 16).view("<f4").astype(np.float64)


def fp8(shape_of_scales: Callable[[int, int], tuple[int, ...]], name_of_scale: str,
        said: dict[str, Any], block: tuple[int, int] | None = None,
) -> Callable[..., Made]:  # fmt: skip
    """FP8 with scales of some shape."""

    def make(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> Made:
        codes = rng.integers(0, 127, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
        scales = rng.uniform(0.5, 2, shape_of_scales(*shape)).astype("<f4") * 1e-4
        high, wide = block or (shape[0], shape[1])
        if block is None and scales.size > 1:
            high = 1
        grid = scales.reshape(-(-shape[0] // high), -(-shape[1] // wide)).astype(np.float64)
        rows, columns = np.indices(shape)
        stored: Stored = {
            name: ("F8_E4M3", codes),
            name.removesuffix("weight") + name_of_scale: ("F32", scales),
        }
        return stored, E4M3[codes] * grid[rows // high, columns // wide], said

    return make


def int8_channel(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> Made:
    """compressed-tensors int-quantized: a bfloat16 scale and a zero point for each row."""
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    scales = cut16(rng.uniform(0.5, 2, (shape[0], 1)) * 1e-3)
    zeros = rng.integers(-9, 9, (shape[0], 1)).astype(np.int8)
    stored: Stored = {
        name: ("I8", codes),
        f"{name}_scale": ("BF16", bits16(scales)),
        f"{name}_zero_point": ("I8", zeros),
    }
    said = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return stored, (codes - zeros.astype(np.float64)) * scales, said


def pack(codes: Array, bits: int) -> Array:
    """Codes along the last dimension, ⌊32 / bits⌋ a word, the first in the lowest bits."""
    per_word = 32 // bits
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word) * per_word), np.uint64)
    padded[..., : codes.shape[-1]] = codes
    words = padded.reshape(*codes.shape[:-1], -1, per_word)
    return (words << (np.arange(per_word, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype("<u4")


def packed(
    bits: int, group: int, *, zero: bool = False, shuffled: bool = False
) -> Callable[..., Made]:
    """compressed-tensors pack-quantized."""

    def make(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> Made:
        rows, columns = shape
        groups = -(-columns // group)
        codes = rng.integers(0, 1 << bits, shape)
        scales = cut16(rng.uniform(0.5, 2, (rows, groups)) * 1e-2)
        zeros = (
            rng.integers(0, 1 << bits, (rows, groups))
            if zero
            else np.full((rows, groups), 1 << (bits - 1))
        )
        of = np.arange(columns) // group
        stored: Stored = {
            f"{name}_packed": ("I32", pack(codes, bits).view("<i4")),
            f"{name}_scale": ("BF16", bits16(scales)),
            f"{name}_shape": ("I64", np.array(shape, "<i8")),
        }
        if shuffled:
            of = rng.permutation(of)
            stored[f"{name}_g_idx"] = ("I32", of.astype("<i4"))
        if zero:
            stored[f"{name}_zero_point"] = (
                "I32",
                np.ascontiguousarray(pack(zeros.T, bits).T).view("<i4"),
            )
        weights = {"num_bits": bits, "group_size": group, "strategy": "group", "type": "int"}
        said = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": weights}}}  # fmt: skip
        return stored, (codes - zeros[:, of].astype(np.float64)) * scales[:, of], said

    return make


def nibbles(kind: str, *, nested: bool, block: int = 64) -> Callable[..., Made]:
    """bitsandbytes NF4 and FP4."""

    def make(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> Made:
        count = shape[0] * shape[1]
        book = np.array(NF4 if kind == "nf4" else [value / 6 for value in E2M1], "<f4")
        codes = rng.integers(0, 16, count).astype(np.uint8)
        blocks = -(-count // block)
        even = np.append(codes, np.zeros(count % 2, np.uint8))
        told = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
        stored: Stored = {
            name: ("U8", (even[::2] << 4 | even[1::2]).reshape(-1, 1)),
            f"{name}.quant_map": ("F32", book),
        }
        if nested:
            inner = rng.integers(0, 256, blocks).astype(np.uint8)
            inner_book = np.sort(rng.uniform(-1, 1, 256)).astype("<f4")
            outer = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype("<f4")
            offset = 0.03125
            told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            absmax = inner_book[inner].astype(np.float64) * outer[np.arange(blocks) // 256] + offset
            stored |= {
                f"{name}.absmax": ("U8", inner),
                f"{name}.nested_absmax": ("F32", outer),
                f"{name}.nested_quant_map": ("F32", inner_book),
            }
        else:
            single = rng.uniform(0.01, 0.1, blocks).astype("<f4")
            absmax = single.astype(np.float64)
            stored[f"{name}.absmax"] = ("F32", single)
        state = np.frombuffer(json.dumps(told).encode(), np.uint8)
        stored[f"{name}.quant_state.bitsandbytes__{kind}"] = ("U8", state)
        values = book[codes].astype(np.float64) * absmax[np.arange(count) // block]
        said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        return stored, values.reshape(shape), said

    return make


def llm_int8(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> Made:
    """bitsandbytes int8: row maxima, 127 steps."""
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    maxima = rng.uniform(0.1, 0.5, shape[0]).astype("<f4")
    module = name.removesuffix("weight")
    stored: Stored = {
        name: ("I8", codes),
        f"{module}SCB": ("F32", maxima),
        f"{module}weight_format": ("U8", np.zeros((), np.uint8)),
    }
    said = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return stored, codes * maxima[:, np.newaxis].astype(np.float64) / 127, said


def stream(codes: Array, bits: int) -> Array:
    """Codes along the first dimension as a stream of bits in words of 32."""
    spread = (codes[:, np.newaxis] >> np.arange(bits)[:, np.newaxis]) & 1
    ones = spread.reshape(-1, codes.shape[1]).astype(np.uint64)
    words = ones.reshape(-1, 32, codes.shape[1])
    return (words << np.arange(32, dtype=np.uint64)[:, np.newaxis]).sum(1).astype("<u4")


def gptq(
    bits: int, group: int, *, version: str = "gptq", shuffled: bool = False
) -> Callable[..., Made]:
    """GPTQ: columns are streams of bits; zero points are stored less 1 unless v2."""

    def make(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> Made:
        rows, columns = shape
        groups = -(-columns // group)
        codes = rng.integers(0, 1 << bits, (columns, rows))
        zeros = rng.integers(1 if version == "gptq" else 0, 1 << bits, (groups, rows))
        scales = rng.uniform(0.001, 0.01, (groups, rows)).astype("<f2")
        of = np.arange(columns) // group
        of = rng.permutation(of) if shuffled else of
        less = 1 if version == "gptq" else 0
        module = name.removesuffix("weight")
        stored: Stored = {
            f"{module}qweight": ("I32", stream(codes, bits).view("<i4")),
            f"{module}qzeros": (
                "I32",
                np.ascontiguousarray(stream((zeros - less).T, bits).T).view("<i4"),
            ),
            f"{module}scales": ("F16", scales),
            f"{module}g_idx": ("I32", of.astype("<i4")),
        }
        values = (codes - zeros[of].astype(np.float64)) * scales[of].astype(np.float64)
        said = {"quant_method": "gptq", "bits": bits, "group_size": group,
                "checkpoint_format": version,
                "desc_act": shuffled}  # fmt: skip
        return stored, values.T, said

    return make


def awq(rng: np.random.Generator, name: str, shape: tuple[int, int], group: int = 32) -> Made:
    """AWQ, version gemm: 8 columns a word in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    rows, columns = shape
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (-(-columns // group), rows))
    scales = rng.uniform(0.001, 0.01, zeros.shape).astype("<f2")

    def words(matrix: Array) -> Array:
        return pack(matrix.reshape(len(matrix), -1, 8)[..., order].reshape(matrix.shape), 4)

    module = name.removesuffix("weight")
    stored: Stored = {
        f"{module}qweight": ("I32", words(codes).view("<i4")),
        f"{module}qzeros": ("I32", words(zeros).view("<i4")),
        f"{module}scales": ("F16", scales),
    }
    of = np.arange(columns) // group
    values = (codes - zeros[of].astype(np.float64)) * scales[of].astype(np.float64)
    said = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
    }
    return stored, values.T, said


def mxfp4(rng: np.random.Generator, name: str, shape: tuple[int, int, int]) -> Made:
    """Experts of gpt-oss, stored as the transpose of each matrix: 32 codes to a power of two."""
    experts, rows, columns = shape
    codes = rng.integers(0, 16, (experts, columns, rows // 32, 32)).astype(np.uint8)
    powers = rng.integers(115, 125, codes.shape[:3]).astype(np.uint8)
    stored: Stored = {
        f"{name}_blocks": ("U8", codes[..., ::2] | codes[..., 1::2] << 4),
        f"{name}_scales": ("U8", powers),
    }
    values = np.array(E2M1)[codes] * 2.0 ** (powers[..., np.newaxis].astype(float) - 127)
    said = {"quant_method": "mxfp4"}
    return stored, values.reshape(experts, columns, rows).transpose(0, 2, 1), said


SAID_FP8 = {"quant_method": "fp8", "weight_block_size": [32, 16]}
FLOAT = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FORMATS: dict[str, Callable[..., Made]] = {
    "fp8 blocks": fp8(lambda r, c: (-(-r // 32), -(-c // 16)), "weight_scale_inv", SAID_FP8,
                      (32, 16)),
    "fp8 tensor": fp8(lambda r, c: (1,), "weight_scale", FLOAT),
    "fp8 scalar": fp8(lambda r, c: (), "weight_scale", FLOAT),
    "fp8 channel": fp8(lambda r, c: (r, 1), "weight_scale", FLOAT),
    "int8 channel": int8_channel,
    "packed 4 bits": packed(4, 32),
    "packed 4 bits, zero points": packed(4, 32, zero=True),
    "packed 4 bits, shuffled": packed(4, 32, shuffled=True),
    "packed 8 bits": packed(8, 32),
    "nf4": nibbles("nf4", nested=False),
    "nf4 nested": nibbles("nf4", nested=True),
    "fp4 nested": nibbles("fp4", nested=True, block=32),
    "llm.int8": llm_int8,
    "gptq 4": gptq(4, 32),
    "gptq 4 v2": gptq(4, 32, version="gptq_v2"),
    "gptq 4 shuffled": gptq(4, 32, shuffled=True),
    "gptq 3": gptq(3, 32),
    "gptq 8": gptq(8, 32),
    "gptq 2": gptq(2, 32),
    "awq": awq,
}  # fmt: skip
