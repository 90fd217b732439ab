"""A small study of attention-only against full fine-tuning: handwritten digits, a ViT made here.

The pre-trained model knows mirrored digits. Its two tasks are the upright digits below five and
those from five on, under linear probes of its own features. Nothing is claimed of which is better.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from taskvec.checkpoints.vectors import open_vector
from taskvec.disentanglement import (
    coefficients,
    disentanglement_error,
    linearised,
    task_addition,
)
from taskvec.disentanglement.accuracy import _ask
from taskvec.disentanglement.opening import MeasuringOptions, open_tasks, open_vectors
from taskvec.errors import UsageError
from taskvec.training import HeadOptions as TrainingAsking
from taskvec.training import RunOutput, finetune
from taskvec.training.data import read_data

datasets = pytest.importorskip("sklearn.datasets")

TASKS = {"low": range(5), "high": range(5, 10)}
MODES = ("attention", "all")
SETTINGS = {"steps": 100, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 5}


@dataclass(frozen=True)
class Study:
    """Folders of the model, of data by task and split, and of vectors by mode and task."""

    model: Path
    data: dict[tuple[str, str], Path]
    vectors: dict[str, dict[str, Path]]

    def of(self, split: str) -> dict[str, Any]:
        return {name: read_data(self.data[name, split]) for name in TASKS}


def pixels(images: Any) -> np.ndarray[Any, Any]:
    return np.asarray(images * 15, np.uint8)


def pretrained(folder: Path, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Path:
    """A ViT that was trained on mirrored digits, without its head."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    module = transformers.ViTModel(config)
    head = torch.nn.Linear(32, 10)
    x = torch.tensor(images[:, :, ::-1].copy() / 127.5 - 1, dtype=torch.float32)
    x = x[:, None].expand(-1, 3, -1, -1)
    y = torch.tensor(labels)
    optimizer = torch.optim.AdamW([*module.parameters(), *head.parameters()], lr=2e-3)
    for step in range(250):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        logits = head(module(pixel_values=x[rows]).last_hidden_state[:, 0])
        loss = torch.nn.functional.cross_entropy(logits, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.save_pretrained(folder)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(half))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("digits")
    found = datasets.load_digits()
    images, labels = pixels(found.images), found.target
    splits = {"train": slice(0, 1000), "validation": slice(1000, 1400), "test": slice(1400, None)}
    data = {}
    for name, digits in TASKS.items():
        for split, rows in splits.items():
            mine = np.isin(labels[rows], digits)
            path = folder / f"{name}-{split}.npz"
            classes = labels[rows][mine] - digits.start
            np.savez(path, x=images[rows][mine], y=classes)
            data[name, split] = path
    model = pretrained(folder / "vit", images[:1000], labels[:1000])
    vectors: dict[str, dict[str, Path]] = {}
    for mode in MODES:
        for name in TASKS:
            trained = finetune(
                str(model),
                str(data[name, "train"]),
                train=mode,
                settings=SETTINGS,
                asking=TrainingAsking(head="probe"),
                output=RunOutput(out=folder / mode / name),
            )
            assert trained.path is not None
            vectors.setdefault(mode, {})[name] = trained.path
    return Study(model, data, vectors)


def opened(study: Study, mode: str, **options: Any) -> tuple[Any, Any, Any, Any]:
    """The module, its tasks on test and on validation data, and the vectors."""
    paths = {name: str(path) for name, path in study.vectors[mode].items()}
    module, test, validation = open_tasks(
        str(study.model),
        paths,
        study.of("test"),
        study.of("validation"),
        MeasuringOptions(**options),
    )
    vectors = open_vectors(str(study.model), module, paths, study.model.parent)
    return module, test, validation, vectors


@pytest.mark.parametrize("mode", MODES)
def test_vectors_add_up(study: Study, mode: str) -> None:
    module, test, validation, vectors = opened(study, mode)
    (found,) = task_addition(
        module, vectors, validation, test, scales=coefficients(6, 0, 1)
    ).values()
    for name in TASKS:
        assert found.single[name].value > found.pretrained[name].value
        assert found.single[name].value > 0.8
    scale = found.scales["low"]
    assert 0 < scale <= 1
    tried = {each.scales["low"]: each.normalised for each in found.tried}
    assert tried[scale] == max(tried.values()) > tried[0.0]
    assert found.mean_normalised.low <= found.mean_normalised.value <= found.mean_normalised.high


def test_attention_only_vectors_hold_attention_only(study: Study) -> None:
    for path in study.vectors["attention"].values():
        names = open_vector(path).tensors
        assert all("attention" in name and name.endswith("weight") for name in names)
        assert len(names) == 3 * 4


def test_error_of_the_model_its_features_and_its_tangent(study: Study) -> None:
    alphas = (0.0, 0.5, 1.0)
    module, test, _, vectors = opened(study, "attention")
    found = disentanglement_error(module, vectors, test, alphas=alphas)
    assert found.values[0][0] == 0
    assert 0 <= found.values.min() <= found.values.max() < 2
    assert found.cells[2][0].accuracy["low"].value > 0.8
    module, test, _, vectors = opened(study, "attention", head="features")
    apart = disentanglement_error(module, vectors, test, alphas=alphas, distance="symmetric_kl")
    assert apart.values[0][0] == 0
    assert apart.values[2][2] > apart.values[1][1] > 0
    assert not apart.cells[0][0].accuracy
    module, test, _, vectors = opened(study, "attention")
    tangent, states = linearised(module, vectors)
    of_tangent = disentanglement_error(tangent, states, test, alphas=alphas)
    assert of_tangent.values[0][0] == 0
    assert (of_tangent.values != found.values).any()


def test_the_command_takes_the_heads_beside_the_vectors(
    study: Study, cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    arguments: list[Any] = ["disentangle", study.model, "--points", 3, "--low", 0, "--high", 1]
    for name, path in study.vectors["all"].items():
        arguments += ["--task", f"{name}={path}", "--data", f"{name}={study.data[name, 'test']}"]
    code, text, err = cli(*arguments, "--out", tmp_path, "--json", "--quiet")
    assert (code, err) == (0, "")
    told = json.loads(text)["error"]
    module, test, _, vectors = opened(study, "all")
    found = disentanglement_error(module, vectors, test, alphas=(0.0, 0.5, 1.0))
    assert told == json.loads(json.dumps(found.to_json()))
    assert found.cells[2][0].accuracy["low"].value > 0.8


def test_probes_are_fitted_to_validation_data_where_there_is_no_head(study: Study) -> None:
    data = {**study.of("test"), "control": study.of("test")["low"]}
    more = {"control": study.of("validation")["low"]}
    paths = {name: str(path) for name, path in study.vectors["all"].items()}
    with pytest.raises(UsageError, match="task 'control': a linear probe is fitted to validation"):
        open_tasks(str(study.model), paths, data, {}, MeasuringOptions())
    module, tasks, _ = open_tasks(str(study.model), paths, data, more, MeasuringOptions())
    assert _ask(tasks["control"], module).accuracy > 0.6
