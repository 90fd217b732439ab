"""Who proposes candidates: grid, quasi-random, TPE, CMA-ES or NSGA-II, all of Optuna.

A sampler is made anew for every candidate, seeded by the study's seed and the candidate's number.
So a study that is resumed goes on as if it had never stopped, and processes that share one do not
propose the same.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from taskvec.coefficients.goals import Goals
from taskvec.coefficients.space import MOST_POINTS, Axis, Space, Value
from taskvec.errors import UsageError

GRID, QMC, TPE, CMAES, NSGA2 = "grid", "qmc", "tpe", "cmaes", "nsga2"
SAMPLERS = (GRID, QMC, TPE, CMAES, NSGA2)
POPULATION = 16  # of NSGA-II
FEW = 2  # axes that quasi-random points still cover
SMALL = 64  # points of a grid over more axes
TRIALS = {QMC: 32, TPE: 64, CMAES: 64, NSGA2: 96}  # where the user does not say


def find_sampler(asked: str, space: Space, goals: Goals) -> str:
    """The sampler for a space.

    Args:
        asked: One of `SAMPLERS`, or `auto`: for a trade-off NSGA-II; a grid where all axes have
            steps or choices, and there are one or two of them or at most 64 points; quasi-random
            for one or two ranges; else CMA-ES where there are ranges alone and nothing must be
            kept, and TPE for the rest.
        space: What is searched.
        goals: What is wanted.

    Raises:
        UsageError: the sampler cannot search this.
    """
    has_choices = any(axis.choices for axis in space.axes)
    is_few = len(space.axes) <= FEW
    if asked == "auto":
        if goals.trade_off:
            return NSGA2
        if space.size <= (MOST_POINTS if is_few else SMALL):
            return GRID
        if is_few and not has_choices:
            return QMC
        return TPE if has_choices or goals.kept else CMAES
    if asked not in SAMPLERS:
        raise UsageError(f"sampler must be one of auto, {', '.join(SAMPLERS)}; got {asked!r}")
    if asked == GRID and space.size > MOST_POINTS:
        (axis, *_) = [str(axis) for axis in space.axes if axis.values is None] or ["all"]
        what = "has no step" if math.isinf(space.size) else f"{space.size:,} points are too many"
        raise UsageError(f"sampler grid: {axis} {what}; give LOW:HIGH:STEP, or another sampler")
    if asked in (QMC, CMAES) and has_choices:
        raise UsageError(f"sampler {asked} takes no choices; use tpe")
    if asked == CMAES and len(space.axes) < 2:
        raise UsageError("sampler cmaes needs two or more axes; use qmc")
    if asked == CMAES and (goals.kept or goals.trade_off):
        raise UsageError("sampler cmaes knows no constraints and no trade-offs; use tpe")
    return asked


def make_sampler(kind: str, space: Space, seed: int, number: int) -> Any:
    """A sampler of Optuna for one candidate.

    Args:
        kind: One of `SAMPLERS`; the points of a grid are queued, and nobody is asked.
        space: What is searched.
        seed: Of the study.
        number: Of the candidate.
    """
    from optuna import samplers

    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these classes are experimental
        if kind == QMC:
            return samplers.QMCSampler(
                scramble=True, seed=seed % 2**32, warn_independent_sampling=False
            )
        if kind == CMAES:
            return samplers.CmaEsSampler(
                x0=space.given,
                seed=own,
                warn_independent_sampling=False,
            )
        if kind == NSGA2:
            return samplers.NSGAIISampler(
                population_size=POPULATION, seed=own, constraints_func=_constraints
            )
        return samplers.TPESampler(
            seed=own, multivariate=True, group=True, constraints_func=_constraints
        )


def _constraints(trial: Any) -> list[float]:
    return list(trial.user_attrs["outcome"]["violations"].values())


def suggest(trial: Any, axis: Axis) -> Value:
    """The value of an axis in a trial of Optuna."""
    if axis.choices:
        return trial.suggest_categorical(axis.key, axis.choices)  # type: ignore[no-any-return]
    values = axis.values
    if values is None:
        return float(trial.suggest_float(axis.key, axis.low, axis.high))
    high = float(values[-1])
    asked = float(trial.suggest_float(axis.key, axis.low, high, step=axis.step))
    return min(values, key=lambda value: abs(float(value) - asked))
