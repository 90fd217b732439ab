"""What the tests share: tiny checkpoints, written and read without the code under test.

Helpers are plain functions (`from tests.conftest import write_checkpoint`); fixtures build on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch and NumPy are there. Models here are tiny: threads that wait for each other, beside
# pytest's workers and whatever else runs, took up to eight times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

Arrays = dict[str, np.ndarray[Any, Any]]

HIDDEN, VOCABULARY, BLOCKS = 24, 2800, 3  # 67,200 embedding entries: more than one 65,536-chunk
STORED = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "|u1",
          "BOOL": "|u1", "BF16": "<u2"}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
}


def to_bf16(values: Any) -> np.ndarray[Any, Any]:
    """Bits of the nearest bfloat16 (ties to even), uint16, any shape."""
    bits = np.asarray(values, "<f4").view("<u4").astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    quiet = (bits >> np.uint64(16)) | np.uint64(0x40)
    return np.where(np.isnan(np.asarray(values, "<f4")), quiet, rounded).astype("<u2")


def from_bf16(bits: Any) -> np.ndarray[Any, Any]:
    """Values of bfloat16 bits, float32."""
    return (np.asarray(bits, "<u2").astype("<u4") << np.uint32(16)).view("<f4")


def encode(values: Any, dtype: str) -> bytes:
    """Stored bytes of an array in a safetensors dtype."""
    return (
        to_bf16(values).tobytes()
        if dtype == "BF16"
        else np.asarray(values).astype(STORED[dtype]).tobytes()
    )


def decode(raw: bytes, dtype: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Values of stored bytes; bfloat16 widened to float32."""
    stored = np.frombuffer(raw, STORED[dtype]).reshape(shape)
    return from_bf16(stored) if dtype == "BF16" else stored


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], dtype: str | Mapping[str, str] = "BF16"
) -> None:
    """One safetensors file; bool and integer arrays keep a dtype of their own."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        array = np.asarray(values)
        kind = dtype if isinstance(dtype, str) else dtype.get(name, "BF16")
        if array.dtype.kind in "bi":
            kind = {"b": "BOOL", "i": "I64"}[array.dtype.kind]
        raw = encode(array, kind)
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Any],
    dtype: str | Mapping[str, str] = "BF16",
    shards: int = 1,
    config: Mapping[str, Any] | None = CONFIG,
) -> Path:
    """A model folder, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    names, placed = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in mine}, dtype)
        placed |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def read_raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and stored bytes of every tensor of a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, data = read_file(path)
        header.pop("__metadata__", None)
        for name, about in header.items():
            start, end = about["data_offsets"]
            found[name] = (about["dtype"], tuple(about["shape"]), data[start:end])
    return found


def read_checkpoint(folder: Path) -> Arrays:
    """Values of every tensor of a folder, by name."""
    raw = read_raw(folder)
    return {name: decode(data, dtype, shape) for name, (dtype, shape, data) in raw.items()}


def tiny_llama(rng: np.random.Generator, blocks: int = BLOCKS) -> Arrays:
    """Weights with the names of a Llama, and besides them a scalar and an odd-sized tensor."""
    h = HIDDEN
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, h)}
    for i in range(blocks):
        block = f"model.layers.{i}."
        shapes |= {
            block + "self_attn.q_proj.weight": (h, h),
            block + "self_attn.k_proj.weight": (h // 2, h),
            block + "self_attn.v_proj.weight": (h // 2, h),
            block + "self_attn.o_proj.weight": (h, h),
            block + "mlp.gate_proj.weight": (2 * h, h),
            block + "mlp.up_proj.weight": (2 * h, h),
            block + "mlp.down_proj.weight": (h, 2 * h),
            block + "input_layernorm.weight": (h,),
            block + "post_attention_layernorm.weight": (h,),
        }
    shapes |= {
        "model.norm.weight": (h,),
        "lm_head.weight": (VOCABULARY, h),
        "odd": (7,),
        "temperature": (),
    }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def tuned(weights: Arrays, rng: np.random.Generator, size: float, slope: float = 0.0) -> Arrays:
    """Weights after a pretended fine-tuning that moves tensor i by size × (1 + slope × i)."""
    return {
        name: (array + size * (1 + slope * i) * rng.normal(0, 1, array.shape)).astype(np.float32)
        for i, (name, array) in enumerate(weights.items())
    }


def family_weights(blocks: int = BLOCKS) -> dict[str, Arrays]:
    """Weights of base, instruct and two fine-tunes of instruct, the same at every call."""
    rng = np.random.default_rng(20260714)
    base = tiny_llama(rng, blocks)
    instruct = tuned(base, rng, 0.02)
    return {
        "base": base,
        "instruct": instruct,
        "math": tuned(instruct, rng, 0.003, slope=0.2),
        "code": tuned(instruct, rng, 0.02, slope=-0.03),
    }


def write_family(
    root: Path, weights: Mapping[str, Arrays] | None = None, dtype: Any = "BF16", shards: int = 1
) -> dict[str, Path]:
    """Folders of a family, by member."""
    return {
        name: write_checkpoint(root / name, tensors, dtype, shards)
        for name, tensors in (weights or family_weights()).items()
    }


def told(err: str) -> str:
    """Standard error without the note of the first run on a machine, whichever test that is."""
    return err.replace("taskvec: compiling kernels, once on this machine …\n", "")


def run_cli(*args: Any, cwd: Path | None = None, **env: str) -> tuple[int, str, str]:
    """Run the real command in a process of its own: exit code, standard output and error."""
    done = subprocess.run(
        [sys.executable, "-m", "taskvec.cli.main", *map(str, args)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, told(done.stderr)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's cache of scans."""
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """Folders of a tiny bfloat16 family: base, instruct, math, code."""
    return write_family(tmp_path / "family")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: exit code, standard output and error."""
    from taskvec.cli.main import main

    def run(*args: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(a) for a in args])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, told(captured.err)

    return run
