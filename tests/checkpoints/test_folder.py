"""Folders: what is opened, and the message for each way in which one can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import CONFIG, to_bf16, write_checkpoint, write_safetensors

from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.source import nbytes
from taskvec.errors import CheckpointError, StaleError

WEIGHTS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(6, 2),
    "model.norm.weight": np.ones(2, np.float32),
    "lm_head.weight": np.zeros((6, 2), np.float32),
}
MODELS = "a model is a folder, a .safetensors file, or org/name on the hub"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def refusal(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_index(folder: Path, **placed: str | None) -> None:
    """Set or remove entries of the index; names with dots for underscores."""
    index = json.loads((folder / INDEX).read_text())
    for name, file in placed.items():
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_single_file(tmp_path):
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", WEIGHTS, "F32"))
    assert list(opened.tensors) == sorted(WEIGHTS)
    assert opened.config["model_type"] == "llama"
    assert nbytes(opened) == 4 * (12 + 2 + 12)
    view = opened.view("model.embed_tokens.weight")
    assert (view.dtype.name, view.shape) == ("F32", (6, 2))
    np.testing.assert_array_equal(view.read(3, 8), np.arange(3, 8, dtype=np.float32))


def test_shards_are_one_model(tmp_path):
    one = open_checkpoint(write_checkpoint(tmp_path / "one", WEIGHTS, "F32"))
    many = open_checkpoint(write_checkpoint(tmp_path / "many", WEIGHTS, "F32", shards=3))
    assert list(one.tensors) == list(many.tensors)
    for name, values in WEIGHTS.items():
        for opened in (one, many):
            np.testing.assert_array_equal(opened.view(name).read(0, values.size), values.ravel())


def test_single_file_under_another_name(tmp_path):
    folder = write_checkpoint(tmp_path / "m", WEIGHTS)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert list(open_checkpoint(folder).tensors) == sorted(WEIGHTS)


def test_config_is_not_needed(tmp_path):
    assert open_checkpoint(write_checkpoint(tmp_path / "m", WEIGHTS, config=None)).config == {}


def test_relative_and_home_paths(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", WEIGHTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("m").path == open_checkpoint("~/m").path == tmp_path / "m"


def test_blocks_at_the_end_of_a_file_and_of_nothing(tmp_path):
    weights = {"a": np.ones(3, np.float32), "b": np.zeros((0, 4), np.float32)}
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", weights, "F32"))
    assert opened.view("a").read(2, 3).tolist() == [1]
    assert opened.view("b").read(0, 0).tolist() == []


# --- what is no checkpoint -----------------------------------------------------------------------


def test_no_such_folder(tmp_path):
    assert refusal(tmp_path / "absent") == (f"{tmp_path}/absent: no such folder or file; {MODELS}")


def test_file_of_another_kind(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert refusal(tmp_path / "x.gguf") == f"{tmp_path}/x.gguf: is a file of another kind; {MODELS}"


def test_file_alone(tmp_path):
    write_checkpoint(tmp_path / "m", WEIGHTS)
    file = (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "unet.safetensors")
    write_safetensors(tmp_path / "m" / "vae.safetensors", {"other": np.ones(2, np.float32)})
    opened = open_checkpoint(file)
    assert (opened.where, opened.folder, opened.inputs) == (str(file), None, (file,))
    assert opened.config == {}  # the config beside it may be another model's
    assert list(opened.tensors) == sorted(WEIGHTS)
    name = next(iter(WEIGHTS))
    assert opened.view(name).read(0, 2).tolist() == to_bf16(WEIGHTS[name]).ravel()[:2].tolist()
    opened.check_unchanged()
    write_safetensors(file, {"w": np.ones(2, np.float32)})
    with pytest.raises(StaleError, match=rf"^{file}: changed while it was read"):
        opened.check_unchanged()


def test_single_file_without_tensors(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {})
    assert refusal(tmp_path / "x.safetensors") == (
        f"{tmp_path}/x.safetensors: holds no tensors; is the download complete?"
    )


def test_single_file_of_quantised_weights(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a.qweight": np.ones(2, np.int64)})
    found = refusal(tmp_path / "x.safetensors")
    assert found.startswith(f"{tmp_path}/x.safetensors: weights are quantised")
    assert "'a.qweight', I64" in found
    assert found.endswith(REMEDY)


def test_empty_folder(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no safetensors file; expected model.safetensors or {INDEX}"
    )


def test_no_tensors(tmp_path):
    write_checkpoint(tmp_path / "m", {})
    assert refusal(tmp_path / "m") == f"{tmp_path}/m: holds no tensors; is the download complete?"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    expected = (
        f"{tmp_path}/{name}: holds only pickled weights, which can run code when loaded; "
        "allow_pickle: true (--allow-pickle) reads them without running what is in them; or "
        "convert them to safetensors"
    )
    assert refusal(tmp_path) == expected
    assert refusal(tmp_path / name) == expected


def test_pickled_weights_beside_safetensors_are_not_read(tmp_path):
    folder = write_checkpoint(tmp_path / "m", WEIGHTS)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    assert list(open_checkpoint(folder).tensors) == sorted(WEIGHTS)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_adapter(tmp_path, weights):
    (tmp_path / "adapter_config.json").write_text("{}")
    if weights is not None and weights.endswith(".safetensors"):
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        write_safetensors(tmp_path / weights, {name: np.zeros((2, 2))})
    elif weights is not None:
        (tmp_path / weights).write_bytes(b"PK")
    assert refusal(tmp_path) == (
        f"{tmp_path}: is an adapter, not a whole model; it can be a task, instruct or target "
        "of a family, or be merged into its base first"
    )


def test_whole_model_with_an_adapter_config_beside_it(tmp_path):
    folder = write_checkpoint(tmp_path / "m", WEIGHTS)
    (folder / "adapter_config.json").write_text("{}")
    assert list(open_checkpoint(folder).tensors) == sorted(WEIGHTS)


# --- shards and index ----------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", WEIGHTS, shards=3)


def test_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    assert refusal(sharded) == (
        f"{sharded}: {INDEX} lists {SHARDS[1]}, which is not there (1 of 3 shards missing); "
        "download it again"
    )


def test_unlisted_shard(sharded):
    (sharded / SHARDS[2]).rename(sharded / "model-00004-of-00004.safetensors")
    edit_index(sharded, **{"lm_head.weight": None})
    found = refusal(sharded)
    assert found.startswith(
        f"{sharded}: shard model-00004-of-00004.safetensors is not listed in {INDEX}; remove it"
    )
    assert found.endswith("or fix the index")


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/model.safetensors", "a/b", "."])
def test_index_names_a_file_outside_the_folder(sharded, file):
    edit_index(sharded, **{"lm_head.weight": file})
    assert refusal(sharded) == (
        f"{sharded}/{INDEX}: file {file!r} of 'lm_head.weight' is outside the folder"
    )


def test_tensor_is_listed_in_the_wrong_shard(sharded):
    edit_index(sharded, **{"lm_head.weight": SHARDS[0]})
    (sharded / SHARDS[2]).unlink()
    found = refusal(sharded)
    assert found.startswith(
        f"{sharded}: {INDEX} says that 'lm_head.weight' is in {SHARDS[0]}, where it is not"
    )
    assert found.endswith("write the index again")


def test_tensor_is_not_listed(sharded):
    write_safetensors(sharded / SHARDS[2], {"lm_head.weight": np.ones(1), "extra": np.ones(1)})
    assert refusal(sharded).startswith(
        f"{sharded}: {SHARDS[2]} holds 'extra', which {INDEX} does not list there"
    )


def test_listed_tensor_is_not_there(sharded):
    edit_index(sharded, ghost=SHARDS[0])
    assert refusal(sharded).startswith(
        f"{sharded}: {INDEX} says that 'ghost' is in {SHARDS[0]}, where it is not"
    )


def test_tensor_in_two_shards(sharded):
    twice = {name: WEIGHTS[name] for name in ("model.norm.weight", "lm_head.weight")}
    write_safetensors(sharded / SHARDS[2], twice)
    found = refusal(sharded)
    assert found.startswith(
        f"{sharded}: {SHARDS[2]} holds 'model.norm.weight', which {INDEX} does not list there"
    )
    assert "remove" not in found  # both shards are needed


def test_one_file_is_read_rather_than_shards_as_in_transformers(sharded):
    write_safetensors(sharded / "model.safetensors", {"only.weight": np.ones(2, np.float32)})
    (sharded / SHARDS[2]).unlink()  # nothing asks for a set that is not read
    found = open_checkpoint(sharded)
    assert list(found.tensors) == ["only.weight"]
    (note,) = found.notes
    assert f"model.safetensors and {INDEX}" in note
    assert "left out" in note


def test_shards_are_read_rather_than_one_file_as_in_diffusers(sharded):
    stem = "diffusion_pytorch_model"
    (sharded / INDEX).rename(sharded / f"{stem}.safetensors.index.json")
    index = (sharded / f"{stem}.safetensors.index.json").read_text()
    (sharded / f"{stem}.safetensors.index.json").write_text(index.replace('"model-', f'"{stem}-'))
    for shard in SHARDS:
        (sharded / shard).rename(sharded / shard.replace("model-", f"{stem}-"))
    write_safetensors(sharded / f"{stem}.safetensors", {"only.weight": np.ones(2, np.float32)})
    found = open_checkpoint(sharded)
    assert list(found.tensors) == sorted(WEIGHTS)
    (note,) = found.notes
    assert f"{stem}.safetensors is left out" in note


def test_index_of_another_name_as_diffusers_has_it(sharded):
    other = "diffusion_pytorch_model.safetensors.index.json"
    (sharded / INDEX).rename(sharded / other)
    assert list(open_checkpoint(sharded).tensors) == sorted(WEIGHTS)
    (sharded / SHARDS[2]).unlink()
    assert refusal(sharded).startswith(f"{sharded}: {other} lists {SHARDS[2]}, which is not there")
    (sharded / "another.safetensors.index.json").write_text("{}")  # now nothing says which is meant
    assert refusal(sharded).startswith(f"{sharded}: 2 safetensors files and no {INDEX}")


def test_several_sets_of_weights_are_told_apart_by_their_indices(sharded):
    """Mistral's own shards, a variant in another precision, and a part for speculative decoding."""
    other = {"layers.0.w": np.ones(3), "norm.w": np.ones(2)}
    for stem, index in (
        ("consolidated", "consolidated.safetensors.index.json"),
        ("model.fp16", "model.safetensors.index.fp16.json"),
    ):
        placed = {}
        for i, name in enumerate(other, 1):
            file = f"{stem}-{i:05}-of-00002.safetensors"
            write_safetensors(sharded / file, {name: other[name]})
            placed[name] = file
        (sharded / index).write_text(json.dumps({"weight_map": placed}))
    write_safetensors(sharded / "mtp.safetensors", other)
    assert list(open_checkpoint(sharded).tensors) == sorted(WEIGHTS)


