"""Searches that are scored by a formula instead of a model: made-up executors and jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taskvec import zoo
from taskvec.coefficients.api import make_job
from taskvec.coefficients.goals import make_goals
from taskvec.coefficients.scoring import Ask, CandidateOutcome, SearchJob
from taskvec.coefficients.space import parse_axis
from taskvec.coefficients.splits import Splitting
from taskvec.errors import CheckpointError
from taskvec.evaluation.evaluate import EvaluationOptions, Result
from taskvec.evaluation.intervals import by_name
from taskvec.evaluation.task import Metric, SampleSettings, Score
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import Recipe


def recipe(scale: float | None = 0.5, **about: Any) -> Recipe:
    """Math and code of the zoo."""
    scales = {} if scale is None else {"scale": scale}
    data = {
        "base": str(zoo.path("base")),
        "instruct": str(zoo.path("instruct")),
        "tasks": {name: {"model": str(zoo.path(name))} | scales for name in ("math", "code")},
        "method": "task_arithmetic",
    }
    return read_recipe(Document(data | about, "made up"), Path.cwd(), needs_scales=False)


def job(
    *axes: str,
    maximize: Sequence[str] = ("zoo:math",),
    minimize: Sequence[str] = (),
    keep: Sequence[str] = (),
    of: Recipe | None = None,
    sampler: str = "auto",
    seed: int = 0,
    select_n: int = 10,
    **about: Any,
) -> SearchJob:
    """A search of the zoo; nothing is loaded for it."""
    given = of or recipe()
    goals = make_goals(maximize, minimize, keep, tasks=list(given.family.tasks), **about)
    options = EvaluationOptions(settings=SampleSettings(seed=seed))
    splitting = Splitting(select_n, 10)
    found = [parse_axis(text) for text in axes]
    return make_job(given, found, goals, options, splitting, sampler=sampler)


def result(task: str, value: float, kind: str = "rate") -> Result:
    """A result of 100 samples: a rate, or a perplexity per token."""
    import math

    metric = Metric("right")
    scores = [Score({"right": float(i < round(100 * value))}) for i in range(100)]
    if kind == "perplexity":
        metric = Metric("perplexity", "perplexity", False, value="nll", per="tokens")
        scores = [Score({"nll": math.log(value), "tokens": 1.0})] * 100
    figures = by_name([metric], scores, 0)
    return Result(task, 1, "made up", (metric,), figures, (), scores, (), {"seed": 0})


class Formula:
    """An executor: `score` gives values by task from a recipe, None standing for the target."""

    def __init__(
        self,
        score: Callable[[Recipe | None], dict[str, float]],
        workers: int = 1,
        kinds: dict[str, str] | None = None,
    ) -> None:
        self.score, self.workers, self.kinds = score, workers, kinds or {}
        self.asks: deque[Ask] = deque()
        self.asked: list[Ask] = []

    def __call__(self, job: SearchJob) -> Formula:
        return self

    def __enter__(self) -> Formula:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, ask: Ask) -> None:
        self.asks.append(ask)
        self.asked.append(ask)

    def next(self) -> CandidateOutcome:
        ask = self.asks.popleft()
        try:
            values = self.score(ask.recipe)
        except CheckpointError as error:
            return CandidateOutcome(ask.number, error=str(error))
        results = [result(t, v, self.kinds.get(t, "rate")) for t, v in values.items()]
        return CandidateOutcome(ask.number, results, "", 0.25, 0.5)

    @property
    def scales(self) -> list[float]:
        """λ of math of every candidate that was scored on selection data, in order."""
        return [
            ask.recipe.scales["math"]
            for ask in self.asked
            if ask.recipe is not None and ask.part == "select" and ask.number >= 0
        ]


def peak(at: float = 0.7) -> Formula:
    """Math is best where its λ is `at`; the rest is as good as in the target, up to λ = 1."""

    def score(recipe: Recipe | None) -> dict[str, float]:
        scale = 0.0 if recipe is None else recipe.scales["math"]
        math = max(0.0, 0.9 - abs(scale - at))
        return {"zoo:math": math, "zoo:code": math / 2, "zoo:say": 1.0 if scale <= 1 else 0.5}

    return Formula(score)
