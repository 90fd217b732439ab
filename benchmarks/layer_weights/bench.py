"""A family in memory: what candidates are put into and asked; and what the answers say.

Answers of one task are two numbers for each item, `above` and `below`: 1 or 0 over 1 for accuracy,
the log-likelihood of an answer over its tokens for a language model. A value is Σ above / Σ below,
higher is better.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import taskvec as tv
from taskvec.methods.table import Table
from taskvec.outputs.candidates import candidates
from taskvec.recipes.coerce import as_recipe

Array = np.ndarray[Any, Any]
Answers = tuple[Array, Array]
PARTS = ("validation", "test")


@dataclass
class Bench:
    """A family, loaded once.

    Attributes:
        name: Of the family and its tasks.
        seed: Of what was trained.
        family: Members.
        module: The target, loaded.
        ask: From a task or control and a part to the module's answers.
        goal: Weight of each task in the score that λ is chosen by; below 0 for what is forgotten.
        controls: What is reported besides.
        scales: λ of plain task arithmetic that are tried.
        fit_with: What `fit` is given: from prompts a task and seed to prompts and options.
    """

    name: str
    seed: int
    family: tv.Family
    module: Any
    ask: Callable[[str, str], Answers]
    goal: Mapping[str, float]
    controls: Sequence[str]
    scales: Sequence[float]
    fit_with: Callable[[int, int], dict[str, Any]]
    known: dict[Any, dict[str, Answers]] = field(default_factory=dict)
    opened: Any = None

    @property
    def sign(self) -> float:
        """Of λ."""
        return -1.0 if any(weight < 0 for weight in self.goal.values()) else 1.0

    def answers(
        self, table: Table | None, scale: Mapping[str, float] | float, part: str,
        method: Any = "task_arithmetic", names: Sequence[str] | None = None,
    ) -> dict[str, Answers]:  # fmt: skip
        """Answers of a candidate to every task, and on test data to every control too."""
        scales = scale if isinstance(scale, Mapping) else dict.fromkeys(self.family.tasks, scale)
        weights = b"" if table is None else np.round(
            table.weights * np.array([[scales[t]] for t in table.tasks]), 9
        ).tobytes()  # fmt: skip
        asked = list(names or self.goal)
        if part == "test" and names is None:
            asked += [name for name in self.controls if name not in asked]
        key = weights or json.dumps([method, scales]), part, tuple(asked)
        if key not in self.known:
            recipe = as_recipe(self.family, {"method": method, "scale": scales})
            self.put(replace(recipe, table=table))
            self.known[key] = {name: self.ask(name, part) for name in asked}
        return self.known[key]

    def put(self, recipe: Any) -> None:
        """Put a candidate into the module."""
        if self.opened is None:
            self.opened = contextlib.ExitStack()
            self.bench = self.opened.enter_context(candidates(recipe, self.module))
        self.bench.put(recipe)

    def close(self) -> None:
        """Make the module the target again."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None

    def score(self, answers: Mapping[str, Answers]) -> float:
        """What λ is chosen by."""
        return sum(weight * value(answers[name]) for name, weight in self.goal.items())


def value(answers: Answers) -> float:
    return float(answers[0].sum() / answers[1].sum())


class Records:
    """Results as JSON lines, found again by their settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            self.rows[row["key"]] = row

    def once(self, told: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found under these settings, or is found now."""
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        if key not in self.rows:
            begun = time.process_time()
            made = make()
            row = {"key": key, **told, **made, "seconds": round(time.process_time() - begun, 2)}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            with self.path.open("ab", buffering=0) as file:  # one write: processes share the file
                file.write(line.encode())
            self.rows[key] = row
        return self.rows[key]


def to_json(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Answers by task, rounded to what matters."""
    return {
        name: [np.round(above, 4).tolist(), below.tolist()]
        if set(np.unique(below)) != {1.0}
        else ["".join(str(int(a)) for a in above), None]
        for name, (above, below) in answers.items()
    }


def from_json(stored: Mapping[str, Any]) -> dict[str, Answers]:
    """Answers as `to_json` wrote them."""
    found = {}
    for name, (above, below) in stored.items():
        if below is None:
            right = np.array([float(letter) for letter in above])
            found[name] = (right, np.ones(len(right)))
        else:
            found[name] = (np.array(above, float), np.array(below, float))
    return found
