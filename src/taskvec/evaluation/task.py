"""Tasks: what is asked of a model, and what its replies are worth.

A task is data and two pure functions: `samples` turns rows of a data file into requests, `score`
turns replies into numbers. Neither knows a model, and nothing here needs torch. There are three
kinds of requests: `Continuation` (how likely is this text after that one), `Prompt` (go on from
here) and `WholeText` (predict this text token by token). Requests and replies are those of
`taskvec.running.requests`; authors of tasks find them here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.errors import UsageError
from taskvec.running.requests import (
    Answer,
    Continuation,
    Likelihood,
    Message,
    Prompt,
    Reply,
    Request,
    Text,
    WholeText,
)

__all__ = [
    "Answer", "Continuation", "Likelihood", "Message", "Metric", "MetricFunction", "Prompt",
    "Replies", "Reply", "Request", "RowsByRole", "Sample", "SampleSettings", "Score", "Task",
    "Text", "Tools", "WholeText", "each", "measure", "task_of",
]  # fmt: skip

if TYPE_CHECKING:
    from taskvec.evaluation.data import DataFile, DataRow
    from taskvec.evaluation.judges.verdict import Judge


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a task.

    Attributes:
        id: The same in every run, unique in the task.
        requests: What is asked; replies come in this order.
        reference: What the score is worked out from besides the replies; JSON types.
    """

    id: str
    requests: tuple[Request, ...]
    reference: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """What the replies to one sample are worth.

    Attributes:
        values: By the name that a `Metric` has them under; one that does not apply is left out.
        notes: For the records, such as what was extracted from an answer; JSON types.
    """

    values: Mapping[str, float]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """How the scores of all samples become one figure.

    Attributes:
        name: Its name in tables; for `rate` and `mean` also the key in `Score.values`.
        kind: `rate` (mean of 0 and 1; Wilson's interval), `mean`, `ratio` (Σ value / Σ per),
            `perplexity` (exp of that ratio) or `own` (by a function of its own); all but the first
            with bootstrap intervals over samples.
        higher_is_better: None where neither is.
        value: Key of the numerator in `Score.values`; default: `name`.
        per: Key of the denominator of a ratio or perplexity.
        aggregate: Of kind `own`: from what samples have in `Score.notes["items"]` under the name
            of the metric, to its value; NaN where there is none.
    """

    name: str
    kind: str = "rate"
    higher_is_better: bool | None = True
    value: str = ""
    per: str = ""
    aggregate: Callable[[Sequence[Any]], float] | None = None


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """What the user can say about how samples are made.

    Attributes:
        shots: Worked examples in front of a question; None: the task's own number.
        seed: Of draws.
        draws: Answers that are drawn for a prompt, where a task can use several.
        apply_chat_template: Whether tasks of the harness ask in conversations; our own tasks say
            that themselves.
    """

    shots: int | None = None
    seed: int = 0
    draws: int = 1
    apply_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class Tools:
    """What scores may use besides replies.

    Attributes:
        allow_code_execution: Whether programs that a model wrote may be run.
        judge: Who says how harmful an answer is; None: the task's own default.
        workers: Programs that run at once; None: as many as there are processors, at most 8.
        seed: Of random draws in scores.
        folder: Where what is slow to get may be kept, to go on from; None: nowhere.
        advance: Called with the number of samples scored since.
    """

    allow_code_execution: bool = False
    judge: Judge | None = None
    workers: int | None = None
    seed: int = 0
    folder: Path | None = None
    advance: Callable[[int], object] = lambda done: None


RowsByRole = Mapping[str, Sequence["DataRow"]]  # by the role of their file
Replies = Sequence[Reply]
MetricFunction = Callable[[Any, Any], Any]  # of model and tokenizer: a number, or several by name


@dataclass(frozen=True, slots=True)
class Task:
    """A way to measure a model.

    Attributes:
        name: As it is asked for.
        summary: One line for people.
        files: Data it reads, the test items first.
        samples: Rows and settings to samples, in the order of the rows.
        score: Samples, the replies to each, and tools to a score for each.
        metrics: What is reported, the main one first.
        needs: `chat` (a chat template) and `code` (programs are run).
        fewest_tokens: Smallest context that the task makes sense with.
        version: Raised whenever the same replies or the same data score differently.
        source: Paper or project that the protocol is from.
        late_metrics: The metrics by the scores, where only these say which there are.
        about: What results say besides.
        measure: Measures the loaded model itself, without samples; see `task_of`.
    """

    name: str
    summary: str
    files: tuple[DataFile, ...]
    samples: Callable[[RowsByRole, SampleSettings], list[Sample]]
    score: Callable[[Sequence[Sample], Sequence[Replies], Tools], list[Score]]
    metrics: tuple[Metric, ...]
    needs: tuple[str, ...] = ()
    fewest_tokens: int = 0
    version: int | str = 1
    source: str = ""
    late_metrics: Callable[[Sequence[Score]], tuple[Metric, ...]] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    measure: MetricFunction | None = None


def task_of(asked: Task | MetricFunction) -> Task:
    """A task as it is, or one that a function `metric(model, tokenizer)` stands for.

    The function returns a number, or numbers by name, of which the first is the main one. More is
    taken to be better. There are no samples, so figures have no interval.
    """
    if isinstance(asked, Task):
        return asked
    name = getattr(asked, "__name__", type(asked).__name__)
    return Task(
        name=name,
        summary=(asked.__doc__ or "").strip().partition("\n")[0],
        files=(),
        samples=lambda rows, settings: [],
        score=lambda samples, replies, tools: [],
        metrics=(),
        late_metrics=lambda scores: tuple(Metric(key, "mean") for key in scores[0].values),
        measure=asked,
    )


def measure(task: Task, model: Any, tokenizer: Any) -> Score:
    """What the function of a task measures.

    Raises:
        UsageError: it returns neither a number nor numbers by name.
    """
    assert task.measure is not None
    found = task.measure(model, tokenizer)
    named = found if isinstance(found, Mapping) else {task.name: found}
    try:
        values = {
            str(name): float(value.item() if hasattr(value, "item") else value)
            for name, value in named.items()
        }
    except (TypeError, ValueError, RuntimeError):
        values = {}
    if not values:
        raise UsageError(
            f"{task.name}: must return a number, or numbers by name; got {type(found).__name__}"
        )
    return Score(values)


def each(
    score: Callable[[Sample, Replies], Score],
) -> Callable[[Sequence[Sample], Sequence[Replies], Tools], list[Score]]:
    """The `Task.score` of a task that scores every sample by itself."""

    def every(samples: Sequence[Sample], replies: Sequence[Replies], tools: Tools) -> list[Score]:
        return [score(sample, mine) for sample, mine in zip(samples, replies, strict=True)]

    return every
