"""Every method on the zoo's math and code, each at its own best λ; a table in Markdown.

    python -m benchmarks.zoo_methods [--only NAME]... [--json FILE]

λ (the same for both tasks) is chosen on 60 questions of each: the λ of the grid with the most right
answers in math and code, the smallest where there are several. The figures are of other questions,
of math all 90 that are left. Everything but λ has the method's defaults, unless the row says
otherwise. Candidates are merged in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import taskvec as tv
from taskvec import zoo
from taskvec.coefficients.splits import Splitting, split
from taskvec.errors import TaskvecError
from taskvec.evaluation.evaluate import EvaluationOptions, TaskSamples, prepare
from taskvec.evaluation.intervals import wilson
from taskvec.evaluation.loading import Models
from taskvec.recipes.coerce import as_recipe

TASKS = ("math", "code")
KEPT = ("say", "find", "howto", "refusal")
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)
CHOOSING_N, TEST_N = 60, 90  # questions of a skill; math has 150 that differ
LATA = {"name": "lata", "normalize_weights": "norm"}
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"name": "task_arithmetic"},
    "lata, logarithmic": {"name": "lata"},
    "lata, linear": {"name": "lata", "scheme": "linear"},
    "lata, threshold": {"name": "lata", "scheme": "threshold"},
    "lata, logarithmic, norm": LATA,
    "ties": {"name": "ties"},
    "ties, density 0.5": {"name": "ties", "density": 0.5},
    "magnitude": {"name": "magnitude"},
    "dare, density 0.5": {"name": "dare", "density": 0.5},
    "dare": {"name": "dare"},
    "dare_ties, density 0.5": {"name": "dare_ties", "density": 0.5},
    "della": {"name": "della"},
    "breadcrumbs": {"name": "breadcrumbs"},
    "consensus": {"name": "consensus"},
    "pcb": {"name": "pcb"},
    "sce": {"name": "sce"},
    "ram": {"name": "ram"},
    "ram_plus": {"name": "ram_plus"},
    "nuslerp": {"name": "nuslerp"},
    "multislerp": {"name": "multislerp"},
    "model_stock": {"name": "model_stock"},
    "tsv": {"name": "tsv"},
    "iso_c": {"name": "iso_c"},
    "iso_cts": {"name": "iso_cts"},
    "average": {"name": "average"},
    "slerp": {"name": "slerp"},
    "karcher": {"name": "karcher"},
}
RELATIVE = ("average", "slerp", "karcher", "nuslerp", "multislerp")  # the same for any common λ


@dataclass
class Row:
    """A method at its best λ: right answers by skill, of `TEST_N` each."""

    name: str
    scale: float
    correct: dict[str, int]
    perplexity: float

    def share(self, skills: tuple[str, ...]) -> str:
        right, asked = sum(self.correct[s] for s in skills), TEST_N * len(skills)
        low, high = wilson(right, asked)
        return f"{right / asked:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Questions:
    """What λ is chosen on, and what the figures are of."""

    choosing: Sequence[TaskSamples]
    reporting: Sequence[TaskSamples]


def questions() -> Questions:
    parts = split(
        [f"zoo:{skill}" for skill in TASKS], EvaluationOptions(), Splitting(CHOOSING_N, TEST_N)
    )
    kept = prepare([f"zoo:{skill}" for skill in KEPT], EvaluationOptions(limit=TEST_N))
    return Questions(
        parts.select, [*parts.test, *kept, *prepare(["zoo:text"], EvaluationOptions())]
    )


def values(models: Models, recipe: Any, asked: Sequence[TaskSamples]) -> dict[str, float]:
    """The main figure of each skill."""
    results = models.evaluate(recipe, asked, "candidate")
    return {r.task.removeprefix("zoo:"): r.main.value for r in results}


def row(name: str, method: dict[str, Any], models: Models, asked: Questions) -> Row:
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        tasks={task: zoo.path(task) for task in TASKS},
    )
    grid = (0.5,) if method["name"] in RELATIVE else GRID
    right: dict[float, float] = {}
    for scale in grid:
        recipe = as_recipe(family, {"method": method, "scale": dict.fromkeys(TASKS, scale)})
        right[scale] = sum(values(models, recipe, asked.choosing).values())
    best = min(right, key=lambda scale: (-right[scale], scale))
    recipe = as_recipe(family, {"method": method, "scale": dict.fromkeys(TASKS, best)})
    found = values(models, recipe, asked.reporting)
    perplexity = found.pop("text")
    correct = {skill: round(TEST_N * value) for skill, value in found.items()}
    return Row(name, best, correct, perplexity)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo_methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", choices=list(METHODS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | λ | math and code | math | code | say, find, howto, refusal | perplexity |")
    print("|---|---|---|---|---|---|---|")
    rows, asked = [], questions()
    started = time.monotonic()
    with Models(EvaluationOptions()) as models:
        for name in options.only or METHODS:
            try:
                found = row(name, METHODS[name], models, asked)
            except TaskvecError as error:
                print(f"| {name} | – | {error} | | | | |")
                continue
            rows.append(found)
            scale = "–" if METHODS[name]["name"] in RELATIVE else f"{found.scale:g}"
            cells = [name, scale, found.share(TASKS), *(found.share((task,)) for task in TASKS)]
            cells += [found.share(KEPT), f"{found.perplexity:.3f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")
    if options.json:
        told = [vars(found) for found in rows]
        options.json.write_text(json.dumps(told, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
