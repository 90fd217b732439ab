"""SQuAD and JSQuAD: forms of the data, normalising, exact match and F1."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.tasks.support import harness, samples_of, score_answers, task_named

from taskvec.errors import DataError, UsageError
from taskvec.evaluation.data import DataPlaces, rows_of
from taskvec.evaluation.task import SampleSettings
from taskvec.evaluation.tasks import reading

SQUAD = task_named(reading.TASKS, "squad")
JSQUAD = task_named(reading.TASKS, "jsquad")


def qa(name: str, question: str, *answers: str, **more: Any) -> dict[str, Any]:
    listed = [{"text": text, "answer_start": 0} for text in answers]
    return {"id": name, "question": question, "answers": listed, **more}


def nested(*qas: dict[str, Any]) -> dict[str, Any]:
    """One article of one paragraph, in SQuAD's own form."""
    paragraph = {"context": "鳥 [SEP] ふくろうは夜に鳴く。 ", "qas": list(qas)}
    return {"version": "1", "data": [{"title": "鳥", "paragraphs": [paragraph]}]}


DATA = nested(qa("a1", "いつ鳴く？", "夜", "夜に"), qa("a2", "何が鳴く？", "ふくろう"))


def test_both_forms_of_the_data_are_the_same() -> None:
    paragraph = DATA["data"][0]["paragraphs"][0]
    flat = [
        {
            "id": each["id"],
            "title": "鳥",
            "context": paragraph["context"],
            "question": each["question"],
            "answers": {"text": [a["text"] for a in each["answers"]], "answer_start": [0]},
        }
        for each in paragraph["qas"]
    ]
    for task in reading.TASKS:
        assert samples_of(task, [DATA], shots=0) == samples_of(task, flat, shots=0)
    assert [sample.id for sample in samples_of(SQUAD, flat)] == ["a1", "a2"]
    assert samples_of(SQUAD, flat)[0].reference == {"answers": ["夜", "夜に"]}


def test_prompts() -> None:
    (sample, _) = samples_of(SQUAD, [DATA])
    assert sample.requests[0].text == (
        "Title: 鳥\n\nBackground: 鳥 [SEP] ふくろうは夜に鳴く。 \n\nQuestion: いつ鳴く？\n\nAnswer:"
    )
    assert sample.requests[0].stop == ("\n",)
    (sample, _) = samples_of(JSQUAD, [DATA], train=[DATA])
    introduction, *parts = sample.requests[0].text.split("### 指示：\n")
    assert introduction.endswith("応答を書きなさい。\n\n")
    assert parts == [
        "与えられた文脈から、質問に対する答えを抜き出してください。\n\n"
        f"### 入力：\n文脈：ふくろうは夜に鳴く。\n質問：{question}\n\n### 応答：{answer}"
        for question, answer in (
            ("いつ鳴く？", "\n夜\n\n"),
            ("何が鳴く？", "\nふくろう\n\n"),
            ("いつ鳴く？", ""),
        )
    ]
    assert sample.requests[0].stop == ("\n\n",)


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        (" The owl.", ("owl",), 1, 1.0),
        ("AN OWL'S  night", ("owls night",), 1, 1.0),
        ("the owl at night", ("an owl",), 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # owl at night
        ("owl owl", ("owl",), 0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # each counts once
        ("owl", ("mouse", "a grey owl"), 0, 2 * 1 * (1 / 2) / (1 + 1 / 2)),
        ("mouse", ("owl",), 0, 0.0),
        ("theory", ("ory",), 0, 0.0),  # articles are whole words
        ("", ("owl",), 0, 0.0),
        ("the", ("owl",), 0, 0.0),
        ("the", ("a",), 1, 1.0),  # nothing is left of either
        ("a", ("the", "owl"), 0, 0.0),  # a reference that is nothing does not count
        ("10-20", ("1020",), 1, 1.0),
        ("10–20", ("1020",), 0, 0.0),  # only ASCII punctuation goes
        ("ÉCOLE", ("école",), 1, 1.0),
    ],
)
def test_scores(answer: str, references: tuple[str, ...], exact: int, f1: float) -> None:
    samples = samples_of(SQUAD, [nested(qa("q", "?", *references))])
    (score,) = score_answers(SQUAD, samples, answer)
    assert score.values == {"exact_match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("\n東京タワー。\n", ("東京タワー",), 1, 1.0),
        ("東京タワー", ("東京",), 0, 2 * (2 / 5) * 1 / (2 / 5 + 1)),
        ("東京、京都", ("京都東京",), 0, 2 * (4 / 5) * 1 / (4 / 5 + 1)),  # order does not count
        ("「東京」", ("東京",), 0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),  # brackets stay
        ("ＡＢＣ", ("ａｂｃ",), 1, 1.0),  # lower case of wide letters
        ("ABC", ("ＡＢＣ",), 0, 0.0),  # wide letters are others
        ("the 東京", ("東京",), 0, 2 * (2 / 6) * 1 / (2 / 6 + 1)),  # no articles; a space counts
        ("285 km/h", ("285km/h", "285 km/h"), 1, 1.0),
        ("。", ("東京",), 0, 0.0),
    ],
)
def test_japanese_scores(answer: str, references: tuple[str, ...], exact: int, f1: float) -> None:
    samples = samples_of(JSQUAD, [nested(qa("q", "？", *references))], shots=0)
    (score,) = score_answers(JSQUAD, samples, answer)
    assert score.values == {"exact_match": exact, "f1": pytest.approx(f1)}


