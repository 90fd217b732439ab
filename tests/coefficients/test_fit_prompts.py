"""Prompts in every form, and who answers them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from taskvec.coefficients.fit.prompts import Teacher, lessons_of
from taskvec.errors import DataError, UsageError
from taskvec.training.data import Reading, read_data


def lessons(prompts, teachers=None, weights=None, objective="kl", **about):
    known = {"tasks": ("math", "code"), "negative": (), "is_language": True, "reading": Reading()}
    return lessons_of(prompts, teachers or {}, weights or {}, objective, **(known | about))


def asked(prompts):
    (lesson,) = lessons({"math": prompts})
    return [(each.text, each.answer) for each in lesson.prompts]


def test_rows_texts_and_pairs():
    turn = (("user", "2+2?"),)
    assert asked([{"prompt": "2+2?"}]) == [(turn, None)]
    assert asked([{"prompt": "2+2?", "answer": "4"}]) == [(turn, "4")]
    assert asked([{"question": "2+2?", "completion": "4"}]) == [(turn, "4")]
    assert asked([{"text": "2+2="}, "3+3=", ("4+4=", "8")]) == [
        ("2+2=", None),
        ("3+3=", None),
        ("4+4=", "8"),
    ]
    messages = [{"role": "system", "content": "s"}, {"from": "human", "value": "2+2?"}]
    assert asked([{"messages": messages}]) == [((("system", "s"), *turn), None)]
    said = [*messages, {"role": "assistant", "content": "4"}]
    assert asked([{"messages": said}]) == [((("system", "s"), *turn), "4")]


def test_files(tmp_path):
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b", "answer": "c"}\n')
    assert asked(rows) == [((("user", "a"),), None), ((("user", "b"),), "c")]
    lines = tmp_path / "p.txt"
    lines.write_text("one\n\ntwo\n")
    assert asked(str(lines)) == [("one", None), ("two", None)]
    chat = tmp_path / "c.jsonl"
    chat.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    assert asked(read_data(chat)) == [((("user", "a"),), "b")]


def test_a_prompt_that_comes_twice_counts_once():
    assert asked(["a", "b", "a"]) == [("a", None), ("b", None)]


def test_teachers_follow_from_names():
    found = lessons(
        {"math": ["x"], "keep": ["y"], "odd": ["z"], "given": [("p", "q")]},
        {"odd": "code", "given": "answers"},
        {"math": 3.0},
    )
    by_name = {each.name: each for each in found}
    assert by_name["math"].teacher == Teacher("task", "math")
    assert by_name["keep"].teacher == Teacher("target")
    assert by_name["odd"].teacher == Teacher("task", "code")
    assert (by_name["given"].teacher.kind, by_name["given"].loss) == ("answers", "likelihood")
    assert [by_name[n].weight for n in ("math", "keep")] == [3 / 6, 1 / 6]
    assert [each.name for each in found] == sorted(by_name)


def test_a_source_of_the_target_may_have_no_prompts():
    keep, math = lessons({"math": ["x"]}, {"keep": "target"})
    assert keep.prompts is None
    assert math.prompts is not None


def test_objectives():
    (one,) = lessons({"any": ["x"]}, objective="entropy")
    assert (one.loss, one.teacher.kind) == ("entropy", "none")
    (one,) = lessons({"any": [("x", "y")]}, objective="likelihood")
    assert (one.loss, one.teacher.kind) == ("likelihood", "answers")


@pytest.mark.parametrize(
    ("prompts", "about", "error", "subject", "remedy"),
    [
        ({}, {}, UsageError, "prompts has no source", "give at least one"),
        ({"maths": ["x"]}, {}, UsageError, "'maths' is not a task", "give it one: 'target'"),
        ({"math": []}, {}, DataError, "prompts of 'math'", "give at least two"),
        ({"math": ["x"]}, {"negative": ("math",)}, UsageError, "subtracts task 'math'", "answers"),
        (
            {"math": ["x"]},
            {"teachers": {"math": "answers"}},
            DataError,
            "source 'math' is learned from its answers",
            "give prompt and answer",
        ),
        (
            {"math": ["x"]},
            {"teachers": {"math": "/no/such"}},
            UsageError,
            "'/no/such' is not a task",
            "known:",
        ),
        ({"math": ["x"]}, {"teachers": {"code": "math"}}, UsageError, "'code' has no prompts", ""),
        ({"math": ["x"]}, {"weights": {"math": 0.0}}, UsageError, "weight of source 'math'", ""),
        ({"math": ["x"]}, {"objective": "mse"}, UsageError, "objective must be in kl", ""),
        (
            {"math": ["x"]},
            {"objective": "entropy", "teachers": {"math": "target"}},
            UsageError,
            "entropy has no teachers",
            "",
        ),
        ({"math": [{"label": 1}]}, {}, DataError, "number 0: has no prompt", "it has label"),
        ({"math": [3]}, {}, DataError, "number 0: must be a text", ""),
        ({"math": "no-such.jsonl"}, {}, DataError, "no-such.jsonl: no such file", ""),
        ({"math": 7}, {}, UsageError, "must be a file or a list; got int", ""),
    ],
)
def test_what_does_not_fit_is_refused(prompts, about, error, subject, remedy):
    with pytest.raises(error) as raised:
        lessons(prompts, **about)
    assert subject in str(raised.value)
    assert remedy in str(raised.value)
