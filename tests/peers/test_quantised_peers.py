"""Quantised weights against what their own libraries make of them on the CPU.

transformers (FP8 with block scales, MXFP4), compressed-tensors and bitsandbytes quantise random
weights, save them, and take them back; taskvec reads the files. What is computed in float32 there
agrees to a few units in the last place; what is rounded to bfloat16, after that rounding.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.source import widened

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="no bitsandbytes here: pip install bitsandbytes"
)
needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="no compressed-tensors here: pip install compressed-tensors",
)

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
ULPS = 4 * 2.0**-24


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def saved(folder: Path, tensors: dict[str, torch.Tensor], said: dict[str, Any]) -> Any:
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def check(opened: Any, name: str, expected: torch.Tensor) -> None:
    """Float32 to a few units; bfloat16 to the bit, once our float32 is rounded."""
    info = opened.tensors[name]
    assert info.shape == tuple(expected.shape)
    view = opened.view(name)
    values = widened(view.read(0, info.size), view.dtype)
    got = torch.from_numpy(values.reshape(info.shape))
    if expected.dtype == torch.float32:
        np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=ULPS, atol=1e-9)
    else:
        assert torch.equal(got.to(expected.dtype), expected)


# --- bitsandbytes --------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_4_bits(tmp_path, kind, nested, dtype):
    from bitsandbytes import functional

    weight = (torch.randn(96, 704) * 0.02).to(dtype)
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    tensors = {NAME: codes, **{f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}}
    opened = saved(tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    check(opened, NAME, functional.dequantize_4bit(codes, state))


@needs_bitsandbytes
def test_bitsandbytes_8_bits(tmp_path):
    from bitsandbytes import functional

    weight = (torch.randn(96, 160) * 0.02).to(torch.float16)
    rows = weight.float().abs().amax(1)
    codes = torch.round(weight.float() * (127 / rows[:, None])).to(torch.int8)
    tensors = {
        NAME: codes,
        f"{MODULE}.SCB": rows,
        f"{MODULE}.weight_format": torch.tensor(0).to(torch.uint8),
    }
    opened = saved(tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    check(opened, NAME, functional.int8_vectorwise_dequant(codes, rows))


# --- compressed-tensors --------------------------------------------------------------------------

WEIGHTS: dict[str, dict[str, Any]] = {
    "float, tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float, channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float, block": {"num_bits": 8, "type": "float", "strategy": "block",
                     "block_structure": [64, 32]},
    "int, channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int, channel, zero points": {"num_bits": 8, "type": "int", "strategy": "channel",
                                  "symmetric": False},
    "packed 4, group": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "packed 4, group, zero points": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False,
    },
    "packed 4, channel": {"num_bits": 4, "type": "int", "strategy": "channel"},
    "packed 8, group": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
}  # fmt: skip


@needs_compressed_tensors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_compressed_tensors(tmp_path, kind, dtype):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    how = WEIGHTS[kind]
    args = QuantizationArgs(**how)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    rows, columns = 128, 160
    weight = torch.randn(rows, columns) * 0.02 + 0.003
    parts = {
        "tensor": lambda w: w.reshape(1, -1),
        "channel": lambda w: w.unsqueeze(-1).transpose(1, 2),
        "group": lambda w: w.reshape(rows, -1, 32),
        "block": lambda w: w.reshape(2, 64, 5, 32).permute(0, 2, 1, 3).reshape(2, 5, -1),
    }[how["strategy"]](weight)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    scale = scale.to(dtype)
    state = {"weight": weight, "weight_scale": scale}
    if not how.get("symmetric", True):
        state["weight_zero_point"] = zero.to(torch.int8)
    name = "pack-quantized" if kind.startswith("packed") else f"{how['type']}-quantized"
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    groups = {"group_0": {"weights": json.loads(args.model_dump_json()), "targets": ["Linear"]}}
    said = {"quant_method": "compressed-tensors", "format": name, "config_groups": groups}
    opened = saved(tmp_path / "m", {f"{MODULE}.{n}": t for n, t in stored.items()}, said)
    assert list(opened.tensors) == [NAME]
    check(opened, NAME, expected)


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fine_grained_fp8(tmp_path, block, scale_type):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    grid = torch.rand(256 // block[0], 384 // block[1]) * 1e-2
    scales = grid.to(scale_type)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    said = {"quant_method": "fp8", "weight_block_size": list(block)}
    opened = saved(tmp_path / "m", {NAME: weight, f"{NAME}_scale_inv": scales}, said)
    check(opened, NAME, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_experts(tmp_path, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 80, 5, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 80, 5), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    check(saved(tmp_path / "m", tensors, {"quant_method": "mxfp4"}), name, expected)
