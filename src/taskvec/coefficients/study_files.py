"""What a study leaves in its folder: the recipe that won, and every candidate that was tried.

OUT/recipe.yaml      ready for `taskvec merge`; where there is a winner
OUT/front/N.yaml     in a trade-off, the recipe of every candidate of the front
recipe.schema.json   beside recipes, for editors
OUT/trials.csv       a row a candidate
OUT/trials.json      all of it: space, goals, seeds, samples, versions, trials, winner, test
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from taskvec.coefficients.scoring import SearchJob
from taskvec.coefficients.space import Space
from taskvec.coefficients.study import Study, definition
from taskvec.coefficients.winner import Choice, Trial, trials_of
from taskvec.evaluation.results import about
from taskvec.files import write_text
from taskvec.journal import finite
from taskvec.recipes.writing import recipe_text, write_recipe
from taskvec.tables import csv_text

FEWEST = 20  # scored candidates that importances need


def study_json(study: Study, choice: Choice, test: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that `trials.json` holds."""
    trials, job = trials_of(study), study.job
    same = definition(job)
    scale = study.scale
    optuna = {name: version(name) for name in ("optuna", "cmaes", "scipy")}
    machine = about()
    everything = {
        "recipe": same["recipe"],
        "members": same["members"],
        "axes": same["axes"],
        "goals": same["goals"],
        "samples": same["samples"],
        "asking": same["asking"],
        "sampler": job.sampler,
        "seed": job.seed,
        "target": dict(scale.target),
        "single": dict(scale.single),
        "metrics": {key: metric.name for key, metric in scale.metrics.items()},
        "tried": sum(trial.is_scored for trial in trials),
        "failed": sum(bool(trial.error) for trial in trials),
        "trials": [asdict(trial) for trial in trials],
        "winner": _chosen(job.space, choice.winner),
        "front": [trial.number for trial in choice.front],
        "nearest_miss": None if choice.miss is None else asdict(choice.miss),
        "test": test,
        "importance": importance(study, trials),
        **machine,
        "versions": machine["versions"] | optuna,
    }
    plain: dict[str, Any] = finite(everything)
    return plain


def _chosen(space: Space, trial: Trial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return asdict(trial) | {"recipe": space.mapping(trial.point)}


def importance(study: Study, trials: Sequence[Trial]) -> dict[str, float] | None:
    """Share of the spread of the first objective that each axis explains; None of too few trials.

    Source: PED-ANOVA, arXiv:2304.10255, as Optuna has it.
    """
    if sum(trial.is_scored for trial in trials) < FEWEST or len(study.job.space.axes) < 2:
        return None
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental; that an axis has one value only
        found: dict[str, float] = get_param_importances(
            study.optuna,
            evaluator=PedAnovaImportanceEvaluator(),
            target=lambda trial: trial.values[0],
        )
    return found


def write(folder: Path, study: Study, choice: Choice, all_of_it: Mapping[str, Any]) -> None:
    """Write everything but the figures.

    Raises:
        OutputError: a file cannot be written.
    """
    space = study.job.space
    if choice.winner is not None:
        write_recipe(folder / "recipe.yaml", candidate_text(space, choice.winner))
    for trial in choice.front:
        write_recipe(folder / "front" / f"{trial.number}.yaml", candidate_text(space, trial))
    write_text(folder / "trials.csv", table(study))
    text = json.dumps(all_of_it, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "trials.json", text + "\n")


def candidate_text(space: Space, trial: Trial) -> str:
    """The recipe at a trial's point, as YAML; a merge of it has the candidate's weights."""
    point = ", ".join(f"{key} {value}" for key, value in trial.point.items())
    about = f"Found by taskvec search, candidate {trial.number}: {point}"
    return recipe_text(space.mapping(trial.point), about)


def table(study: Study) -> str:
    """Every trial as CSV."""
    job, trials = study.job, trials_of(study)
    count = len(job.goals.aims) if job.goals.trade_off else 1
    names = [f"objective_{i + 1}" for i in range(count)]
    return csv_text([_row(job, trial, names) for trial in trials])


def _row(job: SearchJob, trial: Trial, names: Sequence[str]) -> dict[str, Any]:
    kept = {f"violation {goal.key}": trial.violations.get(goal.key) for goal in job.goals.kept}
    allowed = all(violation <= 0 for violation in trial.violations.values())
    return {
        "number": trial.number,
        **{axis.key: trial.point.get(axis.key) for axis in job.space.axes},
        **{goal.key: trial.values.get(goal.key) for goal in job.goals.goals},
        **dict(zip_longest(names, trial.objectives)),
        **kept,
        "allowed": "" if trial.error else allowed,
        "same_as": trial.same_as,
        "switching_s": f"{trial.switching_s:.4f}",
        "scoring_s": f"{trial.scoring_s:.4f}",
        "error": trial.error,
    }
