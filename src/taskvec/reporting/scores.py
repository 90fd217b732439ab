"""Results of `taskvec eval` and their records, as data of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec.evaluation.evaluate import file_name
from taskvec.evaluation.records import SHOWN
from taskvec.journal import Journal
from taskvec.reporting.document import (
    EvaluationData,
    FigureData,
    FindingData,
    SampleData,
    SamplesData,
    ScoreData,
)

TEXT_BUDGET = 2_000_000  # characters of prompts and replies in one report
CUT = 600  # characters of a prompt or a reply that are shown
Entry = Mapping[str, Any]


def evaluation_data(
    path: Path, data: Mapping[str, Any], budget: int
) -> tuple[EvaluationData, int, int]:
    """The data of a `results.json`, with the records beside it.

    Args:
        path: The file.
        data: Its content.
        budget: Characters of samples that may be used.

    Returns:
        The data, the characters used, and how many samples did not fit.
    """
    models: list[str] = list(
        dict.fromkeys(row["model"] for rows in data["tasks"].values() for row in rows)
    )
    samples, used, left = [], 0, 0
    for task, rows in data["tasks"].items():
        part, cost, dropped = _samples(path.parent, task, rows, budget - used)
        used, left = used + cost, left + dropped
        if part is not None:
            samples.append(part)
    whole = EvaluationData(
        path=str(path),
        reference=data["reference"],
        models=models,
        singles=data.get("singles") or {},
        scores=[_score(row) for rows in data["tasks"].values() for row in rows],
        expected=data.get("expected") or {},
        findings=[
            FindingData(**{key: each[key] for key in ("model", "task", "sign", "text")})
            for each in data["findings"]
        ],
        samples=samples,
        versions=data.get("versions") or {},
    )
    return whole, used, left


def _score(row: Entry) -> ScoreData:
    main = row["main"]
    figures = {name: FigureData(**figure) for name, figure in row["figures"].items()}
    difference = row.get("difference")
    return ScoreData(
        task=row["task"],
        model=row["model"],
        metric=main,
        figure=figures.pop(main),
        available=row.get("available"),
        seed=row.get("seed"),
        higher_is_better=row.get("higher_is_better", "perplexity" not in main),
        difference=None if difference is None else FigureData(**difference),
        share=row.get("share_of_single"),
        others=figures,
    )


def _samples(
    folder: Path, task: str, rows: Sequence[Entry], budget: int
) -> tuple[SamplesData | None, int, int]:
    """The samples of a task that every model has records of."""
    records = {
        row["model"]: _records(folder / file_name(row["model"]) / f"{file_name(task)}.jsonl")
        for row in rows
    }
    models = [model for model, entries in records.items() if entries]
    if not models:
        return None, 0, 0
    first = records[models[0]]
    ids = [i for i in first if all(i in records[model] for model in models)]
    metric = rows[0]["main"]
    samples, used = [], 0
    for i in ids:
        entries = [records[model][i] for model in models]
        sample = _sample(i, entries, metric)
        cost = len(sample.prompt) + len(sample.reference) + sum(map(len, sample.replies)) + 40
        if used + cost > budget:
            break
        used += cost
        samples.append(sample)
    part = SamplesData(task=task, metric=metric, models=models, total=len(ids), samples=samples)
    return part, used, len(ids) - len(samples)


def _records(path: Path) -> dict[str, Entry]:
    """Finished samples by their id; empty without records."""
    return {str(entry["id"]): entry for entry in Journal(path).read()[1:] if "scores" in entry}


def _sample(name: str, entries: Sequence[Entry], metric: str) -> SampleData:
    first = entries[0]
    return SampleData(
        id=name,
        prompt=_cut("\n".join(_asked(request) for request in first.get("requests", []))),
        reference=_cut(", ".join(f"{key}: {value}" for key, value in first["reference"].items())),
        replies=[_cut("\n".join(map(_reply, entry["replies"]))) for entry in entries],
        scores=[_value(entry["scores"], metric) for entry in entries],
    )


def _value(scores: Entry, metric: str) -> float | None:
    """The score of a sample: that of the metric, or the only one."""
    value = scores.get(metric, next(iter(scores.values())) if len(scores) == 1 else None)
    return float(value) if isinstance(value, (int, float)) else None


def _asked(request: Entry) -> str:
    text = request.get("context", "")
    parts = [text, request["text"]] if "context" in request else [request["text"]]
    return "".join(map(_text, parts))


def _text(text: Any) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{role}: {content}" for role, content in text)


def _reply(reply: Entry) -> str:
    if "text" in reply:
        return str(reply["text"])
    value = reply["log_likelihood"]
    return "log-likelihood " + (value if isinstance(value, str) else "–" if value is None
                                else f"{value:.3f}")  # fmt: skip


def _cut(text: str) -> str:
    most = min(CUT, SHOWN)
    return text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"
