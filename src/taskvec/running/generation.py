"""Answers: a model goes on from prompts, in batches.

Prompts are padded on the left and masked. Without a temperature the most likely token is taken.
With one, each token is drawn by a number in [0, 1) that depends on (seed, sample, draw, step) and
on nothing else: neither the batch that a prompt falls into nor an interruption changes an answer
by more than rounding, and no global random state is read or set. What the model's generation
config says about sampling and penalties does not apply; its end-of-sequence tokens do. Stop texts
count outside of `<think>` blocks only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from taskvec.extras import require
from taskvec.running.batches import by_length, halving, tokens_at_once
from taskvec.running.encoding import Encoder
from taskvec.running.model import Model
from taskvec.running.requests import (
    Answer,
    after_reasoning,
    end_of_reasoning,
    is_reasoning,
    opened_at_end,
)

TAIL = 40  # tokens from the end of an answer in which a stop text is looked for at each step


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt as the model sees it.

    Attributes:
        tokens: Token ids.
        max_new_tokens: Most tokens of the answer.
        stop: Texts at which it is cut.
        temperature: 0: the most likely token.
        key: What draws depend on, besides the step.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    key: str = ""


def answers(
    model: Model,
    queries: Sequence[Query],
    *,
    batch_tokens: int | None = None,
    take: Callable[[int, Answer], object] = lambda place, answer: None,
) -> list[Answer]:
    """The answer to each query.

    Args:
        model: Which model.
        queries: Any number; those of different lengths, limits and stops may be mixed.
        batch_tokens: Tokens of a batch, with padding and answers; default: by the memory there is.
        take: Called with the place of a query and its answer, as soon as it is there.
    """
    found: dict[int, Answer] = {}
    lengths = [len(q.tokens) + q.max_new_tokens for q in queries]

    def work(batch: list[int]) -> list[Answer]:
        return _batch(model, [queries[place] for place in batch])

    for batch in by_length(lengths, tokens_at_once(model.module, batch_tokens, generating=True)):
        for place, answer in zip(batch, halving(batch, work, model.encoder.where), strict=True):
            found[place] = answer
            take(place, answer)
    return [found[place] for place in range(len(queries))]


def _batch(model: Model, queries: Sequence[Query]) -> list[Answer]:
    torch, transformers = require("torch", "eval"), require("transformers", "eval")
    encoder = model.encoder
    width, longest = max(len(q.tokens) for q in queries), max(q.max_new_tokens for q in queries)
    pad = encoder.prefix
    ids = torch.tensor([[pad] * (width - len(q.tokens)) + list(q.tokens) for q in queries])
    mask = torch.tensor([[0] * (width - len(q.tokens)) + [1] * len(q.tokens) for q in queries])
    chooser, stopper = _Chooser(queries, width), _Stopper(queries, width, encoder)
    config = transformers.GenerationConfig(
        max_new_tokens=longest, eos_token_id=sorted(encoder.ends) or None, pad_token_id=pad
    )
    with torch.no_grad(), _config(model.module, config):
        made = model.module.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=transformers.LogitsProcessorList([chooser]),
            stopping_criteria=transformers.StoppingCriteriaList([stopper]),
        )[:, width:].tolist()
    each = zip(queries, made, stopper.done_at, chooser.broken_at, strict=True)
    return [
        _answer(encoder, query, tokens[:done_at], broken_at)
        for query, tokens, done_at, broken_at in each
    ]


@contextmanager
def _config(module: Any, config: Any) -> Iterator[None]:
    """Put a generation config in the place of the model's, which `generate` would fall back on."""
    own, module.generation_config = module.generation_config, config
    try:
        yield
    finally:
        module.generation_config = own


class _Chooser:
    """A logits processor: draws tokens where there is a temperature, and notes broken logits."""

    def __init__(self, queries: Sequence[Query], width: int) -> None:
        self.queries, self.width = queries, width
        self.broken_at: list[int | None] = [None] * len(queries)

    def __call__(self, ids: Any, scores: Any) -> Any:
        torch = require("torch", "eval")
        step = ids.shape[1] - self.width
        broken = (scores.isnan() | scores.isposinf()).any(1).tolist()
        for i, query in enumerate(self.queries):
            if broken[i] and self.broken_at[i] is None:
                self.broken_at[i] = step
            if query.temperature > 0 and not broken[i]:
                shares = (scores[i].double() / query.temperature).softmax(0).cumsum(0)
                point = xxhash.xxh3_64_intdigest(f"{query.key}\0{step}".encode()) / 2**64
                token = torch.searchsorted(shares, point * shares[-1], right=True)
                scores[i] = -torch.inf
                scores[i, token.clamp(max=len(shares) - 1)] = 0
        return scores


class _Stopper:
    """A stopping criterion: a row is done at its own limit, and where a stop text has come.

    Others of its batch go on, and padding is added to it; `done_at` is its length before.
    """

    def __init__(self, queries: Sequence[Query], width: int, encoder: Encoder) -> None:
        self.queries, self.width, self.encoder = queries, width, encoder
        self.before = [_opening(encoder, query) for query in queries]
        self.done_at: list[int | None] = [None] * len(queries)

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        torch = require("torch", "eval")
        made = ids[:, self.width :]
        for i, query in enumerate(self.queries):
            if self.done_at[i] is None and (
                made.shape[1] >= query.max_new_tokens
                or (query.stop and self._has_stopped(i, made[i].tolist()))
            ):
                self.done_at[i] = made.shape[1]
        return torch.tensor([done is not None for done in self.done_at], device=ids.device)

    def _has_stopped(self, place: int, tokens: list[int]) -> bool:
        tail = after_reasoning(self.encoder.decode(tokens[-TAIL:]))
        if not any(stop in tail for stop in self.queries[place].stop):
            return False
        return not is_reasoning(self.before[place] + self.encoder.decode(tokens))


def _opening(encoder: Encoder, query: Query) -> str:
    """`<think>` or the like, if the prompt ends in it, as the templates of some models do."""
    return opened_at_end(encoder.decode(query.tokens[-TAIL:]))


def _answer(encoder: Encoder, query: Query, tokens: list[int], broken_at: int | None) -> Answer:
    """The answer in a row of generated tokens, which goes on with padding after an end token."""
    ended = "length"
    if broken_at is not None and broken_at < len(tokens):
        tokens, ended = tokens[:broken_at], "nan"
    end = next((i for i, token in enumerate(tokens) if token in encoder.ends), None)
    if end is not None:
        tokens, ended = tokens[:end], "end"
    text = _opening(encoder, query) + encoder.decode(tokens)
    start = len(text) if is_reasoning(text) else end_of_reasoning(text)
    cut = min((at for stop in query.stop if (at := text.find(stop, start)) >= 0), default=None)
    if cut is not None:
        text, ended = text[:cut], "stop"
    return Answer(text, len(tokens), ended)
