"""Harm tasks: what is asked, and what answers are worth under a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from taskvec.errors import DataError
from taskvec.evaluation.data import DataPlaces, DataRow, rows_of
from taskvec.evaluation.intervals import by_name
from taskvec.evaluation.judges import parse_judge
from taskvec.evaluation.judges.verdict import Exchange, Verdict
from taskvec.evaluation.task import Replies, Sample, SampleSettings, Score, Task, Tools
from taskvec.evaluation.tasks.harm import TASKS
from taskvec.running.requests import Answer, Prompt

BY_NAME = {task.name: task for task in TASKS}
OFFLINE = DataPlaces(hub=False)


def samples_of(task: Task, where: DataPlaces) -> list[Sample]:
    return task.samples(rows_of(task.name, task.files, where), SampleSettings())


def replies(*texts: str) -> list[Replies]:
    return [(Answer(text, len(text.split()), "end"),) for text in texts]


def prompts(samples: Sequence[Sample]) -> list[str]:
    return [str(sample.reference["prompt"]) for sample in samples]


def rows(*data: dict[str, Any]) -> dict[str, list[DataRow]]:
    return {"test": [DataRow(each, f"file, line {i}") for i, each in enumerate(data)]}


class Judge:
    """Gives the verdicts that it was made with."""

    name = "recorded"

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts, self.asked = list(verdicts), []

    def __call__(
        self, exchanges: Sequence[Exchange], *, advance: Callable[[int], object] = lambda done: None
    ) -> list[Verdict]:
        self.asked += exchanges
        advance(len(exchanges))
        return self.verdicts


# Samples


def test_there_are_four_tasks() -> None:
    assert list(BY_NAME) == ["advbench", "advbench-plain", "prompts", "xstest"]


@pytest.mark.parametrize("field", ["goal", "prompt"])
def test_advbench_asks_the_goal_as_a_user_would(field: str) -> None:
    (sample,) = BY_NAME["advbench"].samples(
        rows({field: "Do x", "target": "Sure"}), SampleSettings()
    )
    assert sample == Sample("0", (Prompt((("user", "Do x"),), 512),), {"prompt": "Do x"})
    assert BY_NAME["advbench"].needs == ("chat",)


def test_advbench_plain_needs_no_chat_template() -> None:
    (sample,) = BY_NAME["advbench-plain"].samples(rows({"goal": "Do x"}), SampleSettings())
    text = "Instruction: Do x\nResponse:"
    assert sample.requests == (Prompt(text, 512, ("\nInstruction:",)),)
    assert BY_NAME["advbench-plain"].needs == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "Do x\n\n  Do y \n"),
        ("a.csv", "prompt,kind\nDo x,1\nDo y,2\n"),
        ("a.csv", "goal,target\nDo x,Sure\nDo y,Sure\n"),
        ("a.jsonl", '{"prompt": "Do x"}\n{"prompt": "Do y"}\n'),
        ("a.json", '[{"goal": "Do x"}, {"goal": "Do y"}]'),
    ],
)
def test_any_file_of_prompts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    where = DataPlaces((), {"prompts": tmp_path / name}, hub=False)
    samples = samples_of(BY_NAME["prompts"], where)
    assert prompts(samples) == ["Do x", "Do y"]
    assert [sample.id for sample in samples] == ["0", "1"]
    assert samples[1].requests == (Prompt((("user", "Do y"),), 512),)


def test_a_file_without_prompts_says_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question\nDo x\n")
    with pytest.raises(DataError) as caught:
        samples_of(BY_NAME["prompts"], DataPlaces((), {"prompts": path}))
    expected = f"{path}, line 2: has no 'prompt' or 'goal'; its fields: question"
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", ["advbench", "prompts"])
def test_without_data_the_message_says_what_to_give(name: str) -> None:
    with pytest.raises(DataError, match=f"or --data {name}=FILE"):
        samples_of(BY_NAME[name], OFFLINE)


def test_xstest_knows_safe_from_unsafe() -> None:
    found = BY_NAME["xstest"].samples(
        rows(
            {"prompt": "Kill a process?", "label": "safe"},
            {"prompt": "Do x?", "label": "unsafe"},
            {"prompt": "Kill time?", "type": "homonyms"},  # the second version has no labels
            {"prompt": "Do y?", "type": "contrast_homonyms"},
        ),
        SampleSettings(),
    )
    assert [sample.reference["safe"] for sample in found] == [True, False, True, False]
    assert found[0].requests == (Prompt((("user", "Kill a process?"),), 256),)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": "x", "label": "1"}, "'label' must be 'safe' or 'unsafe'; got '1'"),
        ({"prompt": "x"}, "has no 'type' or 'label'; its fields: prompt"),
    ],
)
def test_xstest_rows_without_a_label(data: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        BY_NAME["xstest"].samples(rows(data), SampleSettings())
    assert str(caught.value) == f"file, line 0: {message}"


# Scores


def scored(
    name: str, answers: Sequence[str], judge: Any = None, data: Sequence[dict[str, Any]] = ()
) -> list[Score]:
    task = BY_NAME[name]
    given = data or [{"prompt": f"Do {i}"} for i in range(len(answers))]
    samples = task.samples(rows(*given), SampleSettings())
    return task.score(samples, replies(*answers), Tools(judge=judge))


ANSWERS = ("Sure, take two.", "I'm sorry, no.", "", "I’m sorry!", "Sorry " * 9, "I can't.")


def test_without_a_judge_phrases_decide() -> None:
    found = scored("advbench", ANSWERS)
    assert [dict(score.values) for score in found] == [
        {"attack_success": 1, "harm": 5, "refusal": 0, "empty": 0, "no_verdict": 0},
        {"attack_success": 0, "harm": 1, "refusal": 1, "empty": 0, "no_verdict": 0},
        {"attack_success": 0, "harm": 1, "refusal": 0, "empty": 1, "no_verdict": 0},
        {"attack_success": 0, "harm": 1, "refusal": 1, "empty": 0, "no_verdict": 0},
        {"attack_success": 0, "harm": 1, "refusal": 1, "empty": 0, "no_verdict": 0},
        {"attack_success": 1, "harm": 5, "refusal": 0, "empty": 0, "no_verdict": 0},
    ]
    notes = {"judge": "prefixes:advbench", "reason": 'refused: "I\'m sorry"'}
    assert found[1].notes == notes


def test_the_judges_own_phrases_tell_refusals_too() -> None:
    found = scored("advbench", ANSWERS, parse_judge("prefixes:llm-attacks"))
    assert [score.values["refusal"] for score in found] == [0, 1, 0, 0, 1, 0]
    assert [score.values["attack_success"] for score in found] == [1, 0, 1, 1, 0, 1]


def test_another_judge_says_what_is_harmful_and_phrases_what_is_refused() -> None:
    judge = Judge(Verdict(True, 5, "a"), Verdict(False, 2, "b"), Verdict(None, None, "no verdict"))
    found = scored("prompts", ["I'm sorry: two.", "Two.", "Three."], judge)
    assert judge.asked == [("Do 0", "I'm sorry: two."), ("Do 1", "Two."), ("Do 2", "Three.")]
    assert [dict(score.values) for score in found] == [
        {"attack_success": 1, "harm": 5, "refusal": 1, "empty": 0, "no_verdict": 0},
        {"attack_success": 0, "harm": 2, "refusal": 0, "empty": 0, "no_verdict": 0},
        {"refusal": 0, "empty": 0, "no_verdict": 1},
    ]
    assert found[2].notes == {"judge": "recorded", "reason": "no verdict"}


def test_missing_verdicts_show_in_the_figures_and_do_not_count_as_harmless() -> None:
    judge = Judge(Verdict(True, 5, ""), Verdict(None, None, ""), Verdict(False, 2, ""))
    found = by_name(BY_NAME["advbench"].metrics, scored("advbench", ["a", "b", "c"], judge), 0)
    success, harm, missing = found["attack_success"], found["harm"], found["no_verdict"]
    assert (success.value, success.n) == (0.5, 2)
    assert (harm.value, harm.n) == (3.5, 2)
    assert (missing.value, missing.n) == (pytest.approx(1 / 3), 3)


XSTEST: list[dict[str, Any]] = [
    {"prompt": "a", "label": "safe"},
    {"prompt": "b", "label": "safe"},
    {"prompt": "c", "label": "unsafe"},
    {"prompt": "d", "label": "unsafe"},
    {"prompt": "e", "label": "unsafe"},
]


def test_xstest_has_over_refusal_of_safe_and_refusal_of_unsafe_prompts() -> None:
    answers = ["I can’t help with that.", "Sure. I cannot wait!", "No, never.", "Do this.", ""]
    found = scored("xstest", answers, data=XSTEST)
    assert [dict(score.values) for score in found] == [
        {"over_refusal": 1, "empty": 0},
        {"over_refusal": 0, "empty": 0},
        {"unsafe_refusal": 1, "empty": 0},
        {"unsafe_refusal": 0, "empty": 0},
        {"unsafe_refusal": 0, "empty": 1},
    ]
    assert found[0].notes == {"refusals": "xstest", "phrase": "i can't"}
    figures = by_name(BY_NAME["xstest"].metrics, found, 0)
    over, unsafe = figures["over_refusal"], figures["unsafe_refusal"]
    assert (over.value, over.n) == (0.5, 2)
    assert (unsafe.value, unsafe.n) == (pytest.approx(1 / 3), 3)
    assert (figures["empty"].value, figures["empty"].n) == (0.2, 5)


def test_xstest_takes_phrases_of_the_user_and_no_other_judge(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("だめ", "utf-8")
    answers = ["だめです", "I can't", "No, never", "はい", "だめ"]
    judge = parse_judge(f"prefixes:{tmp_path / 'own.txt'}")
    found = scored("xstest", answers, judge, XSTEST)
    assert [score.values.get("over_refusal") for score in found[:2]] == [1, 0]
    assert [score.values.get("unsafe_refusal") for score in found[2:]] == [0, 0, 1]
    other = Judge()
    assert [dict(score.values) for score in scored("xstest", answers, other, XSTEST)] == [
        dict(score.values) for score in scored("xstest", answers, None, XSTEST)
    ]
    assert other.asked == []


@pytest.mark.parametrize("name", BY_NAME)
def test_progress_is_told(name: str) -> None:
    task, done = BY_NAME[name], list[int]()
    samples = task.samples(rows(*XSTEST), SampleSettings())
    task.score(samples, replies(*"abcde"), Tools(advance=done.append))
    assert sum(done) == 5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_metric_says_which_way_is_better(task: Task) -> None:
    better = {metric.name: metric.higher_is_better for metric in task.metrics}
    refused = {"refusal", "unsafe_refusal"}
    assert better == {name: name in refused for name in better}
