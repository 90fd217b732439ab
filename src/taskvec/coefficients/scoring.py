"""Scoring candidates: the executor interface, and the executor of one process.

An executor is given asks and gives outcomes, in any order. It holds the loaded
target, into whose parameters candidates are put.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self

from taskvec.coefficients.goals import Goals
from taskvec.coefficients.space import Space
from taskvec.coefficients.splits import Split, Splitting
from taskvec.errors import TaskvecError
from taskvec.evaluation.evaluate import (
    EvaluationOptions,
    Result,
    TaskSamples,
    evaluate_with,
)
from taskvec.evaluation.loading import Models
from taskvec.evaluation.task import Task
from taskvec.recipes.recipe import Recipe
from taskvec.streaming import silent

SELECT, TEST = "select", "test"


@dataclass(frozen=True, slots=True)
class SearchJob:
    """What is searched.

    Attributes:
        space: Candidates.
        goals: What is wanted of them.
        options: How they are evaluated.
        splitting: How samples are divided.
        split: The samples.
        sampler: Who proposes candidates; see `sampling.SAMPLERS`.
        seed: Of the sampler, the division of samples, and intervals.
        own: Tasks that were given as such or as functions, by name.
    """

    space: Space
    goals: Goals
    options: EvaluationOptions
    splitting: Splitting
    split: Split
    sampler: str
    seed: int
    own: Mapping[str, Task] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ask:
    """One model to score.

    Attributes:
        number: Which outcome belongs to it.
        recipe: The candidate; None: the target as it is.
        part: `select` or `test`.
    """

    number: int
    recipe: Recipe | None
    part: str = SELECT


@dataclass(frozen=True, slots=True)
class CandidateOutcome:
    """What became of an ask.

    Attributes:
        number: Which ask.
        results: Of every task; empty if it failed.
        error: Why it failed; empty if it did not.
        switching_s: Seconds that it took to put the candidate into the model.
        scoring_s: Seconds that it took to ask the model and score its answers.
    """

    number: int
    results: Sequence[Result] = ()
    error: str = ""
    switching_s: float = 0.0
    scoring_s: float = 0.0


class Executor(Protocol):
    """Scores candidates; a context.

    Attributes:
        workers: How many asks can be under way at once.
    """

    workers: int

    def submit(self, ask: Ask) -> None:
        """Begin with an ask, or keep it for later."""

    def next(self) -> CandidateOutcome:
        """Wait for one of the asks that are under way."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Local:
    """The executor of one process: one candidate after the other."""

    workers = 1

    def __init__(self, job: SearchJob) -> None:
        parts = {SELECT: job.split.select, TEST: job.split.test}
        self._parts: Mapping[str, Sequence[TaskSamples]] = parts
        self._recipe = job.space.recipe
        # Bars are of candidates, not of what each of them is asked.
        self._options = replace(job.options, out=None, progress=silent)
        self._models = Models(self._options)
        self._asks: deque[Ask] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._models.__exit__()

    def submit(self, ask: Ask) -> None:
        """See `Executor`."""
        self._asks.append(ask)

    def next(self) -> CandidateOutcome:
        """See `Executor`."""
        return self.score(self._asks.popleft())

    def score(self, ask: Ask) -> CandidateOutcome:
        """Score one model; what is foreseen to go wrong is the outcome's error."""
        started = switched = time.perf_counter()
        try:
            if ask.recipe is None:
                model = self._models.target(self._recipe)
            else:
                model = self._models.candidate(ask.recipe)
            switched = time.perf_counter()
            results = evaluate_with(
                lambda: model,
                model.encoder,
                self._parts[ask.part],
                self._options,
                where="candidate",
            )
        except TaskvecError as error:
            return CandidateOutcome(ask.number, error=str(error))
        ended = time.perf_counter()
        return CandidateOutcome(ask.number, results, "", switched - started, ended - switched)
