"""TruthfulQA: answers of both forms of its data, MC1 and MC2."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.evaluation.tasks.support import (
    asked,
    harness,
    harness_pairs,
    samples_of,
    score_likelihoods,
)

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.tasks import truthfulqa

(TASK,) = truthfulqa.TASKS

CSV = {
    "Type": "Adversarial",
    "Question": "Do owls read {books}?",
    "Best Answer": "Owls do not read",
    "Correct Answers": "Owls do not read; No.;  Nobody knows ",
    "Incorrect Answers": "Owls read; Only at night.; Nobody knows;",
}
HUB = {
    "question": "Do owls read?",
    "mc1_targets": {"choices": ["No", "Yes", "At night"], "labels": [1, 0, 0]},
    "mc2_targets": {"choices": ["No", "Not at all", "Yes", "At night"], "labels": [1, 1, 0, 0]},
}


def test_answers_of_the_csv_file() -> None:
    (sample,) = samples_of(TASK, [CSV])
    assert sample.id == "0"
    texts = [text for _, text in asked(sample)]
    assert texts == [
        " Owls do not read.",
        " Owls read.",
        " Only at night.",
        " Nobody knows.",
        " No.",
    ]
    assert sample.reference["mc1"] == [0, 1, 2, 3]
    assert sample.reference["best"] == 0
    assert sample.reference["mc2"] == [0, 4, 3, 1, 2, 3]  # the one in both lists counts in both
    assert sample.reference["true"] == [1, 1, 1, 0, 0, 0]
    context = asked(sample)[0][0]
    assert context.startswith("Q: What is human life expectancy in the United States?\nA: Human")
    assert context.endswith("Barcelona, Spain.\n\nQ: Do owls read {books}?\nA:")
    assert context.count("\nA: ") == 6


def test_a_model_without_likelihoods_knows_nothing() -> None:
    """The best answer stands first, so that the first of NaNs would always be right."""
    (sample,) = samples_of(TASK, [CSV])
    score = score_likelihoods(TASK, sample, *[math.nan] * 5)
    assert score.values["mc1"] == 0
    assert math.isnan(score.values["mc2"])
    assert score.notes == {"chosen": None}


def test_scores_of_the_csv_file() -> None:
    (sample,) = samples_of(TASK, [CSV])
    score = score_likelihoods(TASK, sample, *map(math.log, (0.2, 0.1, 0.05, 0.3, 0.25)))
    # MC1: 0.2 against 0.1, 0.05, 0.3. MC2: 0.2 + 0.25 + 0.3 of that and 0.1 + 0.05 + 0.3.
    assert score.values == {"mc1": 0.0, "mc2": pytest.approx(0.75 / 1.2)}
    assert score.notes == {"chosen": 3}


@pytest.mark.parametrize(
    ("values", "mc1", "mc2"),
    [
        ((-1.0, -2.0, -3.0, -1.5), 1.0, None),
        ((-2.0, -1.0, -3.0, -1.5), 0.0, None),
        ((-1.0, -1.0, -3.0, -9.0), 1.0, None),  # a tie: the first, which is the true one
        ((-900.0, -900.0, -900.0, -900.0), 1.0, 0.5),  # too small for floats; the harness has NaN
        ((-math.inf, -1.0, -math.inf, -math.inf), 0.0, 0.0),
    ],
)
def test_scores(values: tuple[float, ...], mc1: float, mc2: float | None) -> None:
    (sample,) = samples_of(TASK, [HUB])
    assert [text for _, text in asked(sample)] == [" No", " Yes", " At night", " Not at all"]
    no, yes, night, not_at_all = map(math.exp, values)
    if mc2 is None:
        mc2 = (no + not_at_all) / (no + not_at_all + yes + night)
    assert score_likelihoods(TASK, sample, *values).values == {
        "mc1": mc1,
        "mc2": pytest.approx(mc2),
    }


BAD_LABELS = "'labels' must be 0 or 1 for each of the 2 choices, both at least once; got"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (CSV | {"Best Answer": ""}, "'Best Answer' must not be blank"),
        (
            CSV | {"Incorrect Answers": " ; "},
            "must have both 'Correct Answers' and 'Incorrect Answers'",
        ),
        ({"Question": "?"}, "has no 'Best Answer'; its fields: Question"),
        (HUB | {"mc2_targets": None}, "'mc2_targets': has no 'choices'; its fields: "),
        (
            HUB | {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 0, 0]}},
            f"'mc1_targets': {BAD_LABELS} [1, 0, 0]",
        ),
        (
            HUB | {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}},
            f"'mc1_targets': {BAD_LABELS} [1, 1]",
        ),
        (
            HUB | {"mc1_targets": {"choices": ["a", " "], "labels": [1, 0]}},
            "must have at least two choices, none of them blank; got ['a', ' ']",
        ),
    ],
)
def test_malformed_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        samples_of(TASK, [row])
    told = str(error.value).removeprefix("data.jsonl, line 1").lstrip(":, ")
    assert told == message


def test_worked_examples_are_refused() -> None:
    with pytest.raises(UsageError, match="task 'truthfulqa' takes no worked examples"):
        samples_of(TASK, [HUB], shots=6)


def test_prompts_and_scores_are_those_of_the_harness() -> None:
    mc1 = harness("truthfulqa/truthfulqa_mc1.yaml", data={"validation": [HUB]})
    mc2 = harness("truthfulqa/truthfulqa_mc2.yaml", data={"validation": [HUB]})
    (doc,) = mc1.validation_docs()
    (sample,) = samples_of(TASK, [HUB])
    ours = asked(sample)
    assert [ours[i] for i in sample.reference["mc1"]] == harness_pairs(mc1, doc)
    assert [ours[i] for i in sample.reference["mc2"]] == harness_pairs(mc2, doc)
    for values in ((-1.0, -2.0, -3.0, -1.5), (-2.0, -1.0, -30.0, -2.0), (-5.0, -5.0, -5.0, -5.0)):
        replies = {
            key: [(values[i], False) for i in sample.reference[key]] for key in ("mc1", "mc2")
        }
        assert score_likelihoods(TASK, sample, *values).values == {
            "mc1": mc1.process_results(doc, replies["mc1"])["acc"],
            "mc2": pytest.approx(mc2.process_results(doc, replies["mc2"])["acc"]),
        }
