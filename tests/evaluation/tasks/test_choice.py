"""Multiple choice: the likeliest, the likeliest for its length, JCommonsenseQA's prompt."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tests.evaluation.tasks.support import (
    asked,
    harness,
    harness_pairs,
    samples_of,
    score_likelihoods,
    task_named,
)

from taskvec.errors import DataError
from taskvec.evaluation.task import Score
from taskvec.evaluation.tasks import choice

OWN = task_named(choice.TASKS, "choice")
JAPANESE = task_named(choice.TASKS, "jcommonsenseqa")


def question(number: int, label: int, *choices: str) -> dict[str, Any]:
    listed = {f"choice{i}": choice for i, choice in enumerate(choices)}
    return {"q_id": number, "question": f"問い{number}は？", **listed, "label": label}


TRAIN = [
    question(1, 1, "赤", "青い", "白", "黒", "緑"),
    question(2, 4, "一", "二", "三", "四", "五"),
]
TEST = [
    question(30, 2, "犬", "猫と犬", "鳥", "魚", "虫"),
    question(31, 0, "山", "川", "海", "空", "谷"),
]


def right(score: Score) -> dict[str, float]:
    """The values that need an answer."""
    return {name: value for name, value in score.values.items() if name != "entropy"}


@pytest.mark.parametrize("answer", [0, 2])
def test_entropy_is_that_of_the_softmax_whatever_the_answer(answer: int) -> None:
    (sample,) = samples_of(OWN, [{"question": "Q", "choices": ["a", "b", "cc"], "answer": answer}])
    for values in ((-1.0, -2.0, -4.0), (-700.0, -701.0, -703.0)):
        p = np.exp(np.array(values) - max(values))
        p /= p.sum()
        score = score_likelihoods(OWN, sample, *values)
        assert score.values["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)
    assert score_likelihoods(OWN, sample, -5.0, -5.0, -5.0).values["entropy"] == (
        pytest.approx(math.log(3))
    )
    sure = score_likelihoods(OWN, sample, -1.0, -math.inf, -900.0).values["entropy"]
    assert (sure, math.copysign(1, sure)) == (0.0, 1.0)
    assert math.isnan(score_likelihoods(OWN, sample, *[-math.inf] * 3).values["entropy"])


@pytest.mark.parametrize(
    ("log_likelihoods", "chosen", "chosen_norm"),
    [
        ((-2.0, -3.0, -9.0), 0, 1),  # −2/1, −3/3, −9/6
        ((-2.0, -2.0, -2.0), 0, 2),  # of equal ones, the first
        ((-1.0, -3.0, -6.0), 0, 0),  # −1 each
        ((-9.0, -3.0, -2.5), 2, 2),
    ],
)
def test_likeliest_choice(
    log_likelihoods: tuple[float, ...], chosen: int, chosen_norm: int
) -> None:
    row = {"question": "Q", "choices": ["a", "b c", "日本語の答え"], "answer": 2}
    (sample,) = samples_of(OWN, [row])
    score = score_likelihoods(OWN, sample, *log_likelihoods)
    assert right(score) == {"accuracy": chosen == 2, "accuracy_norm": chosen_norm == 2}
    assert score.notes == {"chosen": chosen, "chosen_norm": chosen_norm}


def test_nothing_is_right_where_a_likelihood_is_nan() -> None:
    (sample,) = samples_of(OWN, [{"question": "Q", "choices": ["a", "b"], "answer": 0}])
    score = score_likelihoods(OWN, sample, math.nan, math.nan)
    assert right(score) == {"accuracy": 0.0, "accuracy_norm": 0.0}
    assert math.isnan(score.values["entropy"])
    assert score.notes == {"chosen": None, "chosen_norm": None}


def test_own_questions_are_asked_as_they_are() -> None:
    row = {"id": "x", "question": "The sky is", "choices": ["blue", "green"], "answer": 0}
    (sample,) = samples_of(OWN, [row])
    assert sample.id == "x"
    assert asked(sample) == [("The sky is", " blue"), ("The sky is", " green")]


def test_japanese_prompt() -> None:
    (sample, _) = samples_of(JAPANESE, TEST, train=TRAIN, shots=1)
    assert sample.id == "30"
    context, text = asked(sample)[1]
    assert context == (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
        "要求を適切に満たす応答を書きなさい。\n\n"
        "### 指示：\n出力は以下から選択してください：\n- 赤\n- 青い\n- 白\n- 黒\n- 緑\n\n"
        "### 入力：\n問い1は？\n\n### 応答：\n青い\n\n"
        "### 指示：\n出力は以下から選択してください：\n- 犬\n- 猫と犬\n- 鳥\n- 魚\n- 虫\n\n"
        "### 入力：\n問い30は？\n\n### 応答："
    )
    assert text == "\n猫と犬"
    with pytest.raises(DataError, match="3 worked examples are wanted, and its train data have 2"):
        samples_of(JAPANESE, TEST, train=TRAIN)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"choices": ["a"]},
            "must have at least two choices, none of them blank; got ['a']",
        ),
        (
            {"choices": ["a", " "]},
            "must have at least two choices, none of them blank; got ['a', ' ']",
        ),
        ({"choices": "a"}, "'choices' must be a list of texts; got 'a'"),
        ({"answer": 2}, "the answer must be the index of a choice, 0 to 1; got 2"),
        ({"answer": -1}, "the answer must be the index of a choice, 0 to 1; got -1"),
        ({"answer": "b"}, "'answer' must be a whole number; got 'b'"),
        ({"question": ""}, "'question' must not be blank"),
    ],
)
def test_malformed_rows(changed: dict[str, Any], message: str) -> None:
    row = {"question": "Q", "choices": ["a", "b"], "answer": 1} | changed
    with pytest.raises(DataError) as error:
        samples_of(OWN, [row])
    assert str(error.value) == f"data.jsonl, line 1: {message}"


def test_malformed_japanese_rows() -> None:
    with pytest.raises(DataError) as error:
        samples_of(JAPANESE, [TEST[0] | {"label": 5}], shots=0)
    assert str(error.value) == (
        "data.jsonl, line 1: the answer must be the index of a choice, 0 to 4; got 5"
    )
    del (broken := dict(TEST[0]))["choice4"]
    with pytest.raises(DataError, match="line 1: has no 'choice4'; its fields: q_id, question,"):
        samples_of(JAPANESE, [broken], shots=0)


@pytest.mark.parametrize("shots", [0, 2])
def test_prompts_and_scores_are_those_of_the_harness(shots: int) -> None:
    theirs = harness(
        "japanese_leaderboard/ja_leaderboard_jcommonsenseqa.yaml",
        data={"train": TRAIN, "validation": TEST},
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    ours = samples_of(JAPANESE, TEST, train=TRAIN, shots=shots)
    for doc, sample in zip(theirs.validation_docs(), ours, strict=True):
        assert asked(sample) == harness_pairs(theirs, doc, shots)
        for values in ((-4.0, -6.0, -3.0, -3.0, -9.0), (-1.0, -2.0, -5.0, -5.0, -5.0)):
            result = theirs.process_results(doc, [(value, False) for value in values])
            score = right(score_likelihoods(JAPANESE, sample, *values))
            assert score == {"accuracy": result["acc"], "accuracy_norm": result["acc_norm"]}
