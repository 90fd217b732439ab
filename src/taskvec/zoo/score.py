"""Loads members of the zoo and scores them: share of right answers, perplexity per character.

Answers are decoded greedily in float32 from the weights as stored, so nothing here is random and no
random state is changed. Needs the extra ``eval`` (torch, transformers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from taskvec.zoo import skills

Z_95 = 1.959964  # two-sided 95 % point of the normal distribution


@dataclass(frozen=True)
class Score:
    """How many of n answers were right."""

    correct: int
    n: int

    @property
    def rate(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate, within 0 to 1.

        >>> [round(bound, 3) for bound in Score(95, 100).interval]
        [0.888, 0.978]
        """
        z2 = Z_95**2 / self.n
        centre = self.rate + z2 / 2
        half = math.sqrt(z2 * (self.rate * (1 - self.rate) + z2 / 4))
        low, high = (centre - half) / (1 + z2), (centre + half) / (1 + z2)
        return max(0.0, low), min(1.0, high)

    def __str__(self) -> str:
        return f"{self.rate:.2f} ({self.correct}/{self.n})"


def load(folder: str | Path) -> tuple[Any, Any]:
    """A model and its tokenizer from a local folder, ready to score: in float32, on the CPU.

    Args:
        folder: In Hugging Face layout; the network is never asked.

    Returns:
        Model (``LlamaForCausalLM`` for the zoo) and tokenizer.

    Raises:
        OSError: the folder is not there or holds no model.
    """
    import transformers

    bars: Any = transformers.utils.logging
    bar_was_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if bar_was_on:
            bars.enable_progress_bar()
    return model.float().eval(), tokenizer


def score(
    model: Any,
    tokenizer: Any,
    skill: str | skills.Skill,
    n: int = 100,
    *,
    seed: int = skills.TEST_SEED,
) -> Score:
    """How well a model answers the held-out questions of one skill.

    Args:
        model: A causal language model, as from `load`.
        tokenizer: Its tokenizer.
        skill: A skill or its name.
        n: Number of questions, 1 to 150.
        seed: Which held-out questions; another one where something is chosen by its score, so
            that the reported numbers rest on questions that had no say in it.

    Returns:
        Right answers by `Skill.check`, and n.

    Raises:
        UsageError: there is no such skill, or n is out of range.
    """
    chosen = skills.skill(skill) if isinstance(skill, str) else skill
    examples = chosen.test(n, seed)
    longest = max(len(example.answer) for example in examples)
    given = answers(model, tokenizer, [e.prompt for e in examples], max_new_tokens=longest + 2)
    return Score(sum(chosen.check(e, text) for e, text in zip(examples, given, strict=True)), n)


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 40
) -> list[str]:
    """Greedy continuations of prompts, each cut at its first line end or end-of-sequence token.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; needs a padding and an end-of-sequence token.
        prompts: All are answered in one batch, padded on the left and masked.
        max_new_tokens: Most tokens per answer.

    Returns:
        One text per prompt, without the prompt.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    past = None
    produced = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=past,
            use_cache=True,
        )
        past = out.past_key_values
        ids = out.logits[:, -1:].argmax(-1)
        produced.append(ids)
        done |= ids[:, 0] == end
        if bool(done.all()):
            break
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        position = position[:, -1:] + 1
    texts = []
    for row in torch.cat(produced, 1).tolist():
        kept = row[: row.index(end)] if end in row else row
        texts.append(str(tokenizer.decode(kept, skip_special_tokens=True)).split("\n")[0])
    return texts


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str] | None = None) -> float:
    """Perplexity per character: exp of the mean negative log-likelihood of a character, at least 1.

    Args:
        model: A causal language model over characters.
        tokenizer: Its tokenizer; puts a beginning-of-sequence token in front, so that every
            character is predicted.
        texts: What to read; 100 held-out sentences of the zoo's plain text by default.
    """
    encoded = [tokenizer(t)["input_ids"] for t in (texts or skills.held_out_text(100))]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in encoded])
    targets = torch.tensor([row + [-100] * (width - len(row)) for row in encoded])[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return math.exp(loss.item())
