"""Does entropy without labels find the λ that labels would choose? Handwritten digits; two tables.

    python -m benchmarks.entropy [--seeds 10] [--json FILE]
    python -m benchmarks.entropy --choices DIR

An MLP (64, 64, 64, 10) is trained a little on 100 digits of scikit-learn's, then fine-tuned twice:
on digits 0 to 4, and on digits 5 to 9. Both vectors are added.

    two heads   each task is asked about its own digits through its own five logits, and the last
                layer is not fine-tuned: the setting of AdaMerging
    one head    all ten digits are asked about through all ten logits

Of 800 other digits, 400 choose λ, by their labels (the best of a grid of 16 values in [0, 1.5], one
for both tasks or one each) or by the entropy of the predictions, and the other 400 score. Every
seed draws digits, weights and order anew. The tables have means over seeds, with percentile
intervals of a bootstrap over seeds.

With `--choices`: writes questions of the zoo's math and code with four choices each, for
`taskvec sweep --vary scale=0:1.5:0.1 --measure choice --measure choice@entropy --data DIR`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskvec.coefficients.entropy import ADAMERGING, minimize_entropy
from taskvec.coefficients.fit.settings import Descent
from taskvec.zoo.skills import SKILLS, TEST_SEED

HALVES = {"low": range(5), "high": range(5, 10)}
GRID = np.linspace(0, 1.5, 16)
DESCENTS = {
    "entropy, a λ a task": ADAMERGING,
    "entropy, a λ a task, range [0, 1.5], rate 0.01": replace(ADAMERGING, rate=0.01, high=1.5),
    "entropy, a λ a tensor": replace(ADAMERGING, granularity="tensor"),
    "entropy, a λ a tensor, range [0, 1.5], rate 0.01": Descent(
        "tensor", steps=500, rate=0.01, low=0.0, high=1.5
    ),
}
Weights = dict[str, torch.Tensor]
Part = tuple[torch.Tensor, torch.Tensor]
Scale = Callable[[str, str], float]  # λ by task and tensor


def digits(seed: int) -> dict[str, Part]:
    """Disjoint parts: start, tune, choose, score."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    ends = {"start": 100, "tune": 997, "choose": 1397, "score": 1797}
    parts, first = {}, 0
    for name, end in ends.items():
        mine = order[first:end]
        parts[name] = torch.tensor(x[mine] / 16, dtype=torch.float32), torch.tensor(y[mine])
        first = end
    return parts


def network() -> torch.nn.Sequential:
    layers = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 10))


def train(module: torch.nn.Module, part: Part, epochs: int, columns: list[int]) -> None:
    """By the logits in some columns; their digits have to be among these."""
    x, y = part
    places = torch.tensor([columns.index(c) if c in columns else -1 for c in range(10)])[y]
    adam = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            adam.zero_grad()
            out = module(x[batch])[:, columns]
            torch.nn.functional.cross_entropy(out, places[batch]).backward()
            adam.step()


