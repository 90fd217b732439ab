"""What `fit` found, and the files that it leaves.

OUT/table.csv     weights by task and tensor, for λ = 1
OUT/recipe.yaml   names that table: a merge of it is the fitted merge
OUT/fit.json      how it was found: settings, digests, teachers, held-out losses, descents
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.checkpoints.memory import MARK
from taskvec.coefficients.fit.explanation import Explained
from taskvec.coefficients.fit.held_out import Standing
from taskvec.errors import UsageError
from taskvec.evaluation.intervals import span
from taskvec.evaluation.results import about
from taskvec.files import write_text, writing
from taskvec.journal import fields_to_json, finite
from taskvec.layers import classify, override
from taskvec.methods import find_method
from taskvec.methods.table import Table
from taskvec.recipes.recipe import Recipe
from taskvec.recipes.writing import recipe_text, write_recipe
from taskvec.tables import frame

Array = np.ndarray[Any, Any]

TABLE, RECIPE, RECORD = "table.csv", "recipe.yaml", "fit.json"
LAYERS, ONE = "layers", "one weight"


@dataclass(frozen=True, slots=True)
class Curve:
    """One descent.

    Attributes:
        name: Such as `one weight` or `seed 0`.
        losses: Of each step's batch, before its update.
        measured: Step and held-out loss.
        step: The best that was measured.
    """

    name: str
    losses: Sequence[float]
    measured: Sequence[tuple[int, float]]
    step: int


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One source of prompts, as it was used.

    Attributes:
        teacher: Who answered.
        loss: `kl`, `likelihood`, `entropy` or `distance`.
        weight: ω, over the sum of all.
        train: Prompts learned from.
        held_out: Prompts measured.
        generated: Answers that the teacher generated.
        left_out: Prompts that were too long.
        prompts: Digest of the prompts.
        answers: Digest of prompts with answers; empty where there are none.
    """

    teacher: str
    loss: str
    weight: float
    train: int
    held_out: int
    generated: int
    left_out: int
    prompts: str
    answers: str


@dataclass(frozen=True)
class Fitted:
    """Fitted layer weights.

    Attributes:
        table: For λ = 1: those of layers, or one weight a task where layers brought nothing.
        chosen: `layers` or `one weight`.
        recipe: Of the merge, with λ = 1; give it with `table` to `merge`.
        settings: As they were run, by name.
        sources: By name.
        standings: Held-out losses of the target, the start, one weight, each seed, and layers.
        curves: Descents.
        seeds: The table of each seed.
        correlations: Mean rank correlation between seeds, by task.
        explanation: What the layers' weights go with.
        fingerprints: Identity by content of each member.
        warnings: What a user should know.
    """

    table: Table
    chosen: str
    recipe: Recipe
    settings: Mapping[str, Any]
    sources: Mapping[str, SourceRecord]
    standings: Sequence[Standing]
    curves: Sequence[Curve]
    seeds: Sequence[Table]
    correlations: Mapping[str, float]
    explanation: Sequence[Explained]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        losses = ", ".join(f"{each.name} {each.loss.value:.4f}" for each in self.standings)
        return f"Fitted({self.chosen}; {', '.join(self.table.tasks)}; held-out loss: {losses})"

    def standing(self, name: str) -> Standing:
        """The held-out loss of one choice of weights.

        Raises:
            UsageError: it was not measured.
        """
        for each in self.standings:
            if each.name == name:
                return each
        raise UsageError(f"standing {name!r} was not measured")

    @property
    def summary(self) -> str:
        """What was found, in a few lines."""
        lines = [f"{each.name}: held-out loss {span(each.loss)}" for each in self.standings]
        gain = self.standings[-1].gain
        if gain is not None:
            lines.append(f"gain of layers over one weight a task: {span(gain, '+')}")
        lines.append(f"written: {self.chosen}")
        return "\n".join(lines)

    def to_pandas(self) -> Any:
        """A data frame with a row for each task and tensor: its weight, and that of each seed."""
        overrides = tuple(override(entry) for entry in self.recipe.family.layers)
        rows = []
        for task in self.table.tasks:
            seeds = {f"seed {i}": table.of(task) for i, table in enumerate(self.seeds)}
            for name, weight in self.table.of(task).items():
                key = classify(name, overrides)
                about = {k: getattr(key, k) for k in ("tower", "block", "module", "projection")}
                each = {seed: weights[name] for seed, weights in seeds.items()}
                rows.append({"task": task, "tensor": name, **about, "weight": weight, **each})
        return frame(rows)

    def to_json(self) -> dict[str, Any]:
        """All but the table."""
        kept = ("chosen", "settings", "sources", "warnings")
        others = [name for name in self.__dataclass_fields__ if name not in kept]
        return {
            **fields_to_json(self, without=others),
            "origin": self.table.origin,
            "members": finite(self.fingerprints),
            "held_out": {each.name: each.to_json() for each in self.standings},
            "descents": finite(self.curves),
            "correlation_of_seeds": finite(self.correlations),
            "explanation": [
                {"task": e.task, "against": e.against, **e.correlation.to_json()}
                for e in self.explanation
            ],
            **about(),
        }

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write table, recipe and record into a folder.

        Raises:
            UsageError: a member is in memory, so that no recipe can name it.
            OutputError: a file cannot be written.
        """
        folder = Path(folder)
        text = self._recipe_text()
        record = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(folder / RECORD, record + "\n")
        with writing(folder / TABLE):
            self.table.save(folder / TABLE)
        write_recipe(folder / RECIPE, text)
        return folder

    def _recipe_text(self) -> str:
        data = self.recipe.to_dict()
        data["table"] = TABLE
        if MARK in json.dumps(data, default=str):
            raise UsageError(
                "a recipe cannot name a member in memory; save the table alone: "
                "fitted.table.save('table.csv')"
            )
        return recipe_text(data, f"Layer weights fitted by taskvec: {self.chosen}")


def fitted_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a merge of the same members by a table with λ = 1."""
    plain = {"scale": 1.0, "parameters": {}, "profile": None}
    changed = recipe.with_tasks(dict.fromkeys(recipe.tasks, plain))
    return replace(changed, method=find_method("task_arithmetic"), layer_weights=None, table=None)
