"""Multiple choice by likelihood: the answer is the choice that the model finds most likely.

    accuracy        choice with the largest log p(choice | question)
    accuracy_norm   choice with the largest log p(choice | question) / characters of the choice
    entropy         −Σ_c p_c ln p_c, nats, p = softmax of log p(choice | question); needs no answer

The first of equal ones counts; where a likelihood is NaN, nothing is right. Characters are those of
the choice without the space or line feed in front of it. These are `acc` and `acc_norm` of
lm-evaluation-harness.

Source: Kurihara et al., LREC 2022 (JCommonsenseQA); lm-evaluation-harness, task
`ja_leaderboard_jcommonsenseqa`, for its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    likelihoods,
    nonblank_text,
    one_each,
    with_ids,
    worked_examples,
)
from taskvec.running.requests import Continuation

JCOMMONSENSEQA_SHOTS = 3
JCOMMONSENSEQA_INTRODUCTION = (
    "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
    "要求を適切に満たす応答を書きなさい。\n\n"
)
JCOMMONSENSEQA = (
    "### 指示：\n出力は以下から選択してください：\n{choices}\n### 入力：\n{question}\n\n### 応答："
)

ENTROPY = Metric("entropy", "mean", higher_is_better=False)
METRICS = (Metric("accuracy"), Metric("accuracy_norm"), ENTROPY)


def first_largest(values: Sequence[float]) -> int | None:
    """The index of the largest value; of equal ones, the first; None where one is NaN.

    >>> first_largest([-2.0, -1.0, -1.0])
    1
    """
    if any(map(math.isnan, values)):
        return None
    return max(range(len(values)), key=lambda i: values[i])


def choice_entropy(values: Sequence[float]) -> float:
    """How unsure a model is among choices, whichever is right; NaN where a likelihood is.

    The objective of AdaMerging, arXiv:2310.02575, for a language model that chooses.

    Args:
        values: log p of each choice, nats.

    Returns:
        Shannon entropy of their softmax, nats, in [0, ln choices].

    >>> round(choice_entropy([-3.0, -3.0]), 3), round(choice_entropy([-1.0, -99.0]), 3)
    (0.693, 0.0)
    """
    top = max(values)
    if any(map(math.isnan, values)) or math.isinf(top):
        return math.nan
    shares = [math.exp(value - top) for value in values]
    total = sum(shares)
    return 0.0 - sum(x / total * math.log(x / total) for x in shares if x > 0)


def choice_sample(
    name: str, context: str, choices: Sequence[str], answer: int, *, joint: str = " "
) -> Sample:
    """A question with choices.

    Args:
        name: Id of the sample.
        context: All that stands before a choice.
        choices: Texts, none of them empty.
        answer: Index of the right one.
        joint: What stands between context and choice.
    """
    requests = tuple(Continuation(context, joint + choice) for choice in choices)
    return Sample(name, requests, {"choices": list(choices), "answer": answer})


def choice_score(sample: Sample, replies: Replies) -> Score:
    """Whether the likeliest choice is the right one, with and without normalisation by length."""
    values = [reply.log_likelihood for reply in likelihoods(replies)]
    lengths = [len(choice) for choice in sample.reference["choices"]]
    answer = sample.reference["answer"]
    plain = first_largest(values)
    normalised = first_largest([v / n for v, n in zip(values, lengths, strict=True)])
    found = {
        "accuracy": float(plain == answer),
        "accuracy_norm": float(normalised == answer),
        ENTROPY.name: choice_entropy(values),
    }
    return Score(found, {"chosen": plain, "chosen_norm": normalised})


def check_choices(row: DataRow, choices: Sequence[str], answer: int) -> None:
    """Refuse what cannot be a question with choices.

    Raises:
        DataError: fewer than two choices, an empty one, or an answer that is not one of them.
    """
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise DataError(
            f"{row.where}: must have at least two choices, none of them blank; got {list(choices)}"
        )
    if answer not in range(len(choices)):
        raise DataError(
            f"{row.where}: the answer must be the index of a choice, 0 to {len(choices) - 1}; "
            f"got {answer}"
        )


@one_each("choice", "id")
def _samples(name: str, row: DataRow) -> Sample:
    choices, answer = row.texts("choices"), row.number("answer")
    check_choices(row, choices, answer)
    return choice_sample(name, nonblank_text(row, "question"), choices, answer)


def _jcommonsenseqa(row: DataRow) -> tuple[str, list[str], int]:
    """Prompt, choices and the index of the right one."""
    choices, answer = [row.text(f"choice{i}") for i in range(5)], row.number("label")
    check_choices(row, choices, answer)
    listed = "".join(f"- {choice}\n" for choice in choices)
    prompt = JCOMMONSENSEQA.format(choices=listed, question=nonblank_text(row, "question"))
    return prompt, choices, answer


def _jcommonsenseqa_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    before = JCOMMONSENSEQA_INTRODUCTION
    for row in worked_examples("jcommonsenseqa", rows, settings, JCOMMONSENSEQA_SHOTS):
        prompt, choices, answer = _jcommonsenseqa(row)
        before += f"{prompt}\n{choices[answer]}\n\n"
    samples = []
    for name, row in with_ids(rows["test"], "q_id"):
        prompt, choices, answer = _jcommonsenseqa(row)
        samples.append(choice_sample(name, before + prompt, choices, answer, joint="\n"))
    return samples


TASKS = (
    Task(
        name="choice",
        summary="questions with choices of your own",
        files=(DataFile("test", ("choice/*.jsonl", "choice/*.json")),),
        samples=_samples,
        score=each(choice_score),
        metrics=METRICS,
        source="taskvec",
    ),
    Task(
        name="jcommonsenseqa",
        summary="common sense in Japanese, five choices, after 3 worked examples",
        files=(
            DataFile(
                "test",
                (
                    "jglue/jcommonsenseqa-*valid*.json",
                    "jcommonsenseqa-v1.3/valid-v1.3.json",
                ),
                HubData("sbintuitions/JCommonsenseQA", None, "validation"),
            ),
            DataFile(
                "train",
                (
                    "jglue/jcommonsenseqa-*train*.json",
                    "jcommonsenseqa-v1.3/train-v1.3.json",
                ),
                HubData("sbintuitions/JCommonsenseQA", None, "train"),
                optional=True,
            ),
        ),
        samples=_jcommonsenseqa_samples,
        score=each(choice_score),
        metrics=METRICS,
        fewest_tokens=512,
        source="Kurihara et al., LREC 2022; lm-evaluation-harness, ja_leaderboard_jcommonsenseqa",
    ),
)
