"""The study: candidates are sampled, scored and recorded, until there are as many as wanted.

The study lies in a journal. It is resumed by being opened again, and shared by being opened by
several processes. It is refused where it is a study of something else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from taskvec.coefficients.goals import (
    Scale,
    check_gains,
    metrics_of,
    objectives,
    values_of,
    violations,
)
from taskvec.coefficients.sampling import GRID, TRIALS, make_sampler, suggest
from taskvec.coefficients.scoring import Ask, CandidateOutcome, Executor, SearchJob
from taskvec.coefficients.space import Point
from taskvec.coefficients.study_locks import JOURNAL, JournalLock, alone, is_alive
from taskvec.errors import TaskvecError, UsageError
from taskvec.evaluation.task import Metric
from taskvec.extras import require
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Recipe
from taskvec.running.model import stamp_of

NAME = "search"
POLL_S = 0.5  # between looks at what other processes do
ENDED = "the process that scored it ended"


@dataclass(slots=True)
class Study:
    """A study that is open.

    Attributes:
        job: What is searched.
        folder: Where it lies.
        worker: Name of this process.
        optuna: The study of Optuna.
        scale: What values are measured by.
        pending: Trials that are under way in this process, with their points.
    """

    job: SearchJob
    folder: Path
    worker: str
    optuna: Any
    scale: Scale = field(default_factory=lambda: Scale({}, {}, {}))
    pending: dict[int, tuple[Any, Point]] = field(default_factory=dict)

    @property
    def trials(self) -> list[Any]:
        """All trials, in their order."""
        found: list[Any] = self.optuna.get_trials(deepcopy=False)
        return found


def definition(job: SearchJob) -> dict[str, Any]:
    """What makes two studies the same, in JSON types."""
    options, settings = job.options, job.options.settings
    record = {
        "recipe": dict(job.space.data) | {"scales": dict(job.space.recipe.scales)},
        "members": members_of(job),
        "axes": [str(axis) for axis in job.space.axes],
        "goals": asdict(job.goals),
        "samples": job.split.to_json(),
        "tasks": {each.task.name: each.task.version for each in job.split.select},
        "asking": {
            "settings": asdict(settings),
            "context": options.context,
            "stride": options.stride,
            "truncate": options.truncate,
            "dtype": options.dtype,
            "device": options.device,
            "judge": None if options.tools.judge is None else options.tools.judge.name,
        },
        "sampler": job.sampler,
        "seed": job.seed,
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def members_of(job: SearchJob) -> dict[str, str]:
    """What identifies the files of every member."""
    family = job.space.recipe.family
    roles = {"base": family.base, "instruct": family.start, "target": family.edited}
    members = {**roles, **{f"task {name}": path for name, path in family.models.items()}}
    return {role: _stamp(str(path)) for role, path in members.items() if path is not None}


def _stamp(member: str) -> str:
    """What changes when a member does; a member on the hub is known by its commit."""
    path = Path(member).expanduser()
    return stamp_of(path) if path.exists() else member


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Optuna says of every trial."""
    optuna = require("optuna", "search")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(job: SearchJob, folder: Path, worker: str) -> Study:
    """Open the study of a folder, or begin one.

    Raises:
        UsageError: the folder holds a study of something else.
        OutputError: the folder cannot be written.
    """
    optuna = require("optuna", "search")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    record = definition(job)
    objectives = len(job.goals.aims) if job.goals.trade_off else 1
    with alone(folder):
        journal = folder / JOURNAL
        lock = JournalLock(journal)
        lock.acquire()  # cuts off a line that is not whole
        lock.release()
        try:
            storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
            there = {study.study_name for study in storage.get_all_studies()}
        except (ValueError, KeyError) as error:
            raise UsageError(f"{journal}: is not the journal of a study: {error}") from error
        if NAME in there:
            study = optuna.load_study(study_name=NAME, storage=storage)
            _check_same(folder, study.user_attrs.get("definition"), record)
        else:
            study = optuna.create_study(
                study_name=NAME, storage=storage, directions=["maximize"] * objectives
            )
        if "definition" not in study.user_attrs:
            _queue_first(study, job)
            study.set_user_attr("definition", record)
    return Study(job, folder, worker, study)


