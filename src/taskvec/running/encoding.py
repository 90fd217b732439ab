"""From requests to tokens, without weights: what fits a model's context is known before it loads.

Texts get the beginning-of-sequence token where the tokenizer puts one, and nothing else; a text
from a chat template gets nothing, since the template says what it begins with. A text that is to be
predicted whole stands after the beginning-of-sequence token, or the end-of-sequence token where
there is none, so that its first token is predicted too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from taskvec import documents
from taskvec.errors import CheckpointError, TaskvecError
from taskvec.extras import require
from taskvec.running.pretrained import load_tokenizer
from taskvec.running.requests import MARKS, Continuation, Prompt, Text

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
UNLIMITED = 1 << 20  # tokens; for models whose config names no limit


class ScoredRow(NamedTuple):
    """Tokens for a model and those that it should predict.

    Attributes:
        inputs: Token ids.
        targets: Token ids; the last position of `inputs` predicts the last of them.
    """

    inputs: Sequence[int]
    targets: Sequence[int]


@dataclass(frozen=True, slots=True)
class Windows:
    """How long texts are read.

    Attributes:
        context: Most tokens that a window has.
        stride: Tokens that each window after the first predicts; the rest of it is context.
    """

    context: int
    stride: int


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and what is known of its model without weights.

    Attributes:
        where: The model, for messages.
        tokenizer: Of transformers.
        context: Most tokens that the model reads at once.
        begins: Tokens that the tokenizer puts in front of a text: one or none.
        prefix: Token in front of a text that is predicted whole.
        ends: Tokens that end an answer.
    """

    where: str
    tokenizer: Any
    context: int
    begins: tuple[int, ...]
    prefix: int
    ends: frozenset[int]

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without any that the tokenizer would put around it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prompt(self, text: Text) -> list[int]:
        """Tokens of what a model goes on from; never empty."""
        if isinstance(text, str):
            return self.begun(self.encode(text)) or [self.prefix]
        return self.encode(self.rendered(text))

    def begun(self, tokens: list[int]) -> list[int]:
        """Tokens of a text after what the tokenizer puts in front; not twice, if it is written."""
        return tokens if tuple(tokens[:1]) == self.begins else [*self.begins, *tokens]

    def rendered(self, text: Text) -> str:
        """A conversation by the chat template; a text as it is.

        Where the assistant spoke last, the model goes on from there.

        Raises:
            TaskvecError: the template refuses the conversation.
        """
        if isinstance(text, str):
            return text
        messages = [{"role": role, "content": content} for role, content in text]
        begun = bool(text) and text[-1][0] == "assistant"
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # a template is a program of the model's
            roles = ", ".join(role for role, _ in text)
            raise TaskvecError(
                f"{self.where}: its chat template refuses a conversation of {roles}: {error}; "
                "ask it without conversations, or with other roles"
            ) from error
        return rendered

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones but for those around reasoning."""
        marks = _marks(self.tokenizer)
        if marks.keys().isdisjoint(tokens):
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        text, start = "", 0
        for place, token in enumerate((*tokens, None)):
            if token in marks or token is None:
                part = tokens[start:place]
                text += str(self.tokenizer.decode(part, skip_special_tokens=True)) if part else ""
                text += marks.get(token, "")
                start = place + 1
        return text


@lru_cache(maxsize=4)
def _marks(tokenizer: Any) -> dict[int | None, str]:
    """Special tokens of a tokenizer that stand around reasoning, by number."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: str(each) for i, each in added.items() if each.special and str(each) in MARKS}


def open_encoder(folder: Path, where: str) -> Encoder:
    """The encoder of a model folder.

    Args:
        folder: In Hugging Face layout; the network is never asked.
        where: The model, for messages.

    Raises:
        CheckpointError: it has no config or no tokenizer that can be read.
    """
    config, generation = _json(folder / "config.json", where), {}
    if (folder / "generation_config.json").is_file():
        generation = _json(folder / "generation_config.json", where)
    return make_encoder(open_tokenizer(folder, where), config, generation, where)