def weights_of(module: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def of_classes(part: Part, classes: Any) -> Part:
    mine = torch.isin(part[1], torch.tensor(list(classes)))
    return part[0][mine], part[1][mine]


@dataclass
class Family:
    """A start, the vectors of both halves, and what is asked: columns of the logits by source."""

    module: torch.nn.Module
    vectors: dict[str, Weights]
    columns: dict[str, list[int]]
    parts: dict[str, Part]

    def inputs(self, part: str) -> dict[str, Part]:
        return {s: of_classes(self.parts[part], c) for s, c in self.columns.items()}

    def accuracy(self, scale: Scale, part: str) -> float:
        """Share of right answers of the merge, the mean over the sources."""
        merged = {
            name: p.detach() + sum(scale(t, name) * v[name] for t, v in self.vectors.items())
            for name, p in self.module.named_parameters()
            if p.requires_grad
        }
        rates = []
        for source, (x, y) in self.inputs(part).items():
            with torch.no_grad():
                out = torch.func.functional_call(self.module, merged, (x,))
            columns = self.columns[source]
            said = torch.tensor(columns)[out[:, columns].argmax(-1)]
            rates.append(float((said == y).float().mean()))
        return float(np.mean(rates))


def family(seed: int, *, two_heads: bool) -> Family:
    torch.manual_seed(seed)
    parts = digits(seed)
    module, every = network(), list(range(10))
    train(module, parts["start"], 20, every)
    state = {name: p.clone() for name, p in module.state_dict().items()}
    module[-1].requires_grad_(not two_heads)
    vectors = {}
    for task, classes in HALVES.items():
        tuned = network()
        tuned.load_state_dict(state)
        tuned[-1].requires_grad_(not two_heads)
        mine = list(classes) if two_heads else every
        train(tuned, of_classes(parts["tune"], classes), 10, mine)
        vectors[task] = {name: w - state[name] for name, w in weights_of(tuned).items()}
    columns = {t: list(c) for t, c in HALVES.items()} if two_heads else {"all": every}
    return Family(module, vectors, columns, parts)


def constant(by_task: dict[str, float]) -> Scale:
    return lambda task, name: by_task[task]


def one(seed: int, *, two_heads: bool) -> dict[str, dict[str, Any]]:
    """Score and λ of every way to choose."""
    zoo = family(seed, two_heads=two_heads)

    def by_labels(pairs: Any) -> dict[str, float]:
        candidates = [dict(zip(HALVES, map(float, pair), strict=True)) for pair in pairs]
        return max(candidates, key=lambda c: zoo.accuracy(constant(c), "choose"))

    chosen = {
        "nothing: λ = 0": dict.fromkeys(HALVES, 0.0),
        "nothing: λ = 0.3": dict.fromkeys(HALVES, 0.3),
        "nothing: λ = 1": dict.fromkeys(HALVES, 1.0),
        "labels, one λ": by_labels(zip(GRID, GRID, strict=True)),
        "labels, a λ a task": by_labels(itertools.product(GRID, GRID)),
    }
    found: dict[str, dict[str, Any]] = {
        name: {"score": zoo.accuracy(constant(scale), "score"), "scale": scale}
        for name, scale in chosen.items()
    }
    batches = {source: list(x.split(16)) for source, (x, _) in zoo.inputs("choose").items()}
    heads = {s: (lambda out, columns=c: out[:, columns]) for s, c in zoo.columns.items()}
    for name, descent in DESCENTS.items():
        result = minimize_entropy(zoo.module, zoo.vectors, batches, heads=heads, descent=descent)

        def learned(task: str, tensor: str, result: Any = result) -> float:
            of = result.table
            return float(result.scale[task] if of is None else of.of(task)[tensor])

        names = zoo.vectors["low"]
        found[name] = {
            "score": zoo.accuracy(learned, "score"),
            "scale": {t: float(np.mean([learned(t, n) for n in names])) for t in HALVES},
            "entropy": [
                float(np.mean(part)) for part in (result.entropy[:25], result.entropy[-25:])
            ],
        }
    return found


def interval(values: list[float]) -> str:
    """Mean over seeds and its bootstrap interval."""
    rng, all_of_them = np.random.default_rng(0), np.array(values)
    means = all_of_them[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{all_of_them.mean():.3f} [{low:.3f}, {high:.3f}]"


def choices(folder: Path) -> None:
    """Questions of math and code with the right answer among three others."""
    rng = random.Random(0)
    lines = []
    for skill in ("math", "code"):
        for example in SKILLS[skill].test(150, TEST_SEED):
            wrong: set[str] = set()
            while len(wrong) < 3:
                other = _near(rng, example.answer)
                wrong |= {other} - {example.answer}
            listed = [example.answer, *sorted(wrong)]
            rng.shuffle(listed)
            question = example.prompt.removesuffix(" ")
            row = {"question": question, "choices": listed}
            lines.append(json.dumps(row | {"answer": listed.index(example.answer)}))
    (folder / "choice").mkdir(parents=True, exist_ok=True)
    (folder / "choice" / "zoo.jsonl").write_text("\n".join(lines) + "\n")


def _near(rng: random.Random, answer: str) -> str:
    """A number close to one, or a word with one letter changed."""
    if answer.lstrip("-").isdigit():
        return str(abs(int(answer) + rng.choice([-3, -2, -1, 1, 2, 3])))
    place = rng.randrange(len(answer))
    return answer[:place] + rng.choice("abcdefghijklmnopqrstuvwxyz") + answer[place + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.entropy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--choices", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.choices is not None:
        choices(options.choices)
        return
    torch.set_num_threads(1)
    told = {}
    for title, two_heads in (("two heads", True), ("one head", False)):
        runs = told[title] = [one(seed, two_heads=two_heads) for seed in range(options.seeds)]
        print(f"\n{title}, {options.seeds} seeds\n")
        print("| λ chosen by | right | less labels, a λ a task | λ of low, high | entropy |")
        print("|---|---|---|---|---|")
        for name in runs[0]:
            print("| " + " | ".join([name, *cells(name, runs)]) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(told, indent=1, ensure_ascii=False))


def cells(name: str, runs: list[Any]) -> list[str]:
    """Score, difference, λ (the mean over tensors), and entropy at the start and at the end."""
    scores = [run[name]["score"] for run in runs]
    apart = [run[name]["score"] - run["labels, a λ a task"]["score"] for run in runs]
    means = [f"{np.mean([run[name]['scale'][task] for run in runs]):.2f}" for task in HALVES]
    ends = [run[name].get("entropy") for run in runs]
    told = "–" if ends[0] is None else " → ".join(f"{x:.3f}" for x in np.mean(ends, 0))
    return [interval(scores), interval(apart), ", ".join(means), told]


if __name__ == "__main__":
    main()