words = st.lists(st.sampled_from("abc"), max_size=6)


@given(words, words)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(
    ours: list[str], theirs: list[str]
) -> None:
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        expected = float(ours == theirs)
    elif common == 0:
        expected = 0.0
    else:
        precision, recall = common / len(ours), common / len(theirs)
        expected = 2 * precision * recall / (precision + recall)
    assert reading.f1(ours, theirs) == pytest.approx(expected)


NO_ANSWER = (
    "has no answer; questions of SQuAD 2.0 without one are not supported: "
    "leave out those with is_impossible"
)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (nested(qa("q", "?", "a", is_impossible=True)), f", question q: {NO_ANSWER}"),
        (nested(qa("q", "?")), f", question q: {NO_ANSWER}"),
        (
            {"id": "q", "question": "?", "context": "c", "title": "t", "answers": {"text": []}},
            f", question q: {NO_ANSWER}",
        ),
        (
            {"id": "q", "question": "?", "context": "c", "title": "t", "answers": "a"},
            ", question q: 'answers' must be a list of texts; got 'a'",
        ),
        (
            {"id": "q", "question": "?"},
            ", question q: 'answers' must be a list of texts; got None",
        ),
        (
            {"data": [{"title": "t"}]},
            ": is not in SQuAD's form (data, paragraphs, qas): KeyError: 'paragraphs'",
        ),
        (
            {"data": "text"},
            ": is not in SQuAD's form (data, paragraphs, qas): "
            "TypeError: string indices must be integers, not 'str'",
        ),
        (nested(qa("q", " ", "a")), ", question q: 'question' must not be blank"),
    ],
)
@pytest.mark.parametrize("task", reading.TASKS, ids=lambda task: task.name)
def test_malformed_data(task: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        samples_of(task, [row], shots=0)
    assert str(error.value) == f"data.jsonl, line 1{message}"


def test_worked_examples() -> None:
    with pytest.raises(UsageError, match="task 'squad' takes no worked examples; got --shots 2"):
        samples_of(SQUAD, [DATA], shots=2)
    with pytest.raises(DataError, match="2 worked examples are wanted, and its train data have 0"):
        samples_of(JSQUAD, [DATA])


def test_files_of_jglue(tmp_path: Path) -> None:
    (tmp_path / "jsquad-v1.3").mkdir()
    for split in ("train", "valid"):
        path = tmp_path / "jsquad-v1.3" / f"{split}-v1.3.json"
        path.write_text(json.dumps(DATA, ensure_ascii=False), "utf-8")
    rows = rows_of("jsquad", JSQUAD.files, DataPlaces((tmp_path,), hub=False))
    assert len(JSQUAD.samples(rows, SampleSettings())) == 2


# As others


def test_prompt_and_match_of_the_harness() -> None:
    flat = {
        "id": "a1",
        "title": "鳥",
        "context": "鳥 [SEP] ふくろうは夜に鳴く。 ",
        "question": "いつ鳴く？",
        "answers": {"text": ["夜", "夜に"], "answer_start": [0, 0]},
    }
    theirs = harness(
        "japanese_leaderboard/ja_leaderboard_jsquad.yaml",
        data={"train": [flat], "validation": [flat]},
    )
    (doc,) = theirs.validation_docs()
    (sample,) = samples_of(JSQUAD, [flat], train=[flat], shots=1)
    assert sample.requests[0].text == theirs.fewshot_context(doc, 1)
    assert list(sample.requests[0].stop) == theirs.config.generation_kwargs["until"]
    for answer, ours in (("夜", 1.0), ("朝", 0.0), ("夜に", 1.0), ("夜。", 1.0)):
        (score,) = score_answers(JSQUAD, [sample], answer)
        assert score.values["exact_match"] == ours
        result = theirs.process_results(doc, [answer])["exact_match"]
        # The harness takes the first reference alone, and nothing off its end.
        assert result == (ours if answer in ("夜", "朝") else 0.0)


def test_squad_prompt_of_the_harness() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.squadv2.task import SQuAD2

    doc = {"title": "T_t", "context": "C {c}", "question": "Q?", "id": "i", "answers": ["a"]}
    theirs = SQuAD2.doc_to_text(None, doc)
    assert samples_of(SQUAD, [doc])[0].requests[0].text == theirs
