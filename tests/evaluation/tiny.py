"""Tiny models in memory: a random Llama with a byte-pair tokenizer made here."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from taskvec.running.model import Model, wrap  # noqa: E402

TEXT = (
    "The red fox sees the old gate. The old hen sees a red gate and the fox sees the hen. "
    "Question: which is red? Answer: the gate, the fox and the gate. 0 1 2 3 4 5 6 7 8 9"
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(
    *,
    adds_bos: bool = True,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    template: str | None = TEMPLATE,
) -> Any:
    """Byte-level byte pairs of a few words, so that a space belongs to the word after it."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator([TEXT] * 3, trainer)
    if adds_bos and bos is not None:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos or bos
    )
    made.chat_template = template
    return made


def llama(words: Any, *, context: int = 64, seed: int = 0, scale: float = 0.2) -> Any:
    """A random Llama in float32 for a tokenizer; its logits are far apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=None,
            initializer_range=scale,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).float().eval()


def model(*, context: int = 64, seed: int = 0, **about: Any) -> Model:
    """A random Llama with its tokenizer; see `tokenizer`."""
    words = tokenizer(**about)
    return wrap(llama(words, context=context, seed=seed), words, "tiny")
