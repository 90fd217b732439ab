"""`search`: which coefficients are best, by their scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from taskvec.coefficients.goals import Goals, make_goals
from taskvec.coefficients.sampling import find_sampler
from taskvec.coefficients.scoring import Executor, Local, SearchJob
from taskvec.coefficients.space import Axis, make_space, parse_axis
from taskvec.coefficients.splits import Splitting, split
from taskvec.coefficients.study import measure_scale, open_study, quiet, run, wanted_trials
from taskvec.coefficients.study_files import study_json, write
from taskvec.coefficients.study_locks import alone, worker
from taskvec.coefficients.winner import Choice, choose, tested, trials_of
from taskvec.errors import TaskvecError, UsageError
from taskvec.evaluation.evaluate import Asked, EvaluationOptions
from taskvec.evaluation.task import Task, task_of
from taskvec.extras import require
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Recipe
from taskvec.tables import frame


class TrialProgress(Protocol):
    """Called with the number of candidates done; the command line shows a bar."""

    def __call__(self, total: int) -> AbstractContextManager[Callable[[int], object]]:
        """Begin; the context gives a function to call with the candidates done since."""


def silent(total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Progress that nobody sees."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True, slots=True, repr=False)
class SearchResult:
    """What a search found.

    Attributes:
        recipe: The winner's, ready to merge; None: no candidate keeps all that must be kept.
        choice: The winner, the front of a trade-off, or the nearest miss.
        told: All that `trials.json` holds, as JSON types.
    """

    recipe: Recipe | None
    choice: Choice
    told: Mapping[str, Any]

    def __repr__(self) -> str:
        trials = self.told["tried"]
        winner = self.choice.winner
        found = "no winner" if winner is None else f"winner {dict(winner.point)} {winner.values}"
        return f"<SearchResult: {trials} candidates, {found}>"

    def to_pandas(self) -> Any:
        """A row for each candidate: its point, its values, and its error if it failed."""
        rows = [
            {key: trial[key] for key in ("number", "error")} | trial["point"] | trial["values"]
            for trial in self.told["trials"]
        ]
        return frame(rows)


def search(
    recipe: Recipe | str | os.PathLike[str],
    *,
    vary: Mapping[str, str] | Sequence[str] = (),
    maximize: Sequence[Asked] = (),
    minimize: Sequence[Asked] = (),
    keep: Sequence[Asked] = (),
    keep_share: float = 0.95,
    single: Mapping[str, str] | None = None,
    aggregate: str = "mean",
    trade_off: bool = False,
    select_n: int | None = None,
    test_n: int | None = None,
    trials: int | None = None,
    sampler: str = "auto",
    out: str | os.PathLike[str] = "taskvec-search",
    options: EvaluationOptions = EvaluationOptions(),  # noqa: B008 (frozen)
    executor: Callable[[SearchJob], Executor] = Local,
    progress: TrialProgress = silent,
) -> SearchResult:
    """Search the coefficients of a recipe by what candidates score.

    Args:
        recipe: What is merged, or the file of a recipe; λ that it lacks must be varied.
        vary: Axes, as on the command line: `{"scale.math": "0:1", "scheme": "linear,threshold"}`;
            none: λ of each task from 0 to 1.5.
        maximize: Tasks of the evaluation to be good at: `TASK` or `TASK@METRIC`, tasks, or
            functions of model and tokenizer that return a number, of which more is better.
        minimize: To be bad at.
        keep: In which at least `keep_share` of the target's value is kept.
        keep_share: In (0, 1].
        single: By goal, the task of the recipe that was tuned for it: values become shares of what
            that gains alone.
        aggregate: How several goals become one, `mean` or `min`.
        trade_off: Whether each goal is an objective of its own.
        select_n: Samples of a task that candidates are chosen by; None: 100, or half.
        test_n: Other samples that the winner is scored on; None: all others.
        trials: Candidates; those that the folder has already count.
        sampler: `auto`, `grid`, `qmc`, `tpe`, `cmaes` or `nsga2`.
        out: Folder of the study; the same search goes on from it, and may share it.
        options: How candidates are evaluated; the seed is that of the search too.
        executor: Who scores candidates.
        progress: Called with the candidates done.

    Returns:
        What was found; it lies in `out` too.

    Raises:
        UsageError: the arguments are contradictory or incomplete, or the folder has a study of
            something else.
        TaskvecError: anything else foreseen, such as that every candidate failed.
    """
    given = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, needs_scales=False)
    axes = [f"{key}={said}" for key, said in vary.items()] if isinstance(vary, Mapping) else vary
    asked = (*maximize, *minimize, *keep)
    own = {task.name: task for task in (task_of(a) for a in asked if not isinstance(a, str))}
    goals = make_goals(
        *(
            [a if isinstance(a, str) else task_of(a).name for a in way]
            for way in (maximize, minimize, keep)
        ),
        single=single,
        tasks=list(given.family.tasks),
        aggregate=aggregate,
        keep_share=keep_share,
        trade_off=trade_off,
    )
    job = make_job(
        given,
        [parse_axis(text) for text in axes],
        goals,
        options,
        Splitting(select_n, test_n),
        sampler=sampler,
        own=own,
    )
    return run_search(job, Path(out), trials=trials, executor=executor, progress=progress)


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
    progress: TrialProgress = silent,
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
            with progress(wanted) as advance:
                advance(len(trials_of(study)))
                run(study, scorer, wanted, advance)
            with alone(out):
                known = trials_of(study)
                if not any(trial.is_scored for trial in known):
                    raise TaskvecError(f"every candidate failed; the last one: {known[-1].error}")
                choice = choose(job.goals, study.scale, known)
                test = None if choice.winner is None else tested(study, scorer, choice.winner)
                everything = study_json(study, choice, test)
                write(out, study, choice, everything)
    winner = choice.winner
    return SearchResult(
        None if winner is None else job.space.recipe_at(winner.point), choice, everything
    )
