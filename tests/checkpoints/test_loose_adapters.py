"""LoRA files of other tools than PEFT: read where names and scale are certain, else named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.adapters import PREFIX, pair, write_adapter
from tests.conftest import Arrays, write_checkpoint

import taskvec as tv
from taskvec.errors import CheckpointError, FamilyError

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CONV = "down_blocks.0.resnets.0.conv1"
SHAPES = {
    f"{ATTENTION}.to_q.weight": (12, 8), f"{ATTENTION}.to_out.0.weight": (8, 12),
    f"{CONV}.weight": (6, 4, 3, 3), "conv_in.bias": (4,),
}  # fmt: skip


@pytest.fixture
def unet(tmp_path: Path) -> Arrays:
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    (tmp_path / "unet").mkdir()
    save_file(weights, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    return weights


def factors(name: str, rank: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Down, up and their product in the weight's shape."""
    rng = np.random.default_rng(seed)
    outs, *ins = SHAPES[f"{name}.weight"]
    down = rng.normal(size=(rank, *ins)).astype(np.float32)
    up = rng.normal(size=(outs, rank, *(1 for _ in ins[1:]))).astype(np.float32)
    flat = up.reshape(outs, rank).astype(np.float64) @ down.reshape(rank, -1)
    return down, up, flat.reshape(outs, *ins)


def merged(tmp_path: Path, file: Path, **options: Any) -> Arrays:
    recipe = {"anchor": str(tmp_path / "unet"), "method": "task_arithmetic",
              "tasks": {"style": {"model": str(file), "scale": 1}}, **options}  # fmt: skip
    tv.merge(recipe, tmp_path / "out")
    (found,) = (tmp_path / "out").glob("*.safetensors")
    return load_file(found)