def test_copies_beside_a_file_that_is_called_otherwise(tmp_path):
    stem = "diffusion_pytorch_model"
    for end in ("", ".fp16", ".non_ema"):
        name = "w" if not end else "copy"
        write_safetensors(tmp_path / f"{stem}{end}.safetensors", {name: np.ones(3)})
    write_safetensors(tmp_path / "consolidated.safetensors", {"copy": np.ones(3)})
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]


def test_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    assert refusal(sharded) == (
        f"{sharded}: 3 safetensors files and no {INDEX} to say what belongs together"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON (Expecting property name"),
        ("[]", "it must be a mapping; got []; download it again"),
        ("[" * 100_000, "is nested more than 100 levels deep"),
        ("{}", "weight_map is missing; download it again"),
        ('{"weight_map": []}', "weight_map must be a mapping; got []; download it again"),
        ('{"weight_map": {"a": 1}}', "weight_map.a must be text; got 1; download it again"),
    ],
)
def test_broken_index(sharded, content, words):
    (sharded / INDEX).write_text(content)
    assert refusal(sharded).startswith(f"{sharded}/{INDEX}: {words}")


@pytest.mark.parametrize("file", ["", "..", "\0", "x" * 300])
def test_index_names_what_can_be_no_file(sharded, file):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    assert refusal(sharded) == (
        f"{sharded}: {INDEX} lists {file}, which is not there (1 of 1 shards missing); "
        "download it again"
    )