def open_tokenizer(folder: Path, where: str) -> Any:
    """The tokenizer of a model folder, of transformers.

    Args:
        folder: In Hugging Face layout; the network is never asked.
        where: The model, for messages.

    Raises:
        CheckpointError: it has none that can be read.
    """
    require("transformers", "eval")
    try:
        return load_tokenizer(folder)
    except Exception as error:  # its many tokenizers may raise anything
        text = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{where}: has no tokenizer that can be read: {text}; "
            "put the tokenizer files of its base model beside the weights"
        ) from error


def _json(path: Path, where: str) -> dict[str, Any]:
    where = f"{where}: {path.name}"
    return documents.read_object(path, documents.CONFIG, where=where)


def make_encoder(
    tokenizer: Any, config: Mapping[str, Any], generation: Mapping[str, Any], where: str
) -> Encoder:
    """The encoder of a tokenizer.

    Args:
        tokenizer: Of transformers.
        config: Of the model.
        generation: Of the model's answers; what ends them is taken from it, and nothing else.
        where: The model, for messages.

    Raises:
        CheckpointError: there is neither a beginning- nor an end-of-sequence token.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None and end is None:
        raise CheckpointError(
            f"{where}: its tokenizer has neither a beginning- nor an end-of-sequence token"
        )
    config = {**(config.get("text_config") or {}), **config}
    probe = tokenizer("a")["input_ids"]
    ends: set[int] = set()
    for each in (config.get("eos_token_id"), generation.get("eos_token_id"), end):
        listed = each if isinstance(each, (list, tuple)) else (each,)
        ends.update(token for token in listed if token is not None)
    limits = [config[key] for key in _LIMITS if isinstance(config.get(key), int)]
    return Encoder(
        where=where,
        tokenizer=tokenizer,
        context=min([*limits, UNLIMITED]),
        begins=(begin,) if begin is not None and list(probe[:1]) == [begin] else (),
        prefix=end if begin is None else begin,
        ends=frozenset(ends),
    )


def scored_row(encoder: Encoder, request: Continuation, *, truncate: bool) -> ScoredRow:
    """The one row of a continuation; of a context that is too long the end is kept, if at all.

    Spaces at the end of the context count as the beginning of the continuation, since most
    tokenizers join them to what follows.

    Raises:
        TaskvecError: it does not fit, and `truncate` is not set; or there is nothing to score.
    """
    context = encoder.rendered(request.context)
    stripped = context.rstrip()
    left = encoder.encode(stripped)
    whole = encoder.encode(context + request.text)
    targets = whole[len(left) :]
    if not targets:
        raise TaskvecError(f"{encoder.where}: nothing to score in {request.text[:40]!r}")
    inputs = (encoder.begun(whole) if isinstance(request.context, str) else whole)[:-1]
    if len(inputs) < len(targets):  # nothing stands before the first token
        inputs = [encoder.prefix, *inputs]
    if len(inputs) > encoder.context:
        if not truncate or len(targets) > encoder.context:
            raise _too_long(encoder, len(inputs))
        inputs = inputs[-encoder.context :]
    return ScoredRow(inputs, targets)


def document_rows(encoder: Encoder, text: str, windows: Windows) -> Iterator[ScoredRow]:
    """Windows over a text, each of whose tokens is a target once.

    The first window predicts as many tokens as it has room for; each after it `stride` more, from
    as many tokens before them as the context leaves room for, at least one.
    """
    tokens = encoder.encode(text)
    read = [encoder.prefix, *tokens]
    start = 0
    while start < len(tokens):
        stop = min(len(tokens), start + (windows.stride if start else windows.context))
        yield ScoredRow(read[max(0, stop - windows.context) : stop], tokens[start:stop])
        start = stop


def prompt_tokens(encoder: Encoder, request: Prompt, *, truncate: bool) -> list[int]:
    """The tokens of a prompt; of one that leaves no room for the answer the end is kept, if at all.

    Raises:
        TaskvecError: it does not fit, and `truncate` is not set.
    """
    tokens = encoder.prompt(request.text)
    room = encoder.context - request.max_new_tokens
    if len(tokens) <= room:
        return tokens
    if not truncate or room < 1:
        raise _too_long(encoder, len(tokens) + request.max_new_tokens)
    return tokens[-room:]


def _too_long(encoder: Encoder, tokens: int) -> TaskvecError:
    return TaskvecError(
        f"{encoder.where}: a sample needs {tokens} tokens, the model's context is "
        f"{encoder.context}; take fewer shots, or cut samples at the front (--truncate)"
    )
