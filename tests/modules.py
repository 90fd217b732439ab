"""Modules in memory for tests."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")


def llama(seed: int, tie: bool = False) -> Any:
    """A tiny random Llama in bfloat16."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
