"""TMMLU+: examination questions in Traditional Chinese, 66 subjects, four choices.

The choices stand in the prompt with their letters, and the letters are compared by likelihood.
Data are the CSV files of the test questions, one a subject: the hub has a configuration for each,
so download its `data` folder and give it as local files. A file of another subject is asked with
its own name as the subject.

Source: Tam et al., arXiv:2403.01858; lm-evaluation-harness, task `tmmluplus`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from taskvec.errors import DataError
from taskvec.evaluation.data import DataFile, DataRow
from taskvec.evaluation.task import (
    Metric,
    Replies,
    RowsByRole,
    Sample,
    SampleSettings,
    Score,
    Task,
    each,
)
from taskvec.evaluation.tasks.choice import ENTROPY, choice_sample, choice_score
from taskvec.evaluation.tasks.shared import nonblank_text, refuse_shots

LETTERS = "ABCD"
SUBJECTS = Path(__file__).with_name("tmmluplus_subjects.json")  # names in Chinese, by file
PROMPT = (
    "以下為{subject}的單選題，請提供正確答案的選項。\n\n"
    "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
)


def _samples(rows: RowsByRole, settings: SampleSettings) -> list[Sample]:
    refuse_shots("tmmluplus", settings)
    names = json.loads(SUBJECTS.read_text("utf-8"))
    counts: Counter[str] = Counter()
    samples = []
    for row in rows["test"]:
        subject = row.file.removesuffix("_test")
        samples.append(_sample(f"{subject}/{counts[subject]}", names.get(subject, subject), row))
        counts[subject] += 1
    return samples


def _sample(name: str, subject: str, row: DataRow) -> Sample:
    answer = row.text("answer").strip()
    if answer not in tuple(LETTERS):
        raise DataError(f"{row.where}: 'answer' must be one of A, B, C, D; got {answer!r}")
    prompt = PROMPT.format(
        subject=subject,
        question=nonblank_text(row, "question").strip(),
        **{letter: row.text(letter) for letter in LETTERS},
    )
    return choice_sample(name, prompt, LETTERS, LETTERS.index(answer))


def _score(sample: Sample, replies: Replies) -> Score:
    scored = choice_score(sample, replies)
    notes = {"chosen": scored.notes["chosen"], "subject": sample.id.rpartition("/")[0]}
    values = {name: scored.values[name] for name in ("accuracy", ENTROPY.name)}
    return Score(values, notes)


TASKS = (
    Task(
        name="tmmluplus",
        summary="examination questions in Traditional Chinese, four choices",
        files=(DataFile("test", ("tmmluplus/*_test.csv", "tmmluplus/data/*_test.csv")),),
        samples=_samples,
        score=each(_score),
        metrics=(Metric("accuracy"), ENTROPY),
        fewest_tokens=512,
        source="Tam et al., arXiv:2403.01858; lm-evaluation-harness, task tmmluplus",
    ),
)
