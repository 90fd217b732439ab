"""The stages of the study. Each keeps what it found in a file and is not run again.

probe    a linear head for each task, on features of the pre-trained model; frozen from then on
tune     the learning rate of each mode: highest mean single-task accuracy on validation data
train    a task vector for each mode, seed and task, all with as many steps and examples
add      one λ for all tasks, chosen on validation data; test accuracy there and at a fixed λ
negate   each task subtracted, the other tasks being the control, λ chosen on validation data
error    the disentanglement error of one pair on a grid, on test data

Heads are the pre-trained model's probes, the same for every mode and seed. Models of the mode
`linearised` are asked as they were trained, f0 + J Σ λ τ: their features at any λ follow from the
derivative along each vector, which is worked out once (`Tangent`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from benchmarks.attention_only.data import Part, Task
from taskvec.disentanglement import tasks as asked_tasks
from taskvec.disentanglement.addition import task_addition
from taskvec.disentanglement.error import disentanglement_error
from taskvec.disentanglement.negation import task_negation
from taskvec.training.api import finetune
from taskvec.training.heads import linear_probe
from taskvec.training.linearised import derivative
from taskvec.training.loop import BatchLoss
from taskvec.training.settings import TrainingSettings

ASKED = 100  # examples asked at once
TUNING_SEED = 100
PENALTY = 0.1  # of the heads
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FIRST_RATES = (3e-5, 1e-4)


@dataclass(frozen=True)
class Mode:
    """A way to fine-tune."""

    train: str
    linearised: bool = False


MODES = {
    "full": Mode("all"),
    "attention": Mode("attention"),
    "linearised": Mode("all", linearised=True),
}


@dataclass(frozen=True)
class Setup:
    """What the study is of.

    Attributes:
        name: `vision` or `text`.
        backbone: Makes the pre-trained model, anew at each call.
        pooled: From a model's output and its inputs to features, shape (n, width); linear in the
            output.
        tasks: By name.
        tuned_on: Tasks that learning rates are chosen on.
        seeds: Of training (order of examples).
        steps: Of one fine-tune.
        batch: Examples of a step.
        scales: λ that are tried for addition.
        negative_scales: λ that are tried for negation.
        fixed: λ at which modes are compared besides.
        pair: Tasks of the disentanglement error.
        grid: Coefficients of the disentanglement error.
        error_n: Test examples of each task for it.
        precision: Of training and of asking; see `taskvec.training.loop.Settings`.
        out: Folder of everything.
        heads: By task; filled by `probe`.
    """

    name: str
    backbone: Callable[[], Any]
    pooled: Callable[[Any, Mapping[str, Any]], Any]
    tasks: Mapping[str, Task]
    tuned_on: Sequence[str]
    seeds: Sequence[int]
    steps: int
    batch: int
    scales: Sequence[float]
    negative_scales: Sequence[float]
    fixed: float
    pair: tuple[str, str]
    grid: Sequence[float]
    error_n: int
    precision: str
    out: Path
    heads: dict[str, Any] = field(default_factory=dict)

    def features(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Features of a batch, shape (n, width)."""
        return self.pooled(model(**inputs), inputs)

    def told(self) -> dict[str, Any]:
        """What figures depend on besides code; another setup needs another folder."""
        labels = {
            f"{task.name} {part}": hashlib.sha256(rows.labels.numpy().tobytes()).hexdigest()[:12]
            for task in self.tasks.values()
            for part, rows in task.parts.items()
        }
        same = ("name", "steps", "batch", "precision")
        return {**{name: getattr(self, name) for name in same}, "labels": labels}


