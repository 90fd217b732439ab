"""Ids, worked examples and blank texts."""

from __future__ import annotations

import pytest
from tests.evaluation.tasks.support import rows_from

from taskvec.errors import DataError
from taskvec.evaluation.task import SampleSettings
from taskvec.evaluation.tasks.shared import nonblank_text, with_ids, worked_examples


def test_ids_are_the_datas_own_or_row_numbers() -> None:
    rows = rows_from([{"id": "a"}, {"key": 7}, {"text": "x"}])
    assert [name for name, _ in with_ids(rows, "id", "key")] == ["a", "7", "2"]
    assert [name for name, _ in with_ids(rows)] == ["0", "1", "2"]


def test_ids_are_unique() -> None:
    message = (
        "data.jsonl, line 2: id 'a' is there already, at data.jsonl, line 1; "
        "every row needs an id of its own"
    )
    with pytest.raises(DataError) as error:
        with_ids(rows_from([{"id": "a"}, {"id": "a"}]), "id")
    assert str(error.value) == message


def test_blank_texts_are_refused() -> None:
    row = rows_from([{"text": " \n"}])[0]
    with pytest.raises(DataError) as error:
        nonblank_text(row, "text")
    assert str(error.value) == "data.jsonl, line 1: 'text' must not be blank"


def test_worked_examples_are_the_first_rows() -> None:
    train = rows_from([{"n": i} for i in range(4)])
    rows = {"test": [], "train": train}
    assert worked_examples("t", rows, SampleSettings(), 3) == train[:3]
    assert worked_examples("t", rows, SampleSettings(shots=1), 3) == train[:1]
    assert worked_examples("t", {"test": []}, SampleSettings(shots=0), 3) == ()
