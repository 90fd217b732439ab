"""Families of encoders: MiniLM-L6 with five text tasks, and a DINOv2 ViT-S with four of images.

`instruct` is a shared intermediate step from the pre-trained encoder: emotions and irony of tweets
for texts, the rotation of images of all four tasks for vision. Each task is a fine-tune of it under
a frozen linear probe of its own, fitted to `instruct`'s features. Parts are drawn by one fixed
seed; the seed of a run is of the order of the training examples. Validation parts are cut from the
training files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import taskvec as tv
from benchmarks.layer_weights.bench import Answers, Bench
from benchmarks.layer_weights.training import Schedule, computing, shuffled, train
from taskvec.training.data import Classified
from taskvec.training.heads import linear_probe
from taskvec.training.images import read_idx, read_npz
from taskvec.training.models import HeadOptions, open_classifier
from taskvec.training.tokens import Fitting

Array = np.ndarray[Any, Any]
DRAWN_BY = 20250220
TEXTS = {
    "trec": ("TREC.train.all", "TREC.test.all"),
    "sst2": ("stsa.binary.train", "stsa.binary.test"),
    "subj": ("subj.all", None),
    "cr": ("custrev.all", None),
    "mpqa": ("mpqa.all", None),
}
TWEETS = ("emotion", "irony")
PROBE_N, PENALTY, ASKED = 1000, 0.1, 100


@dataclass(frozen=True)
class Kind:
    """What differs between texts and images.

    Attributes:
        name: Of the family.
        asking: How the encoder is asked.
        shared: Schedule of the intermediate step.
        tuned: Schedule of a task.
        train_n: Most training examples of a task.
        validation_n: Validation examples of a task.
        test_n: Most examples that are set apart for tests.
        asked_n: Most of them that are asked, and half as many of a control.
        scales: λ of plain task arithmetic that are tried.
    """

    name: str
    asking: HeadOptions
    shared: Schedule
    tuned: Schedule
    train_n: int
    validation_n: int
    test_n: int
    asked_n: int
    scales: Sequence[float]


TEXT = Kind(
    "text", HeadOptions(fitting=Fitting(context=48, truncate=True)), Schedule(100, 32, 1e-4),
    Schedule(100, 32, 1e-4), 3000, 200, 1500, 1000, (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
)  # fmt: skip
VISION = Kind(
    "vision", HeadOptions(image_size=84), Schedule(60, 32, 3e-5), Schedule(100, 32, 3e-5), 2400,
    200, 1000, 1000, (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
)  # fmt: skip
KINDS = {"text": TEXT, "vision": VISION}
Parts = Mapping[str, Classified]


def data(kind: Kind, folder: Path) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """Parts of the tasks, and of what the intermediate step learns."""
    if kind is TEXT:
        raw = {name: _sentences(folder / "sentconv", *files) for name, files in TEXTS.items()}
        shared = {name: _tweets(folder / "tweeteval" / name) for name in TWEETS}
        tasks = {name: _parts(kind, name, "text", *each) for name, each in raw.items()}
        half = replace(kind, asked_n=kind.asked_n // 2)
        return tasks, {n: _parts(half, n, "text", *each) for n, each in shared.items()}
    sources = {
        "cifar10": _npz(folder / "cifar10_small" / "cifar10_small.npz"),
        "gtsrb": _npz(folder / "gtsrb_small" / "gtsrb_small.npz"),
        "mnist": _npz(folder / "mnist" / "mnist.npz"),
        "fashion": tuple(
            read_idx(folder / "fashion-mnist" / f"{part}-images-idx3-ubyte.gz")[:2]
            for part in ("train", "t10k")
        ),
    }
    tasks = {name: _parts(kind, name, "image", *each) for name, each in sources.items()}
    return tasks, {"rotation": {part: _rotated(tasks, part) for part in ("train", "test")}}


def _parts(kind: Kind, name: str, of: str, train: Any, test: Any) -> Parts:
    rng = np.random.default_rng(DRAWN_BY)
    order = rng.permutation(len(train[0]))
    if test is None:
        cut = min(kind.test_n, len(order) // 3)
        test = [[side[i] for i in order[:cut]] for side in train]
        order = order[cut:]
    cut = kind.validation_n
    rows = {"validation": order[:cut], "train": order[cut : cut + kind.train_n]}
    picked = {part: [[side[i] for i in at] for side in train] for part, at in rows.items()}
    at = rng.permutation(len(test[0]))[: kind.asked_n]
    picked["test"] = [[side[i] for i in at] for side in test]
    if of == "text":  # batches of like length
        for part in ("validation", "test"):
            pairs = sorted(zip(*picked[part], strict=True), key=lambda pair: len(pair[0]))
            picked[part] = [list(side) for side in zip(*pairs, strict=True)]
    classes = tuple(str(i) for i in range(int(max(train[1])) + 1))
    return {
        part: Classified(items, [int(y) for y in labels], classes, of, name, f"{name} {part}")
        for part, (items, labels) in picked.items()
    }


def _sentences(folder: Path, train: str, test: str | None) -> tuple[Any, Any]:
    def read(name: str) -> tuple[list[str], list[int]]:
        lines = (folder / name).read_text("latin-1").rstrip("\n").split("\n")
        rows = [line.partition(" ") for line in lines]  # \x85 is no end of a line here
        return [text for _, _, text in rows], [int(label) for label, _, _ in rows]

    return read(train), None if test is None else read(test)


def _tweets(folder: Path) -> tuple[Any, Any]:
    def read(part: str) -> tuple[list[str], list[int]]:
        texts = (folder / f"{part}_text.txt").read_text("utf-8").rstrip("\n").split("\n")
        labels = [int(y) for y in (folder / f"{part}_labels.txt").read_text().split()]
        return texts[: len(labels)], labels

    return read("train"), read("test")


def _npz(path: Path) -> tuple[Any, Any]:
    return tuple(read_npz(path, f"{part}_x", f"{part}_y")[:2] for part in ("train", "test"))  # type: ignore[return-value]


def _rotated(tasks: Mapping[str, Parts], part: str) -> Classified:
    items, labels = [], []
    for parts in tasks.values():
        chosen = parts["train"].items[-300:] if part == "test" else parts["train"].items[:-300]
        for number, item in enumerate(chosen[:600]):
            items.append(np.ascontiguousarray(np.rot90(item, number % 4)))
            labels.append(number % 4)
    return Classified(items, labels, ("0", "90", "180", "270"), "image", "rotation", part)


@dataclass
class Encoded:
    """A task as batches, and the head that it is asked with."""

    whole: Any
    parts: Mapping[str, list[Any]]
    collate: Any
    known: dict[str, list[Any]] = field(default_factory=dict)

    def batches(self, part: str) -> list[tuple[Mapping[str, Any], torch.Tensor]]:
        """Inputs and labels, collated once."""
        if part not in self.known:
            items = self.parts[part]
            batches = [
                dict(self.collate(items[at : at + ASKED])) for at in range(0, len(items), ASKED)
            ]
            self.known[part] = [(batch, batch.pop("labels")) for batch in batches]
        return self.known[part]

    def answers(self, part: str) -> Answers:
        right = []
        with torch.inference_mode(), computing():
            for batch, labels in self.batches(part):
                logits = self.whole(**batch)
                right.append((getattr(logits, "logits", logits).argmax(-1) == labels).double())
        found = torch.cat(right).numpy()
        return found, found * 0 + 1


def encoded(
    kind: Kind, folder: Path, parts: Mapping[str, Parts], heads: Mapping[str, Any], core: Any
) -> tuple[Any, dict[str, Encoded]]:
    """Tasks of one encoder in memory; a task without a head gets a probe of its features."""
    found = {}
    for name, each in parts.items():
        head = heads.get(name, torch.nn.Identity())
        opened = open_classifier(folder, each["train"], kind.asking, head=head)
        core = opened.core if core is None else core
        examples = {part: opened.encode(rows) for part, rows in each.items()}
        collate = examples["train"].collate
        items = {
            part: list(map(each.items.__getitem__, range(len(each.items))))
            for part, each in examples.items()
        }
        task = Encoded(opened.whole(core.eval()), items, collate)
        if name not in heads:
            task.whole = opened.whole(core)
            task.whole.head = _probe(task, len(each["train"].classes))
        found[name] = task
    return core, found


def _probe(task: Encoded, classes: int) -> Any:
    few = Encoded(task.whole, {"train": task.parts["train"][:PROBE_N]}, task.collate)
    features, labels = [], []
    with torch.no_grad():
        for batch, y in few.batches("train"):
            features.append(task.whole(**batch).float())
            labels.append(y)
    return linear_probe(torch.cat(features), torch.cat(labels), classes=classes, l2=PENALTY)


def tune(
    core: Any, tasks: Sequence[Encoded], schedule: Schedule, seed: int
) -> dict[str, float]:  # fmt: skip
    """Train an encoder on tasks in turn, heads frozen."""
    orders = [
        shuffled(len(t.parts["train"]), schedule.batch, seed * 100 + i) for i, t in enumerate(tasks)
    ]

    def batches() -> Iterator[Any]:
        while True:
            for task, order in zip(tasks, orders, strict=True):
                yield task, dict(task.collate([task.parts["train"][i] for i in next(order)]))

    def loss(drawn: Any) -> torch.Tensor:
        task, batch = drawn
        labels = batch.pop("labels")
        return functional.cross_entropy(task.whole(**batch).float(), labels)

    return train(core, batches(), loss, schedule)


def make(kind: Kind, model: Path, folder: Path, work: Path, seed: int) -> Path:
    """The members of a seed, trained unless they are there; the folder that holds them."""
    tasks, shared = data(kind, folder)
    out = work / f"{kind.name}-members"
    base = out / "base"
    from transformers import AutoModel

    if not base.exists():
        core = AutoModel.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
        core.save_pretrained(base)
        for file in model.glob("*token*"):
            (base / file.name).write_bytes(file.read_bytes())
        if (model / "vocab.txt").exists():
            (base / "vocab.txt").write_bytes((model / "vocab.txt").read_bytes())
    notes = {}
    if not (out / "instruct").exists():
        core, of = encoded(kind, base, shared, {}, None)
        notes["instruct"] = tune(core, list(of.values()), kind.shared, 0)
        notes["instruct"] |= {n: float(t.answers("test")[0].mean()) for n, t in of.items()}
        _save(core, base, out / "instruct")
        save_file(_weights(of), out / "shared-heads.safetensors")
    heads = out / "heads.safetensors"
    if not heads.exists():
        _, of = encoded(kind, out / "instruct", tasks, {}, None)
        save_file(_weights(of), heads)
    mine = out / f"seed {seed}"
    for name in tasks:
        if (mine / name).exists():
            continue
        core, of = encoded(kind, out / "instruct", {name: tasks[name]}, _heads(heads), None)
        notes[name] = tune(core, [of[name]], kind.tuned, seed)
        notes[name] |= {"validation": float(of[name].answers("validation")[0].mean())}
        _save(core, base, mine / name)
        print(kind.name, seed, name, notes[name], flush=True)
    if notes:
        with (out / "training.jsonl").open("a") as log:
            log.write(json.dumps({"seed": seed, **notes}) + "\n")
    return out


def bench(kind: Kind, model: Path, folder: Path, work: Path, seed: int) -> Bench:
    """A seed's family."""
    out = make(kind, model, folder, work, seed)
    tasks, shared = data(kind, folder)
    family = tv.Family(
        base=out / "base",
        instruct=out / "instruct",
        tasks={name: out / f"seed {seed}" / name for name in tasks},
    )
    heads = _heads(out / "heads.safetensors")
    core, of = encoded(kind, out / "instruct", tasks, heads, None)
    shared_heads = _heads(out / "shared-heads.safetensors")
    of |= encoded(kind, out / "instruct", shared, shared_heads, core)[1]

    def fit_with(n: int, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, n])
        prompts: dict[str, Any] = {}
        for name, parts in tasks.items():
            rows = rng.permutation(len(parts["train"].items))[:n]
            prompts[name] = Classified(
                [parts["train"].items[i] for i in rows], [0] * n, parts["train"].classes,
                parts["train"].kind, name, f"{name} {n} {seed}",
            )  # fmt: skip
        return {
            "recipe": family, "prompts": prompts, "heads": {n: heads[n] for n in tasks},
            "asking": kind.asking, "context": computing,
            "settings": {"steps": 60, "rate": 0.08, "measure_every": 20},
        }  # fmt: skip

    return Bench(
        name=kind.name,
        seed=seed,
        family=family,
        module=core,
        ask=lambda name, part: of[name].answers(part),
        goal=dict.fromkeys(tasks, 1 / len(tasks)),
        controls=tuple(shared),
        scales=kind.scales,
        fit_with=fit_with,
    )


def _save(core: Any, base: Path, folder: Path) -> None:
    core.save_pretrained(folder)
    for file in base.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())


def _weights(of: Mapping[str, Encoded]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor.contiguous()
        for name, task in of.items()
        for part, tensor in task.whole.head.state_dict().items()
    }


def _heads(path: Path) -> dict[str, Any]:
    weights = load_file(path)
    found = {}
    for name in sorted({key.rpartition(".")[0] for key in weights}):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        head = torch.nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        found[name] = head.requires_grad_(False)
    return found
