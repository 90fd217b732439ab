"""Models in memory: what a state dict holds is what a file of it would hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import (
    CONFIG,
    family_weights,
    from_bf16,
    read_checkpoint,
    read_raw,
    to_bf16,
    write_family,
)
from tests.modules import llama

import taskvec as tv
from taskvec.checkpoints.memory import DeviceView, open_memory
from taskvec.dtypes import DTYPES
from taskvec.errors import CheckpointError, StaleError, UsageError

torch = pytest.importorskip("torch")

SCALE = {"math": 0.5, "code": -0.25}


def state(tensors: Any, dtype: str = "bfloat16") -> dict[str, Any]:
    """A torch state dict of float32 arrays."""
    kind = getattr(torch, dtype)
    return {name: torch.from_numpy(np.array(array)).to(kind) for name, array in tensors.items()}


def family_of(members: Any) -> tv.Family:
    return tv.Family(
        base=members["base"],
        instruct=members["instruct"],
        tasks={"math": members["math"], "code": members["code"]},
    )


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float16", "F16"), ("float32", "F32"), ("float64", "F64"), ("int64", "I64"), ("bool", "BOOL"),
     ("uint16", "U16"), ("complex64", "C64")],
)  # fmt: skip
def test_arrays_and_tensors_give_their_stored_bytes(dtype, name):
    array = np.array([[1, 0, 3], [2, 5, 0]]).astype(dtype)
    for value in (array, torch.from_numpy(array.copy())):
        opened = open_memory({"w": value})
        view = opened.view("w")
        assert (view.dtype.name, view.shape) == (name, (2, 3))
        assert opened.tensors["w"].nbytes == array.nbytes
        assert view.read(1, 5).tobytes() == array.ravel()[1:5].tobytes()
        assert view.read(0, 6).dtype == np.dtype(view.dtype.storage)


def test_bfloat16_is_its_bits():
    values = np.array([1.0, -2.5, 3.140625], np.float32)
    view = open_memory({"w": torch.from_numpy(values).to(torch.bfloat16)}).view("w")
    assert view.dtype.name == "BF16"
    assert view.read(0, 3).tolist() == to_bf16(values).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_strides_are_read_in_row_major_order(dtype):
    tensor = torch.arange(24.0).reshape(2, 3, 4).to(getattr(torch, dtype))
    one = torch.ones(1, dtype=tensor.dtype)
    for value in (tensor.permute(2, 0, 1), tensor[:, ::2], one.expand(5)):
        view = open_memory({"w": value}).view("w")
        whole = view.read(0, value.numel())
        got = from_bf16(whole) if dtype == "bfloat16" else whole
        assert got.tolist() == value.float().flatten().tolist()
        assert view.read(2, 5).tolist() == whole[2:5].tolist()


def test_nothing_is_copied_where_strides_are_plain():
    tensor, array = torch.zeros(8, dtype=torch.bfloat16), np.zeros(8, np.float32)
    views = open_memory({"a": array, "t": tensor})
    assert np.shares_memory(views.view("a").read(2, 4), array)
    tensor[3] = 1.0
    assert views.view("t").read(3, 4).tolist() == [0x3F80]


def test_tensors_of_a_device_are_brought_over_by_blocks():
    moved = []

    class Elsewhere:
        """A tensor that says what is brought into main memory."""

        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __getitem__(self, part: slice) -> Elsewhere:
            return Elsewhere(self.tensor[part])

        def cpu(self) -> Any:
            moved.append(self.tensor.numel())
            return self.tensor

    tensor = torch.arange(8.0).to(torch.bfloat16)
    view = DeviceView(DTYPES["BF16"], (2, 4), Elsewhere(tensor))
    assert from_bf16(view.read(2, 5)).tolist() == [2, 3, 4]
    assert moved == [3]


def test_scalars_empty_tensors_and_parameters():
    values = {
        "e": torch.zeros(0, 4),
        "p": torch.nn.Parameter(torch.ones(2)),
        "s": np.float64(2),
    }
    opened = open_memory(values)
    assert list(opened.tensors) == ["e", "p", "s"]
    assert opened.view("e").read(0, 0).tolist() == []
    assert opened.view("p").read(0, 2).tolist() == [1, 1]
    assert (opened.view("s").shape, opened.view("s").read(0, 1).tolist()) == ((), [2])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({}, CheckpointError, "<in memory>: holds no tensors; give a model with weights"),
        ({1: np.ones(2)}, UsageError, "<in memory>: names of tensors must be text; got 1"),
        (
            {"w": [1.0]},
            UsageError,
            "<in memory>: 'w' must be a NumPy array or a torch tensor; got list",
        ),
        (
            {"w": np.ones(2, ">f4")},
            UsageError,
            "<in memory>: tensor 'w' is of type >f4, which is not known; convert it first "
            "(bfloat16 can be given as a torch tensor)",
        ),
        (
            {"w": torch.ones(2, device="meta")},
            CheckpointError,
            "<in memory>: tensor 'w' is on the device meta, its weights are not there; load the "
            "model whole",
        ),
        (
            {"w": torch.ones(2).to_sparse()},
            CheckpointError,
            "<in memory>: tensor 'w' is sparse or quantised, its weights are not there; load the "
            "model whole",
        ),
        (
            {"w": torch.ones(2).to(torch.float8_e4m3fn)},
            CheckpointError,
            "<in memory>: weights are quantised in a way that is not read (tensor 'w', F8_E4M3); "
            "give the model as it was before quantisation",
        ),
    ],
)  # fmt: skip
def test_what_is_no_model(model, error, message):
    with pytest.raises(error) as caught:
        open_memory(model)
    assert str(caught.value) == message


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_same_weights_in_memory_and_on_disk_give_the_same_result(tmp_path, kind):
    weights = family_weights()
    dtype = "F32" if kind == "numpy" else "BF16"
    folders = write_family(tmp_path / "family", weights, dtype)
    members = weights if kind == "numpy" else {n: state(w) for n, w in weights.items()}
    on_disk, in_memory = family_of(folders), family_of(members)
    assert np.array_equal(tv.scan(on_disk).gram, tv.scan(in_memory).gram)
    expected = tv.merge(on_disk, tmp_path / "disk", method="lata", scale=SCALE)
    got = tv.merge(in_memory, tmp_path / "memory", method="lata", scale=SCALE)
    assert got.fingerprint == expected.fingerprint
    assert read_raw(tmp_path / "memory") == read_raw(tmp_path / "disk")
    assert not (tmp_path / "memory" / "config.json").exists()  # nobody said what it is


def test_members_in_memory_and_on_disk_mix(tmp_path, family):
    members = family | {"math": state(family_weights()["math"])}
    tv.merge(family_of(members), tmp_path / "mixed", method="lata", scale=SCALE)
    tv.merge(family_of(family), tmp_path / "disk", method="lata", scale=SCALE)
    assert read_raw(tmp_path / "mixed") == read_raw(tmp_path / "disk")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config == CONFIG  # the target is a folder


def test_one_object_in_two_roles_is_read_once():
    shared = state(family_weights()["base"])
    with pytest.warns(tv.TaskvecWarning, match="vector is zero"):
        opened = tv.scan(tv.Family(instruct=shared, base=shared, tasks={"t": shared}), cache="off")
    assert not opened.gram[:, 1:].any()


# --- the cache -----------------------------------------------------------------------------------


def test_scans_of_what_is_in_memory_are_never_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path / "cache"))
    weights = family_weights()
    family = family_of(weights)
    first = tv.scan(family)
    assert not list((tmp_path / "cache").glob("*"))
    weights["math"]["model.norm.weight"][:] += 0.5
    assert not np.array_equal(tv.scan(family).gram, first.gram)


def test_nothing_that_is_kept_fits_what_was_opened_again():
    model = {"w": np.ones(2)}
    assert open_memory(model).identity != open_memory(model).identity


def test_weights_that_changed_since_the_scan_are_noticed(tmp_path):
    weights = family_weights()
    family = family_of(weights)
    table = tv.lata(tv.scan(family))
    weights["math"]["model.norm.weight"][:] += 0.5
    with pytest.raises(StaleError, match=r"^task 'math' \(<in memory>\): weights of tensor 'mo"):
        tv.merge(family, tmp_path / "out", table=table, scale=SCALE)


# --- manifest, verify, replay --------------------------------------------------------------------


def test_manifest_says_in_memory_and_verify_that_it_cannot_look(tmp_path, family):
    members = family | {"math": state(family_weights()["math"])}
    out = tmp_path / "out"
    tv.merge(family_of(members), out, method="lata", scale=SCALE)
    manifest = json.loads((out / "taskvec-manifest.json").read_text())
    assert manifest["members"]["task:math"]["path"] == "<in memory>"
    assert manifest["recipe"]["tasks"]["math"]["model"] == "<in memory>"
    found = {check.what: check for check in tv.verify(out, replay=True)}
    gone = "<in memory>: was in memory and cannot be read again; merge in Python"
    assert (found["task:math"].outcome, found["task:math"].detail) == ("absent", gone)
    assert (found["replay"].outcome, found["replay"].detail) == ("absent", gone)
    assert found["output"].outcome == found["task:code"].outcome == "same"


def test_replaying_the_manifest_says_that_it_cannot(tmp_path, cli):
    weights = family_weights()
    tv.merge(family_of(weights), tmp_path / "out", method="lata", scale=SCALE)
    manifest = tmp_path / "out" / "taskvec-manifest.json"
    code, _, err = cli("merge", manifest, tmp_path / "again", "--quiet")
    assert code == 1
    assert "<in memory>: was in memory and cannot be read again; merge in Python" in err
    assert not (tmp_path / "again").exists()


def test_card_does_not_name_what_was_in_memory_as_a_model(tmp_path, family):
    members = family | {"math": state(family_weights()["math"])}
    tv.merge(family_of(members), tmp_path / "out", method="lata", scale=SCALE)
    head = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert "in memory" not in head
    assert "base_model" not in head  # folders here are no names on the hub


# --- modules -------------------------------------------------------------------------------------


class Tiny(torch.nn.Module):
    """A module with parameters of two shapes and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = torch.nn.Linear(6, 4)
        self.register_buffer("steps", torch.tensor(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_modules(tmp_path):
    before, after = Tiny(0), Tiny(1)
    family = tv.Family(anchor=before, tasks={"t": after})
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"t": 0.5})
    got = read_checkpoint(tmp_path / "out")
    a, b = (m.linear.weight.detach().double().numpy() for m in (before, after))
    np.testing.assert_allclose(got["linear.weight"], a + 0.5 * (b - a), rtol=1e-6)
    assert got["steps"] == 3
    manifest = json.loads((tmp_path / "out" / "taskvec-manifest.json").read_text())
    assert manifest["members"]["anchor"]["path"] == "<in memory: Tiny>"


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_models_bring_their_config(tmp_path: Path, tie):
    transformers = pytest.importorskip("transformers")
    before, after = llama(0, tie), llama(1, tie)
    family = tv.Family(anchor=before, tasks={"t": after})
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"t": 1.0})
    assert ("lm_head.weight" in read_raw(tmp_path / "out")) is not tie
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.dtype == torch.bfloat16
    assert (tmp_path / "out" / "generation_config.json").exists()
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        expected, got = after(tokens).logits, loaded(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