def _check_same(folder: Path, before: Any, now: Mapping[str, Any]) -> None:
    if before is None or before == now:
        return
    keys = [key for key in now if before.get(key) != now[key]]
    changes = []
    for key in keys:
        one, other = (json.dumps(each, ensure_ascii=False) for each in (before.get(key), now[key]))
        changes.append(key if len(one) + len(other) > 200 else f"{key} was {one}, is {other}")
    raise UsageError(
        f"{folder}: holds a study of something else; what differs: {'; '.join(changes)}. Give "
        "another --out"
    )


def _queue_first(study: Any, job: SearchJob) -> None:
    """The recipe as it was given, then the points of a grid."""
    given = job.space.given
    points = [] if given is None else [given]
    if job.sampler == GRID:
        rest = [dict(point) for point in job.space.points() if point != given]
        points += Random(job.seed).sample(rest, len(rest))
    # Some may be there: the process that began the study may have been killed meanwhile.
    queued = [trial.system_attrs.get("fixed_params") for trial in study.get_trials(deepcopy=False)]
    for point in points:
        if point not in queued:
            study.enqueue_trial(point)


def wanted_trials(job: SearchJob, asked: int | None) -> int:
    """How many candidates are tried: as asked, or by the sampler."""
    if asked is not None:
        return asked
    if job.sampler == GRID:
        return sum(1 for _ in job.space.points())
    return int(min(TRIALS[job.sampler], job.space.size))


def measure_scale(study: Study, executor: Executor) -> None:
    """Score the target, and single tasks where goals are measured by them; once in a study.

    Raises:
        UsageError: the goals do not go with the metrics or the scores.
        TaskvecError: one of them cannot be scored.
    """
    with alone(study.folder):
        kept = study.optuna.user_attrs.get("scale")
        if kept is None:
            kept = _measure(study.job, executor)
            study.optuna.set_user_attr("scale", kept)
    metrics = {key: Metric(**record) for key, record in kept["metrics"].items()}
    study.scale = Scale(metrics, kept["target"], kept["single"])
    check_gains(study.job.goals, study.scale)


def _measure(job: SearchJob, executor: Executor) -> dict[str, Any]:
    outcome = score_one(executor, Ask(-1, None))
    metrics = metrics_of(job.goals, outcome.results)
    single: dict[str, float] = {}
    for task in dict.fromkeys(goal.single for goal in job.goals.aims if goal.single is not None):
        values = values_of(
            job.goals, score_one(executor, Ask(-1, single_task(job.space.recipe, task))).results
        )
        single |= {goal.key: values[goal.key] for goal in job.goals.aims if goal.single == task}
    about = ("name", "kind", "higher_is_better")
    return {
        "metrics": {k: {name: getattr(m, name) for name in about} for k, m in metrics.items()},
        "target": values_of(job.goals, outcome.results),
        "single": single,
    }


def score_one(executor: Executor, ask: Ask) -> CandidateOutcome:
    """The outcome of one ask, while nothing else is under way.

    Raises:
        TaskvecError: it failed.
    """
    executor.submit(ask)
    outcome = executor.next()
    if outcome.error:
        raise TaskvecError(outcome.error)
    return outcome


def single_task(recipe: Recipe, task: str) -> Recipe:
    """The target with the vector of one task alone, at λ = 1."""
    scale = {name: float(name == task) for name in recipe.family.tasks}
    made = as_recipe(recipe.family.members, {"method": "task_arithmetic", "scale": scale})
    return replace(made, out=recipe.out)


def run(study: Study, executor: Executor, trials: int, advance: Callable[[int], object]) -> None:
    """Score candidates until there are `trials` of them, those of other processes counted.

    Args:
        study: Open, with its scale measured.
        executor: Who scores.
        trials: How many.
        advance: Called with the number of candidates that this process has finished.

    Raises:
        BaseException: anything unforeseen; candidates that were under way are queued again.
    """
    try:
        while True:
            while len(study.pending) < executor.workers and _begin(
                study, executor, trials, advance
            ):
                pass
            if study.pending:
                _finish(study, executor.next())
                advance(1)
            elif _others_work(study):
                time.sleep(POLL_S)
            elif not _can_begin(study, trials):
                return
    except BaseException as error:
        with alone(study.folder):
            for number in study.pending:
                _again(study, number, is_killed=isinstance(error, Exception))
        raise


