"""GSM8K: prompts, and what is read from an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.tasks.support import asked, harness, samples_of, score_answers, task_named

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.data import DataPlaces, rows_of
from taskvec.evaluation.task import SampleSettings, Tools
from taskvec.evaluation.tasks import gsm8k
from taskvec.running.requests import Likelihood

TASK = task_named(gsm8k.TASKS, "gsm8k")
CHAT = task_named(gsm8k.TASKS, "gsm8k-chat")
LIKELIHOOD = task_named(gsm8k.TASKS, "gsm8k-likelihood")

TRAIN = [
    {"question": "Two and {two}?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "Ten less 1?", "answer": "10 - 1 = 9\n#### 9"},
]
TEST = [
    {"question": "Six times 3?", "answer": "6 * 3 = <<6*3=18>>18\n#### 18"},
    {"question": "A debt of 5?", "answer": "It is -5\n#### -5"},
    {"question": "A price?", "answer": "It is 1,800\n#### 1,800"},
]

# Answer, reference, strict and flexible reading, whether each is right. By hand from the rules.
READ = [
    ("6 * 3 = 18\n#### 18", "18", "18", "18", 1, 1),
    ("#### 18\nThat is all 7 of them", "18", "18", "7", 1, 0),
    ("#### 1 #### 18", "18", "1", "18", 0, 1),  # the first of them is read
    ("####18", "18", None, "18", 0, 1),
    ("#### $18", "18", None, "$18", 0, 1),  # no digit after the mark
    ("#### 18.", "18", "18.", "18.", 1, 1),
    ("#### 18..", "18", "18..", "18..", 0, 0),
    ("#### 18.0", "18", "18.0", "18.0", 0, 0),  # not made equal
    ("#### 1,800", "1,800", "1,800", "1,800", 1, 1),
    ("#### 1800", "1,800", "1800", "1800", 1, 1),
    ("#### 1,8,00", "1,800", "1,8,00", "1,8,00", 1, 1),
    ("#### -5", "-5", "-5", "-5", 1, 1),
    ("#### - 5", "-5", None, "5", 0, 0),
    ("#### \u22125", "-5", None, "5", 0, 0),  # a minus sign that is no hyphen
    ("the answer is -$5", "-5", None, "-$5", 0, 1),
    ("#### 18%", "18", "18", "18", 1, 1),
    ("#### 18 apples", "18", "18", "18", 1, 1),
    ("#### **18**", "18", None, "18", 0, 1),
    (r"\boxed{18}", "18", None, "18", 0, 1),
    ("#### 1.8e1", "18", "1.8", "1", 0, 0),
    ("#### 36/2", "18", "36", "2", 0, 0),
    ("#### eighteen", "18", None, None, 0, 0),
    ("", "18", None, None, 0, 0),
    ("#### ...", "18", "...", "...", 0, 0),
    ("It is 18...", "18", None, "18...", 0, 0),
    ("It is 18. So it is.", "18", None, "18.", 0, 1),
    ("It is 18, or so ...", "18", None, "...", 0, 0),
    ("#### 018", "18", "018", "018", 0, 0),
    ("#### 18\n\n", "18", "18", "18", 1, 1),
]


@pytest.mark.parametrize(("answer", "number", "strict", "flexible", "is_strict", "is_flex"), READ)
def test_readings(
    answer: str, number: str, strict: str | None, flexible: str | None, is_strict: int, is_flex: int
) -> None:
    samples = samples_of(TASK, [{"question": "?", "answer": f"So.\n#### {number}"}], shots=0)
    (score,) = score_answers(TASK, samples, answer)
    assert score.notes == {"strict": strict, "flexible": flexible}
    assert score.values == {"exact_match_strict": is_strict, "exact_match_flexible": is_flex}


@pytest.mark.parametrize(
    ("answer", "strict", "is_strict", "is_flexible"),
    [
        ("6 * 3. The final answer is 18", "18", 1, 1),
        ("The final answer is $18.", "$18.", 1, 1),
        ("The final answer is 7. No: The final answer is 18", "18", 1, 1),  # the last one
        ("The final answer is 18. It took 3 steps", "18.", 1, 0),
        ("The final answer is **18**.", None, 0, 1),
        ("The final answer is 5", "5", 0, 0),
        ("the final answer is 18", None, 0, 1),
    ],
)
def test_readings_of_a_conversation(
    answer: str, strict: str | None, is_strict: int, is_flexible: int
) -> None:
    (score,) = score_answers(CHAT, samples_of(CHAT, TEST[:1]), answer)
    assert score.notes["strict"] == strict
    assert score.values == {"exact_match_strict": is_strict, "exact_match_flexible": is_flexible}


def test_prompt_has_the_first_train_rows_as_worked_examples() -> None:
    (sample, *_) = samples_of(TASK, TEST, train=TRAIN, shots=2)
    (prompt,) = sample.requests
    assert prompt.text == (
        "Question: Two and {two}?\nAnswer: 2 + 2 = <<2+2=4>>4\n#### 4\n\n"
        "Question: Ten less 1?\nAnswer: 10 - 1 = 9\n#### 9\n\n"
        "Question: Six times 3?\nAnswer:"
    )
    assert prompt.stop == ("Question:", "</s>", "<|im_end|>")
    assert (prompt.max_new_tokens, prompt.temperature) == (256, 0.0)
    assert [s.id for s in samples_of(TASK, TEST, shots=0)] == ["0", "1", "2"]


def test_five_examples_unless_told_otherwise() -> None:
    (sample,) = samples_of(TASK, TEST[:1], train=TRAIN * 3)
    assert sample.requests[0].text.count("Question:") == 6


def test_conversation_is_one_message_of_the_user() -> None:
    (sample,) = samples_of(CHAT, TEST[:1])
    ((role, content),) = sample.requests[0].text
    assert role == "user"
    assert "\nProblem: Six times 3?\n" in content
    assert sample.requests[0].stop == (
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>",
        "Q:",
        "</s>",
        "<|im_end|>",
    )
    assert CHAT.needs == ("chat",)


def test_likelihood_asks_for_the_worked_answer() -> None:
    (sample,) = samples_of(LIKELIHOOD, TEST[:1])
    assert asked(sample) == [("Question: Six times 3?\nAnswer:", " 6 * 3 = <<6*3=18>>18\n#### 18")]
    (score,) = LIKELIHOOD.score([sample], [[Likelihood(-6.0, 12, True)]], Tools())
    assert score.values == {"log_likelihood": -6.0, "nll": 6.0, "tokens": 12.0, "greedy": 1.0}


def test_too_few_train_rows() -> None:
    message = (
        "task 'gsm8k': 5 worked examples are wanted, and its train data have 2; put train data "
        "beside the test data, or ask for fewer by --shots"
    )
    with pytest.raises(DataError) as error:
        samples_of(TASK, TEST, train=TRAIN)
    assert str(error.value) == message


@pytest.mark.parametrize("task", [CHAT, LIKELIHOOD], ids=lambda task: task.name)
def test_worked_examples_are_refused(task: Any) -> None:
    message = f"task '{task.name}' takes no worked examples; got --shots 2, so leave that out"
    with pytest.raises(UsageError) as error:
        samples_of(task, TEST, shots=2)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "?", "answer": "18"},
            "data.jsonl, line 1: 'answer' must have its number after '#### '; it has none",
        ),
        ({"question": " ", "answer": "#### 1"}, "data.jsonl, line 1: 'question' must not be blank"),
        ({"answer": "#### 1"}, "data.jsonl, line 1: has no 'question'; its fields: answer"),
    ],
)
@pytest.mark.parametrize("task", gsm8k.TASKS, ids=lambda task: task.name)
def test_malformed_rows(task: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        samples_of(task, [row], shots=0)
    assert str(error.value) == message


def test_train_data_that_cannot_be_had_are_needed_only_for_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(*_: object) -> None:
        raise DataError("no network")

    monkeypatch.setattr("taskvec.evaluation.data._from_hub", no_hub)
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "Six times 3?", "answer": "#### 18"}\n', "utf-8")
    rows = rows_of("gsm8k", TASK.files, DataPlaces(by_task={"gsm8k": file}))
    assert (
        TASK.samples(rows, SampleSettings(shots=0))[0].requests[0].text.startswith("Question: Six")
    )
    with pytest.raises(DataError, match="its train data have 0"):
        TASK.samples(rows, SampleSettings())


# As lm-evaluation-harness


def test_prompts_are_those_of_the_harness() -> None:
    theirs = harness("gsm8k/gsm8k.yaml", data={"train": TRAIN, "test": TEST})
    ours = samples_of(TASK, TEST, train=TRAIN, shots=2)
    for doc, sample in zip(theirs.test_docs(), ours, strict=True):
        assert sample.requests[0].text == theirs.fewshot_context(doc, 2)
        assert list(sample.requests[0].stop) == theirs.config.generation_kwargs["until"]


def test_conversation_is_that_of_the_harness() -> None:
    theirs = harness("gsm8k/gsm8k-cot-llama.yaml", data={"test": TEST})
    for doc, sample in zip(theirs.test_docs(), samples_of(CHAT, TEST), strict=True):
        messages = theirs.fewshot_context(
            doc, 0, apply_chat_template=True, chat_template=lambda messages, **_: messages
        )
        assert [(m["role"], m["content"]) for m in messages] == list(sample.requests[0].text)
        assert list(sample.requests[0].stop) == theirs.config.generation_kwargs["until"]


@pytest.mark.parametrize(
    ("task", "path"), [(TASK, "gsm8k/gsm8k.yaml"), (CHAT, "gsm8k/gsm8k-cot-llama.yaml")]
)
def test_scores_are_those_of_the_harness(task: Any, path: str) -> None:
    answers = [(case[0], case[1]) for case in READ]
    answers += [(text.replace("####", "The final answer is"), number) for text, number in answers]
    test = [{"question": "?", "answer": f"So.\n#### {number}"} for _, number in answers]
    ours = score_answers(task, samples_of(task, test, shots=0), *[text for text, _ in answers])
    theirs = harness(path, data={"train": TRAIN, "test": test})
    names = {"exact_match_strict": "strict-match", "exact_match_flexible": "flexible-extract"}
    filters = {each.name: each for each in theirs._filters}
    for doc, (text, _), score in zip(theirs.test_docs(), answers, ours, strict=True):
        for key, name in names.items():
            responses = [[text]]
            for step in filters[name].filters:
                responses = step().apply(responses, [doc])
            (result,) = responses
            assert score.values[key] == theirs.process_results(doc, [result])["exact_match"], text
