"""What of a folder belongs to a model besides its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import CONFIG, tiny_llama, write_checkpoint, write_safetensors

from taskvec.checkpoints.belongings import belongings, belongs
from taskvec.family.members import open_members
from taskvec.outputs import run as engine
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Family

TOKENIZERS = [
    "source.spm", "target.spm", "bpe.codes", "prophetnet.tokenizer", "tokenizer.model.v3",
    "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "qwen.tiktoken", "emoji.vocab", "spm_char.model",
]  # fmt: skip
OTHERS = [
    "modeling_mine.py", "chat_template.jinja", "LICENSE", "NOTICE.txt", "USE_POLICY.md",
    "preprocessor_config.json", "additional_chat_templates/tool.jinja", "1_Pooling/config.json",
    "tokenizer/tokenizer.json", "config_sentence_transformers.json", "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
]  # fmt: skip
JUNK = [
    "README.md", ".gitattributes", "model.safetensors", "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "tf_model.h5",
    "flax_model.msgpack", "model.Q4_K_M.gguf", "trainer_state.json", "training_args.bin",
    "optimizer.pt", "rng_state_0.pth", "events.out.tfevents.1", "adapter_config.json",
    "taskvec-manifest.json", "onnx/config.json",
    "original/params.json", "checkpoint-500/config.json",
    "runs/x/events.out.tfevents.2", ".cache/huggingface/x.lock", "logo.png",
    "unet/model.safetensors",
    "zero_to_fp32.py", "latest",
]  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS + OTHERS)
def test_files_of_the_model_are_kept_whatever_they_are_called(name):
    assert belongs(name)


@pytest.mark.parametrize("name", JUNK)
def test_weights_copies_and_what_training_leaves_are_not(name):
    assert not belongs(name)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_a_folder_with_weights_of_its_own_is_another_model_unless_it_is_a_module(tmp_path):
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "extra"}, {"path": "../outside"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    fill(tmp_path, "1_Pooling/config.json", "tokenizer/vocab.txt", "runs/a/b", "events.out.1")
    for folder in ("extra", "draft"):
        fill(tmp_path, f"{folder}/config.json", f"{folder}/model.safetensors")
    fill(tmp_path, "model.safetensors", "model.fp16.safetensors", "README.md", "a/b/c/d/e/f.json")

    found, left = belongings(tmp_path)

    assert found == [
        "1_Pooling/config.json", "extra/config.json", "extra/model.safetensors", "modules.json",
        "tokenizer/vocab.txt",
    ]  # fmt: skip
    assert left == [
        "a/b/c/d/e/", "draft/", "events.out.1", "model.fp16.safetensors", "model.safetensors",
        "runs/",
    ]  # fmt: skip


def test_a_merge_carries_folders_over_and_says_what_it_leaves_out(tmp_path):
    for i, name in enumerate(("a", "b")):
        folder = write_checkpoint(
            tmp_path / name, tiny_llama(np.random.default_rng(i)), config=CONFIG
        )
        (folder / "modules.json").write_text('[{"path": "2_Dense"}]')
        fill(folder, "2_Dense/config.json", "1_Pooling/deep/config.json", *TOKENIZERS)
        fill(folder, "onnx/model.onnx", "trainer_state.json", "README.md")
        write_safetensors(
            folder / "2_Dense" / "model.safetensors", {"linear.weight": np.ones(i + 1)}
        )
        write_safetensors(folder / "model.fp16.safetensors", {"w": np.ones(1)})
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{anchor: a, tasks: {b: {model: b, scale: 0.5}}, method: task_arithmetic}")
    out = engine.run(load_recipe(recipe), tmp_path / "out").path
    assert out is not None

    for name in ("2_Dense/config.json", "2_Dense/model.safetensors", "1_Pooling/deep/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert all((out / name).is_file() for name in TOKENIZERS)
    assert not (out / "onnx").exists()
    assert not (out / "model.fp16.safetensors").exists()
    family = Family(anchor=str(tmp_path / "a"), tasks=load_recipe(recipe).family.tasks)
    notes = open_members(family, needs_base=False, needs_anchor=True).notes
    (left,) = [note for note in notes if "left out" in note]
    assert all(name in left for name in ("model.fp16.safetensors", "onnx/", "trainer_state.json"))
    assert "README" not in left
    assert any("2_Dense" in note and "target's own weights" in note for note in notes)


def test_a_quantisation_that_is_none_is_said_and_not_in_the_result(tmp_path):
    for i, name in enumerate(("a", "b")):
        config = CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}
        write_checkpoint(tmp_path / name, tiny_llama(np.random.default_rng(i)), config=config)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{anchor: a, tasks: {b: {model: b, scale: 0.5}}, method: task_arithmetic}")
    out = engine.run(load_recipe(recipe), tmp_path / "out").path
    assert out is not None
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    family = load_recipe(recipe).family
    notes = open_members(family, needs_base=False, needs_anchor=True).notes
    assert sum("quantization_config" in note for note in notes) == 2
