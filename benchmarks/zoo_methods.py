"""Every method on the zoo's math and code, each at its own best λ; a table in Markdown.

    python -m benchmarks.zoo_methods [--n 150] [--only NAME]... [--json FILE]

λ (the same for both tasks) is chosen on another draw of questions than the figures are from: the λ
of the grid with the most right answers in math and code, the smallest where there are several. Math
has 163 questions in all, so that most of its 80 are asked again. Everything
but λ has the method's defaults, unless the row says otherwise. Candidates are merged in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import taskvec as tv
from taskvec import zoo
from taskvec.engine.api import recipe_of_family
from taskvec.errors import TaskvecError
from taskvec.evaluation.evaluate import Options, prepare
from taskvec.evaluation.figures import wilson
from taskvec.evaluation.loading import Models
from taskvec.evaluation.task import Settings

TASKS = ("math", "code")
KEPT = ("say", "find", "howto", "refusal")
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)
CHOOSING_SEED, CHOOSING_N = 1, 80
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
    """A method at its best λ: right answers by skill, of n."""

    name: str
    scale: float
    correct: dict[str, int]
    n: int
    perplexity: float

    def share(self, skills: tuple[str, ...]) -> str:
        right, asked = sum(self.correct[s] for s in skills), self.n * len(skills)
        low, high = wilson(right, asked)
        return f"{right / asked:.2f} [{low:.2f}, {high:.2f}]"


def counts(models: Models, recipe: Any, skills: tuple[str, ...], options: Options) -> Any:
    prepared = prepare([f"zoo:{skill}" for skill in skills], options)
    results = models.evaluate((recipe, None), prepared, "candidate")
    return {r.task.removeprefix("zoo:"): r for r in results}


def row(name: str, method: dict[str, Any], models: Models, n: int) -> Row:
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        tasks={task: zoo.path(task) for task in TASKS},
    )
    grid = (0.5,) if method["name"] in RELATIVE else GRID
    choosing = Options(limit=CHOOSING_N, settings=Settings(seed=CHOOSING_SEED))
    right: dict[float, float] = {}
    for scale in grid:
        recipe = recipe_of_family(family, method, dict.fromkeys(TASKS, scale), {})
        found = counts(models, recipe, TASKS, choosing)
        right[scale] = sum(found[task].main.value for task in TASKS)
    best = min(right, key=lambda scale: (-right[scale], scale))
    recipe = recipe_of_family(family, method, dict.fromkeys(TASKS, best), {})
    found = counts(models, recipe, (*TASKS, *KEPT, "text"), Options(limit=n))
    text = found.pop("text")
    correct = {skill: round(n * result.main.value) for skill, result in found.items()}
    return Row(name, best, correct, n, text.main.value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo_methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--n", type=int, default=150, help="questions of a skill (150)")
    parser.add_argument("--only", action="append", choices=list(METHODS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | λ | math and code | math | code | say, find, howto, refusal | perplexity |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    started = time.monotonic()
    with Models(Options()) as models:
        for name in options.only or METHODS:
            try:
                found = row(name, METHODS[name], models, options.n)
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
