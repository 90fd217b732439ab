"""Rows and replies for tests of tasks, and the tasks of lm-evaluation-harness on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from taskvec.evaluation.data import DataRow
from taskvec.evaluation.task import Sample, SampleSettings, Score, Task, Tools
from taskvec.running.requests import Answer, Continuation, Likelihood

Data = Sequence[Mapping[str, Any]]


def rows_from(data: Data, file: str = "") -> list[DataRow]:
    """Rows as a file of JSON lines would give them."""
    return [
        DataRow(fields, f"data.jsonl, line {i}", file) for i, fields in enumerate(data, start=1)
    ]


def task_named(tasks: Sequence[Task], name: str) -> Task:
    (found,) = [task for task in tasks if task.name == name]
    return found


def samples_of(
    task: Task, test: Data, *, train: Data = (), shots: int | None = None, file: str = ""
) -> list[Sample]:
    rows = {"test": rows_from(test, file), "train": rows_from(train)}
    return task.samples({f.role: rows[f.role] for f in task.files}, SampleSettings(shots=shots))


def score_answers(task: Task, samples: Sequence[Sample], *texts: str) -> list[Score]:
    return task.score(samples, [[Answer(text, 1, "end")] for text in texts], Tools())


def score_likelihoods(task: Task, sample: Sample, *values: float) -> Score:
    replies = [Likelihood(value, 3, False) for value in values]
    return task.score([sample], [replies], Tools())[0]


def asked(sample: Sample) -> list[tuple[Any, str]]:
    """Context and text of each continuation that a sample asks for."""
    assert all(isinstance(request, Continuation) for request in sample.requests)
    return [(request.context, request.text) for request in sample.requests]


def harness(path: str, **changed: Any) -> Any:
    """A task of lm-evaluation-harness with data of ours; the first rows are its worked examples.

    Args:
        path: Its YAML file, below the harness's `tasks`.
        changed: `data` (rows by split) and keys of the configuration.
    """
    lm_eval = pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    splits = {name: datasets.Dataset.from_list(rows) for name, rows in changed.pop("data").items()}
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / path)
    config.pop("tag", None)
    config.pop("dataset_name", None)
    config.update(changed, custom_dataset=lambda **_: datasets.DatasetDict(splits), metadata=None)
    if config.get("fewshot_split"):
        config["fewshot_config"] = {"sampler": "first_n"}
    return ConfigurableTask(config=config)


def harness_pairs(task: Any, doc: Any, shots: int = 0) -> list[tuple[str, str]]:
    """What the harness asks the likelihood of."""
    context = task.fewshot_context(doc, shots)
    return [request.args for request in task.construct_requests(doc, context)]
