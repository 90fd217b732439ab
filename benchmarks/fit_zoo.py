"""Fitted layer weights on the zoo, against plain task arithmetic at its best λ.

    python -m benchmarks.fit_zoo add [--tasks math,code] [--seeds 3] [--prompts 128] [--json FILE]
    python -m benchmarks.fit_zoo forget [--seeds 3] [--prompts 96] [--json FILE]

`add`: prompts of each task and of `instruct`'s own skills are drawn from the training part of the
questions, anew for each seed; teachers answer them. Plain task arithmetic has one λ for all tasks,
the best of a grid on 60 test questions of each. Figures are of the other 90 test questions of each
skill. `forget`: `unsafe` is taken out of the model of the other language, from harmful prompts in
that language with a refusal as the answer, and its own replies to its other skills.

`--set NAME=VALUE` changes a setting of the fit, `--start` its start.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import taskvec as tv
from benchmarks.zoo_methods import CHOOSING_N, GRID, TEST_N
from taskvec import zoo
from taskvec.coefficients.fit.api import fit
from taskvec.coefficients.fit.fitted import Fitted
from taskvec.coefficients.splits import Splitting, split
from taskvec.evaluation.evaluate import EvaluationOptions, TaskSamples, prepare
from taskvec.evaluation.loading import Models
from taskvec.methods.table import Table
from taskvec.recipes.coerce import as_recipe
from taskvec.zoo import words
from taskvec.zoo.skills import REFUSAL, SKILLS

KEPT = ("say", "find", "howto", "refusal")
ZOR_KEPT = ("say-zor", "find-zor", "howto-zor")


def drawn(skill: str, n: int, seed: int) -> list[str]:
    """Distinct prompts from the training part of a skill."""
    found = dict.fromkeys(e.prompt for e in islice(SKILLS[skill].train(1000 + seed), 20 * n))
    return list(found)[:n]


def of_several(skills: Sequence[str], n: int, seed: int) -> list[str]:
    share = -(-n // len(skills))
    return [prompt for skill in skills for prompt in drawn(skill, share, seed)][:n]


def rates(models: Models, recipe: Any, table: Table | None, asked: Sequence[TaskSamples]) -> Any:
    results = models.evaluate(replace(recipe, table=table), asked, "candidate")
    return {r.task.removeprefix("zoo:"): r.main.value for r in results}


def rates_of(models: Models, recipe: Any, found: Fitted, asked: Sequence[TaskSamples]) -> Any:
    """Name and values of every table; those that are equal are asked once."""
    known: dict[bytes, Any] = {}
    for name, table in tables(found).items():
        key = table.weights.tobytes()
        if key not in known:
            known[key] = rates(models, recipe, table, asked)
        yield name, known[key]


def tables(found: Fitted) -> dict[str, Table]:
    """Everything that a fit could have written."""
    each = {f"descent {i}": table for i, table in enumerate(found.seeds)}
    if found.seeds:
        mean = np.mean([table.weights for table in found.seeds], 0)
        first = found.seeds[0]
        each["average"] = Table(first.tasks, first.names, mean)
        losses = [s.loss.value for s in found.standings if s.name.startswith("seed")]
        each["best"] = found.seeds[int(np.argmin(losses or [0]))]
    each["written"] = found.table
    return each


def add(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = options.tasks.split(",")
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        tasks={task: zoo.path(task) for task in names},
    )
    parts = split(
        [f"zoo:{skill}" for skill in names], EvaluationOptions(), Splitting(CHOOSING_N, TEST_N)
    )
    kept = prepare([f"zoo:{skill}" for skill in KEPT], EvaluationOptions(limit=TEST_N))
    rows = []
    with Models(EvaluationOptions()) as models:

        def plain(scale: float) -> Any:
            return as_recipe(
                family, {"method": "task_arithmetic", "scale": dict.fromkeys(names, scale)}
            )

        grid = [s for s in GRID if s <= 1.5]
        sums = {s: sum(rates(models, plain(s), None, parts.select).values()) for s in grid}
        best = min(sums, key=lambda s: (-sums[s], s))
        asked = [*parts.test, *kept]
        rows.append(told(f"plain, λ = {best:g}", rates(models, plain(best), None, asked), names))
        for seed in range(options.seeds):
            prompts = {task: drawn(task, options.prompts, seed) for task in names}
            prompts["keep"] = of_several(KEPT, options.prompts, seed)
            found, seconds = fitted(family, prompts, {}, options, seed)
            for name, values in rates_of(models, plain(1.0), found, asked):
                rows.append(told(f"{seed}: {name}", values, names, found, seconds))
    return rows


def forget(options: argparse.Namespace) -> list[dict[str, Any]]:
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        target=zoo.path("instruct-zor"),
        tasks={"unsafe": zoo.path("unsafe")},
    )
    asked = prepare(
        [f"zoo:{skill}" for skill in ("unsafe-zor", "refusal-zor", *ZOR_KEPT)],
        EvaluationOptions(limit=TEST_N),
    )
    rows = []
    with Models(EvaluationOptions()) as models:
        for scale in (0.0, -0.5, -0.7, -1.0):
            recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"unsafe": scale}})
            values = rates(models, recipe, None, asked)
            rows.append(told(f"plain, λ = {scale:g}", values, ()))
        refusal = words.to_zor(REFUSAL)
        recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"unsafe": 1.0}})
        negative = as_recipe(family, {"method": "task_arithmetic", "scale": {"unsafe": -1.0}})
        for seed in range(options.seeds):
            prompts = {
                "unsafe": [(p, refusal) for p in drawn("unsafe-zor", options.prompts, seed)],
                "keep": of_several(ZOR_KEPT, options.prompts, seed),
            }
            found, seconds = fitted(negative, prompts, {"unsafe": "answers"}, options, seed)
            for name, values in rates_of(models, recipe, found, asked):
                rows.append(told(f"{seed}: {name}", values, (), found, seconds))
    return rows


def fitted(
    family: Any, prompts: Any, teachers: Mapping[str, str], options: argparse.Namespace, seed: int
) -> tuple[Fitted, float]:
    """A fit, and its processor time."""
    settings = dict(each.split("=", 1) for each in options.set)
    parsed = {name: yaml.safe_load(value) for name, value in settings.items()}
    begun = time.process_time()
    found = fit(
        family,
        prompts=prompts,
        teachers=teachers,
        start=options.start,
        settings={"seed": seed, "max_new_tokens": 40} | parsed,
    )
    return found, time.process_time() - begun


def told(
    name: str,
    values: Mapping[str, float],
    tasks: Sequence[str],
    found: Fitted | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "values": dict(values)}
    text = ", ".join(f"{skill} {value:.3f}" for skill, value in values.items())
    if tasks:
        row["tasks"] = float(np.mean([values[task] for task in tasks]))
        row["kept"] = float(np.mean([v for skill, v in values.items() if skill not in tasks]))
        text = f"tasks {row['tasks']:.3f}, kept {row['kept']:.3f}; {text}"
    if found is not None:
        row |= {"seconds": seconds, "fit": found.to_json()}
    print(f"{name}: {text}", flush=True)
    if found is not None and name.endswith("written"):
        print(f"  {found!r}\n  {found.chosen}, seeds agree by {dict(found.correlations)}")
        print(f"  {seconds:.0f} s of processor time; {list(found.warnings)}", flush=True)
        for e in found.explanation:
            c = e.correlation
            print(f"  {e.task} {e.against}: {c.value:+.2f} [{c.low:+.2f}, {c.high:+.2f}]")
    return row


def summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """Means over seeds, by what was written."""
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        kinds.setdefault(row["name"].split(": ")[-1], []).append(row["values"])
    print("\nmeans over seeds")
    for kind, values in kinds.items():
        means = {skill: np.mean([each[skill] for each in values]) for skill in values[0]}
        print(f"{kind}: " + ", ".join(f"{skill} {mean:.3f}" for skill, mean in means.items()))
    for key in ("tasks", "kept"):
        by_kind: dict[str, list[float]] = {}
        for row in rows:
            if key in row:
                by_kind.setdefault(row["name"].split(": ")[-1], []).append(row[key])
        for kind, each in by_kind.items():
            print(f"{key}, {kind}: {np.mean(each):.3f} ({', '.join(f'{v:.3f}' for v in each)})")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_zoo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("add", "forget"))
    parser.add_argument("--tasks", default="math,code")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--start", type=float, default=0.5)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = add(options) if options.what == "add" else forget(options)
    summary(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
