"""Problems of our own in the format of HumanEval and MBPP."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from taskvec.errors import DataError, TaskvecError, UsageError
from taskvec.evaluation import intervals
from taskvec.evaluation.data import DataPlaces, DataRow, rows_of
from taskvec.evaluation.task import Sample, SampleSettings, Task, Tools
from taskvec.evaluation.tasks import code, task
from taskvec.evaluation.tasks.code import pass_at
from taskvec.running.requests import Answer, Prompt
from taskvec.sandbox import programs
from taskvec.sandbox.programs import ProgramOutcome

ALLOWED = Tools(allow_code_execution=True, workers=2)
DATA = os.environ.get("TASKVEC_DATA")

TWICE = {
    "task_id": "Own/0",
    "prompt": 'def twice(n):\n    """ Two times a number.\n    >>> twice(2)\n    4\n    """\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(0) == 0\n",
}


def problem(number: int, **more: Any) -> dict[str, Any]:
    """A problem in MBPP's format: to add its number."""
    return {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(n):\r\n    return n + {number}\r\n",
        "test_list": [f"assert add({i}) == {number + i}" for i in range(3)],
        "test_setup_code": "",
    } | more


def rows(*data: Mapping[str, Any]) -> list[DataRow]:
    return [DataRow(each, f"row {i}") for i, each in enumerate(data)]


def needs_a_sandbox() -> None:
    try:
        programs.isolation()
    except TaskvecError as error:
        pytest.skip(str(error))


def answers(*texts: str) -> list[Answer]:
    return [Answer(text, 1, "stop") for text in texts]


def asked(sample: Sample) -> Prompt:
    request = sample.requests[0]
    assert isinstance(request, Prompt)
    return request


# pass@k


def test_pass_at_is_the_share_of_draws_with_a_pass() -> None:
    for n in range(1, 8):
        for passed, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations(range(n), k))
            lucky = sum(any(answer < passed for answer in draw) for draw in draws)
            assert pass_at(k, n=n, passed=passed) == float(Fraction(lucky, len(draws)))


def test_pass_at_is_the_closed_formula() -> None:
    """1 − C(n−c, k)/C(n, k) = 1 − ∏ (1 − k/i) over i from n − c + 1 to n."""
    for n, k in ((200, 1), (200, 10), (200, 100), (100, 100), (37, 10)):
        for passed in range(n + 1):
            missed = Fraction(1)
            for i in range(n - passed + 1, n + 1):
                missed *= 1 - Fraction(k, i)
            expected = float(1 - max(missed, Fraction(0)))
            assert pass_at(k, n=n, passed=passed) == pytest.approx(expected, rel=0, abs=1e-15)


