"""Several adapters as one: against PEFT's own combination, and loaded by PEFT."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import taskvec as tv

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_spec("peft") is None, reason="no PEFT here: pip install peft"),
    pytest.mark.filterwarnings("ignore"),  # of PEFT and transformers, about what they do
]

Model = Any


def llama() -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=60,
                    num_attention_heads=4, num_key_value_heads=2)
    )  # fmt: skip


def gpt2() -> Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=8))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def trained(base: Model, folder: Path, **config: Any) -> None:
    """An adapter whose B is not zero."""
    import peft

    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)


CASES = [
    (llama, [{"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 6},
             {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 5,
              "use_rslora": True}]),
    (llama, [{"target_modules": "all-linear", "r": 4, "rank_pattern": {"k_proj": 2},
              "alpha_pattern": {"k_proj": 7}},
             {"target_modules": "all-linear", "r": 2, "rank_pattern": {"layers.1.*": 5}}]),
    (llama, [{"target_modules": ["embed_tokens", "v_proj"], "r": 4},
             {"target_modules": ["embed_tokens", "v_proj"], "r": 2}]),
    (gpt2, [{"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True},
            {"target_modules": ["c_attn", "c_proj"], "r": 3, "fan_in_fan_out": True}]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=["plain", "patterns", "embedding", "gpt2"])
def test_the_sum_is_that_of_pefts_cat(tmp_path: Path, case: Any) -> None:
    import peft

    make, configs = case
    base, scales = make(), [0.5, 0.75]  # PEFT takes the root of a weight for some combinations
    base.save_pretrained(tmp_path / "base")
    for name, config in zip("ab", configs, strict=True):
        trained(base, tmp_path / name, **config)
    tasks = {n: {"model": str(tmp_path / n), "scale": s} for n, s in zip("ab", scales, strict=True)}
    recipe = {"anchor": str(tmp_path / "base"), "tasks": tasks, "method": "task_arithmetic",
              "out": {"form": "lora"}}  # fmt: skip
    done = tv.merge(recipe, tmp_path / "out")
    assert {row.kept for row in done.factored} == {"stacked"}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], scales, "sum", combination_type="cat")
    theirs.set_adapter("sum")
    ours = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    ids = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        expected, found = theirs.eval()(ids).logits, ours.eval()(ids).logits
        plain = base.eval()(ids).logits
    assert (expected - plain).abs().max() > 1e-2
    assert torch.allclose(found, expected, rtol=0, atol=2e-5)
    merged = ours.merge_and_unload()
    tv.merge(recipe | {"out": {}}, tmp_path / "model")
    whole = type(base).from_pretrained(tmp_path / "model")
    if case is not CASES[2]:  # PEFT merges into the embedding, which is also a tied head elsewhere
        for name, weight in whole.state_dict().items():
            assert torch.allclose(merged.state_dict()[name], weight, atol=1e-6), name


def test_weights_by_layer_and_signs(tmp_path: Path) -> None:
    """What PEFT's combinations do not have: λ by layer, subtraction."""
    import peft

    base = llama()
    base.save_pretrained(tmp_path / "base")
    for name in "ab":
        trained(base, tmp_path / name, target_modules=["q_proj"], r=4)
    recipe = {
        "anchor": str(tmp_path / "base"), "method": "task_arithmetic", "out": {"form": "lora"},
        "tasks": {"a": {"model": str(tmp_path / "a"), "scale": {"depth": [1, 0.25], "outside": 0}},
                  "b": {"model": str(tmp_path / "b"), "scale": -0.5}},
    }  # fmt: skip
    tv.merge(recipe, tmp_path / "out")
    ours = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").merge_and_unload()
    parts = {
        name: peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        .merge_and_unload().state_dict()
        for name in "ab"
    }  # fmt: skip
    for i, scale in enumerate((1, 0.25)):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        start = base.state_dict()[name].double()
        a, b = (parts[n][name].double() - start for n in "ab")
        assert torch.allclose(
            ours.state_dict()[name].double(), start + scale * a - 0.5 * b, atol=1e-6
        )


def test_modules_that_are_saved_whole(tmp_path: Path) -> None:
    import peft

    base = llama()
    base.save_pretrained(tmp_path / "base")
    trained(base, tmp_path / "a", target_modules=["q_proj"], r=4, modules_to_save=["norm"])
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    state = tmp_path / "a" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(state)
    (norm,) = [name for name in tensors if name.endswith("model.norm.weight")]
    tensors[norm] = tensors[norm] + 0.5
    save_file(tensors, state)
    tasks = {"a": {"model": str(tmp_path / "a"), "scale": 0.5}}
    recipe = {"anchor": str(tmp_path / "base"), "method": "task_arithmetic", "tasks": tasks}
    with pytest.raises(tv.TaskvecError, match=r"model\.norm\.weight"):
        tv.merge(recipe | {"out": {"form": "lora"}}, tmp_path / "no")
    tv.merge(recipe | {"out": {"form": "lora", "rest": "save"}}, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").merge_and_unload()
    assert torch.allclose(model.state_dict()["model.norm.weight"], torch.tensor(1.25))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"]
    assert np.isfinite(float(model.state_dict()["model.norm.weight"].sum()))
