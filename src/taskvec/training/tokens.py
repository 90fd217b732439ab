"""Texts as tokens to train on: windows over running text, answers in conversations, labelled texts.

In running text every token is learned. In a conversation only the assistant's answers are, with
what ends them: the tokens that lie in what the chat template makes of an answer behind its opening
(what a prompt for generation ends with), up to the first token that ends a turn. Where the template
puts no such token behind the last answer, the end-of-sequence token is added and learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.errors import DataError, UsageError
from taskvec.extras import require
from taskvec.running.encoding import UNLIMITED, Encoder
from taskvec.training.data import Classified, Conversations, Documents
from taskvec.training.loop import Examples
from taskvec.training.objectives import IGNORED

WINDOW = 512  # tokens, by default, if the model reads that many


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens, and those that are learned.

    Attributes:
        tokens: Ids.
        labels: The same, or −100 where nothing is learned.
    """

    tokens: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True, slots=True)
class Fitting:
    """How long a row may be.

    Attributes:
        context: Most tokens; None: what the model reads, and `WINDOW` of running text.
        truncate: Whether longer ones are cut at the end, instead of refused.
    """

    context: int | None = None
    truncate: bool = False


def window_rows(encoder: Encoder, data: Documents, fitting: Fitting) -> list[TokenRow]:
    """Texts behind each other, each with what begins and ends a text, cut into windows.

    Raises:
        UsageError: the window is longer than the model reads.
    """
    length = _length(encoder, fitting, default=min(WINDOW, encoder.context))
    end = encoder.tokenizer.eos_token_id
    stream: list[int] = []
    for text in data.items:
        stream += [*encoder.begun(encoder.encode(text)), *([] if end is None else [end])]
    windows = [stream[at : at + length] for at in range(0, len(stream), length)]
    return [TokenRow(window, window) for window in windows if len(window) > 1]


def answer_rows(
    encoder: Encoder, data: Conversations, fitting: Fitting
) -> tuple[list[TokenRow], int]:
    """Conversations with their answers to be learned, and how many were left out.

    Without a chat template, texts stand behind each other as they are.

    Raises:
        DataError: one is too long, or its answers cannot be located.
        UsageError: the limit is above what the model reads, or the tokenizer gives no offsets.
    """
    length = _length(encoder, fitting, default=encoder.context)
    if not encoder.tokenizer.is_fast:
        raise UsageError(
            f"{encoder.where}: its tokenizer gives no positions of tokens in the text; "
            "convert it to a fast one (tokenizer.json)"
        )
    rows, dropped = [], 0
    for messages, where in zip(data.items, data.places, strict=True):
        row = answer_row(encoder, messages, where)
        if len(row.tokens) > length:
            if not fitting.truncate:
                raise DataError(
                    f"{where}: has {len(row.tokens)} tokens, the limit is {length}; "
                    "truncate such examples (--truncate), or leave it out"
                )
            row = TokenRow(row.tokens[:length], row.labels[:length])
        if all(label == IGNORED for label in row.labels[1:]):
            dropped += 1
            continue
        rows.append(row)
    return rows, dropped


def answer_row(encoder: Encoder, messages: Sequence[tuple[str, str]], where: str) -> TokenRow:
    """One conversation with its answers to be learned."""
    text, spans = _spans(encoder, messages, where)
    found = encoder.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    tokens, places = list(found["input_ids"]), list(found["offset_mapping"])
    labels = [IGNORED] * len(tokens)
    for start, stop in spans:
        inside = [i for i, (a, b) in enumerate(places) if a < stop and b > start]
        ended = False
        for i in inside:
            if ended:
                break
            labels[i] = tokens[i]
            # A turn that ends as the model's answers do is all; the template's line break is not.
            ended = tokens[i] in encoder.ends
    end = encoder.tokenizer.eos_token_id
    last = [token for token in labels if token != IGNORED][-1:]
    if end is not None and last and last[0] not in encoder.ends and messages[-1][0] == "assistant":
        tokens.append(end)
        labels.append(end)
    if not encoder.has_chat:
        begun = encoder.begun(tokens)
        labels = [IGNORED] * (len(begun) - len(tokens)) + labels
        tokens = begun
    return TokenRow(tokens, labels)


