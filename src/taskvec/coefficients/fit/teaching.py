"""Teachers: their greedy answers where prompts have none, and what they say to every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from taskvec.coefficients.fit import losses
from taskvec.coefficients.fit.asking import Asker, LanguageAsker
from taskvec.coefficients.fit.directions import TaskDirections
from taskvec.coefficients.fit.losses import Taught
from taskvec.coefficients.fit.prompts import Asked, Teacher
from taskvec.coefficients.fit.steering import Steered
from taskvec.errors import DataError, TaskvecError, UsageError
from taskvec.extras import require
from taskvec.running.encoding import Encoder
from taskvec.running.generation import Query, answers
from taskvec.running.model import Model, load, open_stored
from taskvec.training.tokens import TokenRow

AT_ONCE = 32  # rows that a teacher is asked about at once


@dataclass(slots=True)
class Teachers:
    """Puts a module to its teachers, one at a time.

    Attributes:
        directions: Members.
        steered: The module.
        names: The module's own names of the target's tensors.
        device: For models of their own.
        dtype: For models of their own.
    """

    directions: TaskDirections
    steered: Steered
    names: Mapping[str, str]
    device: str = "auto"
    dtype: str = "auto"
    _loaded: tuple[str, LanguageAsker] | None = field(default=None)  # the last of its own

    @contextmanager
    def asked(self, teacher: Teacher, asker: Any) -> Iterator[Any]:
        """An asker of the teacher.

        Raises:
            UsageError: its vocabulary is another.
        """
        if teacher.kind == "model":
            yield self._other(teacher.name, asker)
            return
        self.become("target" if teacher.kind == "target" else f"task:{teacher.name}")
        yield asker

    def become(self, role: str) -> None:
        """Put the module to a member's own weights; `target` after something else was put."""
        if role != "target":
            self.steered.load(partial(self.directions.member, "target"), self.names)
        self.steered.load(partial(self.directions.member, role), self.names)

    def _other(self, name: str, asker: Any) -> LanguageAsker:
        if not isinstance(asker, LanguageAsker):
            raise UsageError(
                f"teacher {name}: a model of its own teaches language models only; name a task or "
                "'target'"
            )
        if self._loaded is not None and self._loaded[0] == name:
            return self._loaded[1]
        stored = open_stored(name)
        check_vocabulary(stored.encoder, asker.encoder)
        other = load(stored, dtype=self.dtype, device=self.device)
        words = [
            module.get_output_embeddings().weight.shape[0]
            for module in (other.module, asker.module)
        ]
        if words[0] != words[1]:
            raise UsageError(
                f"teacher {name}: has {words[0]} words, the target has {words[1]}; give a teacher "
                "of the same vocabulary"
            )
        self._loaded = name, replace(asker, module=other.module)
        return self._loaded[1]


def check_vocabulary(teacher: Encoder, target: Encoder) -> None:
    """Refuse a teacher whose tokens are others.

    Raises:
        UsageError: they are.
    """
    theirs, ours = teacher.tokenizer.get_vocab(), target.tokenizer.get_vocab()
    if theirs == ours:
        return
    differing = sorted(
        word for word in theirs.keys() | ours.keys() if theirs.get(word) != ours.get(word)
    )
    raise UsageError(
        f"teacher {teacher.where}: its vocabulary is not the target's ({target.where}): token "
        f"{differing[0]!r} and {len(differing) - 1} more differ; give a teacher with the same "
        "tokenizer, or prompts with its answers and the teacher 'answers'"
    )


@dataclass(frozen=True, slots=True)
class Answered:
    """Prompts of a source with answers.

    Attributes:
        rows: As tokens.
        texts: Each prompt with its answer, for the record.
        generated: How many answers are the teacher's.
        left_out: How many prompts are too long.
    """

    rows: Sequence[TokenRow]
    texts: Sequence[tuple[Any, str]]
    generated: int
    left_out: int


def answer_prompts(
    name: str,
    prompts: Sequence[Asked],
    asker: LanguageAsker,
    *,
    teacher: Callable[[], Any],
    known: Mapping[str, tuple[str, bool]],
    take: Callable[[str, str, bool], object],
    max_new_tokens: int,
    context: int | None,
) -> Answered:
    """Prompts as rows; the teacher is asked where answers lack.

    Args:
        name: Of the source.
        prompts: What is asked.
        asker: Of the target, which encodes.
        teacher: Gives a context of the teacher's asker; called if an answer lacks.
        known: Answers generated before, and whether they ended, by prompt.
        take: Called with each new answer.
        max_new_tokens: Longest answer.
        context: Most tokens of a row; None: what the model reads.

    Raises:
        DataError: all prompts are too long.
        TaskvecError: the teacher's logits are not finite.
    """
    encoder = asker.encoder
    limit = min(encoder.context, context or encoder.context)
    fitting = [asked for asked in prompts if len(encoder.prompt(asked.text)) < limit]
    found: dict[str, tuple[str, bool]] = dict(known)
    lacking = [a for a in fitting if a.answer is None and repr(a.text) not in found]
    if lacking:
        with teacher() as other:
            queries = [
                Query(tokens, min(max_new_tokens, limit - len(tokens)))
                for tokens in (encoder.prompt(asked.text) for asked in lacking)
            ]
            for asked, answer in zip(
                lacking, answers(Model(other.module, encoder), queries), strict=True
            ):
                if answer.ended == "nan":
                    raise TaskvecError(
                        f"source {name!r}: the teacher's logits are not finite at {asked.where}; "
                        "look at its weights, or load it in a wider dtype"
                    )
                found[repr(asked.text)] = answer.text, answer.ended == "end"
                take(repr(asked.text), answer.text, answer.ended == "end")
    rows, texts = [], []
    for asked in fitting:
        text, is_whole = (
            (asked.answer, True) if asked.answer is not None else found[repr(asked.text)]
        )
        row = asker.row(asked, text, is_whole=is_whole)
        if len(row.tokens) <= limit and asker.count(row):
            rows.append(row)
            texts.append((asked.text, text))
    if not rows:
        raise DataError(
            f"prompts of {name!r}: all {len(prompts)} are longer than {limit} tokens with their "
            "answers, or have empty answers; shorten them, or raise context"
        )
    generated = sum(asked.answer is None for asked in fitting)
    return Answered(rows, texts, generated, len(prompts) - len(rows))


def teach(
    asker: Asker, name: str, rows: Sequence[Any], *, hidden: bool, size: int | None
) -> list[Taught]:
    """What a module says to each row, as a teacher.

    Args:
        asker: Asks the teacher.
        name: Of the source.
        rows: Of it.
        hidden: Whether hidden states are wanted.
        size: Most rows at once; None: `AT_ONCE`.
    """
    torch = require("torch", "eval")
    found: list[Taught] = []
    size = size or AT_ONCE
    with torch.no_grad():
        for start in range(0, len(rows), size):
            mine = rows[start : start + size]
            outputs = asker.ask({name: mine}, hidden=hidden)[name]
            for i in range(len(mine)):
                there = outputs.owner == i
                values = outputs.values[there]
                states = None if outputs.hidden is None else outputs.hidden[:, there]
                if asker.kind == "features":
                    found.append(Taught(features=values))
                else:
                    found.append(losses.keep_likeliest(values, states))
    return found
