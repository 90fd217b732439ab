"""How answers are written: repetition, entropy and unknown words, without knowing what is right.

Records hold texts, not token ids, and models with different tokenizers are compared. So a token is
here what a reader sees as one: a run of letters, a digit, a character of a script without spaces,
or a run of marks.

Everything is a ratio of sums over samples, so that `figures` gives intervals and paired
differences. An entropy is Σ −log2 p / n with p from all answers of the model; the interval takes p
as given, which is right to the first order.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.evaluation.evaluate import Result
from taskvec.evaluation.intervals import Figure, difference, figure
from taskvec.evaluation.task import Metric, Sample, Score
from taskvec.running.requests import Answer, Prompt, Request

TOKEN = re.compile(r"\d|[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\d]+|[^\w\s]+")
LOOP = re.compile(r"(.{1,50}?)\1{2,}")  # up to 50 characters, three times or more in a row

REPETITION = Metric("repetition", "ratio", False, "looped", "characters")
NON_WORDS = Metric("non_words", "ratio", False, "unknown", "judged")
CHARACTER_ENTROPY = Metric("character_entropy", "ratio", None, "character_bits", "characters")
TOKEN_ENTROPY = Metric("token_entropy", "ratio", None, "token_bits", "tokens")
MEASURES = (NON_WORDS, REPETITION, CHARACTER_ENTROPY, TOKEN_ENTROPY)

# Least differences to the reference. Merges of the zoo have at most 0.21 of the first and 0.02 of
# the second as long as half of what they are asked is right, and at least 0.30 of one of them where
# nothing is.
NON_WORDS_MORE = 0.25  # of the words
REPETITION_MORE = 0.25  # of the characters
# Entropies depend on what is talked about. So they count only where both are off in the same
# direction, from the reference's answers and from prompts and right answers, in answers that are
# long enough to have one.
CHARACTER_BITS = 1.0
TOKEN_BITS = 2.0
LONG_ENOUGH = 5.0  # tokens of an answer, on average

FEWEST = 20  # answers to judge by
# An answer that the reference gives to this many questions of a task, to the letter, is a stock
# answer, such as a refusal. It says nothing about the words of an answer to that question.
STOCK = 5

Texts = Sequence[Sequence[str]]  # of each sample


def tokens(text: str) -> list[str]:
    """The tokens of a text, in lower case.

    >>> tokens("It's 42 !? 猫だ")
    ['it', "'", 's', '4', '2', '!?', '猫', 'だ']
    """
    return TOKEN.findall(text.lower())


def answers(results: Sequence[Result]) -> list[list[str]]:
    """What a model answered to each sample that asks for answers, task after task."""
    return [
        [reply.raw for reply in replies if isinstance(reply, Answer)]
        for result in results
        for sample, replies in zip(result.samples, result.replies, strict=True)
        if _asks(sample)
    ]


def known_texts(results: Sequence[Result]) -> list[list[str]]:
    """What each of these samples says itself: its prompts, and what is right."""
    return [
        [
            *(text for request in sample.requests for text in _texts_of(request)),
            *_strings(sample.reference),
        ]
        for result in results
        for sample in result.samples
        if _asks(sample)
    ]


def _asks(sample: Sample) -> bool:
    return any(isinstance(request, Prompt) for request in sample.requests)


def _texts_of(request: Request) -> list[str]:
    """What a prompt says, message by message."""
    if not isinstance(request, Prompt):
        return []
    if isinstance(request.text, str):
        return [request.text]
    return [content for _, content in request.text]


def _strings(data: Any) -> Iterator[str]:
    """Every text in JSON types."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, (Mapping, Sequence)):
        for each in data.values() if isinstance(data, Mapping) else data:
            yield from _strings(each)


@dataclass(frozen=True, slots=True)
class Odd:
    """Writing that is far from the reference's.

    Attributes:
        ways: What is far, in words.
        figures: Of the model, by measure.
        reference: Of the reference, by measure; empty without one.
    """

    ways: tuple[str, ...]
    figures: Mapping[str, Figure]
    reference: Mapping[str, Figure]


def odd(mine: Sequence[Result], reference: Sequence[Result] | None) -> Odd | None:
    """What is odd in how the answers to all tasks are written; None if nothing is.

    Args:
        mine: Results of a model.
        reference: Those of the reference in the same tasks; None: only repetition is judged.
    """
    texts = answers(mine)
    if len(texts) < FEWEST:
        return None
    seed = mine[0].about["seed"]
    theirs: list[Score] = []
    measures: Sequence[Metric] = (REPETITION,)
    if reference is None:
        ours = writing_scores(texts)
        ways = ["repetition"] if _ratio(REPETITION, ours) >= REPETITION_MORE else []
    else:
        known = vocabulary(reference)
        ours, theirs = writing_scores(texts, known), writing_scores(answers(reference), known)
        measures = MEASURES if sum(known.judged) >= FEWEST else MEASURES[1:]
        ways = list(_ways(measures, ours, theirs, writing_scores(known_texts(reference)), seed))
    if not ways:
        return None
    return Odd(
        tuple(ways),
        {m.name: figure(m, ours, seed=seed) for m in measures},
        {m.name: figure(m, theirs, seed=seed) for m in measures if theirs},
    )


