"""Evaluation against its floors, in one process: a copy of the parameters, bare forward passes.

    python -m benchmarks.evaluation FAMILY_DIR WORK_DIR [--runs 5] [--threads 2]

FAMILY_DIR is a family of `benchmarks.synthetic` that transformers can load. Prints one JSON object:
seconds of every run. `benchmarks.run` makes ratios of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

import taskvec as tv
from taskvec.outputs.candidates import candidates
from taskvec.recipes.coerce import as_recipe
from taskvec.running.encoding import Encoder, ScoredRow
from taskvec.running.likelihood import likelihoods
from taskvec.running.model import Model

WINDOWS, CONTEXT = 8, 512
CHOICES, PROMPT, ANSWER = 16, 120, 8  # rows and tokens
TASKS = ("math", "code")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def load(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, trust_remote_code=False
    )
    return model.eval()


def switching(family: tv.Family, module: Any, work: Path, runs: int) -> dict[str, list[float]]:
    """A copy of the parameters, a switch of both tasks, and what it replaces: a folder, loaded."""
    parameters = [p.detach() for p in module.parameters()]
    into = [torch.empty_like(p) for p in parameters]

    def copy() -> None:
        for source, target in zip(parameters, into, strict=True):
            target.copy_(source)

    found: dict[str, list[float]] = {"copy": [], "switch": [], "folder": []}
    recipe = as_recipe(family, {"method": "task_arithmetic", "scale": dict.fromkeys(TASKS, 0.5)})
    copy()
    with candidates(recipe, module) as bench:
        bench.put(recipe)
        for i in range(runs):
            found["copy"].append(timed(copy))
            scale = dict.fromkeys(TASKS, 0.1 * (i + 1))
            changed = as_recipe(family, {"method": "task_arithmetic", "scale": scale})
            found["switch"].append(timed(partial(bench.put, changed)))

    def write_and_load() -> None:
        tv.merge(
            family, work, method="task_arithmetic", scale=dict.fromkeys(TASKS, 0.5), force=True
        )
        load(work)

    for _ in range(min(2, runs)):
        found["folder"].append(timed(write_and_load))
    return found


def asking(module: Any, runs: int) -> dict[str, list[float]]:
    """Likelihoods of windows and of answers, and the forward passes alone, in the same batches."""
    rng, words = Random(0), module.config.vocab_size
    encoder = Encoder("bench", None, CONTEXT, (), 0, frozenset())
    model = Model(module, encoder)

    def row(length: int, targets: int) -> ScoredRow:
        tokens = [rng.randrange(words) for _ in range(length + 1)]
        return ScoredRow(tokens[:-1], tokens[-targets:])

    texts = [row(CONTEXT, CONTEXT) for _ in range(WINDOWS)]
    answers = [row(PROMPT, ANSWER) for _ in range(CHOICES)]
    found: dict[str, list[float]] = {}
    for name, rows in (("perplexity", texts), ("answers", answers)):
        batch = torch.tensor([row.inputs for row in rows])
        size = 2048 // batch.shape[1]
        parts = batch.split(size)

        def bare(parts: Any = parts) -> None:
            with torch.inference_mode():
                for part in parts:
                    module(input_ids=part, use_cache=False)

        bare()
        for _ in range(runs):
            found.setdefault(f"{name}, bare", []).append(timed(bare))
            found.setdefault(name, []).append(timed(partial(likelihoods, model, rows)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("family", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    root = options.family
    family = tv.Family(
        instruct=str(root / "instruct"), tasks={name: str(root / name) for name in TASKS}
    )
    module = load(root / "instruct")
    found = switching(family, module, options.work, options.runs)
    print(json.dumps(found | asking(module, options.runs)))


if __name__ == "__main__":
    main()
