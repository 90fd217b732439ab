"""`search`: which coefficients are best, by their scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from taskvec.coefficients.goals import Goals, make_goals
from taskvec.coefficients.sampling import find_sampler
from taskvec.coefficients.scoring import Executor, Local, SearchJob
from taskvec.coefficients.space import Axis, make_space, parse_axis
from taskvec.coefficients.splits import Splitting, split
from taskvec.coefficients.study import measure_scale, open_study, quiet, run, wanted_trials
from taskvec.coefficients.study_files import study_json, write
from taskvec.coefficients.study_locks import alone, worker
from taskvec.coefficients.winner import Choice, choose, measure_winner, trials_of
from taskvec.errors import TaskvecError, UsageError
from taskvec.evaluation.data import DataPlaces
from taskvec.evaluation.evaluate import Asked, EvaluationOptions
from taskvec.evaluation.options import EvaluationKeywords, evaluation_options, places_of
from taskvec.evaluation.task import Task, task_of
from taskvec.extras import require
from taskvec.keywords import takes
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Recipe
from taskvec.streaming import Progress, silent
from taskvec.tables import frame


@dataclass(frozen=True, slots=True, repr=False)
class SearchResult:
    """What a search found.

    Attributes:
        recipe: The winner's, ready to merge; None: no candidate keeps all that must be kept.
        choice: The winner, the front of a trade-off, or the nearest miss.
        job: What was searched.
        record: All that `trials.json` holds, as JSON types.
    """

    recipe: Recipe | None
    choice: Choice
    job: SearchJob
    record: Mapping[str, Any]

    def __repr__(self) -> str:
        trials = self.record["tried"]
        winner = self.choice.winner
        found = "no winner" if winner is None else f"winner {dict(winner.point)} {winner.values}"
        return f"<SearchResult: {trials} candidates, {found}>"

    def to_pandas(self) -> Any:
        """A row for each candidate: its point, its values, and its error if it failed."""
        rows = [
            {key: trial[key] for key in ("number", "error")} | trial["point"] | trial["values"]
            for trial in self.record["trials"]
        ]
        return frame(rows)


class SearchKeywords(TypedDict, total=False):
    """What is searched.

    Attributes:
        vary: Axes, as on the command line: `{"scale.math": "0:1", "scheme": "linear,threshold"}`;
            default: λ of each task from 0 to 1.5.
        maximize: Tasks of the evaluation to be good at: `TASK` or `TASK@METRIC`, tasks, or
            functions of model and tokenizer that return a number, of which more is better.
        minimize: To be bad at.
        keep: In which at least `keep_share` of the target's value is kept.
        keep_share: In (0, 1]; default: 0.95.
        single: By goal, the task of the recipe that was tuned for it: values become shares of what
            that gains alone.
        aggregate: How several goals become one, `mean` (default) or `min`.
        trade_off: Whether each goal is an objective of its own.
        select_n: Samples of a task that candidates are chosen by; default: 100, or half.
        test_n: Other samples that the winner is scored on; default: all others.
        test_data: Where test data lie, if they are separate; as `data`.
        trials: Candidates; those that the folder has already count.
        sampler: `auto` (default), `grid`, `qmc`, `tpe`, `cmaes` or `nsga2`.
        executor: Who scores candidates; default: this process.
    """

    vary: Mapping[str, str] | Sequence[str] | None
    maximize: Sequence[Asked] | None
    minimize: Sequence[Asked] | None
    keep: Sequence[Asked] | None
    keep_share: float | None
    single: Mapping[str, str] | None
    aggregate: str | None
    trade_off: bool | None
    select_n: int | None
    test_n: int | None
    test_data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | DataPlaces | None
    trials: int | None
    sampler: str | None
    executor: Callable[[SearchJob], Executor] | None


class AllKeywords(SearchKeywords, EvaluationKeywords, total=False):
    """What `search` takes."""


@takes(SearchKeywords, EvaluationKeywords)
def search(recipe: Recipe | str | os.PathLike[str], **options: Unpack[AllKeywords]) -> SearchResult:
    """Search the coefficients of a recipe by what candidates score.

    The same search goes on from the folder `out`, by default `taskvec-search`, and processes may
    share it; `seed` is that of the sampler too, and `progress` counts candidates.

    Args:
        recipe: What is merged, or the file of a recipe; λ that it lacks must be varied.
        {options}

    Returns:
        What was found; it lies in `out` too.

    Raises:
        UsageError: the arguments are contradictory or incomplete, or the folder has a study of
            something else.
        TaskvecError: anything else foreseen, such as that every candidate failed.
    """
    how: dict[str, Any] = dict(options)
    given = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, needs_scales=False)
    vary = how.get("vary") or ()
    axes = [f"{k}={values}" for k, values in vary.items()] if isinstance(vary, Mapping) else vary
    ways = [how.get(way) or () for way in ("maximize", "minimize", "keep")]
    own = {t.name: t for way in ways for a in way if not isinstance(a, str) for t in [task_of(a)]}
    goals = make_goals(
        *([a if isinstance(a, str) else task_of(a).name for a in way] for way in ways),
        single=how.get("single"),
        tasks=list(given.family.tasks),
        **{key: how[key] for key in ("aggregate", "keep_share", "trade_off") if key in how},
    )
    out = Path(how.get("out", "taskvec-search"))
    apart = how.get("test_data")
    splitting = Splitting(
        how.get("select_n"), how.get("test_n"), None if apart is None else places_of(apart)
    )
    job = make_job(
        given,
        [parse_axis(text) for text in axes],
        goals,
        evaluation_options(how | {"out": out}),
        splitting,
        sampler=how.get("sampler", "auto"),
        own=own,
    )
    return run_search(
        job,
        out,
        trials=how.get("trials"),
        executor=how.get("executor", Local),
        progress=how.get("progress", silent),
    )


def make_job(
    recipe: Recipe,
    axes: Sequence[Axis],
    goals: Goals,
    options: EvaluationOptions,
    splitting: Splitting,
    *,
    sampler: str = "auto",
    own: Mapping[str, Task] | None = None,
) -> SearchJob:
    """All that makes up a search, checked as far as it can be without weights.

    Raises:
        UsageError: the arguments are contradictory or incomplete.
        TaskvecError: data are missing.
    """
    require("optuna", "search")
    space = make_space(recipe, axes)
    chosen = find_sampler(sampler, space, goals)
    own = own or {}
    names = dict.fromkeys(goal.task for goal in goals.goals)
    parts = split([own.get(name, name) for name in names], options, splitting)
    seed = options.settings.seed
    return SearchJob(space, goals, options, splitting, parts, chosen, seed, own)


def run_search(
    job: SearchJob,
    out: Path,
    *,
    trials: int | None = None,
    executor: Callable[[SearchJob], Executor] = Local,
    progress: Progress = silent,
) -> SearchResult:
    """Run a search, or go on with it.

    Raises:
        See `search`.
    """
    if trials is not None and trials < 1:
        raise UsageError(f"trials must be 1 or more; got {trials}")
    wanted = wanted_trials(job, trials)
    with quiet(), worker(out) as name:
        study = open_study(job, out, name)
        with executor(job) as scorer:
            measure_scale(study, scorer)
            with progress("candidates", wanted) as advance:
                advance(len(trials_of(study)))
                run(study, scorer, wanted, advance)
            with alone(out):
                known = trials_of(study)
                if not any(trial.is_scored for trial in known):
                    raise TaskvecError(f"every candidate failed; the last one: {known[-1].error}")
                choice = choose(job.goals, study.scale, known)
                test = (
                    None if choice.winner is None else measure_winner(study, scorer, choice.winner)
                )
                everything = study_json(study, choice, test)
                write(out, study, choice, everything)
    winner = choice.winner
    return SearchResult(
        None if winner is None else job.space.recipe_at(winner.point), choice, job, everything
    )
