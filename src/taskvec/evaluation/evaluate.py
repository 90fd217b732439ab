"""Evaluate: ask a model the samples of some tasks, and say what its replies are worth.

Everything that can be wrong without weights is found before they are loaded: tasks, data, prompts
that do not fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from taskvec.errors import DataError, TaskvecError, UsageError
from taskvec.evaluation import intervals
from taskvec.evaluation.data import DataPlaces, rows_of
from taskvec.evaluation.harness import PREFIX, harness_tasks
from taskvec.evaluation.intervals import Figure, span
from taskvec.evaluation.records import begin_replies, read_replies, write_records
from taskvec.evaluation.replies import ReplyOptions, encode, replies_to
from taskvec.evaluation.task import (
    Metric,
    MetricFunction,
    Replies,
    Sample,
    SampleSettings,
    Score,
    Task,
    Tools,
    measure,
    task_of,
)
from taskvec.evaluation.tasks import task as find_task
from taskvec.journal import finite
from taskvec.running.encoding import Encoder, Windows
from taskvec.running.model import DTYPES, Model, preserve_modes
from taskvec.sandbox.programs import require_permission
from taskvec.streaming import Progress, silent
from taskvec.tables import frame, html_table

Asked = str | Task | MetricFunction
CONTEXT = 2048  # tokens of a window, unless the model has fewer or the user says otherwise


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        data: Where data lie.
        include_path: Folder of the user's own task files for the harness; see `harness`.
        limit: Most samples of a task, drawn by the seed; None: all.
        settings: How samples are made.
        context: Tokens of a window over a text; None: the model's, at most 2,048.
        stride: Tokens that each window after the first predicts; None: the whole window.
        truncate: Whether prompts that do not fit are cut at the front.
        batch_tokens: Tokens of a batch; None: by the memory there is.
        dtype: Of the loaded weights; see `model.load`.
        device: Where the model runs; see `model.load`.
        tools: What scores may use.
        out: Folder for results and records, from which an interrupted run goes on; None: nothing
            is written.
        progress: Called with the samples done.
    """

    data: DataPlaces = field(default_factory=DataPlaces)
    include_path: Path | None = None
    limit: int | None = None
    settings: SampleSettings = field(default_factory=SampleSettings)
    context: int | None = None
    stride: int | None = None
    truncate: bool = False
    batch_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    tools: Tools = field(default_factory=Tools)
    out: Path | None = None
    progress: Progress = silent

    def __post_init__(self) -> None:
        numbers = {
            "limit": self.limit,
            "context": self.context,
            "stride": self.stride,
            "batch_tokens": self.batch_tokens,
            "draws": self.settings.draws,
            "workers": self.tools.workers,
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more; got {value}")
        for name, value in (("shots", self.settings.shots), ("seed", self.settings.seed)):
            if value is not None and value < 0:
                raise UsageError(f"{name} must be 0 or more; got {value}")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    def asking(self, encoder: Encoder) -> ReplyOptions:
        """How samples are put to a model with this encoder."""
        context = min(self.context or CONTEXT, encoder.context)
        stride = self.stride or context
        if not 1 <= stride <= context:
            raise UsageError(f"stride must be 1 to the context, {context}; got {stride}")
        windows = Windows(context, stride)
        return ReplyOptions(windows, self.truncate, self.batch_tokens, self.settings.seed)


@dataclass(frozen=True, slots=True)
class TaskSamples:
    """A task with its samples.

    Attributes:
        task: Which task.
        samples: What is asked, in the order of the data.
        available: How many samples the data have.
    """

    task: Task
    samples: list[Sample]
    available: int


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """What one task says of one model.

    Attributes:
        task: Its name.
        version: Of the task.
        model: As the user named it.
        metrics: What the figures mean, the main one first.
        figures: By metric.
        samples: What was asked.
        scores: One for each sample.
        replies: To each sample.
        about: Settings, context, stride, tokens read, judge, seconds.
    """

    task: str
    version: int | str
    model: str
    metrics: tuple[Metric, ...]
    figures: Mapping[str, Figure]
    samples: Sequence[Sample]
    scores: Sequence[Score]
    replies: Sequence[Replies]
    about: Mapping[str, Any]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {span(figure)}" for name, figure in self.figures.items())
        return f"<Result of {self.task}: {self.model}: {shown}, n = {len(self.samples)}>"

    @property
    def main(self) -> Figure:
        """The figure of the main metric."""
        return self.figures[self.metrics[0].name]

    def to_pandas(self) -> Any:
        """A row for each sample, with its scores."""
        ids = [sample.id for sample in self.samples] or [""] * len(self.scores)
        return frame([{"id": n, **s.values} for n, s in zip(ids, self.scores, strict=True)])

    def to_json(self) -> dict[str, Any]:
        """A JSON object, without samples."""
        return {
            "task": self.task,
            "version": self.version,
            "model": self.model,
            "main": self.metrics[0].name,
            "higher_is_better": self.metrics[0].higher_is_better,
            "figures": finite(self.figures),
            **self.about,
        }


class Results(Mapping[str, Result]):
    """Results of one model by task."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results = {result.task: result for result in results}

    def __getitem__(self, task: str) -> Result:
        return self._results[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._results.values()))

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"task": task, "metric": name}
            | {key: getattr(figure, key) for key in ("value", "low", "high", "n")}
            for task, result in self._results.items()
            for name, figure in result.figures.items()
        ]

    def to_pandas(self) -> Any:
        """A row for each task and metric: value, 95 % interval, number of samples."""
        return frame(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows(), "Results")


def prepare(asked: Sequence[Asked], options: EvaluationOptions) -> list[TaskSamples]:
    """Find the tasks and make their samples.

    Args:
        asked: Names, tasks, or functions; see `task_of`.
        options: How to evaluate.

    Raises:
        UsageError: there is no such task, it is named twice, or a limit is not positive.
        DataError: data are missing or malformed.
        TaskvecError: a task runs programs, and may not or cannot.
    """
    tasks = [each if isinstance(each, str) else task_of(each) for each in asked]
    names = [each if isinstance(each, str) else each.name for each in tasks]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice or not names:
        raise UsageError(
            f"task {twice[0]!r} is named twice" if twice else "no task is named; see --list"
        )
    found = _find(tasks, options)
    for name in options.data.by_task:
        if name not in (*names, *(task.name for task in found)):
            raise UsageError(f"data are given for {name!r}, which is not one of the tasks")
    for task in found:
        if "code" in task.needs:
            allowed = options.tools.allow_code_execution
            require_permission(f"task {task.name!r}", allowed=allowed)
    return [_prepare(task, options) for task in found]


def _find(tasks: Sequence[str | Task], options: EvaluationOptions) -> list[Task]:
    """The tasks of these names, in their order; a group of the harness gives several."""
    of_harness = [name for name in tasks if isinstance(name, str) and name.startswith(PREFIX)]
    theirs = {}
    if of_harness:
        theirs = harness_tasks(
            of_harness,
            options.settings,
            include_path=options.include_path,
            allow_code_execution=options.tools.allow_code_execution,
        )
    found: list[Task] = []
    for each in tasks:
        if isinstance(each, Task):
            found.append(each)
        else:
            found += theirs.get(each) or [find_task(each)]
    return found


def _prepare(task: Task, options: EvaluationOptions) -> TaskSamples:
    if task.measure is not None:
        return TaskSamples(task, [], 0)
    rows = rows_of(task.name, task.files, options.data)
    samples = task.samples(rows, options.settings)
    available = len(samples)
    if not samples:
        raise DataError(f"task {task.name!r}: its data hold nothing to ask")
    ids: set[str] = set()
    for sample in samples:
        if sample.id in ids:  # replies are kept, and paired between models, by it
            raise UsageError(f"task {task.name!r} gives two samples the id {sample.id!r}")
        ids.add(sample.id)
    if options.limit is not None and options.limit < available:
        # Some data are sorted by subject: the first ones would not stand for all.
        chosen = Random(f"{options.settings.seed}:{task.name}").sample(
            range(available), options.limit
        )
        samples = [samples[i] for i in sorted(chosen)]
    return TaskSamples(task, samples, available)


def evaluate_with(
    model: Callable[[], Model],
    encoder: Encoder,
    prepared: Sequence[TaskSamples],
    options: EvaluationOptions,
    *,
    where: str,
    stamp: str = "",
) -> list[Result]:
    """Results of one model.

    Args:
        model: Gives it, loaded; not called if all replies were kept by an earlier run.
        encoder: Its tokenizer and limits.
        prepared: Tasks with their samples.
        options: How to evaluate.
        where: What it is called.
        stamp: What identifies its weights; empty: nothing is taken from an earlier run.

    Raises:
        TaskvecError: the model cannot be loaded, or not asked what the tasks ask.
    """
    tokens = check(encoder, prepared, options)
    run = _Run(where, stamp, encoder, cache(model), options.asking(encoder), options)
    return [_one(run, each, count) for each, count in zip(prepared, tokens, strict=True)]


def check(
    encoder: Encoder, prepared: Sequence[TaskSamples], options: EvaluationOptions
) -> list[int]:
    """Find what a model cannot be asked, without loading its weights.

    Returns:
        Tokens that it would read for each task, answers not counted.

    Raises:
        UsageError: a task needs what the model lacks.
        TaskvecError: a sample does not fit its context.
    """
    tokens = []
    for each in prepared:
        _check_task(encoder, each.task)
        try:
            tokens.append(encode(encoder, each.samples, options.asking(encoder)).tokens)
        except TaskvecError as error:
            raise type(error)(f"task {each.task.name!r}: {error}") from error
    return tokens


def _check_task(encoder: Encoder, task: Task) -> None:
    if "chat" in task.needs and not encoder.has_chat:
        raise UsageError(
            f"task {task.name!r} asks in conversations; {encoder.where} has no chat template"
        )
    if encoder.context < task.fewest_tokens:
        raise UsageError(
            f"task {task.name!r} needs a context of {task.fewest_tokens} tokens; {encoder.where} "
            f"has {encoder.context}"
        )


@dataclass(frozen=True, slots=True)
class _Run:
    """One model and how it is asked."""

    where: str
    stamp: str
    encoder: Encoder
    model: Callable[[], Model]
    asking: ReplyOptions
    options: EvaluationOptions


def _one(run: _Run, prepared: TaskSamples, tokens: int) -> Result:
    task, samples, options = prepared.task, prepared.samples, run.options
    about = {
        "n": len(samples),
        "available": prepared.available,
        "seed": options.settings.seed,
        "shots": options.settings.shots,
        "draws": options.settings.draws,
        "context": run.asking.windows.context,
        "stride": run.asking.windows.stride,
        "truncate": options.truncate,
        "dtype": options.dtype,
        "device": options.device,
        "tokens_read": tokens,
        **task.about,
    }
    header = {"task": task.name, "version": task.version, "model": run.where, **about}
    header["key"] = _key(run, header, samples)
    path = None
    if options.out is not None and task.measure is None:
        path = options.out / file_name(run.where) / f"{file_name(task.name)}.jsonl"
    started = time.monotonic()
    replies, kept = _ask(run, samples, path, header)
    if task.measure is not None:
        model = run.model()
        with preserve_modes(model.module):
            scores = [measure(task, model.module, run.encoder.tokenizer)]
    else:
        with options.progress(f"{run.where}: {task.name}: scores", len(samples)) as advance:
            folder = path.parent if path is not None else None
            seed = options.settings.seed
            tools = replace(options.tools, advance=advance, folder=folder, seed=seed)
            scores = task.score(samples, replies, tools)
    if path is not None:
        write_records(path, header, samples, replies, scores)
    metrics = task.metrics if task.late_metrics is None else task.late_metrics(scores)
    return Result(
        task=task.name,
        version=task.version,
        model=run.where,
        metrics=metrics,
        figures=intervals.by_name(metrics, scores, options.settings.seed),
        samples=samples,
        scores=scores,
        replies=replies,
        about={
            **about,
            "judge": options.tools.judge.name if options.tools.judge is not None else None,
            "seconds": round(time.monotonic() - started, 3),
            "kept": kept,
        },
    )


def _ask(
    run: _Run, samples: Sequence[Sample], path: Path | None, header: Mapping[str, Any]
) -> tuple[list[Replies], int]:
    """The replies to all samples, and how many an earlier run left."""
    kept: Mapping[str, Replies] = {}
    if path is not None and run.stamp:
        kept = read_replies(path, header["key"])
    missing = [sample for sample in samples if sample.id not in kept]
    found = dict(kept)
    with run.options.progress(f"{run.where}: {header['task']}", len(samples)) as advance:
        advance(len(samples) - len(missing))
        if missing:
            store = begin_replies(path, header, kept)

            def done(place: int, replies: Replies) -> None:
                found[missing[place].id] = replies
                store(missing[place].id, replies)
                advance(1)

            model = run.model()
            encoded = encode(run.encoder, missing, run.asking)
            replies_to(model, missing, encoded, batch_tokens=run.options.batch_tokens, done=done)
    return [found[sample.id] for sample in samples], len(samples) - len(missing)


def _key(run: _Run, header: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """What replies depend on, as a digest."""
    requests = [[sample.id, [asdict(request) for request in sample.requests]] for sample in samples]
    text = json.dumps([run.stamp, dict(header), requests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_name(text: str) -> str:
    """A text as the name of a file.

    >>> file_name("org/model@main"), file_name("./runs/merged/"), file_name("zoo:math")
    ('org-model@main', 'merged', 'zoo-math')
    """
    is_path = text.startswith((".", "/", "~")) or Path(text).exists()
    # Not what a link leads to: two links may lead to one folder.
    text = os.path.basename(os.path.abspath(text)) if is_path else text  # noqa: PTH100, PTH119
    return re.sub(r"[^\w.@+-]+", "-", text).strip("-") or "model"