def _ways(
    measures: Sequence[Metric],
    ours: Sequence[Score],
    theirs: Sequence[Score],
    asked: Sequence[Score],
    seed: int,
) -> Iterator[str]:
    """Measures that are far from the reference's, in words."""

    def side(metric: Metric, least: float, other: Sequence[Score]) -> int:
        """1 or -1 if it is at least that much above or below, beyond the interval; else 0."""
        if not abs(_ratio(metric, ours) - _ratio(metric, other)) >= least:
            return 0
        apart = difference(metric, ours, other, seed=seed)
        return int(apart.low > 0) - int(apart.high < 0)

    if NON_WORDS in measures and side(NON_WORDS, NON_WORDS_MORE, theirs) > 0:
        yield "non-words"
    if side(REPETITION, REPETITION_MORE, theirs) > 0:
        yield "repetition"
    if sum(score.values["tokens"] for score in ours) >= LONG_ENOUGH * len(ours):
        sides = {
            side(metric, least, other)
            for metric, least in ((CHARACTER_ENTROPY, CHARACTER_BITS), (TOKEN_ENTROPY, TOKEN_BITS))
            for other in (theirs, asked)
        }
        if sides in ({1}, {-1}):
            yield "far more disorder" if sides == {1} else "far less variety"


def _ratio(metric: Metric, scores: Sequence[Score]) -> float:
    """The value of a measure without its interval; NaN where there is nothing to measure."""
    value, per = (sum(s.values[key] for s in scores) for key in (metric.value, metric.per))
    return value / per if per else math.nan


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words that are known, by sample.

    The reference's answer to a question does not count for that question, so that the reference is
    measured as everybody else: its own rare words are unknown too.

    Attributes:
        given_words: Words of prompts and right answers.
        samples: Words of the reference's answers, by sample.
        counts: In how many samples the reference writes a word.
        judged: Which samples count: not those with a stock answer.
    """

    given_words: frozenset[str]
    samples: Sequence[frozenset[str]]
    counts: Mapping[str, int]
    judged: Sequence[bool]

    def unknown(self, place: int, words: Sequence[str]) -> int:
        """How many of the words of an answer to a sample are unknown."""
        own = self.samples[place]
        return sum(
            word not in self.given_words and self.counts.get(word, 0) - (word in own) < 1
            for word in words
        )


def vocabulary(reference: Sequence[Result]) -> Vocabulary:
    """The words that prompts, right answers and the reference's answers have."""
    written = answers(reference)
    words = [frozenset(word for text in texts for word in tokens(text)) for texts in written]
    tasks = [result.task for result in reference for s in result.samples if _asks(s)]
    given = [(task, *texts) for task, texts in zip(tasks, written, strict=True)]
    times = Counter(given)
    return Vocabulary(
        given_words=frozenset(
            w for texts in known_texts(reference) for text in texts for w in tokens(text)
        ),
        samples=words,
        counts=Counter(word for each in words for word in each),
        judged=[times[each] < STOCK for each in given],
    )


def writing_scores(texts: Texts, known: Vocabulary | None = None) -> list[Score]:
    """What the measures are worked out from, for each sample.

    Args:
        texts: Of each sample.
        known: Words that are known; None: words are not judged.
    """
    cut = [[tokens(text) for text in each] for each in texts]
    characters = _bits(Counter(c for each in texts for text in each for c in text))
    words = _bits(Counter(word for each in cut for part in each for word in part))
    scores = []
    for place, (each, parts) in enumerate(zip(texts, cut, strict=True)):
        mine = [word for part in parts for word in part]
        judged = known is not None and known.judged[place]
        values = {
            "characters": sum(map(len, each)),
            "looped": sum(map(_count_loops, each)),
            "character_bits": sum(characters[c] for text in each for c in text),
            "tokens": len(mine),
            "token_bits": sum(words[word] for word in mine),
            "judged": len(mine) if judged else 0,
            "unknown": known.unknown(place, mine) if known is not None and judged else 0,
        }
        scores.append(Score({name: float(value) for name, value in values.items()}))
    return scores


def _bits(counts: Counter[str]) -> dict[str, float]:
    """−log2 of the share of each."""
    total = counts.total()
    return {each: math.log2(total / count) for each, count in counts.items()}


def _count_loops(text: str) -> int:
    """Characters in places where the same comes three times or more in a row.

    >>> _count_loops("a cat, a cat, a cat, and a dog"), _count_loops("a b c")
    (21, 0)
    """
    return sum(len(found[0]) for found in LOOP.finditer(" ".join(text.split())))
