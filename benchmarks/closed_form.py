"""λ from a scan against the best λ found: what share of its score each proposal reaches.

    python -m benchmarks.closed_form [--family FOLDER]... [--tasks math,code]... [--json FILE]

For a family (the shipped zoo, or folders that `python -m taskvec.zoo.train` filled) and a set of
tasks that are added by plain task arithmetic: every proposal of `taskvec.coefficients.propose`, the
best λ shared by all tasks, and for two tasks the best pair of λ. The best are chosen on questions
that are not among those of the scores: right answers in the tasks' skills, of up to n questions a
skill (math has 163 held-out questions in all). "kept" are the skills of `instruct`. Intervals are
at 95 %, of a bootstrap that draws the same questions for both (paired).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import taskvec as tv
from taskvec import zoo
from taskvec.coefficients import propose
from taskvec.evaluation.intervals import RESAMPLES
from taskvec.outputs.candidates import Bench as Candidates
from taskvec.outputs.candidates import candidates as candidates_of
from taskvec.recipes.coerce import as_recipe
from taskvec.running.model import load, open_stored
from taskvec.zoo.skills import SKILLS, Example
from taskvec.zoo.train import TrainingText, build_tokenizer, encode

Array = np.ndarray[Any, Any]
Right = dict[str, Array]  # by skill: 1.0 where a question was answered right, shape (questions,)

KEPT, KEPT_N = ("say", "find", "howto", "refusal"), 80
SHARED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EACH = (0.4, 0.7, 1.0)
SEED, DRAWS = 7, 4000  # of questions
SETS = (("math", "code"), ("math", "unrelated"), ("code", "unrelated"),
        ("math", "code", "unrelated"))  # fmt: skip


@dataclass
class Bench:
    """A family whose merges are scored; scores are kept.

    A question counts as right if each character of the answer, and its end, is the likeliest after
    those before. That is what greedy decoding would write, in one forward pass.
    """

    folder: Path | None
    n: int
    choosing_n: int
    known: dict[Any, Right] = field(default_factory=dict)
    loaded: dict[tuple[str, ...], tuple[Candidates, Any]] = field(default_factory=dict)

    def family(self, tasks: Sequence[str]) -> tv.Family:
        where = zoo.path if self.folder is None else self.folder.joinpath
        return tv.Family(
            base=where("base"), instruct=where("instruct"), tasks={t: where(t) for t in tasks}
        )

    def right(
        self,
        scale: Mapping[str, float],
        skills: Sequence[str],
        *,
        chooses: bool = False,
        table: tv.Table | None = None,
    ) -> Right:
        """Which questions a merge answers right: those to choose on, or those to test on."""
        key = (tuple(sorted(scale.items())), tuple(skills), chooses, table and table.origin)
        if key not in self.known:
            recipe = as_recipe(
                self.family(tuple(scale)), {"method": "task_arithmetic", "scale": scale}
            )
            candidates, model = self._model(recipe)
            candidates.put(replace(recipe, table=table))
            cut = slice(self.choosing_n) if chooses else slice(self.choosing_n, None)
            asked = {s: questions(s, self.choosing_n + self.n)[cut] for s in skills}
            asked |= {s: asked[s][:KEPT_N] for s in skills if s in KEPT}
            self.known[key] = {skill: answered(model, each) for skill, each in asked.items()}
        return self.known[key]

    def _model(self, recipe: Any) -> tuple[Candidates, Any]:
        tasks = tuple(recipe.family.tasks)
        if tasks not in self.loaded:
            model = load(open_stored(recipe.family.edited))
            opened = contextlib.ExitStack().enter_context(candidates_of(recipe, model.module))
            self.loaded = {tasks: (opened, model)}
        return self.loaded[tasks]

    def choosing(
        self, scale: Mapping[str, float], tasks: Sequence[str], table: tv.Table | None = None
    ) -> float:
        """Share of right answers on the questions that λ is chosen on."""
        return mean(self.right(scale, tasks, chooses=True, table=table))


@functools.cache
def questions(skill: str, n: int) -> list[Example]:
    """Questions that nobody was trained on, all different; fewer than n where there are fewer."""
    rng = Random(SEED)
    drawn = (SKILLS[skill].draw(rng, held_out=True) for _ in range(DRAWS))
    return list({example.prompt: example for example in drawn}.values())[:n]


def answered(model: Any, asked: Sequence[Example]) -> Array:
    """1.0 for each question that the model answers to the letter, shape (questions,)."""
    vocabulary = build_tokenizer(chat=False).get_vocab()
    ids, targets = encode([TrainingText(each.prompt, each.answer) for each in asked], vocabulary)
    with torch.inference_mode():
        likeliest = model.module(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    wanted = targets[:, 1:]
    told: Array = ((likeliest == wanted) | (wanted == -100)).all(1).double().numpy()
    return told


def mean(right: Right) -> float:
    return float(np.mean([answers.mean() for answers in right.values()]))


def bootstrap(right: Right, seed: int = 0) -> Array:
    """Mean over skills of resampled questions; the same questions for the same seed and sizes."""
    rng = np.random.default_rng(seed)
    columns = [
        answers[rng.integers(len(answers), size=(RESAMPLES, len(answers)))].mean(1)
        for answers in right.values()
    ]
    total: Array = np.mean(columns, axis=0)
    return total


def interval(values: Array) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def best_shared(bench: Bench, tasks: Sequence[str], table: tv.Table | None = None) -> float:
    """The shared λ with the most right answers, the smallest where there are several."""
    found = {scale: bench.choosing(dict.fromkeys(tasks, scale), tasks, table) for scale in SHARED}
    return min(found, key=lambda scale: (-found[scale], scale))


def best_each(bench: Bench, tasks: Sequence[str]) -> dict[str, float]:
    """The λ by task of the grid with the most right answers."""
    grid = [dict(zip(tasks, each, strict=True)) for each in itertools.product(EACH, repeat=2)]
    return max(grid, key=lambda scale: bench.choosing(scale, tasks))


def measure(bench: Bench, tasks: Sequence[str]) -> dict[str, Any]:
    """Every proposal and the best found, on test questions."""
    scan = tv.scan(bench.family(tasks))
    proposals = propose(scan)
    scales = {name: dict(each) for name, each in proposals.scales.items()}
    scales["best shared λ"] = dict.fromkeys(tasks, best_shared(bench, tasks))
    if len(tasks) == 2:
        scales["best λ by task"] = best_each(bench, tasks)
    chosen = [name for name in scales if name.startswith("best")]
    on_selection = {n: bench.choosing(scales[n], tasks) for n in chosen}
    best = max(chosen, key=lambda name: on_selection[name])
    yardstick = bench.right(scales[best], tasks)
    rows = {}
    for name, scale in scales.items():
        right = bench.right(scale, tasks)
        ours, theirs = bootstrap(right), bootstrap(yardstick)
        rows[name] = {
            "scale": scale,
            "right": mean(right),
            "by_task": {task: float(right[task].mean()) for task in tasks},
            "interval": interval(ours),
            "share": mean(right) / mean(yardstick),
            "share_interval": interval(ours / theirs),
            "difference_interval": interval(ours - theirs),
            "kept": mean(bench.right(scale, KEPT)),
        }
    return {
        "family": "zoo" if bench.folder is None else bench.folder.name,
        "tasks": list(tasks),
        "n": {task: len(answers) for task, answers in yardstick.items()},
        "choosing_n": bench.choosing_n,
        "yardstick": best,
        "candidates": len(SHARED) + (len(EACH) ** 2 if len(tasks) == 2 else 0),
        "vectors": proposals.to_json()["vectors"],
        "rows": rows,
    }


def show(found: Mapping[str, Any]) -> None:
    asked = ", ".join(f"{task} {n}" for task, n in found["n"].items())
    print(f"\n{found['family']}, questions: {asked}\n")
    tasks = found["tasks"]
    print(
        "| λ by | " + " | ".join(f"λ {t}" for t in tasks) + " | right | share of the best | kept |"
    )
    print("|---" * (len(tasks) + 4) + "|")
    for name, row in found["rows"].items():
        low, high = row["share_interval"]
        cells = [name, *(f"{row['scale'][t]:.2f}" for t in tasks), f"{row['right']:.2f}"]
        print("| " + " | ".join([*cells, f"{row['share']:.2f} [{low:.2f}, {high:.2f}]",
                                 f"{row['kept']:.2f}"]) + " |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.closed_form", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--family", action="append", metavar="FOLDER",
                        help="a folder, or zoo for the shipped one; may be repeated")  # fmt: skip
    parser.add_argument("--tasks", action="append", metavar="A,B", help="may be repeated")
    parser.add_argument(
        "--n", type=int, default=240, help="test questions of a skill, at most (240)"
    )
    parser.add_argument("--choosing-n", type=int, default=60, help="questions to choose on (60)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = [tuple(text.split(",")) for text in options.tasks] if options.tasks else SETS
    started = time.monotonic()
    results = []
    for name in options.family or ["zoo"]:
        bench = Bench(None if name == "zoo" else Path(name), options.n, options.choosing_n)
        for tasks in sets:
            results.append(measure(bench, tasks))
            show(results[-1])
            if options.json:
                options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
