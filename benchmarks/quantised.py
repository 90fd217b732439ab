"""Families of experts in bfloat16, FP8 and MXFP4, and a family under the names of a trainer.

The three have the same parameters and nearly the same values, so that their merges differ in how
weights are stored and in nothing else. Every block is alike; members have their experts in another
order. FP8 has a scale for each 128 × 128 weights, as DeepSeek has
them; MXFP4 is stored as gpt-oss stores its experts.
"""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic import MEMBERS, SEED

FORMATS = ("bfloat16", "fp8", "mxfp4")
ROLES = ("instruct", "math", "code")
BLOCKS, SHAPE = 12, (4, 2880, 1440)  # experts, in, out: 199 million parameters
QUICK = 1, (2, 640, 384)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

Array = NDArray[Any]
Stored = dict[str, tuple[str, Array]]


def bfloat16_bytes(*, quick: bool) -> int:
    """Bytes of a member in bfloat16."""
    blocks, shape = QUICK if quick else (BLOCKS, SHAPE)
    return 2 * blocks * prod(shape)


def write_formats(folder: Path, *, quick: bool) -> None:
    """Members in every format under `folder/FORMAT`."""
    blocks, shape = QUICK if quick else (BLOCKS, SHAPE)
    stamp, label = folder / "complete.json", json.dumps([1, blocks, shape])
    if not stamp.exists() or stamp.read_text() != label:
        shutil.rmtree(folder, ignore_errors=True)
        values = 0.02 * np.random.default_rng(SEED).standard_normal(shape, np.float32)
        once: dict[str, Stored] = {
            "bfloat16": {"": ("BF16", (values.view("<u4") >> 16).astype("<u2"))},
            "fp8": _fp8(values),
            "mxfp4": _mxfp4(values),
        }
        for number, role in enumerate(ROLES):
            for kind, parts in once.items():
                turned = {end: (d, np.roll(array, number, 0)) for end, (d, array) in parts.items()}
                names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(blocks)]
                tensors = {name + end: t for name in names for end, t in turned.items()}
                _write(folder / kind / role, tensors, kind)
        stamp.write_text(label)


def _fp8(values: Array) -> Stored:
    experts, rows, columns = values.shape
    high, wide = -(-rows // 128), -(-columns // 128)
    padded = np.zeros((experts, high * 128, wide * 128), np.float32)
    padded[:, :rows, :columns] = np.abs(values)
    largest = padded.reshape(experts, high, 128, wide, 128).max((2, 4))
    scales = np.maximum(largest, 1e-12) / np.float32(448)
    each = scales.repeat(128, 1).repeat(128, 2)[:, :rows, :columns]
    return {"": ("F8_E4M3", _e4m3(values / each)), "_scale_inv": ("F32", scales)}


def _e4m3(values: Array) -> Array:
    """Codes of values up to 448, towards zero; how they are rounded costs no time to undo."""
    magnitude = np.minimum(np.abs(values), np.float32(448))
    exponent = np.clip(np.frexp(magnitude)[1] - 1, -6, 8)
    mantissa = np.floor(np.ldexp(magnitude, 3 - exponent)).astype(np.uint8)
    codes = np.where(mantissa < 8, mantissa, (exponent + 7 << 3) + mantissa - 8).astype(np.uint8)
    signed: Array = codes | (np.signbit(values).astype(np.uint8) << 7)
    return signed


def _mxfp4(values: Array) -> Stored:
    experts, _, columns = values.shape
    groups = np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(experts, columns, -1, 32)
    powers = np.frexp(np.abs(groups).max(-1))[1] - 3
    scaled = np.ldexp(groups, -powers[..., np.newaxis])
    codes = np.searchsorted((_E2M1[1:] + _E2M1[:-1]) / 2, np.abs(scaled)).astype(np.uint8)
    codes |= np.signbit(scaled).astype(np.uint8) << 3
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    scales = (powers + 127).astype(np.uint8)
    return {"_blocks": ("U8", packed), "_scales": ("U8", scales)}


def _write(folder: Path, tensors: Stored, kind: str) -> None:
    folder.mkdir(parents=True)
    said = {"quant_method": kind, "weight_block_size": [128, 128]}
    config: dict[str, Any] = {"model_type": "gpt_oss", "dtype": "bfloat16"}
    config |= {} if kind == "bfloat16" else {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    with (folder / "model.safetensors").open("wb") as stream:
        text = json.dumps(header).encode()
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            stream.write(np.ascontiguousarray(array).data)


def write_wrapped(folder: Path) -> None:
    """Copies of the fine-tunes of a family whose tensors are named as DDP and torch.compile do."""
    for member in MEMBERS:
        copy = folder / f"{member}-wrapped"
        copy.mkdir(exist_ok=True)
        shutil.copy(folder / member / "config.json", copy)
        raw = (folder / member / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        renamed = {
            n if n == "__metadata__" else f"module._orig_mod.{n}": t for n, t in header.items()
        }
        text = json.dumps(renamed).encode()
        text += b" " * (-len(text) % 8)
        content = len(text).to_bytes(8, "little") + text + raw[8 + length :]
        (copy / "model.safetensors").write_bytes(content)
