"""Tasks of causal language models: texts, and the positions that count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from taskvec.disentanglement.tasks import LogitRows, ModelTask
from taskvec.errors import DataError
from taskvec.evaluation.evaluate import CONTEXT
from taskvec.extras import require
from taskvec.running.batches import by_length, halving, tokens_at_once
from taskvec.running.encoding import Encoder, Windows, document_rows
from taskvec.running.likelihood import logits_from
from taskvec.running.requests import Message
from taskvec.training.objectives import IGNORED
from taskvec.training.tokens import TokenRow, answer_row

Array = np.ndarray[Any, Any]
Pair = tuple[str, str]  # prompt and answer
Conversation = tuple[Message, ...]
TEXTS = "texts"


def language(
    name: str,
    texts: Sequence[str | Pair | Conversation],
    encoder: Encoder,
    *,
    context: int | None = None,
    batch_tokens: int | None = None,
) -> ModelTask:
    """A task of a causal language model: the next token at every position that counts.

    Args:
        name: For messages.
        texts: All of one kind. Texts: all tokens count, in windows of `context` tokens. Pairs of a
            prompt and an answer, plain texts: the tokens count in which the two together differ
            from the prompt alone, so also one that joins the prompt's last space to the answer.
            Conversations, by the chat template: the tokens of the assistant's answers and what ends
            them count, as in training.
        encoder: The model's.
        context: Tokens of a window over a text; default: the model's, at most 2,048.
        batch_tokens: Tokens of a batch, with padding; default: by the memory there is.

    Raises:
        DataError: texts are missing, kinds are mixed, one is empty, or a prompt with its answer is
            longer than the model's context.
    """
    kinds = {_kind(text) for text in texts}
    if len(kinds) != 1:
        what = f"mix {' and '.join(sorted(kinds))}" if kinds else "are empty"
        raise DataError(f"data of task {name!r} {what}; give texts of one kind")
    width = min(encoder.context, context or CONTEXT)
    rows: list[TokenRow] = []
    examples: list[int] = []
    for number, text in enumerate(texts):
        mine = _token_rows(name, number, text, encoder, width)
        rows += mine
        examples += [number] * len(mine)
    counted = [np.array(row.labels) != IGNORED for row in rows]

    def run(module: Any) -> Iterator[LogitRows]:
        tokens = tokens_at_once(module, batch_tokens)
        for batch in by_length([len(row.tokens) for row in rows], tokens):
            work = partial(_positions, module, rows, counted, encoder.prefix)
            logits = halving(batch, work, encoder.where)
            labels = np.concatenate([np.array(rows[i].labels)[counted[i]] for i in batch])
            owners = np.concatenate([[examples[i]] * int(counted[i].sum()) for i in batch])
            yield LogitRows(require("torch", "train").cat(logits), labels, owners)

    content = [[list(row.tokens), list(row.labels)] for row in rows]
    identity = xxhash.xxh3_128_hexdigest(repr([content, examples]).encode())
    return ModelTask(name, run, identity, has_many_rows=True, is_exact=kinds != {TEXTS})


def _kind(text: str | Pair | Conversation) -> str:
    if isinstance(text, str):
        return TEXTS
    return "pairs" if isinstance(text[0], str) else "conversations"


def _token_rows(
    name: str, number: int, text: str | Pair | Conversation, encoder: Encoder, width: int
) -> list[TokenRow]:
    """Input tokens, each with the correct next token if that position counts."""
    where = f"data of task {name!r}: text {number}"
    if isinstance(text, str):
        found = list(document_rows(encoder, text, Windows(width, width)))
        pads = [[IGNORED] * (len(row.inputs) - len(row.targets)) for row in found]
        rows = zip(found, pads, strict=True)
        windows = [TokenRow(row.inputs, [*pad, *row.targets]) for row, pad in rows]
        if not windows:
            raise DataError(f"{where} is empty; remove it")
        return windows
    if isinstance(text[0], str):
        row = _pair_row(encoder, *text)
    else:
        whole = answer_row(encoder, text, where)
        row = TokenRow(whole.tokens[:-1], whole.labels[1:])
    if all(label == IGNORED for label in row.labels):
        raise DataError(f"{where} has no answer; remove it")
    if len(row.tokens) > encoder.context:
        raise DataError(
            f"{where} has {len(row.tokens)} tokens, the model's context is {encoder.context}; "
            "remove or shorten it"
        )
    return [row]


def _pair_row(encoder: Encoder, prompt: str, answer: str) -> TokenRow:
    """A prompt and the tokens of its answer, each as the correct next token."""
    before, whole = encoder.encode(prompt), encoder.encode(prompt + answer)
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    read = encoder.begun(whole)
    if len(read) == len(whole) and shared == 0:  # nothing stands before the first token
        read = [encoder.prefix, *whole]
    answered = whole[shared:]
    return TokenRow(read[:-1], [IGNORED] * (len(read) - 1 - len(answered)) + answered)


def _positions(
    module: Any, rows: Sequence[TokenRow], counted: Sequence[Array], padding: int, batch: list[int]
) -> list[Any]:
    """Logits where tokens count, by row of a batch, shape (positions, vocabulary)."""
    torch = require("torch", "train")
    place = next(module.parameters()).device
    width = max(len(rows[i].tokens) for i in batch)
    ids = torch.full((len(batch), width), padding)
    for line, i in enumerate(batch):
        ids[line, : len(rows[i].tokens)] = torch.tensor(rows[i].tokens)
    first = min(int(counted[i].argmax()) for i in batch)
    logits = logits_from(module, ids.to(place), first)
    places = [torch.tensor(np.flatnonzero(counted[i]) - first, device=place) for i in batch]
    return [logits[line, positions] for line, positions in enumerate(places)]
