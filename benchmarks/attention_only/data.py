"""The study's tasks: images or sentences with labels, cut into train, validation and test parts.

Parts are drawn by one fixed seed, whatever the seed of a run: every mode and every seed is trained,
chosen and tested on the same examples. Test parts come from the test files where there are any;
validation parts are cut from the training files.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

Array = np.ndarray[Any, Any]

DRAWN_BY = 20240705  # seed of the parts
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEXTS = {
    "trec": ("TREC.train.all", "TREC.test.all"),
    "sst2": ("stsa.binary.train", "stsa.binary.test"),
    "subj": ("subj.all", None),
    "cr": ("custrev.all", None),
    "mpqa": ("mpqa.all", None),
}


@dataclass(frozen=True)
class Part:
    """Examples: keyword arguments of the backbone, first dimension n; labels, int64, shape (n,)."""

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, places: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {name: x[places] for name, x in self.inputs.items()}, self.labels[places]


@dataclass(frozen=True)
class Sizes:
    """Examples of each part of a task."""

    train: int = 1920
    validation: int = 200
    test: int = 400


@dataclass(frozen=True)
class Task:
    """A data set in its parts, and how many classes it has."""

    name: str
    classes: int
    parts: Mapping[str, Part]


def image_tasks(folder: Path, sizes: Sizes, *, pixels: int) -> dict[str, Task]:
    """CIFAR-10, GTSRB, MNIST, Fashion-MNIST at `pixels` squared, normalised as ImageNet is."""
    sources = {
        "cifar10": _npz(folder / "cifar10_small" / "cifar10_small.npz"),
        "gtsrb": _npz(folder / "gtsrb_small" / "gtsrb_small.npz"),
        "mnist": _npz(folder / "mnist" / "mnist.npz"),
        "fashion": _idx(folder / "fashion-mnist"),
    }
    found = {}
    for name, (train, test) in sources.items():
        chosen = _chosen(len(train[1]), len(test[1]), sizes)
        rows = {part: (train if file == "train" else test) for part, (file, _) in chosen.items()}
        parts = {
            part: Part(
                {"pixel_values": _pixels(rows[part][0][places], pixels)},
                torch.from_numpy(rows[part][1][places].astype(np.int64)),
            )
            for part, (_, places) in chosen.items()
        }
        found[name] = Task(name, int(train[1].max()) + 1, parts)
    return found


def text_tasks(folder: Path, sizes: Sizes, tokenizer: Any, *, tokens: int) -> dict[str, Task]:
    """TREC, SST-2, Subj, CR and MPQA, sentences cut at `tokens`."""
    found = {}
    for name, (train_file, test_file) in TEXTS.items():
        train = _sentences(folder / "sentconv" / train_file)
        if test_file is None:
            order = np.random.default_rng(DRAWN_BY).permutation(len(train))
            cut = len(train) - sizes.test
            test = [train[i] for i in order[cut:]]
            train = [train[i] for i in order[:cut]]
        else:
            test = _sentences(folder / "sentconv" / test_file)
        parts = {}
        for part, (file, places) in _chosen(len(train), len(test), sizes).items():
            rows = [(train if file == "train" else test)[i] for i in places]
            told = tokenizer(
                [text for _, text in rows], padding=True, truncation=True, max_length=tokens,
                return_tensors="pt", return_token_type_ids=False,
            )  # fmt: skip
            parts[part] = Part(dict(told), torch.tensor([label for label, _ in rows]))
        found[name] = Task(name, 1 + max(label for label, _ in train), parts)
    return found


def _chosen(of_train: int, of_test: int, sizes: Sizes) -> dict[str, tuple[str, Array]]:
    """Which file each part is from, and which of its rows it has."""
    rng = np.random.default_rng(DRAWN_BY)
    train, test = rng.permutation(of_train), rng.permutation(of_test)
    cut = min(sizes.validation, of_train // 5)
    return {
        "train": ("train", train[cut : cut + sizes.train]),
        "validation": ("train", train[:cut]),
        "test": ("test", test[: sizes.test]),
    }


def _npz(path: Path) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    with np.load(path) as data:
        return (data["train_x"], data["train_y"]), (data["test_x"], data["test_y"])


def _idx(folder: Path) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def read(name: str, header: int) -> Array:
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def pair(name: str) -> tuple[Array, Array]:
        labels = read(f"{name}-labels-idx1", 8)
        return read(f"{name}-images-idx3", 16).reshape(len(labels), 28, 28), labels

    return pair("train"), pair("t10k")


def _pixels(images: Array, pixels: int) -> torch.Tensor:
    """uint8 images, (n, h, w) or (n, h, w, 3), as float32, (n, 3, pixels, pixels)."""
    colour = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
    x = torch.from_numpy(colour).permute(0, 3, 1, 2).float() / 255
    x = functional.interpolate(x, (pixels, pixels), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def _sentences(path: Path) -> list[tuple[int, str]]:
    """Lines `label text`, latin-1."""
    lines = path.read_text("latin-1").rstrip("\n").split("\n")  # \x85 is no end of a line here
    return [(int(label), text) for label, _, text in (line.partition(" ") for line in lines)]
