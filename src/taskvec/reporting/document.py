"""The data of a report: one document, with a schema, from which every section follows.

A page embeds it as JSON, and `taskvec report --format json` writes it alone. Numbers that are not
finite are null.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1


class DataPart(BaseModel):
    """A part of the document; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MemberData(DataPart):
    """One model of a family."""

    path: str
    fingerprint: str
    dtypes: dict[str, int] | None = Field(
        default=None, description="Tensors by dtype; null if unknown"
    )
    parameters: int | None = None
    differs: list[str] = Field(default=[], description="What differs from the anchor, in words")


class FamilyData(DataPart):
    """A scan: statistics of each tensor, from which weights are computed in the page."""

    path: str
    tasks: list[str]
    has_base: bool
    names: list[str] = Field(description="Tensors, sorted")
    sizes: list[int]
    towers: list[str]
    blocks: list[int | None] = Field(description="Null outside the blocks")
    kinds: list[str] = Field(description="Module or projection")
    modules: list[str]
    layers: dict[str, list[int]] = Field(
        description="Layer of each tensor by granularity, numbered in order of their first tensor"
    )
    order: list[int] = Field(description="Tensors in the order of the model")
    gram: list[list[float]] = Field(
        description="Upper triangle of the Gram matrix of anchor, instruction vector, task vectors"
    )
    agree: list[list[int]] = Field(description="Upper triangle over pairs of tasks")
    support: list[list[int]]
    members: dict[str, MemberData]
    warnings: list[str] = []


class TableData(DataPart):
    """Layer weights from a table, a manifest or a fit."""

    name: str
    path: str
    names: list[str]
    weights: dict[str, list[float]]
    scales: dict[str, float] = Field(default={}, description="λ by task, where it is one number")


class MergeData(DataPart):
    """A merged folder, as its manifest describes it."""

    name: str
    path: str
    method: str
    decided_by: str
    recipe: dict[str, Any]
    recipe_text: str
    command: str
    fingerprint: str
    members: dict[str, MemberData]
    versions: dict[str, Any]
    table: TableData


class FigureData(DataPart):
    """A value with its 95 % interval."""

    value: float | None
    interval: list[float | None]
    n: int


class ScoreData(DataPart):
    """The main metric of a model in a task."""

    task: str
    model: str
    metric: str
    figure: FigureData
    available: int | None = None
    seed: int | None = None
    higher_is_better: bool | None = None
    difference: FigureData | None = Field(default=None, description="To the reference, paired")
    share: float | None = Field(default=None, description="Of the score of the task's own model")
    others: dict[str, FigureData] = Field(default={}, description="Further metrics")


class FindingData(DataPart):
    """A sign of failure."""

    model: str
    task: str | None
    sign: str
    text: str


class SampleData(DataPart):
    """One sample of a task: what was asked, and every model's reply and score."""

    id: str
    prompt: str
    reference: str
    replies: list[str] = Field(description="By model; as in `SamplesData.models`")
    scores: list[float | None]


class SamplesData(DataPart):
    """The samples of a task."""

    task: str
    metric: str
    models: list[str]
    total: int
    samples: list[SampleData]


class EvaluationData(DataPart):
    """What `taskvec eval` wrote."""

    path: str
    reference: str | None
    models: list[str]
    singles: dict[str, str] = Field(default={}, description="Model that was tuned for a task alone")
    scores: list[ScoreData]
    expected: dict[str, dict[str, str]] = {}
    findings: list[FindingData] = []
    samples: list[SamplesData] = []
    versions: dict[str, Any] = {}


class FitData(DataPart):
    """What `taskvec fit` wrote: `fit.json` and its table."""

    path: str
    table: TableData | None
    record: dict[str, Any]


class TrainingData(DataPart):
    """What `taskvec finetune` wrote: `run.json`, and its metrics by name."""

    path: str
    settings: dict[str, Any]
    curves: dict[str, list[list[float | None]]] = Field(description="Pairs of step and value")


class RecordData(DataPart):
    """A file of another verb, as `docs/reference/files.md` describes it."""

    path: str
    data: dict[str, Any]


class ReportData(DataPart):
    """All data of a report."""

    format: int = FORMAT
    title: str
    version: str
    sources: list[str]
    families: list[FamilyData] = []
    merges: list[MergeData] = []
    tables: list[TableData] = []
    evaluations: list[EvaluationData] = []
    searches: list[RecordData] = []
    fits: list[FitData] = []
    sweeps: list[RecordData] = []
    pairs: list[RecordData] = []
    disentanglements: list[RecordData] = []
    trainings: list[TrainingData] = []
    notes: list[str] = Field(default=[], description="What was left out, and why")