MODULES = (f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", CONV)


def check(found: Arrays, unet: Arrays, scaling: float) -> None:
    for i, module in enumerate(MODULES):
        name = f"{module}.weight"
        expected = unet[name] + scaling * factors(module, 4, i)[2]
        assert np.allclose(found[name], expected, rtol=0, atol=1e-5), name
    assert np.array_equal(found["conv_in.bias"], unet["conv_in.bias"])


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def test_kohya(unet, tmp_path):
    tensors: Arrays = {}
    for i, module in enumerate(MODULES):
        down, up, _ = factors(module, 4, i)
        tensors |= {f"{kohya(module)}.lora_down.weight": down, f"{kohya(module)}.alpha":
                    np.array(2, np.float32), f"{kohya(module)}.lora_up.weight": up}  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors")
    check(merged(tmp_path, tmp_path / "style.safetensors"), unet, 0.5)


def test_kohya_without_alpha_is_unscaled(unet, tmp_path):
    tensors: Arrays = {}
    for i, module in enumerate(MODULES):
        down, up, _ = factors(module, 4, i)
        tensors |= {
            f"{kohya(module)}.lora_down.weight": down,
            f"{kohya(module)}.lora_up.weight": up,
        }
    save_file(tensors, tmp_path / "style.safetensors")
    check(merged(tmp_path, tmp_path / "style.safetensors"), unet, 1.0)


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("form", ["lora_A", "processor", "with alpha", "metadata"])
def test_diffusers(unet, tmp_path, prefix, form):
    if not prefix and form in ("lora_A", "metadata"):
        pytest.skip("nothing says whose names these are")
    tensors: Arrays = {}
    for i, module in enumerate(MODULES):
        down, up, _ = factors(module, 4, i)
        if form == "processor" and module is not CONV:
            path, _, leaf = module.removesuffix(".0").rpartition(".")
            name = f"{prefix}{path}.processor.{leaf}_lora"
            tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        elif form == "processor":
            tensors |= {f"{prefix}{module}.lora.down.weight": down,
                        f"{prefix}{module}.lora.up.weight": up}  # fmt: skip
            tensors[f"{prefix}{module}.alpha"] = np.array(4, np.float32)
        else:
            tensors |= {f"{prefix}{module}.lora_A.weight": down,
                        f"{prefix}{module}.lora_B.weight": up}  # fmt: skip
        if form == "with alpha":
            tensors[f"{prefix}{module}.alpha"] = np.array(1, np.float32)
    about = {"unet.r": 4, "unet.lora_alpha": 12, "unet.alpha_pattern": {}}
    metadata = {"lora_adapter_metadata": json.dumps(about)} if form == "metadata" else None
    (tmp_path / "style").mkdir()
    save_file(tensors, tmp_path / "style" / "pytorch_lora_weights.safetensors", metadata)
    scaling = {"with alpha": 0.25, "metadata": 3.0}.get(form, 1.0)
    check(merged(tmp_path, tmp_path / "style"), unet, scaling)


def test_what_the_model_lacks_is_named_and_may_be_excluded(unet, tmp_path):
    tensors: Arrays = {}
    for i, module in enumerate(MODULES):
        down, up, _ = factors(module, 4, i)
        tensors |= {
            f"{kohya(module)}.lora_down.weight": down,
            f"{kohya(module)}.lora_up.weight": up,
        }
    other = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{other}.lora_down.weight": down, f"{other}.lora_up.weight": up}
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(FamilyError, match=re.escape(f"{other}.weight")) as caught:
        merged(tmp_path, tmp_path / "style.safetensors")
    assert "exclude: ['lora_te_*']" in str(caught.value)
    found = merged(tmp_path, tmp_path / "style.safetensors", exclude=["lora_te_*"])
    check(found, unet, 1.0)


def test_a_name_that_may_be_two_is_an_error(tmp_path):
    (tmp_path / "unet").mkdir()
    twins = {name: np.ones((4, 4), np.float32) for name in ("a.b_c.weight", "a_b.c.weight")}
    save_file(twins, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    tensors = {"lora_unet_a_b_c.lora_down.weight": np.ones((2, 4), np.float32),
               "lora_unet_a_b_c.lora_up.weight": np.ones((4, 2), np.float32)}  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(FamilyError) as caught:
        merged(tmp_path, tmp_path / "style.safetensors")
    assert all(name in str(caught.value) for name in twins)


def test_names_of_a_whole_checkpoint(tmp_path):
    """kohya's names for the model inside a file of Stable Diffusion in its original layout."""
    weights = {"model.diffusion_model.input_blocks.1.1.proj_in.weight": np.eye(4, dtype=np.float32)}
    (tmp_path / "unet").mkdir()
    save_file(weights, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    module = "lora_unet_input_blocks_1_1_proj_in"
    down, up = np.ones((1, 4), np.float32), np.ones((4, 1), np.float32)
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up},
              tmp_path / "style.safetensors")  # fmt: skip
    (found,) = merged(tmp_path, tmp_path / "style.safetensors").values()
    assert np.array_equal(found, np.eye(4) + 1)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_x.lora_down.weight": (2, 4)}, "lora_B"),
        ({"lora_unet_x.lora_down.weight": (2, 4), "lora_unet_x.lora_up.weight": (4, 2),
          "lora_unet_x.dora_scale": (4, 1)}, "LoRA"),
        ({"lora_unet_x.hada_w1_a": (2, 4)}, "LyCORIS"),
        ({"lora_unet_x.lokr_w1": (2, 4)}, "LyCORIS"),
        ({f"{PREFIX}x.lora_A.weight": (2, 4), f"{PREFIX}x.lora_B.weight": (4, 2)},
         "adapter_config.json"),
        ({"x.lora_A.weight": (2, 4), "x.lora_B.weight": (4, 2)}, "adapter_config.json"),
        ({"lora_unet_x.lora_down.weight": (2, 4), "lora_unet_x.lora_mid.weight": (2, 2, 3, 3),
          "lora_unet_x.lora_up.weight": (4, 2)}, "kohya"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path, tensors, said):
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, tmp_path / "style.safetensors")
    write_checkpoint(tmp_path / "anchor", {"x.weight": np.ones((4, 4), np.float32)}, "F32")
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"a": tmp_path / "style.safetensors"})
    with pytest.raises(CheckpointError, match=said):
        tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=1)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_is_above_zero(unet, tmp_path, alpha):
    down, up, _ = factors(MODULES[0], 4)
    module = kohya(MODULES[0])
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up,
               f"{module}.alpha": np.array(alpha, np.float32)},
              tmp_path / "style.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="alpha"):
        merged(tmp_path, tmp_path / "style.safetensors")


@pytest.mark.parametrize("text", ["[", "[1]", '{"unet.lora_alpha": "8"}', '{"unet.lora_alpha": 0}',
                                  '{"unet.alpha_pattern": {"(": 1}}'])  # fmt: skip
def test_metadata_of_another_kind_are_an_error(unet, tmp_path, text):
    down, up, _ = factors(MODULES[0], 4)
    tensors = {f"unet.{MODULES[0]}.lora_A.weight": down, f"unet.{MODULES[0]}.lora_B.weight": up}
    save_file(tensors, tmp_path / "style.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=r"lora_adapter_metadata|alpha_pattern"):
        merged(tmp_path, tmp_path / "style.safetensors")


def test_what_follows_tokens_is_no_change_of_weights(tmp_path):
    weights = {"model.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32)}
    write_checkpoint(tmp_path / "anchor", weights, "F32")
    write_adapter(tmp_path / "a", pair("model.layers.0.mlp.up_proj", 4, 4),
                  alora_invocation_tokens=[1, 2])  # fmt: skip
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"a": tmp_path / "a"})
    with pytest.raises(CheckpointError, match="alora_invocation_tokens") as caught:
        tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=1)
    assert "merge_and_unload" not in str(caught.value)  # PEFT cannot either
