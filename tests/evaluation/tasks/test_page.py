"""The page of tasks names what the tasks have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from taskvec.evaluation.task import Task
from taskvec.evaluation.tasks import (
    choice,
    gsm8k,
    likelihood,
    perplexity,
    reading,
    tmmluplus,
    truthfulqa,
)

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "tasks.md"
MODULES = (choice, gsm8k, likelihood, perplexity, reading, tmmluplus, truthfulqa)
TASKS = [task for module in MODULES for task in module.TASKS]


def test_names_are_unique() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS) == 13


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_page_has_metrics_files_and_hub_names(task: Task) -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    what, data = (line for line in lines if line.startswith(f"| `{task.name}` |"))
    _, _, asked, examples, metrics, _, _ = re.split(r" ?\| ?", what)
    assert re.findall(r"`(\w+)`", metrics) == [metric.name for metric in task.metrics]
    assert ("chat template" in asked) == ("chat" in task.needs)
    assert examples.isdigit() == (len(task.files) == 2)
    _, _, test, train, hub, _ = re.split(r" ?\| ?", data)
    for file, cell in zip(task.files, (test, train), strict=False):
        assert re.findall(r"`([^`]+)`", cell) == list(file.names)
        named = [file.hub.name, file.hub.config, file.hub.split] if file.hub else []
        assert {part for part in named if part} <= set(re.findall(r"`([^`]+)`", hub))
        assert file.hub or hub == "–"