def _begin(study: Study, executor: Executor, trials: int, advance: Callable[[int], object]) -> bool:
    """Ask for a candidate and begin with it; False if there are enough."""
    with alone(study.folder):
        _take_over(study)
        if not _can_begin(study, trials):
            return False
        job = study.job
        number = _begun(study.trials)
        study.optuna.sampler = make_sampler(job.sampler, job.space, job.seed, number)
        trial = study.optuna.ask()
        point = job.space.choose(lambda axis: suggest(trial, axis))
        trial.set_user_attr("worker", study.worker)
    study.pending[trial.number] = trial, point
    twin = _twin(study, trial.number, point)
    if twin is not None:
        record = dict(twin.user_attrs["outcome"]) | {"same_as": twin.number}
        _tell(study, trial.number, record | {"switching_s": 0.0, "scoring_s": 0.0})
        advance(1)
        return True
    try:
        recipe = job.space.recipe_at(point)
    except TaskvecError as error:
        _finish(study, CandidateOutcome(trial.number, error=str(error)))
        advance(1)
        return True
    executor.submit(Ask(trial.number, recipe))
    return True


def _can_begin(study: Study, trials: int) -> bool:
    """Whether another candidate is to be scored; one that stands in for another does not count."""
    waiting = [trial for trial in study.trials if trial.state.name == "WAITING"]
    if study.job.sampler == GRID and not waiting:
        return False
    return _begun(study.trials) < trials or any("again" in t.user_attrs for t in waiting)


def _begun(trials: Sequence[Any]) -> int:
    """How many candidates were begun with; one that stands in for another does not count."""
    return sum(t.state.name != "WAITING" and "again" not in t.user_attrs for t in trials)


def _others_work(study: Study) -> bool:
    """Whether a process that lives, or may have left a candidate, has one under way."""
    return any(trial.state.name == "RUNNING" for trial in study.trials)


def _twin(study: Study, number: int, point: Point) -> Any:
    """A trial of the same point that was scored."""
    for trial in study.trials:
        outcome = trial.user_attrs.get("outcome")
        is_other = trial.number != number and trial.state.is_finished()
        if is_other and outcome and outcome["point"] == point and "same_as" not in outcome:
            return trial
    return None


def _finish(study: Study, outcome: CandidateOutcome) -> None:
    """Keep what became of a candidate."""
    goals, (_, point) = study.job.goals, study.pending[outcome.number]
    record: dict[str, Any] = {
        "point": dict(point),
        "values": {},
        "objectives": [],
        "violations": {},
        "error": outcome.error,
        "switching_s": outcome.switching_s,
        "scoring_s": outcome.scoring_s,
    }
    if not outcome.error:
        try:
            record["values"] = values = values_of(goals, outcome.results)
            record["objectives"] = [float(x) for x in objectives(goals, study.scale, values)]
            record["violations"] = violations(goals, study.scale, values)
        except TaskvecError as error:
            record["error"] = str(error)
    _tell(study, outcome.number, record)


def _tell(study: Study, number: int, record: Mapping[str, Any]) -> None:
    from optuna.trial import TrialState

    trial, _ = study.pending[number]
    trial.set_user_attr("outcome", dict(record))
    if record["error"]:
        study.optuna.tell(trial, state=TrialState.FAIL)
    else:
        study.optuna.tell(trial, list(record["objectives"]))
    del study.pending[number]


def _take_over(study: Study) -> None:
    """Fail what processes that are gone had under way, and queue it once more."""
    for trial in study.trials:
        if trial.state.name == "RUNNING" and trial.number not in study.pending:
            owner = trial.user_attrs.get("worker")
            if owner is None or not is_alive(study.folder, owner):
                _again(study, trial.number, is_killed=True)


def _again(study: Study, number: int, *, is_killed: bool) -> None:
    """Fail a trial that is under way, and queue its candidate again, if it did not kill before."""
    from optuna.trial import TrialState

    (trial,) = [trial for trial in study.trials if trial.number == number]
    kills = trial.user_attrs.get("kills", 0) + is_killed
    queued = {each.user_attrs.get("again") for each in study.trials}
    point = dict(trial.system_attrs.get("fixed_params", {})) | dict(trial.params)
    if kills < 2 and number not in queued:
        study.optuna.enqueue_trial(point, user_attrs={"again": number, "kills": kills})
    study.optuna.tell(number, state=TrialState.FAIL)
