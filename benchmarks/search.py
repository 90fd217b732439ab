"""What a search costs besides scoring, and what a switch replaces, in one process.

    python -m benchmarks.search WORK_DIR [--family DIR] [--runs 5] [--threads 2]

Searches λ of two tasks of the zoo, and times everything but scoring. With a real family, in DIR's
folders `instruct`, `math` and `unsafe`, it times a switch to a candidate against what it replaces,
a folder that is written, opened and loaded, and against the least that it can be: a copy of the
parameters. It binds itself to as many processors as it has threads. Prints one JSON object of
seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import taskvec as tv
from taskvec import zoo
from taskvec.coefficients import search
from taskvec.evaluation.evaluate import EvaluationOptions
from taskvec.evaluation.loading import Models
from taskvec.recipes.coerce import as_recipe
from taskvec.running.model import load, open_stored

TRIALS = 24
TASKS = ("math", "unsafe")


def searching(work: Path) -> dict[str, list[float]]:
    """Seconds of each candidate: scoring, switching, and all but scoring on average."""
    family = tv.Family(
        instruct=str(zoo.path("instruct")),
        tasks={name: str(zoo.path(name)) for name in ("math", "code")},
    )
    recipe = as_recipe(family, {"method": "task_arithmetic", "scale": {"math": 0.5, "code": 0.5}})
    spent: list[float] = []

    @contextmanager
    def timed(label: str, total: int) -> Iterator[Any]:
        started = time.perf_counter()
        yield lambda done: None
        spent.append(time.perf_counter() - started)

    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = search(
            recipe,
            vary={"scale.math": "0:1.2", "scale.code": "0:1.2"},
            maximize=["zoo:math", "zoo:code"],
            sampler="tpe",
            trials=TRIALS,
            test_n=1,
            out=folder,
            progress=timed,
        )
    scored = [trial for trial in found.record["trials"] if trial["same_as"] is None]
    scoring = [trial["scoring_s"] for trial in scored]
    return {
        "scoring": scoring,
        "switching": [trial["switching_s"] for trial in scored[1:]],  # the first one compiles
        "overhead": [(spent[0] - scored[0]["switching_s"] - sum(scoring)) / len(scored)],
    }


def switching(root: Path, work: Path, runs: int) -> dict[str, list[float]]:
    """A switch to a candidate of two tasks, a copy, a folder written and loaded, in turns."""
    family = tv.Family(
        instruct=str(root / "instruct"), tasks={name: str(root / name) for name in TASKS}
    )
    found: dict[str, list[float]] = {"switch": [], "copy": [], "folder": []}
    with Models(EvaluationOptions()) as models:
        half = as_recipe(family, {"method": "task_arithmetic", "scale": dict.fromkeys(TASKS, 0.5)})
        parameters = [p.detach() for p in models.candidate(half).module.parameters()]
        copies = [parameter.clone() for parameter in parameters]
        for run in range(runs):
            scale = dict.fromkeys(TASKS, 0.1 * (run + 1))
            recipe = as_recipe(family, {"method": "task_arithmetic", "scale": scale})
            started = time.perf_counter()
            models.candidate(recipe)
            found["switch"].append(time.perf_counter() - started)
            started = time.perf_counter()
            for copy, parameter in zip(copies, parameters, strict=True):
                copy.copy_(parameter)
            found["copy"].append(time.perf_counter() - started)
            started = time.perf_counter()
            tv.merge(family, work / "merged", method="task_arithmetic", scale=scale, force=True)
            load(open_stored(work / "merged"))
            found["folder"].append(time.perf_counter() - started)
    shutil.rmtree(work / "merged")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("work", type=Path)
    parser.add_argument("--family", type=Path, metavar="DIR")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    found = searching(options.work)
    if options.family is not None:
        found |= switching(options.family, options.work, options.runs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
