"""Against PEFT: what its adapters make of a model, and where its own combining is something else.

Models are tiny and random, adapters are moved as far as training moves them. `merge_and_unload` is
done in float32. Where PEFT merges into a weight that two modules share, its merged model is not the
one that was trained (it warns of that); there the outputs of the unmerged model are compared.
"""

from __future__ import annotations

import copy
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

ROUNDINGS = 8 * 2.0**-24
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
Model = Any


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def llama(*, tied: bool = False) -> Model:
    import transformers

    config = transformers.LlamaConfig(
        **SIZES, hidden_size=16, intermediate_size=40, num_key_value_heads=1,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Model:
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> Model:
    import transformers

    config = transformers.BertConfig(**SIZES, hidden_size=16, intermediate_size=40)
    return transformers.BertForSequenceClassification(config)


def t5() -> Model:
    import transformers

    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=40, num_layers=2, num_heads=2, vocab_size=40
    )
    return transformers.T5ForConditionalGeneration(config)


class Convolutions(torch.nn.Module):
    """A module of no library, with 3 × 2 and 1 × 1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one = torch.nn.Conv2d(3, 8, (3, 2)), torch.nn.Conv2d(8, 6, 1)
        self.head = torch.nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.head(self.one(self.wide(x)).mean((2, 3)))

    def save_pretrained(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        save_file(self.state_dict(), folder / "model.safetensors")


def train(model: Model, **settings: Any) -> Model:
    """The model with an adapter whose every parameter was moved, as if by training."""
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    move(adapted)
    return adapted


def move(adapted: Model) -> None:
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


def weights(model: Model) -> dict[str, np.ndarray[Any, Any]]:
    return {n: t.detach().float().numpy().copy() for n, t in model.state_dict().items()}


def load(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """All that was stored, within float32's rounding of the terms."""
    assert got.keys() <= expected.keys()
    for name, values in got.items():
        bound = ROUNDINGS * max(abs(expected[name]).max(), 2.0**-4)
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=bound, err_msg=name)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "all linear": (llama, {"target_modules": "all-linear"}),
    "rank and alpha patterns": (llama, {
        "lora_alpha": 7, "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 5},
        "alpha_pattern": {r"^model\.layers\.1.*v_proj": 3, "k_proj": 9, "proj": 1},
    }),
    "rank stabilised": (llama, {
        "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2},
    }),
    "some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embedding and head": (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "modules to save": (llama, {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"],
    }),
    "trained tokens": (llama, {
        "target_modules": ["q_proj"], "trainable_token_indices": [17, 3, 4],
    }),
    "DoRA": (llama, {"target_modules": "all-linear", "use_dora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, biases of adapted layers": (gpt2, {
        "target_modules": ["c_attn", "c_proj"], "bias": "lora_only",
    }),
    "gpt2, all biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "gpt2, biases of the adapter": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "bert": (bert, {
        "target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "all",
    }),
    "t5": (t5, {"target_modules": ["q", "v", "wi"]}),
    "convolutions": (Convolutions, {"target_modules": ["wide", "one", "head"], "bias": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_task_with_scale_1_is_the_merged_model(case: str, dtype: Any, tmp_path: Path) -> None:
    make, settings = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "base")
    adapted = train(model, r=4, **settings)
    if dtype == torch.bfloat16:  # the adapter alone, as it is trained by many; merged in float32
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype).float()
    adapted.save_pretrained(tmp_path / "lora")
    if dtype == torch.bfloat16:
        narrow(tmp_path / "lora" / "adapter_model.safetensors", dtype)
    expected = weights(adapted.merge_and_unload())
    family = tv.Family({"a": tmp_path / "lora"}, tmp_path / "base")
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"a": 1.0})
    got = load(tmp_path / "out")
    assert_same(got, expected)
    before = load(tmp_path / "base")
    assert any((got[name] != before[name]).any() for name in got)


def narrow(path: Path, dtype: Any) -> None:
    """Store what was trained in another dtype; an embedding's own weights stay as they are."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    trained = {n: t.to(dtype) for n, t in tensors.items() if not n.endswith("base_layer.weight")}
    save_file(tensors | trained, path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [17, 3]},
    ],
    ids=["head", "embedding", "both", "whole embedding", "tokens"],
)
def test_tied_models_answer_as_the_adapted_model(settings: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    adapted = train(copy.deepcopy(model), r=4, **settings)
    adapted.save_pretrained(tmp_path / "lora")
    family = tv.Family({"a": tmp_path / "lora"}, tmp_path / "base")
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"a": 1.0})
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[1, 3, 17, 9, 30]])
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
        got, plain = ours.eval()(tokens).logits, model.eval()(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-2


def two_adapters(folder: Path) -> tuple[Model, dict[str, dict[str, Any]]]:
    """A model with adapters `a` and `b`, saved as folders, and what each of them adds."""
    import peft

    model = llama()
    model.save_pretrained(folder / "base")
    before = weights(model)
    found = {}
    for name, settings in (("a", {"r": 4, "lora_alpha": 8}), ("b", {"r": 4, "lora_alpha": 2})):
        alone = train(copy.deepcopy(model), target_modules=["q_proj", "up_proj"], **settings)
        alone.save_pretrained(folder / name)
        after = weights(alone.merge_and_unload())
        found[name] = {n: after[n].astype(float) - before[n] for n in before}
    adapted = peft.PeftModel.from_pretrained(model, folder / "a", adapter_name="a")
    adapted.load_adapter(folder / "b", adapter_name="b")
    return adapted, found


def test_several_adapters_are_added_as_their_weighted_sum(tmp_path: Path) -> None:
    adapted, change = two_adapters(tmp_path)
    scale = {"a": 0.7, "b": -0.4}
    family = tv.Family({"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "base")
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=scale)
    before = load(tmp_path / "base")
    expected = {
        name: before[name] + sum(scale[t] * change[t][name] for t in scale) for name in before
    }
    assert_same(load(tmp_path / "out"), expected)
    # PEFT's `cat` is that sum too; its `linear` adds A and B apart from each other.
    adapted.add_weighted_adapter(["a", "b"], [0.7, -0.4], "cat", combination_type="cat")
    adapted.add_weighted_adapter(["a", "b"], [0.7, 0.4], "linear", combination_type="linear")
    added = {}
    for kind in ("cat", "linear"):
        adapted.set_adapter(kind)
        after = weights(copy.deepcopy(adapted).merge_and_unload())
        added[kind] = {name: after[name].astype(float) - before[name] for name in before}
    name = "model.layers.0.self_attn.q_proj.weight"
    ours = {"cat": expected[name] - before[name],
            "linear": 0.7 * change["a"][name] + 0.4 * change["b"][name]}  # fmt: skip
    size = np.linalg.norm(ours["linear"])
    assert np.linalg.norm(added["cat"][name] - ours["cat"]) < 1e-5 * size
    assert np.linalg.norm(added["linear"][name] - ours["linear"]) > 0.2 * size
