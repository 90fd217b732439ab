"""Code: HumanEval and MBPP, by running the programs; unbiased pass@k.

pass@k is the probability that at least one of k answers passes all tests. From n ≥ k answers, of
which c pass, its unbiased estimate for one problem is 1 − C(n−c, k) / C(n, k) (Codex paper,
arXiv:2107.03374, equation 1); the figure is the mean over problems.

One answer is the most likely one (temperature 0); with `draws` n > 1, n are drawn at 0.8, which
the Codex paper finds best for many answers. Its best for pass@1 alone is nearer to 0.2: compare
pass@1 figures of equal draws only.

The `-chat` tasks put the same problems to a model's chat template in this project's own words, and
take the code block of the answer.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.data import DataFile, DataRow, HubData
from taskvec.evaluation.task import (
    Metric,
    Replies,
    RowsByRole,
    Sample,
    SampleSettings,
    Score,
    Task,
    Tools,
)
from taskvec.evaluation.tasks.likelihood import MBPP
from taskvec.evaluation.tasks.shared import nonblank_text, refuse_shots, with_ids
from taskvec.running.requests import Answer, Prompt, Text
from taskvec.sandbox.programs import ProgramOutcome, require_permission, run_program
from taskvec.streaming import default_threads

MAX_NEW_TOKENS = 512
DRAWN_TEMPERATURE = 0.8
PASS_AT = (1, 10, 100)
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Codex paper, section 2.2
MBPP_TEST = range(11, 511)  # task_id of its test split
MBPP_EXAMPLES = (2, 3, 4)  # task_id of the worked examples of its paper


def pass_at(k: int, *, n: int, passed: int) -> float:
    """Unbiased estimate of the probability that one of k answers passes.

    Args:
        k: Answers that one may try, at most n.
        n: Answers that were drawn.
        passed: How many of them pass.

    >>> pass_at(1, n=4, passed=1)
    0.25
    >>> pass_at(2, n=4, passed=1)
    0.5
    """
    draws = math.comb(n, k)
    return (draws - math.comb(n - passed, k)) / draws


# Samples


def humaneval_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    """The problems as they are: the model goes on after the function's docstring."""
    refuse_shots("humaneval", settings)
    return [
        Sample(
            name,
            _prompts(nonblank_text(row, "prompt"), settings, HUMANEVAL_STOP),
            {"before": nonblank_text(row, "prompt"), "after": _humaneval_tests(row)},
        )
        for name, row in with_ids(rows["test"], "task_id")
    ]


def humaneval_chat_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    """The same problems as requests to write the whole function."""
    refuse_shots("humaneval-chat", settings)
    return [
        Sample(
            name,
            _prompts(
                _ask("Complete this Python function:", nonblank_text(row, "prompt")), settings
            ),
            {
                "before": row.text("prompt"),
                "after": _humaneval_tests(row),
                "entry_point": row.text("entry_point"),
            },
        )
        for name, row in with_ids(rows["test"], "task_id")
    ]


def _humaneval_tests(row: DataRow) -> str:
    return f"\n{row.text('test')}\ncheck({row.text('entry_point')})\n"


def mbpp_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    """The problems as lm-evaluation-harness asks them, after worked examples: task_id 2, 3 and 4.

    They are taken from the `prompt` rows, or from the test rows where all of MBPP is in one file.
    Where neither has them, the first problems serve, which then are not scored.
    """
    shots = 3 if settings.shots is None else settings.shots
    examples, scored = _split_mbpp(rows, shots)
    front = "".join(
        f"{_mbpp_text(row)}{_lines(nonblank_text(row, 'code'))}\n[DONE]\n\n" for row in examples
    )
    return [
        Sample(
            name,
            _prompts(front + _mbpp_text(row), settings, ("[DONE]",)),
            {"before": "", "after": _setup(row) + _mbpp_tests(row)},
        )
        for name, row in with_ids(scored, "task_id")
    ]


def mbpp_chat_samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    """The same problems as requests, without worked examples."""
    refuse_shots("mbpp-chat", settings)
    return [
        Sample(
            name,
            _prompts(_ask(_task_text(row), _mbpp_tests(row)), settings),
            {"before": "", "after": _setup(row) + _mbpp_tests(row)},
        )
        for name, row in with_ids(_split_mbpp(rows, 0)[1], "task_id")
    ]


def _split_mbpp(rows: RowsByRole, shots: int) -> tuple[list[DataRow], list[DataRow]]:
    """Worked examples and what is scored."""
    test = [row for row in rows["test"] if row.number("task_id") in MBPP_TEST]
    if not test:
        raise DataError(
            f"{rows['test'][0].where}: no problem has a task_id of MBPP's test split, 11 to 510"
        )
    known = {row.number("task_id"): row for row in (*rows["test"], *rows.get("prompt", ()))}
    if all(number in known for number in MBPP_EXAMPLES):
        others = [number for number in known if number not in (*MBPP_EXAMPLES, *MBPP_TEST)]
        examples = [known[number] for number in (*MBPP_EXAMPLES, *sorted(others))]
    else:
        examples, test = test[:-1], test[max(shots, 0) :]
    if not 0 <= shots <= len(examples):
        raise UsageError(
            f"task 'mbpp' takes 0 to {len(examples)} worked examples; got --shots {shots}"
        )
    return examples[:shots], test


def _task_text(row: DataRow) -> str:
    return f"{nonblank_text(row, 'text', 'prompt')} It must pass these tests:"


def _mbpp_text(row: DataRow) -> str:
    text, tests = nonblank_text(row, "text", "prompt"), _mbpp_tests(row).strip()
    return MBPP.format(text=text, tests=tests)