def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that were run; those with `good` in them pass."""
    ran: list[str] = []

    def run(program: str) -> ProgramOutcome:
        ran.append(program)
        return (
            ProgramOutcome("passed")
            if "good" in program
            else ProgramOutcome("failed", "AssertionError")
        )

    monkeypatch.setattr(code, "run_program", run)
    monkeypatch.setattr(programs, "isolation", lambda: "namespaces")
    return ran


def test_figures_are_as_many_as_answers_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, done = outcomes(monkeypatch), list[int]()
    samples = [Sample(name, (), {"before": "", "after": f"#{name}"}) for name in "ab"]
    replies = [answers(*["good"] * 3, *["bad"] * 7), answers(*["bad"] * 10)]
    tools = Tools(allow_code_execution=True, advance=done.append)
    scores = code.score(samples, replies, tools)
    assert scores[0].values == {"pass@1": pytest.approx(0.3), "pass@10": 1.0}
    assert scores[1].values == {"pass@1": 0.0, "pass@10": 0.0}
    found = intervals.by_name(code.METRICS, scores, 0)
    assert {name: figure.value for name, figure in found.items()} == {
        "pass@1": pytest.approx(0.15), "pass@10": 0.5,
    }  # fmt: skip
    assert sorted(ran) == ["bad#a", "bad#b", "good#a"]  # each once
    assert done == [1, 1]
    assert scores[0].notes["passed"] == 3
    assert scores[0].notes["outcomes"][3] == {"ended": "failed", "detail": "AssertionError"}
    scores = code.score(samples, [answers("good"), answers("bad")], tools)
    assert list(intervals.by_name(code.METRICS, scores, 0)) == ["pass@1"]


# HumanEval


def test_humaneval_asks_for_the_rest_of_a_function() -> None:
    (sample,) = code.humaneval_samples({"test": rows(TWICE)}, SampleSettings())
    assert sample.id == "Own/0"
    assert sample.requests == (
        Prompt(TWICE["prompt"], 512, ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 0.0, 0),
    )


def test_several_answers_are_drawn() -> None:
    (sample,) = code.humaneval_samples({"test": rows(TWICE)}, SampleSettings(draws=3))
    drawn = [(r.temperature, r.draw) for r in sample.requests if isinstance(r, Prompt)]
    assert drawn == [(0.8, 0), (0.8, 1), (0.8, 2)]


@pytest.mark.parametrize("name", ["humaneval", "humaneval-chat", "mbpp-chat"])
def test_worked_examples_are_refused_where_there_are_none(name: str) -> None:
    with pytest.raises(UsageError) as error:
        task(name).samples({"test": rows(TWICE)}, SampleSettings(shots=2))
    assert (
        str(error.value)
        == f"task {name!r} takes no worked examples; got --shots 2, so leave that out"
    )


def test_humaneval_runs_problem_answer_and_tests() -> None:
    needs_a_sandbox()
    samples = code.humaneval_samples(
        {"test": rows(*(TWICE | {"task_id": str(i)} for i in range(5)))}, SampleSettings()
    )
    texts = ("    return 2 * n\n", "    return n * n", "    import os; os._exit(0)",
             "    return n +", "    return n + n")  # fmt: skip
    scores = code.score(samples, [answers(text) for text in texts], ALLOWED)
    assert [score.values["pass@1"] for score in scores] == [1, 0, 0, 0, 1]
    assert scores[1].notes["outcomes"] == [{"ended": "failed", "detail": "AssertionError"}]
    assert scores[3].notes["outcomes"][0]["detail"] == "SyntaxError: invalid syntax"


WHOLE = 'Here:\n```python\nimport math\n\ndef twice(n):\n    """Doc."""\n    return n + n\n```\nSo.'


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (WHOLE, True),
        (WHOLE.split("```")[1].removeprefix("python\n"), True),  # no block at all
        ("```python\n    return 2 * n\n```", True),  # only the rest
        ("```\nprint(1)\n```\nand\n" + WHOLE, True),  # the block that has the function
        (WHOLE.removesuffix("```\nSo."), True),  # cut off after the code
        (WHOLE.replace("n + n", "n"), False),
        ("I cannot do that.", False),
    ],
)
def test_code_of_an_answer_in_a_conversation(text: str, passes: bool) -> None:
    needs_a_sandbox()
    samples = code.humaneval_chat_samples({"test": rows(TWICE)}, SampleSettings())
    (score,) = code.chat_score(samples, [answers(text)], ALLOWED)
    assert score.values["pass@1"] == passes


def test_humaneval_chat_asks_for_the_whole_function() -> None:
    (sample,) = code.humaneval_chat_samples({"test": rows(TWICE)}, SampleSettings())
    ((role, content),) = asked(sample).text
    assert role == "user"
    assert content == (  # type: ignore[comparison-overlap]
        "Complete this Python function:\n\n```python\n" + TWICE["prompt"].strip()
        + "\n```\n\nAnswer with all of its code in one code block."
    )  # fmt: skip


# MBPP


PROMPT_12 = """\
You are an expert Python programmer, and here is your task: Write a function to add 2. \
Your code should pass these tests:

assert add(0) == 2
assert add(1) == 3
assert add(2) == 4
[BEGIN]
def add(n):
    return n + 2

[DONE]

You are an expert Python programmer, and here is your task: Write a function to add 12. \
Your code should pass these tests:

assert add(0) == 12
assert add(1) == 13
assert add(2) == 14
[BEGIN]
"""


def test_mbpp_asks_as_its_paper_does() -> None:
    data = {"test": rows(problem(12)), "prompt": rows(*map(problem, range(1, 11)))}
    (sample,) = code.mbpp_samples(data, SampleSettings(shots=1))
    assert sample.id == "12"
    assert sample.requests == (Prompt(PROMPT_12, 512, ("[DONE]",), 0.0, 0),)


def examples(sample: Sample) -> list[int]:
    """The numbers that the worked examples of a prompt add."""
    parts = str(asked(sample).text).split("return n + ")[1:]
    return [int(part.split("\n")[0]) for part in parts]


def test_mbpp_takes_its_worked_examples_from_where_they_are() -> None:
    prompt, test = rows(*map(problem, range(1, 11))), rows(*map(problem, range(11, 16)))
    for data in ({"test": test, "prompt": prompt}, {"test": [*prompt, *test], "prompt": []}):
        samples = code.mbpp_samples(data, SampleSettings())
        assert [sample.id for sample in samples] == [str(i) for i in range(11, 16)]
        assert {tuple(examples(sample)) for sample in samples} == {(2, 3, 4)}
        more = code.mbpp_samples(data, SampleSettings(shots=5))
        assert {tuple(examples(sample)) for sample in more} == {(2, 3, 4, 1, 5)}
        none = code.mbpp_samples(data, SampleSettings(shots=0))
        assert {tuple(examples(sample)) for sample in none} == {()}


def test_mbpp_without_them_takes_its_first_problems_which_are_not_scored() -> None:
    samples = code.mbpp_samples({"test": rows(*map(problem, range(11, 16)))}, SampleSettings())
    assert [sample.id for sample in samples] == ["14", "15"]
    assert examples(samples[0]) == [11, 12, 13]


def test_mbpp_with_too_few_examples_is_refused() -> None:
    for shots in (-1, 2):
        with pytest.raises(UsageError) as error:
            code.mbpp_samples({"test": rows(problem(11), problem(12))}, SampleSettings(shots=shots))
        assert str(error.value) == (
            f"task 'mbpp' takes 0 to 1 worked examples; got --shots {shots}"
        )
    with pytest.raises(DataError) as data_error:
        code.mbpp_samples({"test": rows(problem(601))}, SampleSettings())
    assert str(data_error.value) == (
        "row 0: no problem has a task_id of MBPP's test split, 11 to 510"
    )


def test_mbpp_runs_answer_setup_and_tests() -> None:
    needs_a_sandbox()
    late = {"test_setup_code": "root = Node(7)", "test_list": ["assert root.value == 7"]}
    sanitized = {k: v for k, v in problem(13).items() if k not in ("text", "test_setup_code")}
    sanitized |= {"prompt": "Root.", "test_imports": ["import math"]}
    sanitized |= {"test_list": ["assert math.isclose(root(4), 2)"]}
    data = {"test": rows(problem(11), problem(12, **late), sanitized)}
    samples = code.mbpp_samples(data, SampleSettings(shots=0))
    texts = ("def add(n):\r\n    return n + 11", "class Node:\n    def __init__(self, value):\n"
             "        self.value = value", "def root(n):\n    return n ** 0.5\n")  # fmt: skip
    scores = code.score(samples, [answers(text) for text in texts], ALLOWED)
    assert [score.values["pass@1"] for score in scores] == [1, 1, 1]
    (wrong, _, _) = code.score(samples, [answers(text) for text in texts[::-1]], ALLOWED)
    assert wrong.values["pass@1"] == 0


def test_mbpp_chat() -> None:
    needs_a_sandbox()
    (sample,) = code.mbpp_chat_samples({"test": rows(problem(11))}, SampleSettings())
    assert asked(sample).text == (
        (
            "user",
            "Write a function to add 11. It must pass these tests:\n\n```python\nassert add(0) == "
            "11\nassert add(1) == 12\nassert add(2) == 13\n```\n\nAnswer with all of its code in "
            "one code block.",
        ),
    )
    block = "Sure.\n\n```python\ndef add(n):\n    return n + 11\n```\n"
    (score,) = code.chat_score([sample], [answers(block)], ALLOWED)
    assert score.values["pass@1"] == 1


# Whether programs may be run


@pytest.mark.parametrize("found", code.TASKS, ids=lambda found: found.name)
def test_nothing_is_run_unless_it_is_allowed(found: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = outcomes(monkeypatch)
    assert "code" in found.needs
    with pytest.raises(UsageError) as error:
        found.score([Sample("a", (), {"before": "", "after": ""})], [answers("good")], Tools())
    assert str(error.value).startswith("scoring code runs generated programs")
    assert "--allow-code-execution" in str(error.value)
    assert not ran


# Real data


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="TASKVEC_DATA names no data folder")
@pytest.mark.parametrize(
    ("name", "solution", "count"),
    [("humaneval", "canonical_solution", 164), ("mbpp-chat", "code", 500)],
)
def test_reference_solutions_pass(name: str, solution: str, count: int) -> None:
    needs_a_sandbox()
    found = task(name)
    places = DataPlaces((Path(str(DATA)),), hub=False)
    data = rows_of(name, found.files, places)
    samples = found.samples(data, SampleSettings())
    solutions = [answers(row.text(solution)) for row in data["test"]]
    scores = found.score(samples, solutions, ALLOWED)
    failed = [s.id for s, score in zip(samples, scores, strict=True) if not score.values["pass@1"]]
    assert failed == []
    assert len(scores) == count
    wrong = [answers("    pass\n") for _ in samples]
    assert not any(score.values["pass@1"] for score in found.score(samples, wrong, ALLOWED))