def test_empty_index(sharded):
    (sharded / INDEX).write_text('{"weight_map": {}}')
    assert refusal(sharded).startswith(f"{sharded}: shard {SHARDS[0]} is not listed in {INDEX};")


def test_other_files_beside_the_shards_are_left_alone(sharded):
    write_safetensors(sharded / "optimizer.safetensors", {"state": np.ones(1)})
    assert list(open_checkpoint(sharded).tensors) == sorted(WEIGHTS)


def test_broken_shard_is_named(sharded):
    (sharded / SHARDS[1]).write_bytes(b"")
    assert refusal(sharded) == (
        f"{sharded / SHARDS[1]}: file has 0 bytes, too few for a header; download it again"
    )


def test_broken_config(tmp_path):
    folder = write_checkpoint(tmp_path / "m", WEIGHTS)
    (folder / "config.json").write_text("{'single': 'quotes'}")
    assert refusal(folder).startswith(f"{folder}/config.json: is not JSON (Expecting property name")


# --- quantised -----------------------------------------------------------------------------------

REMEDY = "give the model as it was before quantisation"


@pytest.mark.parametrize("entry", [{"quant_method": "gptq"}, {"bits": 4}, [1]])
def test_plain_weights_are_not_quantised_whatever_the_config_says(tmp_path, entry):
    config = CONFIG | {"quantization_config": entry}
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", WEIGHTS, config=config))
    assert opened.config == CONFIG
    (note,) = opened.notes
    assert "quantization_config" in note


