"""Extractive question answering: the answer stands in the text, and the model writes it down.

    exact_match   1 if answer and reference are equal when normalised
    f1            2PR / (P + R) of the pieces that both have: words, in Japanese characters

Both are the largest over the references. SQuAD normalises by lower case, no ASCII punctuation, no
`a`, `an`, `the`, single spaces; JGLUE by lower case, no `。` at the end, single spaces. Questions
without an answer (SQuAD 2.0) are refused.

Source: Rajpurkar et al., arXiv:1606.05250; Kurihara et al., LREC 2022, and JGLUE's fine-tuning
patch of `squad_metrics.py`; lm-evaluation-harness, `squadv2` and `ja_leaderboard_jsquad`, for the
prompts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from taskvec.errors import DataError
from taskvec.evaluation.data import DataFile, DataRow, HubData
from taskvec.evaluation.task import (
    Metric,
    Replies,
    RowsByRole,
    Sample,
    SampleSettings,
    Score,
    Task,
    each,
)
from taskvec.evaluation.tasks.shared import (
    answers,
    nonblank_text,
    refuse_shots,
    with_ids,
    worked_examples,
)
from taskvec.running.requests import Prompt

SQUAD = "Title: {title}\n\nBackground: {context}\n\nQuestion: {question}\n\nAnswer:"
JSQUAD_SHOTS = 2
JSQUAD_INTRODUCTION = (
    "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
    "要求を適切に満たす応答を書きなさい。\n\n"
)
JSQUAD = (
    "### 指示：\n与えられた文脈から、質問に対する答えを抜き出してください。\n\n"
    "### 入力：\n文脈：{context}\n質問：{question}\n\n### 応答："
)
TOKENS = 128

METRICS = (Metric("exact_match"), Metric("f1", "mean"))


def normalised(text: str) -> str:
    """English text without what does not count.

    >>> normalised("The  Duke of York's.")
    'duke of yorks'
    """
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def normalised_ja(text: str) -> str:
    """Japanese text without what does not count.

    >>> normalised_ja("東京　タワー。")
    '東京 タワー'
    """
    return " ".join(text.strip().lower().rstrip("。").split())


def f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of pieces; without pieces, whether both have none.

    >>> f1("a b c d".split(), "b d".split())
    0.6666666666666666
    """
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def questions(rows: Sequence[DataRow]) -> list[DataRow]:
    """A row for each question, from SQuAD's nested JSON or from rows of the hub.

    Each has `id`, `title`, `context`, `question` and `answers`, a list of texts.

    Raises:
        DataError: the form is another one, or a question has no answer.
    """
    flat: list[DataRow] = []
    for row in rows:
        if "data" not in row.data:
            flat.append(_question(row, row.data))
            continue
        try:
            for article in row.data["data"]:
                for paragraph in article["paragraphs"]:
                    above = {"title": article["title"], "context": paragraph["context"]}
                    flat += [_question(row, {**above, **qa}) for qa in paragraph["qas"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{row.where}: is not in SQuAD's form (data, paragraphs, qas): "
                f"{type(error).__name__}: {error}"
            ) from error
    return flat


def _question(row: DataRow, data: Mapping[str, Any]) -> DataRow:
    where = f"{row.where}, question {data['id']}" if "id" in data else row.where
    given = data.get("answers")
    texts = given.get("text") if isinstance(given, dict) else given
    if isinstance(texts, list):
        texts = [one.get("text") if isinstance(one, dict) else one for one in texts]
    if texts == [] or data.get("is_impossible"):
        raise DataError(
            f"{where}: has no answer; questions of SQuAD 2.0 without one are not supported: "
            "leave out those with is_impossible"
        )
    asked = DataRow({**data, "answers": texts}, where, row.file)
    asked.texts("answers")
    return asked


def _squad_prompt(row: DataRow) -> str:
    keys = ("title", "context", "question")
    return SQUAD.format(**{key: nonblank_text(row, key) for key in keys})


def _jsquad_prompt(row: DataRow) -> str:
    context = nonblank_text(row, "context").split("[SEP]")[-1].strip()  # before it, the title
    return JSQUAD.format(context=context, question=nonblank_text(row, "question"))


def _ask(
    rows: RowsByRole, before: str, prompt: Callable[[DataRow], str], stop: tuple[str, ...]
) -> list[Sample]:
    return [
        Sample(
            name,
            (Prompt(before + prompt(row), TOKENS, stop),),
            {"answers": row.texts("answers")},
        )
        for name, row in with_ids(questions(rows["test"]), "id")
    ]


def _squad_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    refuse_shots("squad", settings)
    return _ask(rows, "", _squad_prompt, ("\n",))


def _jsquad_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    train = {"train": questions(rows.get("train", ()))}
    before = JSQUAD_INTRODUCTION
    for row in worked_examples("jsquad", train, settings, JSQUAD_SHOTS):
        before += f"{_jsquad_prompt(row)}\n{row.texts('answers')[0]}\n\n"
    return _ask(rows, before, _jsquad_prompt, ("\n\n",))


def _score(sample: Sample, replies: Replies) -> Score:
    return _best(sample, replies, normalised, str.split)


def _score_ja(sample: Sample, replies: Replies) -> Score:
    return _best(sample, replies, normalised_ja, list)


def _best(
    sample: Sample,
    replies: Replies,
    normalise: Callable[[str], str],
    pieces: Callable[[str], list[str]],
) -> Score:
    """The best match with a reference; references that normalise to nothing do not count."""
    answer = normalise(answers(replies)[0].text)
    given = [text for text in map(normalise, sample.reference["answers"]) if text] or [""]
    values = {
        "exact_match": float(answer in given),
        "f1": max(f1(pieces(answer), pieces(reference)) for reference in given),
    }
    return Score(values, {"normalised": answer})


TASKS = (
    Task(
        name="squad",
        summary="questions on a text in English, answered by words of it",
        files=(
            DataFile(
                "test", ("squad/dev-v1.1.json",), HubData("rajpurkar/squad", None, "validation")
            ),
        ),
        samples=_squad_samples,
        score=each(_score),
        metrics=METRICS,
        fewest_tokens=512,
        source="Rajpurkar et al., arXiv:1606.05250; lm-evaluation-harness, task squadv2",
    ),
    Task(
        name="jsquad",
        summary="questions on a text in Japanese, answered by words of it, after 2 examples",
        files=(
            DataFile(
                "test",
                ("jglue/jsquad-*valid*.json", "jsquad-v1.3/valid-v1.3.json"),
                HubData("sbintuitions/JSQuAD", None, "validation"),
            ),
            DataFile(
                "train",
                ("jglue/jsquad-*train*.json", "jsquad-v1.3/train-v1.3.json"),
                HubData("sbintuitions/JSQuAD", None, "train"),
                optional=True,
            ),
        ),
        samples=_jsquad_samples,
        score=each(_score_ja),
        metrics=METRICS,
        fewest_tokens=512,
        source="Kurihara et al., LREC 2022; lm-evaluation-harness, ja_leaderboard_jsquad",
    ),
)
