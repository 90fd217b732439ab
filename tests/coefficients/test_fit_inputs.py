"""Fitting classifiers and encoders, of texts and images."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("PIL")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.training import tiny_models  # noqa: E402

import taskvec as tv  # noqa: E402
from taskvec.coefficients.fit import api  # noqa: E402
from taskvec.errors import UsageError  # noqa: E402

TEXTS = [f"it is {word} {i}" for i in range(8) for word in ("fine", "bad")]
QUICK = {"batch_size": 8, "seeds": 1, "held_out": 0.5, "steps": 40, "granularity": "model"}


def moved(folder, name, size=1.0, seed=1):
    """A fine-tune: every matrix in the blocks moves."""
    path = shutil.copytree(folder, folder.parent / name)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if "layer" in key and tensor.ndim == 2 else tensor
        for key, tensor in load_file(path / "model.safetensors").items()
    }  # fmt: skip
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def fitted(folder, prompts, **about):
    family = tv.Family(anchor=folder, tasks={"t": folder.parent / "tuned"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layers bring nothing", UserWarning)
        settings = QUICK | about.pop("settings", {})
        return tv.fit(family, prompts={"t": prompts}, settings=settings, **about)


def assert_found(found, loss):
    """The weight of the fine-tune's own answers is 1."""
    assert found.sources["t"].loss == loss
    assert next(iter(found.table.of("t").values())) == pytest.approx(1, abs=0.15)
    assert found.standing("one weight").loss.value < 0.2 * found.standing("start").loss.value


def test_a_classifier_of_texts_by_its_own_head(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "NOTHING", 0.0)  # random heads hardly tell features apart
    folder = tiny_models.bert(tmp_path / "bert", labels=2)
    moved(folder, "tuned")
    assert_found(fitted(folder, TEXTS), "kl")
    rows = tiny_models.reviews(tmp_path / "reviews.tsv")
    assert_found(fitted(folder, rows), "kl")


def test_an_encoder_by_its_features(tmp_path):
    folder = tiny_models.bert(tmp_path / "bert")
    moved(folder, "tuned")
    assert_found(fitted(folder, TEXTS), "distance")


def test_images_by_features_and_by_a_head_that_is_given(tmp_path):
    folder = tiny_models.vit(tmp_path / "vit")
    moved(folder, "tuned")
    images = tiny_models.shapes(tmp_path / "shapes.npz")
    assert_found(fitted(folder, images), "distance")
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 2)
    with torch.no_grad():
        head.weight.mul_(5)
    assert_found(fitted(folder, images, heads={"t": head}), "kl")


def test_layers_of_an_encoder_and_its_merge(tmp_path):
    folder = tiny_models.bert(tmp_path / "bert")
    moved(folder, "tuned")
    found = fitted(folder, TEXTS, settings={"granularity": "tensor", "steps": 5})
    assert np.isfinite(found.seeds[0].weights).all()
    family = tv.Family(anchor=folder, tasks={"t": folder.parent / "tuned"})
    tv.merge(family, tmp_path / "out", table=found.table, scale={"t": 1.0})


def test_what_an_encoder_is_not_asked_for(tmp_path):
    folder = tiny_models.bert(tmp_path / "bert")
    moved(folder, "tuned")
    with pytest.raises(UsageError, match="features have no entropy; give a head"):
        fitted(folder, TEXTS, objective="entropy")
    with pytest.raises(UsageError, match="hidden states are of language models"):
        fitted(folder, TEXTS, settings={"hidden": 1.0})
    with pytest.raises(UsageError, match="teaches language models only"):
        fitted(folder, TEXTS, teachers={"t": str(folder)})
