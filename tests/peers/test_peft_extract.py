"""Adapters that taskvec extracts, loaded by PEFT: the merged model has the weights that it should.

The reference is θ_pre + B A of a full SVD of θ_ft − θ_pre in float64, cut at the adapter's rank.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import taskvec as tv

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed here"),
    # PEFT 0.21 asks transformers 5 for an attribute that has a new name there.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def llama(seed: int, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tied_llama(seed: int) -> Any:
    return llama(seed, tied=True)


def gpt2(seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32)
    )


@pytest.fixture(params=[llama, tied_llama, gpt2], ids=["llama", "tied llama", "gpt2"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tv.Family:
    """An anchor and a fine-tune that moved all but biases of linear layers."""
    anchor, other = request.param(0), request.param(1)
    anchor.save_pretrained(tmp_path / "anchor")
    with torch.no_grad():
        for (name, w), v in zip(anchor.named_parameters(), other.parameters(), strict=True):
            if name.endswith("wte.weight"):
                continue  # tied, and PEFT would part it from the head: refused
            if w.ndim == 2:  # a spectrum that falls off
                left, values, right = torch.linalg.svd(v, full_matrices=False)
                w += (
                    left * values * (0.6 + 0.3 * torch.rand(())) ** torch.arange(len(values))
                ) @ right
            elif "ln_" in name or "norm" in name:
                w += 0.01 * torch.randn_like(w)
    anchor.save_pretrained(tmp_path / "math")
    return tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})


def state(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: w.double().numpy() for name, w in model.state_dict().items()}


def merged(root: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What PEFT makes of anchor and adapter."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "anchor")
    loaded = peft.PeftModel.from_pretrained(model, root / "lora").merge_and_unload()
    return {name: w.detach().double().numpy() for name, w in loaded.state_dict().items()}


def best(tau: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    left, values, right = np.linalg.svd(tau, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("shape", [{"rank": 5}, {"energy": 0.8}], ids=["rank", "energy"])
def test_peft_gives_the_best_approximation(
    family: tv.Family, tmp_path: Path, shape: dict[str, Any]
) -> None:
    done = tv.extract(family, tmp_path / "lora", form="lora", rest="drop", **shape)
    anchor, tuned, got = state(tmp_path / "anchor"), state(tmp_path / "math"), merged(tmp_path)
    ranks = {row.name: row.rank for row in done.factored if row.kept == "lora"}
    assert len(ranks) >= 8
    assert len(set(ranks.values())) > 1 or "rank" in shape
    for name, w in anchor.items():
        change = best(tuned[name] - w, ranks[name]) if name in ranks else 0
        assert np.allclose(got[name], w + change, rtol=0, atol=2e-6), name
        assert name not in ranks or np.abs(change).max() > 1e-3


@pytest.mark.filterwarnings("ignore:the saved embedding is tied:taskvec.TaskvecWarning")
def test_peft_loads_modules_that_are_saved_whole(family: tv.Family, tmp_path: Path) -> None:
    done = tv.extract(family, tmp_path / "lora", form="lora", rest="save", rank=64)
    tuned, got = state(tmp_path / "math"), merged(tmp_path)
    assert done.lost < 1e-9
    assert {row.kept for row in done.factored} >= {"saved"}
    for name, w in tuned.items():
        assert np.allclose(got[name], w, rtol=0, atol=2e-6), name
