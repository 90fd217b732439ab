"""What is asked of a module: prompts as rows, and what it says to rows of several sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from taskvec.coefficients.fit.prompts import Asked
from taskvec.errors import DataError, UsageError
from taskvec.extras import require
from taskvec.running.encoding import Encoder
from taskvec.training.objectives import IGNORED
from taskvec.training.tokens import TokenRow, answer_row, token_examples


@dataclass(frozen=True, slots=True)
class Outputs:
    """Outputs of a module at P positions of the rows of one source.

    Attributes:
        values: Logits or features; shape (P, words).
        owner: Which row each position is of.
        labels: Token of the answer at each position; None where rows have no answers.
        hidden: Hidden states of each block, shape (blocks, P, dimensions); None: not asked for.
    """

    values: Any
    owner: Any
    labels: Any = None
    hidden: Any = None


class Asker(Protocol):
    """Asks a module in memory."""

    @property
    def kind(self) -> str:
        """`tokens`, `logits` or `features`, for what a loss is taken on."""

    def ask(self, rows: Mapping[str, Sequence[Any]], *, hidden: bool = False) -> dict[str, Outputs]:
        """What the module says, by source."""

    def count(self, row: Any) -> int:
        """Positions of a row."""


@dataclass(frozen=True, slots=True)
class LanguageAsker:
    """Asks a causal language model for the tokens of answers.

    Attributes:
        module: Of torch.
        encoder: Its tokenizer.
        chat_end: Token that ends an answer in a conversation; None: there is none.
    """

    module: Any
    encoder: Encoder
    chat_end: int | None

    @property
    def kind(self) -> str:
        """See `Asker`."""
        return "tokens"

    def ask(
        self, rows: Mapping[str, Sequence[TokenRow]], *, hidden: bool = False
    ) -> dict[str, Outputs]:
        """See `Asker`; rows of like length are one batch, also of several sources."""
        flat = [(name, i, row) for name, each in rows.items() for i, row in enumerate(each)]
        flat.sort(key=lambda entry: len(entry[2].tokens))
        parts: dict[str, list[Outputs]] = {name: [] for name in rows}
        for group in _of_like_length(flat):
            for name, outputs in self._group(group, hidden).items():
                parts[name].append(outputs)
        return {name: _behind_each_other(each) for name, each in parts.items()}

    def _group(
        self, group: Sequence[tuple[str, int, TokenRow]], hidden: bool
    ) -> dict[str, Outputs]:
        torch = require("torch", "eval")
        batch = token_examples([], {}).collate([row for _, _, row in group])
        device = next(self.module.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        found = self.module(**batch, use_cache=False, output_hidden_states=hidden)
        states = found.hidden_states[1:] if hidden else ()
        answers = {}
        for source in dict.fromkeys(name for name, _, _ in group):
            mine = [place for place, (name, _, _) in enumerate(group) if name == source]
            there = labels[mine] != IGNORED
            numbers = torch.tensor([group[place][1] for place in mine], device=device)
            answers[source] = Outputs(
                found.logits[mine, :-1][there],
                numbers[there.nonzero()[:, 0]],
                labels[mine][there],
                torch.stack([block[mine, :-1][there] for block in states]) if hidden else None,
            )
        return answers

    def count(self, row: TokenRow) -> int:
        """See `Asker`."""
        return sum(label != IGNORED for label in row.labels[1:])

    def row(self, asked: Asked, answer: str, *, is_whole: bool = True) -> TokenRow:
        """A prompt with its answer, whose tokens count, and what ends it.

        Args:
            asked: The prompt.
            answer: To it.
            is_whole: Whether the answer has an end; not if it was cut.
        """
        before = self.encoder.prompt(asked.text)
        after = self.encoder.encode(answer)
        is_plain = isinstance(asked.text, str)
        end = self.encoder.tokenizer.eos_token_id if is_plain else self.chat_end
        after += [end] if is_whole and end is not None else []
        return TokenRow([*before, *after], [*[IGNORED] * len(before), *after])


def chat_end(encoder: Encoder) -> int | None:
    """The token that ends an answer in a conversation: the template's, or the sequence's end."""
    own: int | None = encoder.tokenizer.eos_token_id
    if not encoder.has_chat or not encoder.tokenizer.is_fast:
        return own
    try:
        row = answer_row(encoder, [("user", "a"), ("assistant", "b")], encoder.where)
    except DataError:  # a template that writes such a conversation otherwise
        return own
    ends = [label for label in row.labels if label in encoder.ends]
    return ends[0] if ends else own


def _of_like_length(
    rows: Sequence[tuple[str, int, TokenRow]],
) -> Iterator[Sequence[tuple[str, int, TokenRow]]]:
    """Sorted rows in groups, in which less than a third of the tokens is padding."""
    first = 0
    for place in range(1, len(rows) + 1):
        shortest = len(rows[first][2].tokens)
        if place == len(rows) or len(rows[place][2].tokens) > 1.5 * shortest:
            yield rows[first:place]
            first = place


def _behind_each_other(each: Sequence[Outputs]) -> Outputs:
    """Outputs for the rows of one source, ordered by row."""
    torch = require("torch", "eval")
    owner = torch.cat([outputs.owner for outputs in each])
    order = owner.argsort(stable=True)

    def cat(name: str, dim: int = 0) -> Any:
        parts = [getattr(outputs, name) for outputs in each]
        return None if parts[0] is None else torch.cat(parts, dim).index_select(dim, order)

    return Outputs(cat("values"), owner[order], cat("labels"), cat("hidden", 1))


@dataclass(frozen=True, slots=True)
class InputAsker:
    """Asks a classifier or an encoder, with a head of each source.

    Attributes:
        wholes: From a batch, as keywords, to logits or features; by source.
        collate: From rows to a batch, by source.
        device: Where batches go.
        kind: `logits` or `features`.
    """

    wholes: Mapping[str, Callable[..., Any]]
    collate: Mapping[str, Callable[[Sequence[Any]], Any]]
    device: Any
    kind: str

    def ask(self, rows: Mapping[str, Sequence[Any]], *, hidden: bool = False) -> dict[str, Outputs]:
        """See `Asker`."""
        torch = require("torch", "eval")
        if hidden:
            raise UsageError("hidden states are of language models; leave hidden at 0")
        answers = {}
        for name, each in rows.items():
            batch = dict(self.collate[name](each))
            labels = batch.pop("labels", None)
            batch = {key: _to(value, self.device) for key, value in batch.items()}
            found = self.wholes[name](**batch)
            values = getattr(found, "logits", found)
            owner = torch.arange(len(each), device=values.device)
            labels = None if labels is None else labels.to(values.device)
            answers[name] = Outputs(values, owner, labels)
        return answers

    def count(self, row: Any) -> int:
        """See `Asker`."""
        return 1


def _to(value: Any, device: Any) -> Any:
    return value.to(device) if hasattr(value, "to") else value


@contextmanager
def checkpointing(module: Any, wanted: bool) -> Iterator[None]:
    """With activations computed anew in the backward pass, where that is wanted.

    Raises:
        UsageError: the module cannot do that.
    """
    if not wanted:
        yield
        return
    name = "{}_checkpointing_{}"
    kind = "activation" if hasattr(module, name.format("activation", "enable")) else "gradient"
    if not hasattr(module, name.format(kind, "enable")):
        raise UsageError(
            f"{type(module).__name__} does not support checkpointing of activations; leave it out"
        )
    getattr(module, name.format(kind, "enable"))({"use_reentrant": False})
    try:
        # Layers of transformers look at their own mode, and at no one else's; dropout stays off.
        for part in module.modules():
            if getattr(part, "gradient_checkpointing", False):
                part.training = True
        yield
    finally:
        getattr(module, name.format(kind, "disable"))()
