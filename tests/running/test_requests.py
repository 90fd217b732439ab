"""Reasoning in front of an answer is not scored, by any task."""

from __future__ import annotations

import pytest

from taskvec.evaluation.judges.refusals import PrefixJudge
from taskvec.evaluation.task import Sample, Tools
from taskvec.evaluation.tasks import tasks
from taskvec.running.encoding import Encoder
from taskvec.running.requests import Answer, is_reasoning, opened_at_end, without_reasoning


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
        ("<thought>1</thought>2", "2"),
        ("<thinking>1</thinking>\n2", "2"),
        ("<reasoning>1", ""),
        ("<seed:think>1</seed:think>2", "2"),
        ("[THINK]1[/THINK]2", "2"),
        ("1◁/think▷2", "2"),
        ("<|START_THINKING|>1<|END_THINKING|>2", "2"),
        ("<|begin_of_thought|>1<|end_of_thought|>2", "2"),
        ("<|channel|>analysis<|message|>1assistant<|channel|>final<|message|>2", "2"),
        ("<|channel|>analysis<|message|>1", ""),
        ("<|channel|>final<|message|>2", "2"),
        ("<think>1</thought>2</think>3", "3"),
        ("a <thoughtful> word", "a <thoughtful> word"),
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
    assert is_reasoning("<think>a</think><thought>b")
    assert is_reasoning("<|channel|>analysis<|message|>b")
    assert not is_reasoning("<|channel|>analysis<|message|>b<|channel|>final<|message|>")
    assert opened_at_end("<|im_start|>assistant\n<thought>\n") == "<thought>"
    assert opened_at_end("no") == ""


def test_special_tokens_around_reasoning_are_kept() -> None:
    """gpt-oss and Mistral mark reasoning by special tokens, which a text leaves out."""

    class Added:
        def __init__(self, text: str, special: bool) -> None:
            self.text, self.special = text, special

        def __str__(self) -> str:
            return self.text

    class Tokenizer:
        def __init__(self) -> None:
            texts = {9: "[THINK]", 8: "[/THINK]", 7: "</s>"}
            self.added_tokens_decoder = {i: Added(text, True) for i, text in texts.items()}

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return "".join(str(token) for token in tokens if token < 7)

    encoder = Encoder("m", Tokenizer(), 8, (), 0, frozenset())
    assert encoder.decode([1, 9, 2, 3, 8, 4, 7]) == "1[THINK]23[/THINK]4"
    assert encoder.decode([1, 2, 7]) == "12"


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
