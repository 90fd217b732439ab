"""Likelihood of given answers: joined as they are, per token, reference programs of MBPP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.tasks.support import asked, samples_of, task_named

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.intervals import figure
from taskvec.evaluation.task import Tools
from taskvec.evaluation.tasks import likelihood
from taskvec.running.requests import Likelihood

OWN = task_named(likelihood.TASKS, "likelihood")
MBPP = task_named(likelihood.TASKS, "mbpp-likelihood")

PROBLEM = {
    "task_id": 11,
    "text": "Write a function to {double} a number.",
    "code": "def double(n):\r\n    return 2 * n \r\n",
    "test_list": ["assert double(1) == 2", "assert double(0) == 0", "assert double(-1) == -2"],
}


def test_prompt_and_answer_are_joined_as_they_are() -> None:
    pairs = [{"prompt": "One, two,", "answer": " three"}, {"prompt": "", "answer": "x", "id": "y"}]
    samples = samples_of(OWN, pairs)
    assert [sample.id for sample in samples] == ["0", "y"]
    assert [asked(sample) for sample in samples] == [[("One, two,", " three")], [("", "x")]]


def test_figures_are_per_token() -> None:
    samples = samples_of(OWN, [{"prompt": "", "answer": "a"}, {"prompt": "", "answer": "b"}])
    replies = [[Likelihood(-6.0, 2, False)], [Likelihood(-1.0, 8, True)]]
    scores = OWN.score(samples, replies, Tools())
    values = {metric.name: figure(metric, scores).value for metric in OWN.metrics}
    assert values == {
        "log_likelihood_per_token": pytest.approx(-7 / 10),  # not the mean of −3 and −1/8
        "perplexity": pytest.approx(math.exp(7 / 10)),
        "greedy": 0.5,
    }
    assert [metric.higher_is_better for metric in OWN.metrics] == [True, False, True]


def test_reference_programs() -> None:
    (sample,) = samples_of(MBPP, [PROBLEM])
    assert sample.id == "11"
    prompt = (
        "You are an expert Python programmer, and here is your task: "
        "Write a function to {double} a number. Your code should pass these tests:\n\n"
        "assert double(1) == 2\nassert double(0) == 0\nassert double(-1) == -2\n[BEGIN]\n"
    )
    assert asked(sample) == [(prompt, "def double(n):\n    return 2 * n \n")]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (OWN, {"prompt": "a", "answer": " "}, "'answer' must not be blank"),
        (OWN, {"answer": "a"}, "has no 'prompt'; its fields: answer"),
        (OWN, {"prompt": 1, "answer": "a"}, "'prompt' must be a text; got 1"),
        (MBPP, PROBLEM | {"code": ""}, "'code' must not be blank"),
        (MBPP, PROBLEM | {"test_list": "a"}, "'test_list' must be a list of texts; got 'a'"),
    ],
)
def test_malformed_rows(task: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        samples_of(task, [row])
    assert str(error.value) == f"data.jsonl, line 1: {message}"


@pytest.mark.parametrize(("task", "row"), [(OWN, {"prompt": "a", "answer": "b"}), (MBPP, PROBLEM)])
def test_worked_examples_are_refused(task: Any, row: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="takes no worked examples; got --shots 1"):
        samples_of(task, [row], shots=1)


def test_mbpp_prompt_is_that_of_the_harness() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from jinja2 import Template
    from lm_eval.tasks._yaml_loader import load_yaml

    # The template alone: the whole task would ask the network for its metric.
    path = Path(lm_eval.__file__).parent / "tasks" / "mbpp" / "mbpp.yaml"
    template = Template(
        load_yaml(path, resolve_func=False)["doc_to_text"], keep_trailing_newline=True
    )
    assert asked(samples_of(MBPP, [PROBLEM])[0])[0][0] == template.render(**PROBLEM)
