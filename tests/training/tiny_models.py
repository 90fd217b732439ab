"""Tiny random models in folders, with data that they can learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.training.test_tokens import CHATML, tokenizer
from tokenizers.processors import TemplateProcessing

WIDTH = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
VISION = WIDTH | {"image_size": 8, "patch_size": 4}


def save(config: Any, kind: str, folder: Path, **options: Any) -> Path:
    """A model with random weights of a spread that tells inputs apart, as a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(transformers, kind)(config)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
    module.to(**options).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """A causal language model of letters; q, k and v are one tensor; answers in ChatML."""
    made = tokenizer(CHATML, bos=None)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=len(made), n_positions=96,
        eos_token_id=made.eos_token_id, bos_token_id=None, resid_pdrop=0.1,
    )  # fmt: skip
    made.save_pretrained(folder)
    return save(config, "GPT2LMHeadModel", folder, dtype=torch.bfloat16)


def codegen(folder: Path) -> Path:
    """A causal language model whose attention and MLPs the layer table does not know."""
    made = tokenizer(CHATML, bos=None)
    config = transformers.CodeGenConfig(
        n_embd=16, n_layer=2, n_head=4, rotary_dim=4, vocab_size=len(made), n_positions=96,
        n_ctx=96, eos_token_id=made.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    made.save_pretrained(folder)
    return save(config, "CodeGenForCausalLM", folder)


def bert(folder: Path, labels: int | None = None) -> Path:
    """A model of texts, with a head of its own for so many classes or without one."""
    made = tokenizer()
    made.save_pretrained(folder)
    config = transformers.BertConfig(**WIDTH, vocab_size=len(made), max_position_embeddings=64)
    if labels is None:
        return save(config, "BertModel", folder)
    config.num_labels = labels
    return save(config, "BertForSequenceClassification", folder)


def vit(folder: Path) -> Path:
    """A model of images of 8 × 8 px, without a head."""
    return save(transformers.ViTConfig(**VISION), "ViTModel", folder)


def dinov2(folder: Path) -> Path:
    """DINOv2 of images of 8 × 8 px, without a head."""
    width = {name: size for name, size in VISION.items() if name != "intermediate_size"}
    return save(transformers.Dinov2Config(**width), "Dinov2Model", folder)


def without(folder: Path, part: str) -> Path:
    """A folder, from whose weights those with a part in their name were taken."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, file, {"format": "pt"})
    return folder


def clip(folder: Path) -> Path:
    """A model of images and texts."""
    made = tokenizer()
    ending = (made.eos_token, made.eos_token_id)  # where CLIP takes a text's features from
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {made.eos_token}", special_tokens=[ending]
    )
    made.save_pretrained(folder)
    ids = {"eos_token_id": made.eos_token_id, "bos_token_id": 1, "pad_token_id": 0}
    text = WIDTH | ids | {"vocab_size": len(made), "max_position_embeddings": 40}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return save(config, "CLIPModel", folder)


def pairs(path: Path, count: int = 12) -> Path:
    """Questions and answers, a line each."""
    rows = [{"prompt": f"{i} and {i}?", "response": f"{2 * i}."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(path: Path, count: int = 16) -> Path:
    """Texts of two classes, told apart by a word."""
    rows = [f"{'pos' if i % 2 else 'neg'}\tit is {'fine' if i % 2 else 'bad'} {i}"
            for i in range(count)]  # fmt: skip
    path.write_text("\n".join(["label\ttext", *rows]) + "\n")
    return path


def shapes(path: Path, count: int = 24) -> Path:
    """Images of 8 × 8 px, with stripes across or down: two classes."""
    random = np.random.default_rng(0)
    stripes = np.tile(np.array([0, 200] * 4, np.uint8), (8, 1))
    images = [np.stack([stripes if i % 2 else stripes.T] * 3, -1) for i in range(count)]
    noise = random.integers(0, 50, (count, 8, 8, 3), np.uint8)
    np.savez(path, x=np.stack(images) + noise, y=np.arange(count) % 2,
             classes=np.array(["across", "down"]))  # fmt: skip
    return path