def _mbpp_tests(row: DataRow) -> str:
    return "\n" + "\n".join(_lines(test) for test in row.texts("test_list")) + "\n"


def _setup(row: DataRow) -> str:
    """What the tests need besides the answer, whose classes it may use."""
    setup = row.text("test_setup_code") if "test_setup_code" in row.data else ""
    if "test_imports" in row.data:  # of the sanitized problems
        setup = "\n".join(row.texts("test_imports"))
    return f"\n{_lines(setup)}" if setup else ""


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _prompts(
    text: Text, settings: SampleSettings, stop: tuple[str, ...] = ()
) -> tuple[Prompt, ...]:
    temperature = DRAWN_TEMPERATURE if settings.draws > 1 else 0.0
    return tuple(
        Prompt(text, MAX_NEW_TOKENS, stop, temperature, draw) for draw in range(settings.draws)
    )


def _ask(what: str, code: str) -> Text:
    block = f"```python\n{code.strip()}\n```"
    return (("user", f"{what}\n\n{block}\n\nAnswer with all of its code in one code block."),)


# Scores


def score(samples: Sequence[Sample], replies: Sequence[Replies], tools: Tools) -> list[Score]:
    """Runs the program of every answer; a program that comes twice is run once.

    Raises:
        TaskvecError: programs may not be run, or cannot be isolated here.
    """
    require_permission("scoring code", allowed=tools.allow_code_execution)
    programs = [
        [_program(sample.reference, reply) for reply in mine]
        for sample, mine in zip(samples, replies, strict=True)
    ]
    scores = []
    with ThreadPoolExecutor(tools.workers or default_threads()) as pool:
        different = dict.fromkeys(itertools.chain.from_iterable(programs))
        running = {program: pool.submit(run_program, program) for program in different}
        try:
            for mine in programs:
                scores.append(_score([running[program].result() for program in mine]))
                tools.advance(1)
        finally:  # after an error or an interrupt, what has not begun is not begun
            pool.shutdown(wait=False, cancel_futures=True)
    return scores


def _score(outcomes: Sequence[ProgramOutcome]) -> Score:
    n, passed = len(outcomes), sum(outcome.passed for outcome in outcomes)
    values = {f"pass@{k}": pass_at(k, n=n, passed=passed) for k in PASS_AT if k <= n}
    details = [{"ended": outcome.ended, "detail": outcome.detail} for outcome in outcomes]
    return Score(values, {"passed": passed, "outcomes": details})


def _program(reference: Any, reply: object) -> str:
    """The program as HumanEval puts it together: the problem, the answer, the tests."""
    assert isinstance(reply, Answer)
    return str(reference["before"] + reply.text + reference["after"])


def chat_score(samples: Sequence[Sample], replies: Sequence[Replies], tools: Tools) -> list[Score]:
    """`score` of the code blocks of conversational answers."""
    codes = [
        [Answer(_code(sample.reference, reply), 0, "stop") for reply in mine]
        for sample, mine in zip(samples, replies, strict=True)
    ]
    return score(samples, codes, tools)


def _code(reference: Any, reply: object) -> str:
    """The code of an answer, as what can follow `before`.

    A whole function may follow the one of the problem, whose body is its docstring.
    """
    assert isinstance(reply, Answer)
    blocks = re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", reply.text, re.DOTALL)
    name = reference.get("entry_point")
    if name is None:
        return str(blocks[0]) if blocks else reply.text
    is_whole = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE).search
    whole = [block for block in blocks or [reply.text] if is_whole(block)]
    if whole:
        return f"\n\n{whole[0]}"
    return str(blocks[0]) if blocks else reply.text


METRICS = (Metric("pass@1"), *(Metric(f"pass@{k}", "mean") for k in PASS_AT[1:]))

_HUMANEVAL = (
    DataFile(
        "test",
        ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl"),
        HubData("openai/openai_humaneval", None, "test"),
    ),
)
_MBPP = (
    DataFile(
        "test",
        ("mbpp/mbpp.test.jsonl", "mbpp/mbpp.jsonl"),
        HubData("google-research-datasets/mbpp", "full", "test"),
    ),
    DataFile(
        "prompt",
        ("mbpp/mbpp.prompt.jsonl", "mbpp/mbpp.jsonl"),
        HubData("google-research-datasets/mbpp", "full", "prompt"),
        optional=True,
    ),
)

TASKS = (
    Task(
        name="humaneval",
        summary="HumanEval: Python functions from their docstrings, tested by running them",
        files=_HUMANEVAL,
        samples=humaneval_samples,
        score=score,
        metrics=METRICS,
        needs=("code",),
        fewest_tokens=1024,
        source="arXiv:2107.03374",
    ),
    Task(
        name="humaneval-chat",
        summary="HumanEval, put to the chat template",
        files=_HUMANEVAL,
        samples=humaneval_chat_samples,
        score=chat_score,
        metrics=METRICS,
        needs=("chat", "code"),
        fewest_tokens=1024,
        source="arXiv:2107.03374; the wording is this project's",
    ),
    Task(
        name="mbpp",
        summary="MBPP: short Python functions from a sentence and three tests, 3-shot",
        files=_MBPP,
        samples=mbpp_samples,
        score=score,
        metrics=METRICS,
        needs=("code",),
        fewest_tokens=1536,
        source="arXiv:2108.07732",
    ),
    Task(
        name="mbpp-chat",
        summary="MBPP, put to the chat template, without worked examples",
        files=_MBPP[:1],
        samples=mbpp_chat_samples,
        score=chat_score,
        metrics=METRICS,
        needs=("chat", "code"),
        fewest_tokens=1024,
        source="arXiv:2108.07732; the wording is this project's",
    ),
)
