"""Reasoning in front of an answer is not scored, by any task."""

from __future__ import annotations

import pytest

from taskvec.evaluation.judges.refusals import PrefixJudge
from taskvec.evaluation.task import Sample, Tools
from taskvec.evaluation.tasks import tasks
from taskvec.running.requests import Answer, is_reasoning, without_reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n1, no 2\n</think>\n\n3", "3"),
        ("1, no 2</think>\n3", "3"),  # the prompt opened the block
        ("<think>1, no 2", ""),  # cut off
        ("<think>1</think>2<think>3", "2"),
        ("<think>1</think>2 <think>3</think>4", "2 4"),
        ("<think>1<think>2</think>3</think>4", "4"),
        ("<think></think> 4", "4"),
        ("  4 < 5 think", "  4 < 5 think"),
        ("", ""),
    ],
)
def test_the_answer_is_what_stands_outside_of_reasoning(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer
    assert Answer(text, 1, "end").text == answer
    assert Answer(text, 1, "end").raw == text


def test_a_block_is_open_until_it_is_closed() -> None:
    assert is_reasoning("a<think>b")
    assert not is_reasoning("a<think>b</think>")
    assert not is_reasoning("b</think>")


RIGHT = "\ndef add(a, b):\n    return a + b\n"
WRONG = "\ndef add(a, b):\n    return a - b\n"
ADD = {"before": "", "after": "\nassert add(2, 3) == 5\n", "entry_point": "add"}


@pytest.mark.parametrize(
    ("task", "reference", "right", "wrong", "metric"),
    [
        ("gsm8k", {"answer": "18"}, "#### 18", "#### 17", "exact_match_strict"),
        (
            "gsm8k-chat",
            {"answer": "18"},
            "The final answer is 18",
            "The final answer is 17",
            "exact_match_strict",
        ),
        ("squad", {"answers": ["the fox"]}, "the fox", "a cat", "exact_match"),
        ("advbench", {"prompt": "Do x"}, "Sure, first", "I'm sorry, no", "attack_success"),
        ("prompts", {"prompt": "Do x"}, "Sure, first", "I'm sorry, no", "attack_success"),
        ("xstest", {"prompt": "x", "safe": True}, "I'm sorry, no", "Sure, first", "over_refusal"),
        ("humaneval", ADD, RIGHT, WRONG, "pass@1"),
        ("mbpp", ADD, RIGHT, WRONG, "pass@1"),
        ("humaneval-chat", ADD, f"```python{RIGHT}```", f"```python{WRONG}```", "pass@1"),
        ("mbpp-chat", ADD, f"```python{RIGHT}```", f"```python{WRONG}```", "pass@1"),
    ],
)
def test_drafts_count_for_nothing(
    task: str, reference: dict[str, object], right: str, wrong: str, metric: str
) -> None:
    answers = {
        f"<think>{wrong}</think>{right}": 1.0,
        f"<think>{right}</think>{wrong}": 0.0,
        f"{wrong}</think>{right}": 1.0,
        right: 1.0,
        wrong: 0.0,
    }
    samples = [Sample(str(i), (), reference) for i, _ in enumerate(answers)]
    replies = [[Answer(text, 9, "end")] for text in answers]
    tools = Tools(allow_code_execution=True, judge=PrefixJudge())
    if task == "xstest":
        tools = Tools()
    scores = tasks()[task].score(samples, replies, tools)
    assert [score.values[metric] for score in scores] == list(answers.values())