def kept(setup: Setup, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A stage's result; from its file, if it is there."""
    path = setup.out / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["setup"] != setup.told():
            raise SystemExit(f"{path} is of another setup; give another folder")
        return found
    started = time.monotonic()
    result = {"setup": setup.told(), **make()}
    result["seconds"] = round(time.monotonic() - started, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(path)
    print(f"{name}: {result['seconds']:.0f} s", flush=True)
    return result


def probe(setup: Setup) -> None:
    """Fit the heads, or take them from their file."""
    path = setup.out / "heads.safetensors"
    if not path.exists():
        backbone = setup.backbone().eval()
        weights: dict[str, Any] = {}
        for task in setup.tasks.values():
            train = task.parts["train"]
            inputs = torch.cat([answer(setup, backbone, x) for x, _ in batches(train)])
            head = linear_probe(inputs, train.labels, classes=task.classes, l2=PENALTY)
            weights |= {f"{task.name}.{name}": w for name, w in head.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path)
    weights = load_file(path)
    for name in setup.tasks:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        head = torch.nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        setup.heads[name] = head.requires_grad_(False)


def answer(setup: Setup, backbone: Any, inputs: Mapping[str, Any]) -> Any:
    """Features of a batch, float32, without gradients."""
    with torch.no_grad(), computing(setup):
        return setup.features(backbone, inputs).float()


def computing(setup: Setup) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bfloat16")


def batches(part: Part, most: int | None = None) -> list[tuple[dict[str, Any], Any]]:
    """Examples as they are asked: in order, `ASKED` at once."""
    places = torch.arange(len(part))[:most]
    return [part.at(places[at : at + ASKED]) for at in range(0, len(places), ASKED)]


def trained(setup: Setup, mode: str, task: str, seed: int, rate: float) -> dict[str, Any]:
    """A task vector, trained unless it is kept."""
    name = f"vector-{mode}-{task}-{seed}-{rate:g}"
    path = setup.out / "vectors" / f"{name}.safetensors"
    if path.exists():
        return load_file(path)
    how, backbone, part = MODES[mode], setup.backbone(), setup.tasks[task].parts["train"]

    def objective(module: Any, batch: Any) -> BatchLoss:
        inputs, labels = batch
        logits = setup.heads[task](setup.features(module, inputs).float())
        loss = functional.cross_entropy(logits, labels)
        return BatchLoss(loss, (logits.argmax(-1) == labels).sum())

    def make() -> dict[str, Any]:
        items = [
            ({n: x[i] for n, x in part.inputs.items()}, part.labels[i]) for i in range(len(part))
        ]
        found = finetune(
            backbone,
            items,
            train=how.train,
            linearised=how.linearised,
            objective=objective,
            settings=TrainingSettings(
                steps=setup.steps, batch_size=setup.batch, learning_rate=rate, seed=seed,
                warmup_steps=setup.steps // 10, precision=setup.precision, device="cpu",
            ),
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: v.contiguous() for name, v in found.vector.items()}, path)
        losses = [record["loss"] for record in found.records if "loss" in record]
        return {"losses": losses, "trains": found.selection.parameters}

    kept(setup, f"training/{name}", make)
    return load_file(path)


class Tangent(torch.nn.Module):
    """Features of a linearised model, f0 + Σ_t α_t J τ_t; its parameters are the α, zero at first.

    What is asked of it is not inputs but `at`, places among the examples that it was made for.
    """

    def __init__(self, value: Any, changes: Mapping[str, Any]) -> None:
        super().__init__()
        self.value, self.changes = value, dict(changes)
        self.alpha = torch.nn.ParameterDict(
            {t: torch.nn.Parameter(torch.zeros(1)) for t in changes}
        )

    def forward(self, at: Any) -> Any:
        moved = sum(self.alpha[t] * change[at] for t, change in self.changes.items())
        return self.value[at] + moved


@dataclass
class Asked:
    """Models of one mode and seed, as the measurements ask them.

    Attributes:
        module: What vectors are put into.
        vectors: By task, for `module`.
        tasks: By part and task.
    """

    module: Any
    vectors: dict[str, Any]
    tasks: dict[str, dict[str, asked_tasks.ModelTask]]


def asked(
    setup: Setup,
    mode: str,
    vectors: Mapping[str, Any],
    parts: Sequence[str],
    most: int | None = None,
) -> Asked:
    """Vectors as they are asked on the data of the same tasks."""
    backbone = setup.backbone().eval()
    if MODES[mode].linearised:
        return _tangent(setup, backbone, vectors, parts, most)
    states = {}
    theta0 = dict(backbone.state_dict())
    for task, vector in vectors.items():
        states[task] = {**theta0, **{n: theta0[n] + v for n, v in vector.items()}}
    tasks = {
        part: {
            task: asked_tasks.classification(
                task,
                batches(setup.tasks[task].parts[part], most),
                head=setup.heads[task],
                forward=lambda module, inputs: answer(setup, module, inputs),
            )
            for task in vectors
        }
        for part in parts
    }
    return Asked(backbone, states, tasks)


def _tangent(
    setup: Setup, backbone: Any, vectors: Mapping[str, Any], parts: Sequence[str], most: int | None
) -> Asked:
    values: list[Any] = []
    changes: dict[str, list[Any]] = {task: [] for task in vectors}
    tasks: dict[str, dict[str, asked_tasks.ModelTask]] = {part: {} for part in parts}
    first = 0
    for part in parts:
        for task in vectors:
            places = []
            for inputs, labels in batches(setup.tasks[task].parts[part], most):
                for other, vector in vectors.items():
                    with torch.no_grad(), computing(setup):
                        out, change = derivative(backbone, vector, **inputs)
                    changes[other].append(setup.pooled(change, inputs).float())
                values.append(setup.pooled(out, inputs).float())
                places.append((torch.arange(first, first + len(labels)), labels))
                first += len(labels)
            tasks[part][task] = asked_tasks.classification(task, places, head=setup.heads[task])
    module = Tangent(torch.cat(values), {task: torch.cat(c) for task, c in changes.items()})
    ones = {}
    for task in vectors:
        state = {name: p.detach().clone() for name, p in module.state_dict().items()}
        state[f"alpha.{task}"] = torch.ones(1)
        ones[task] = state
    return Asked(module.eval(), ones, tasks)


def tune(setup: Setup, mode: str) -> float:
    """The learning rate of a mode: highest mean validation accuracy, the smallest where several.

    Rates lie a factor of about three apart; both neighbours of the best have been tried.
    """

    def accuracy(rate: float) -> float:
        shares = []
        for task in setup.tuned_on:
            vector = trained(setup, mode, task, TUNING_SEED, rate)
            of = asked(setup, mode, {task: vector}, ["validation"])
            found = task_addition(
                of.module, of.vectors, of.tasks["validation"], of.tasks["validation"], scales=[1.0]
            )
            shares.append(found["task_arithmetic"].mean_accuracy.value)
        return float(np.mean(shares))

    def make() -> dict[str, Any]:
        tried = {rate: accuracy(rate) for rate in FIRST_RATES}
        while True:
            best = max(tried, key=lambda rate: (tried[rate], -rate))
            place = RATES.index(best)
            near = [r for r in RATES[max(0, place - 1) : place + 2] if r not in tried]
            if not near:
                return {"accuracy": {f"{r:g}": tried[r] for r in sorted(tried)}, "rate": best}
            tried |= {rate: accuracy(rate) for rate in near}

    return float(kept(setup, f"tune-{mode}", make)["rate"])


def measured(setup: Setup, mode: str, seed: int) -> None:
    """Train all tasks by one mode and seed, and measure what becomes of them."""
    rate = tune(setup, mode)
    vectors = {task: trained(setup, mode, task, seed, rate) for task in setup.tasks}
    of: list[Asked] = []  # made when something is to be measured

    def made() -> Asked:
        if not of:
            of.append(asked(setup, mode, vectors, ["validation", "test"]))
        return of[0]

    def add(scales: Sequence[float]) -> Callable[[], dict[str, Any]]:
        def make() -> dict[str, Any]:
            found = task_addition(
                made().module,
                made().vectors,
                made().tasks["validation"],
                made().tasks["test"],
                scales=scales,
                out=setup.out / "measured" / f"{mode}-{seed}",
            )
            return {"rate": rate, **found["task_arithmetic"].to_json()}

        return make

    def negate() -> dict[str, Any]:
        found = {}
        for task in setup.tasks:
            data = {
                part: {"target": by_name[task], "control": _together(by_name, without=task)}
                for part, by_name in made().tasks.items()
            }
            vector = made().vectors[task]
            negations = task_negation(
                made().module,
                vector,
                data["validation"],
                data["test"],
                scales=setup.negative_scales,
                out=setup.out / "measured" / f"{mode}-{seed}-{task}",
            )
            found[task] = negations["task_arithmetic"].to_json()
        return {"rate": rate, "tasks": found}

    kept(setup, f"add-{mode}-{seed}", add(setup.scales))
    kept(setup, f"fixed-{mode}-{seed}", add([setup.fixed]))
    kept(setup, f"negate-{mode}-{seed}", negate)


def error(setup: Setup, mode: str, seed: int) -> None:
    """The disentanglement error of the pair."""
    rate = tune(setup, mode)

    def make() -> dict[str, Any]:
        vectors = {task: trained(setup, mode, task, seed, rate) for task in setup.pair}
        of = asked(setup, mode, vectors, ["test"], most=setup.error_n)
        found = disentanglement_error(
            of.module,
            of.vectors,
            of.tasks["test"],
            alphas=setup.grid,
            out=setup.out / "measured" / f"error-{mode}-{seed}",
        )
        return {"rate": rate, **found.to_json()}

    kept(setup, f"error-{mode}-{seed}", make)


def _together(
    by_name: Mapping[str, asked_tasks.ModelTask], *, without: str
) -> asked_tasks.ModelTask:
    """The data of all tasks but one, as one task."""
    others = [task for name, task in by_name.items() if name != without]

    def run(module: Any) -> Iterator[asked_tasks.LogitRows]:
        first = 0
        for task in others:
            last = first
            for rows in task.run(module):
                yield asked_tasks.LogitRows(rows.logits, rows.labels, rows.examples + first)
                last = first + int(rows.examples.max()) + 1
            first = last

    identity = " ".join(task.identity for task in others)
    return asked_tasks.ModelTask("control", run, identity)
