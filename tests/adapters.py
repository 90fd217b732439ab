"""LoRA adapters for tests, written and worked out without the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tests.conftest import Arrays, write_safetensors

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 6, "init_lora_weights": True,
    "fan_in_fan_out": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False, "use_dora": False, "modules_to_save": None,
}  # fmt: skip
SCALING = 1.5  # α / r of that


def write_adapter(
    folder: Path, tensors: Mapping[str, Any], dtype: Any = "F32", **config: Any
) -> Path:
    """An adapter folder; names get PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    kinds = dtype if isinstance(dtype, str) else {PREFIX + n: kind for n, kind in dtype.items()}
    named = {PREFIX + name: values for name, values in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", named, kinds)
    return folder


def pair(module: str, outs: int, ins: int, rank: int = 4, seed: int = 0) -> Arrays:
    """A and B of one module, as PEFT names them; float32."""
    rng = np.random.default_rng([seed, *module.encode()])
    return {
        f"{module}.lora_A.weight": rng.normal(0, 0.1, (rank, ins)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(0, 0.1, (outs, rank)).astype(np.float32),
    }


def pairs(weights: Mapping[str, Any], modules: list[str], seed: int = 0) -> Arrays:
    """A and B for weights (out, in) of the named modules."""
    found: Arrays = {}
    for module in modules:
        found |= pair(module, *weights[f"{module}.weight"].shape, seed=seed)
    return found


def deltas(tensors: Arrays, scaling: float = SCALING) -> Arrays:
    """s · B A by tensor of the model, float64."""
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = tensors[f"{module}.lora_B.weight"].astype(np.float64)
            found[f"{module}.weight"] = scaling * (b @ a.astype(np.float64))
    return found
