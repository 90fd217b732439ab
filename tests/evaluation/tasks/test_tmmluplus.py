"""TMMLU+: prompts by subject, letters, subjects in the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.tasks.support import (
    asked,
    harness,
    harness_pairs,
    samples_of,
    score_likelihoods,
)

from taskvec.errors import DataError
from taskvec.evaluation.data import DataPlaces, rows_of
from taskvec.evaluation.task import SampleSettings
from taskvec.evaluation.tasks import tmmluplus

(TASK,) = tmmluplus.TASKS

ROW = {"question": " 一加一為何？ ", "A": "1", "B": "2 ", "C": "{3}", "D": "4", "answer": "B"}


def test_prompt_and_score() -> None:
    (sample,) = samples_of(TASK, [ROW], file="accounting_test")
    assert sample.id == "accounting/0"
    prompt = (
        "以下為會計學的單選題，請提供正確答案的選項。\n\n"
        "一加一為何？\nA. 1\nB. 2 \nC. {3}\nD. 4\nAnswer:"
    )
    assert asked(sample) == [(prompt, f" {letter}") for letter in "ABCD"]
    score = score_likelihoods(TASK, sample, -3.0, -1.0, -1.0, -2.0)
    assert score.values["accuracy"] == 1.0
    assert score.values.keys() == {"accuracy", "entropy"}
    assert score.notes == {"chosen": 1, "subject": "accounting"}
    assert score_likelihoods(TASK, sample, -3.0, -2.0, -1.0, -2.0).values["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("subject", "shown"), [("tve_design", "統測 設計"), ("music", "音樂科"), ("mine", "mine")]
)
def test_subjects_in_prompts(subject: str, shown: str) -> None:
    (sample,) = samples_of(TASK, [ROW], file=f"{subject}_test")
    assert sample.requests[0].context.startswith(f"以下為{shown}的單選題，")


def test_files_of_several_subjects(tmp_path: Path) -> None:
    (tmp_path / "tmmluplus").mkdir()
    for name, count in (("physics_test", 2), ("mine_test", 1), ("physics_train", 5)):
        lines = ["question,A,B,C,D,answer", *[f'"Q{i}, 問",1,2,3,4,D' for i in range(count)]]
        (tmp_path / "tmmluplus" / f"{name}.csv").write_text("\n".join(lines), "utf-8")
    rows = rows_of("tmmluplus", TASK.files, DataPlaces((tmp_path,)))
    samples = TASK.samples(rows, SampleSettings())
    assert [sample.id for sample in samples] == ["mine/0", "physics/0", "physics/1"]
    assert [sample.requests[0].context[:8] for sample in samples] == [
        "以下為mine的",
        "以下為物理的單選",
        "以下為物理的單選",
    ]


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        rows_of("tmmluplus", TASK.files, DataPlaces())
    assert str(error.value) == (
        "task 'tmmluplus' has no test data; give a folder with 'tmmluplus/*_test.csv' in it by "
        "--data DIR, or --data tmmluplus=FILE"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": "E"}, "'answer' must be one of A, B, C, D; got 'E'"),
        ({"answer": ""}, "'answer' must be one of A, B, C, D; got ''"),
        ({"question": " "}, "'question' must not be blank"),
        ({"D": 4}, "'D' must be a text; got 4"),
    ],
)
def test_malformed_rows(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        samples_of(TASK, [ROW | changed], file="accounting_test")
    assert str(error.value) == f"data.jsonl, line 1: {message}"


@pytest.mark.parametrize("subject", ["accounting", "tve_design", "junior_chemistry"])
def test_prompts_and_scores_are_those_of_the_harness(subject: str) -> None:
    theirs = harness(
        f"tmmluplus/default/tmmluplus_{subject}.yaml", data={"test": [ROW], "train": [ROW]}
    )
    (doc,) = theirs.test_docs()
    (sample,) = samples_of(TASK, [ROW], file=f"{subject}_test")
    assert asked(sample) == harness_pairs(theirs, doc)
    for values in ((-3.0, -1.0, -1.0, -2.0), (-1.0, -1.0, -9.0, -9.0)):
        result = theirs.process_results(doc, [(value, False) for value in values])
        assert score_likelihoods(TASK, sample, *values).values["accuracy"] == result["acc"]
        assert result["acc"] == result["acc_norm"]


def test_subjects_are_those_of_the_harness() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / "tmmluplus" / "default"
    configs = [load_yaml(path) for path in folder.glob("tmmluplus_*.yaml")]
    theirs = {c["dataset_name"]: c["description"] for c in configs if c["dataset_name"]}
    subjects = json.loads(tmmluplus.SUBJECTS.read_text("utf-8"))
    for subject, description in theirs.items():
        shown = tmmluplus.PROMPT.partition("{question}")[0]
        assert shown.format(subject=subjects[subject]) == description, subject
    assert len(subjects) >= len(theirs) >= 66
