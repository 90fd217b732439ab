"""Every task on the whole of its real data, where these are at hand.

`TASKVEC_DATA` names a folder with `gsm8k/test.jsonl` and so on; nothing is asked of the network.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from taskvec.evaluation.data import DataPlaces, rows_of
from taskvec.evaluation.task import SampleSettings, Task
from taskvec.evaluation.tasks import choice, gsm8k, likelihood, perplexity, reading, truthfulqa
from taskvec.running.requests import Continuation, WholeText

DATA = os.environ.get("TASKVEC_DATA")
COUNTS = {
    "wikitext-2": 62,
    "gsm8k": 1319,
    "gsm8k-chat": 1319,
    "gsm8k-likelihood": 1319,
    "truthfulqa": 817,
    "jcommonsenseqa": 1119,
    "jsquad": 4442,
    "mbpp-likelihood": 500,
}
TASKS = {
    task.name: task
    for module in (choice, gsm8k, likelihood, perplexity, reading, truthfulqa)
    for task in module.TASKS
}


@pytest.mark.skipif(DATA is None, reason="TASKVEC_DATA names no folder of data")
@pytest.mark.parametrize("name", COUNTS)
def test_whole_data(name: str) -> None:
    task: Task = TASKS[name]
    rows = rows_of(name, task.files, DataPlaces((Path(DATA or ""),), hub=False))
    shots = 0 if name == "jsquad" else None  # JGLUE's train part of it is not always there
    samples = task.samples(rows, SampleSettings(shots=shots))
    assert len(samples) == COUNTS[name]
    assert len({sample.id for sample in samples}) == len(samples)
    assert samples == task.samples(rows, SampleSettings(shots=shots))
    for sample in samples:
        assert sample.requests
        for request in sample.requests:
            if isinstance(request, Continuation | WholeText):
                assert request.text.strip()
