"""Tiny models of open_clip and timm. To be imported in a process of its own; see `in_process`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def in_process(program: str) -> Any:
    """What a program prints as JSON, run in a process of its own with `models` at hand."""
    start = "from tests.foreign_models import models\nimport json, torch\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + program],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def models(blocks: int = 2) -> dict[str, Any]:
    """The models by name, so many blocks a tower, random but the same each time."""
    importlib.import_module("tests.without_torchvision")
    sys.modules["transformers"] = None  # type: ignore[assignment]  # not needed, slow to import
    import torch
    from open_clip.model import CLIP, CustomTextCLIP
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    vision = {"layers": blocks, "width": 64, "patch_size": 14, "image_size": 28}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": blocks}
    pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "ls_init_value": 0.1}
    coca = {"embed_cls": True, "pad_id": 0, "proj_bias": True, "ls_init_value": 0.1}
    trunk = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32, "timm_proj": "linear"}
    small: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 16}
    small |= {"depth": blocks, "num_heads": 2, "num_classes": 3}
    return {
        "open_clip": CLIP(8, vision, text),
        "open_clip-coca": CustomTextCLIP(
            8, {**vision, **pooled}, {**text, **coca}, init_logit_bias=-10.0
        ),
        "open_clip-timm": CustomTextCLIP(8, trunk, text),  # its tower has twelve blocks
        "timm": VisionTransformer(**small),
        "timm-norms": VisionTransformer(**small, qk_norm=True, init_values=0.1, reg_tokens=2),
        "timm-pool": VisionTransformer(**small, global_pool="map", class_token=False),
    }
