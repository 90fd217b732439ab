"""The programs that read what taskvec writes: transformers, PEFT, sentence-transformers, llama.cpp.

Six kinds of models, tiny and random: dense, with experts, multimodal, an encoder, made with an
adapter, and a stack. Each is loaded without a warning, and answers as the merged weights do.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tested_architectures import loaded, models

import taskvec as tv

# llama.cpp's own converter, where its sources are at hand; no registry of Python has it installed.
CONVERTER = os.environ.get("TASKVEC_LLAMA_CPP", "")

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def family(name: str, root: Path) -> tuple[Any, dict[str, Any]]:
    """A model, changed by less than it is large, in two folders; and a recipe of both."""
    model = models()[name]()
    model.save_pretrained(root / "anchor")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(root / "tuned")
    tasks = {"a": {"model": str(root / "tuned"), "scale": 0.5}}
    return model, {"anchor": str(root / "anchor"), "method": "task_arithmetic", "tasks": tasks}


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "llava", "bert"])
def test_transformers_loads_a_merge_without_a_warning(name: str, tmp_path: Path) -> None:
    model, recipe = family(name, tmp_path)
    tv.merge(recipe, tmp_path / "out")
    found = loaded(type(model), tmp_path / "out")
    assert found is not None
    start = type(model).from_pretrained(tmp_path / "anchor").state_dict()
    for key, tuned in model.state_dict().items():
        expected = start[key] + 0.5 * (tuned - start[key])
        assert torch.allclose(found[key], expected, rtol=0, atol=1e-6), key


def test_transformers_loads_a_stack_without_a_warning(tmp_path: Path) -> None:
    model, recipe = family("llama", tmp_path)
    pieces = [{"model": recipe["anchor"], "blocks": [0, 2]},
              {"model": str(tmp_path / "tuned"), "blocks": [1, 2]}]  # fmt: skip
    tv.merge({"target": {"stack": pieces}, "method": "passthrough"}, tmp_path / "out")
    found = loaded(type(model), tmp_path / "out")
    assert found is not None
    last = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(found[last], model.state_dict()[last.replace("2", "1")])


@pytest.mark.filterwarnings("ignore")  # of PEFT, about what it does to configs
def test_peft_loads_an_adapter_and_transformers_what_it_makes(tmp_path: Path) -> None:
    import peft

    base = models()["llama"]()
    base.save_pretrained(tmp_path / "base")
    tasks = {}
    for name in ("a", "b"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
        adapted = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for key, weight in adapted.named_parameters():
                if "lora_" in key:
                    weight.normal_(0, 0.2)
        adapted.save_pretrained(tmp_path / name)
        tasks[name] = {"model": str(tmp_path / name), "scale": 0.5}
    recipe = {"anchor": str(tmp_path / "base"), "method": "task_arithmetic", "tasks": tasks}
    tv.merge(recipe, tmp_path / "out")
    tv.merge(recipe | {"out": {"form": "lora"}}, tmp_path / "lora")
    whole = loaded(type(base), tmp_path / "out")
    assert whole is not None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    assert not [w for w in said if "missing" in str(w.message) or "unexpected" in str(w.message)]
    for key, weight in model.merge_and_unload().state_dict().items():
        assert torch.allclose(weight, whole[key], rtol=0, atol=1e-6), key


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="no sentence-transformers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_transformers_embeds_with_a_merge(tmp_path: Path) -> None:
    import sentence_transformers as st
    import transformers as tf
    from sentence_transformers import models as modules

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = tf.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = tf.BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    weights = tf.BertModel(config)
    for name in ("anchor", "tuned"):
        weights.save_pretrained(tmp_path / f"{name}-bert")
        tokenizer.save_pretrained(tmp_path / f"{name}-bert")
        words_model = modules.Transformer(str(tmp_path / f"{name}-bert"))
        pooling = modules.Pooling(16, "mean")
        dense = modules.Dense(16, 8)
        st.SentenceTransformer(modules=[words_model, pooling, dense]).save(str(tmp_path / name))
        with torch.no_grad():
            for weight in weights.parameters():
                weight += 0.05 * torch.randn_like(weight)
    tasks = {"a": {"model": str(tmp_path / "tuned"), "scale": 1}}
    recipe = {"anchor": str(tmp_path / "anchor"), "method": "task_arithmetic", "tasks": tasks}
    tv.merge(recipe, tmp_path / "out")
    texts = ["a b", "c d e"]
    found = st.SentenceTransformer(str(tmp_path / "out"))
    assert [type(module).__name__ for module in found] == ["Transformer", "Pooling", "Dense"]
    tuned = st.SentenceTransformer(str(tmp_path / "tuned"))
    tuned[2].load_state_dict(st.SentenceTransformer(str(tmp_path / "anchor"))[2].state_dict())
    assert torch.allclose(
        torch.tensor(found.encode(texts)), torch.tensor(tuned.encode(texts)), atol=1e-5
    )


@pytest.mark.skipif(not CONVERTER, reason="TASKVEC_LLAMA_CPP names no convert_hf_to_gguf.py")
def test_llama_cpp_converts_a_merge(tmp_path: Path) -> None:
    import sentencepiece
    import transformers as tf

    tokens = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn letters from", "and a few more"] * 8),
        model_writer=tokens, vocab_size=300, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=320,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    for name in ("anchor", "tuned"):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.model").write_bytes(tokens.getvalue())
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.01 * torch.randn_like(weight)
    tasks = {"a": {"model": str(tmp_path / "tuned"), "scale": 0.5}}
    recipe = {"anchor": str(tmp_path / "anchor"), "method": "task_arithmetic", "tasks": tasks}
    tv.merge(recipe, tmp_path / "out")
    for name in ("anchor", "out"):
        done = subprocess.run(
            [sys.executable, CONVERTER, tmp_path / name, "--outfile", tmp_path / f"{name}.gguf",
             "--outtype", "f32"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    sizes = {name: (tmp_path / f"{name}.gguf").stat().st_size for name in ("anchor", "out")}
    assert abs(sizes["anchor"] - sizes["out"]) < 4096  # names in the metadata
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
