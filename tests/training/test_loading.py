"""Folders that do not hold all of the model that transformers makes of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.training import tiny_models as tiny

import taskvec as tv
from taskvec.errors import CheckpointError, ParameterError, UsageError
from taskvec.running.loading import load
from taskvec.training import HeadOptions, RunOutput, finetune

FEW = {"steps": 2, "batch_size": 4, "learning_rate": 1e-2}
# Maker of the folder, what it does not hold, and head.
PARTIAL = {
    "vit": (tiny.vit, "pooler", "probe"),
    "bert": (tiny.bert, "pooler", "probe"),
    "dinov2": (tiny.dinov2, "mask_token", "probe"),
    "clip": (tiny.clip, "text_model.encoder.layers.1", "zero-shot"),
}


def given(which: str, folder: Any) -> tuple[Any, Any, str]:
    """A folder that lacks something, data, and the head to train under."""
    make, part, head = PARTIAL[which]
    made = tiny.reviews(folder / "a.tsv") if which == "bert" else tiny.shapes(folder / "a.npz")
    return tiny.without(make(folder / which), part), made, head


@pytest.mark.parametrize("which", PARTIAL)
def test_all_trains_what_the_folder_holds(which: str, tmp_path: Any) -> None:
    model, data, head = given(which, tmp_path)
    said: list[str] = []
    tasks = {}
    for task, seed in (("a", 0), ("b", 1)):
        trained = finetune(
            model,
            data,
            train="all",
            settings=FEW | {"seed": seed},
            asking=HeadOptions(head=head),
            output=RunOutput(tmp_path / task, saves_model=True, on_message=said.append),
        )
        tasks[task] = str(trained.path)

    start = load_file(model / "model.safetensors")
    assert load_file(tmp_path / "a/vector.safetensors").keys() <= start.keys()
    assert load_file(tmp_path / "a/model/model.safetensors").keys() == start.keys()
    family = tv.Family(anchor=model, tasks=tasks)
    tv.merge(family, tmp_path / "merged", method="ties", scale=dict.fromkeys(tasks, 0.5))
    assert load_file(tmp_path / "merged/model.safetensors").keys() == start.keys()
    transformers.AutoModel.from_pretrained(tmp_path / "merged")
    part = PARTIAL[which][1]
    assert not any(part in name for name in trained.selection.names)
    lines = [line for line in said if "does not hold" in line]
    if which in ("vit", "bert"):
        assert not lines  # the model is without a pooler
        assert trained.module.backbone.pooler is None
    else:
        first, count = {
            "dinov2": ("embeddings.mask_token", 1),
            "clip": ("text_model.encoder.layers.1.self_attn.k_proj.weight", 16),
        }[which]
        assert set(lines) == {
            f"{model} does not hold {first!r} ({count} such): random, and does not train"
        }


def test_what_is_random_is_the_same_every_time(tmp_path: Any) -> None:
    folder = tiny.without(tiny.dinov2(tmp_path / "a"), "layer.1")
    before = torch.random.get_rng_state()
    one, missing = load(folder, "a", "AutoModel")
    torch.rand(1)
    other, _ = load(folder, "a", "AutoModel")
    assert {name.split(".")[:3][-1] for name in missing} == {"1"}
    for name in missing:
        assert torch.equal(one.get_parameter(name), other.get_parameter(name))
    torch.random.set_rng_state(before)


def test_an_own_head_that_is_not_there_is_refused(tmp_path: Any) -> None:
    bert = tiny.without(tiny.bert(tmp_path / "bert", 2), "classifier")
    with pytest.raises(CheckpointError) as caught:
        finetune(bert, tiny.reviews(tmp_path / "a.tsv"), settings=FEW)
    assert str(caught.value) == (
        f"{bert}: lacks 'classifier.weight', without which it has no head; give the folder that "
        "was saved with its head"
    )
    clip = tiny.without(tiny.clip(tmp_path / "clip"), "text_projection")
    with pytest.raises(CheckpointError, match=r"lacks 'text_projection.weight', without which"):
        finetune(clip, tiny.shapes(tmp_path / "a.npz"), asking=HeadOptions(head="zero-shot"))


def test_a_language_model_without_its_head_is_refused(tmp_path: Any) -> None:
    model = tiny.gpt2(tmp_path / "gpt2")
    config = transformers.AutoConfig.from_pretrained(model)
    config.tie_word_embeddings = False
    tiny.save(config, "GPT2Model", model)
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head.weight', without which"):
        finetune(model, tiny.pairs(tmp_path / "a.jsonl"), settings=FEW)


def test_a_pooler_that_is_not_there_cannot_be_asked_for(tmp_path: Any) -> None:
    model, data, _ = given("vit", tmp_path)
    with pytest.raises(UsageError, match="pool 'pooler': needs pooler_output"):
        finetune(model, data, asking=HeadOptions(pool="pooler"), settings=FEW)


@pytest.mark.parametrize("train", ["*mask_token", "lora:*mask_token"])
def test_only_what_is_not_there_leaves_nothing(train: str, tmp_path: Any) -> None:
    model, data, _ = given("dinov2", tmp_path)
    with pytest.raises(ParameterError, match="leaves nothing"):
        finetune(model, data, train=train, settings=FEW)


def test_transformers_says_nothing(tmp_path: Any, monkeypatch: Any, caplog: Any) -> None:
    given("vit", tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load(tmp_path / "vit", "vit", "AutoModel")
    assert not caplog.records
    transformers.AutoModel.from_pretrained(tmp_path / "vit")
    assert "pooler" in caplog.text  # it speaks again
