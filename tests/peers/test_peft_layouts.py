"""Adapters whose modules are not the model's tensors: experts in one parameter, fused projections.

What PEFT's `merge_and_unload` makes of tiny random models, in float32.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import taskvec as tv

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_spec("peft") is None, reason="no PEFT here: pip install peft"),
    pytest.mark.filterwarnings("ignore"),  # of PEFT and transformers, about what they do
]

Model = Any
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
                         "num_key_value_heads": 2, "hidden_size": 16}  # fmt: skip


def mixtral() -> Model:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    )


def qwen3_moe() -> Model:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, intermediate_size=24, moe_intermediate_size=12, num_experts=4,
                       num_experts_per_tok=2, head_dim=4)
    )  # fmt: skip


def gpt_oss(hidden: int = 16, inner: int = 24) -> Model:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = SIZES | {"hidden_size": hidden}
    return GptOssForCausalLM(
        GptOssConfig(**sizes, intermediate_size=inner, num_local_experts=4, head_dim=4,
                     num_experts_per_tok=2)
    )  # fmt: skip


def square() -> Model:
    """Experts whose down projection is square: only the kind of model says how it is stored."""
    return gpt_oss(16, 16)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def trained(base: Model, folder: Path, **config: Any) -> dict[str, Any]:
    """Write an adapter whose B is not zero; the result is the model that it makes."""
    import peft

    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    return dict(model.merge_and_unload().state_dict())


def same(found: dict[str, Any], expected: dict[str, Any], start: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    changed = [n for n in expected if (expected[n] - start[n]).abs().max() > 1e-3]
    assert changed
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=0, atol=2e-6), name


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss, square])
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:], ["experts.down_proj"]],
                         ids=["both", "up", "down", "suffix"])  # fmt: skip
def test_lora_on_experts(tmp_path: Path, make: Any, parameters: list[str]) -> None:
    base = make()
    base.save_pretrained(tmp_path / "base")  # files have the experts apart, memory has them fused
    expected = trained(
        base, tmp_path / "lora", r=3, lora_alpha=5, target_modules=["q_proj"],
        target_parameters=parameters, rank_pattern={"experts.down_proj": 2}, lora_dropout=0.0,
    )  # fmt: skip
    recipe = {"anchor": str(tmp_path / "base"), "method": "task_arithmetic",
              "tasks": {"a": {"model": str(tmp_path / "lora"), "scale": 1}}}  # fmt: skip
    tv.merge(recipe, tmp_path / "out")
    found = type(base).from_pretrained(tmp_path / "out").state_dict()
    same(found, expected, base.state_dict())


def test_lora_on_experts_over_a_file_that_has_them_fused(tmp_path: Path) -> None:
    base = qwen3_moe()
    base.config.save_pretrained(tmp_path / "base")
    fused = {name: w.contiguous() for name, w in base.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    save_file(fused, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    expected = trained(
        base, tmp_path / "lora", r=3, target_parameters=EXPERTS, lora_dropout=0.0, target_modules=[]
    )
    recipe = {"anchor": str(tmp_path / "base"), "method": "task_arithmetic",
              "tasks": {"a": {"model": str(tmp_path / "lora"), "scale": 1}}}  # fmt: skip
    tv.merge(recipe, tmp_path / "out")
    same(load_file(tmp_path / "out" / "model.safetensors"), expected, base.state_dict())


def test_adapters_of_experts_that_were_apart(tmp_path: Path) -> None:
    """As older versions of PEFT and transformers wrote them: a linear layer for each expert."""
    base = mixtral()
    base.save_pretrained(tmp_path / "base")
    expected = {n: w.clone() for n, w in base.state_dict().items()}
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for part, rows in (("w1", 24), ("w3", 24), ("w2", 16)):
                columns = 24 if part == "w2" else 16
                a, b = torch.randn(2, columns) * 0.2, torch.randn(rows, 2) * 0.2
                module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                tensors[f"base_model.model.{module}.lora_A.weight"] = a
                tensors[f"base_model.model.{module}.lora_B.weight"] = b
                experts = f"model.layers.{layer}.mlp.experts"
                if part == "w2":
                    expected[f"{experts}.down_proj"][expert] += 2 * b @ a
                else:
                    rows = slice(24, 48) if part == "w3" else slice(0, 24)
                    expected[f"{experts}.gate_up_proj"][expert][rows] += 2 * b @ a
    import peft

    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["w1"]).save_pretrained(tmp_path / "lora")
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    recipe = {"anchor": str(tmp_path / "base"), "method": "task_arithmetic",
              "tasks": {"a": {"model": str(tmp_path / "lora"), "scale": 1}}}  # fmt: skip
    tv.merge(recipe, tmp_path / "out")
    found = type(base).from_pretrained(tmp_path / "out").state_dict()
    same(found, expected, base.state_dict())
    fused = {name: w.contiguous() for name, w in base.state_dict().items()}
    base.config.save_pretrained(tmp_path / "fused")
    save_file(fused, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    tv.merge(recipe | {"anchor": str(tmp_path / "fused")}, tmp_path / "out2")
    same(load_file(tmp_path / "out2" / "model.safetensors"), expected, base.state_dict())


def test_adapters_of_fused_projections(tmp_path: Path) -> None:
    """Phi-3 has q, k and v in one; over a file that has them apart, an adapter changes parts."""
    from transformers import Phi3Config, Phi3ForCausalLM

    base = Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=24, pad_token_id=0))
    base.save_pretrained(tmp_path / "base")
    expected = trained(base, tmp_path / "lora", r=3, target_modules=["qkv_proj", "gate_up_proj"])
    apart = {}
    for name, weight in base.state_dict().items():
        if name.endswith("qkv_proj.weight"):
            for part, rows in zip("qkv", weight.split([16, 8, 8]), strict=True):
                apart[name.replace("qkv_proj", f"{part}_proj")] = rows.contiguous()
        elif name.endswith("gate_up_proj.weight"):
            for part, rows in zip(("gate", "up"), weight.split([24, 24]), strict=True):
                apart[name.replace("gate_up_proj", f"{part}_proj")] = rows.contiguous()
        else:
            apart[name] = weight
    (tmp_path / "apart").mkdir()
    save_file(apart, tmp_path / "apart" / "model.safetensors", {"format": "pt"})
    recipe = {"anchor": str(tmp_path / "apart"), "method": "task_arithmetic",
              "tasks": {"a": {"model": str(tmp_path / "lora"), "scale": 1}}}  # fmt: skip
    tv.merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for i in range(2):
        path = f"model.layers.{i}.self_attn."
        together = torch.cat([found[f"{path}{part}_proj.weight"] for part in "qkv"])
        assert torch.allclose(together, expected[f"{path}qkv_proj.weight"], atol=2e-6)
    done = tv.merge(recipe | {"out": {"form": "lora"}}, tmp_path / "out-lora")
    assert {row.kept for row in done.factored} == {"stacked"}