@pytest.mark.parametrize("name", ["w.weight", "mlp.experts.gate_up_proj_blocks"])
def test_packed_weights_are_quantised(tmp_path, name):
    config = {"quantization_config": {"quant_method": "mine"}}
    header = {name: {"dtype": "U8", "shape": [2, 4], "data_offsets": [0, 8]}}
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = refusal(tmp_path)
    assert found.startswith(f"{tmp_path}: ")
    assert repr(name.removesuffix("_blocks"))[:-1] in found
    assert found.endswith(f"U8, mine by config.json); {REMEDY}") or "_scales', which" in found


@pytest.mark.parametrize(
    "suffix",
    ["qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "weight_scale", "weight_scale_inv",
     "weight_packed", "quant_state.bitsandbytes__nf4"],
)  # fmt: skip
def test_quantised_by_tensor_name(tmp_path, suffix):
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    folder = write_checkpoint(tmp_path / "m", {**WEIGHTS, name: np.ones(3, np.int64)})
    found = refusal(folder)
    assert found.startswith(f"{folder}: ")
    assert "model.layers.0.mlp.up_proj" in found
    assert found.endswith(REMEDY) or "missing" in found


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3"])
def test_quantised_by_dtype(tmp_path, dtype):
    bits = {"F8": 8, "F6": 6, "F4": 4}[dtype[:2]]
    header = {"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}
    raw = json.dumps(header).encode()
    content = len(raw).to_bytes(8, "little") + raw + bytes(bits)
    (tmp_path / "model.safetensors").write_bytes(content)
    found = refusal(tmp_path)
    assert found.startswith(f"{tmp_path}: ")
    assert f"'w', {dtype}" in found
    assert found.endswith(REMEDY)


# --- files that move under our feet --------------------------------------------------------------


def test_unchanged(tmp_path):
    open_checkpoint(write_checkpoint(tmp_path / "m", WEIGHTS)).check_unchanged()


def test_file_changed_while_it_was_read(tmp_path):
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", WEIGHTS))
    file = tmp_path / "m" / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as opened_file:  # in place: the same inode
        opened_file.write(content)
    os.utime(
        file, ns=(before.st_atime_ns, before.st_mtime_ns)
    )  # the change time tells all the same
    with pytest.raises(StaleError) as caught:
        opened.check_unchanged()
    assert str(caught.value) == f"{file}: changed while it was read; run again when it is at rest"


def test_file_vanished_while_it_was_read(tmp_path):
    opened = open_checkpoint(write_checkpoint(tmp_path / "m", WEIGHTS))
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(
        StaleError, match=r"model\.safetensors: vanished while it was read; run again"
    ):
        opened.check_unchanged()