def _spans(
    encoder: Encoder, messages: Sequence[tuple[str, str]], where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where the assistant's answers stand in it."""
    if not encoder.has_chat:
        text, spans = "", []
        for role, content in messages:
            if role == "assistant":
                spans.append((len(text), len(text) + len(content)))
            text += content
        return text, spans
    listed = [{"role": role, "content": content} for role, content in messages]
    whole = _render(encoder, listed, where)
    spans = []
    for i, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        opening = _render(encoder, listed[:i], where, add_generation_prompt=True)
        answered = _render(encoder, listed[: i + 1], where)
        if not (whole.startswith(answered) and answered.startswith(opening)):
            raise DataError(
                f"{where}: answer {i + 1} cannot be located, because the chat template of "
                f"{encoder.where} writes it differently in the whole conversation; split it into "
                "conversations with one answer, at the end"
            )
        spans.append((len(opening), len(answered)))
    return whole, spans


def _render(
    encoder: Encoder, messages: Sequence[Mapping[str, str]], where: str, **options: Any
) -> str:
    try:
        return str(encoder.tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program of the model's
        raise DataError(
            f"{where}: the chat template of {encoder.where} refuses it: {error}"
        ) from error


def _length(encoder: Encoder, fitting: Fitting, *, default: int) -> int:
    length = default if fitting.context is None else fitting.context
    if length < 2:
        raise UsageError(f"context must be at least 2 tokens; got {length}")
    if length > encoder.context:
        raise UsageError(
            f"context is {length} tokens, more than the {encoder.context} that {encoder.where} "
            "reads; give less"
        )
    return length


def token_examples(rows: Sequence[TokenRow], identity: Mapping[str, Any]) -> Examples:
    """Rows of tokens as examples, padded on the right to the longest of a batch.

    Causal attention never looks at what comes after, so that the id of the padding does not matter;
    masks are given where there is any, for models that count positions by them.
    """
    return Examples(rows, _collate_tokens, _count_learned, "tokens", identity)


def _collate_tokens(rows: Sequence[TokenRow]) -> dict[str, Any]:
    torch = require("torch", "train")
    width = max(len(row.tokens) for row in rows)
    padding = [width - len(row.tokens) for row in rows]
    batch = {
        "input_ids": [[*row.tokens, *[0] * n] for row, n in zip(rows, padding, strict=True)],
        "labels": [[*row.labels, *[IGNORED] * n] for row, n in zip(rows, padding, strict=True)],
    }
    if any(padding):
        batch["attention_mask"] = [[1] * (width - n) + [0] * n for n in padding]
    return {name: torch.tensor(values) for name, values in batch.items()}


def _count_learned(batch: Mapping[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def text_examples(tokenizer: Any, data: Classified, fitting: Fitting, where: str) -> Examples:
    """Labelled texts as examples: what the tokenizer makes of each, padded to the longest.

    Args:
        tokenizer: Of transformers, with a padding token.
        data: Texts.
        fitting: Largest number of tokens; None: the length of the model in the tokenizer.
        where: The model, for messages.

    Raises:
        DataError: a text is too long.
    """
    limit = fitting.context or min(int(tokenizer.model_max_length), UNLIMITED)
    cut = {"truncation": True, "max_length": limit} if fitting.truncate else {}
    found = tokenizer(list(data.items), verbose=False, **cut)
    lengths = [len(ids) for ids in found["input_ids"]]
    if max(lengths) > limit:
        place = lengths.index(max(lengths))
        raise DataError(
            f"{data.where}: example {place} has {lengths[place]} tokens, the limit of {where} is "
            f"{limit}; truncate such examples (--truncate)"
        )
    items = [
        ({name: values[i] for name, values in found.items()}, data.labels[i])
        for i in range(len(lengths))
    ]
    identity = {"digest": data.digest}
    return Examples(items, _padding(tokenizer), _count_labels, "examples", identity)


def _padding(tokenizer: Any) -> Callable[[Sequence[Any]], Any]:
    torch = require("torch", "train")

    def collate(items: Sequence[Any]) -> Any:
        batch = tokenizer.pad([entry for entry, _ in items], return_tensors="pt", verbose=False)
        return {**batch, "labels": torch.tensor([label for _, label in items])}

    return collate


def _count_labels(batch: Mapping[str, Any]) -> int:
    return len(batch["labels"])
