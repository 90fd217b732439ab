"""Quantised checkpoints: every format against its formula in float64, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.quantisers import FORMATS, awq, fp8, gptq, mxfp4, write_quantised

from taskvec.checkpoints import quantised_views
from taskvec.checkpoints.codebooks import BYTES, E2M1, spreads
from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import size
from taskvec.errors import CheckpointError
from taskvec.kernels.dequantise import widen_e2m1, widen_e4m3

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (96, 160)
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def made(format_: str, folder: Path) -> tuple[Any, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    if format_ == "mxfp4":
        stored, values, said = mxfp4(rng, EXPERTS, (3, 64, 40))
    else:
        stored, values, said = FORMATS[format_](rng, NAME, SHAPE)
    stored["model.norm.weight"] = ("F32", np.ones(4, "<f4"))
    config = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": said}
    return open_checkpoint(write_quantised(folder, stored, config)), values


@pytest.mark.parametrize("format_", [*FORMATS, "mxfp4"])
def test_every_format_is_read_as_its_formula_says(tmp_path, format_, monkeypatch):
    opened, values = made(format_, tmp_path / "m")
    name = EXPERTS if format_ == "mxfp4" else NAME
    assert list(opened.tensors) == sorted([name, "model.norm.weight"])
    info, view = opened.tensors[name], opened.view(name)
    assert (info.dtype.name, info.shape) == ("F16", values.shape)
    assert view.dtype.name == ("BF16" if format_ == "mxfp4" else "F32")
    assert info.nbytes < 2 * values.size
    expected = values.reshape(-1)
    for slab in (1 << 23, 4096):
        monkeypatch.setattr(quantised_views, "SLAB_BYTES", slab)
        view.slabs._kept.clear() if hasattr(view, "slabs") else None
        for start, stop in (
            (0, size(view)),
            (0, 1),
            (161, 161),
            (33, 1000),
            (5001, size(view)),
            (7, 7),
        ):
            got = widened(view.read(start, stop), view.dtype)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected[start:stop], rtol=4e-7, atol=1e-12)
    assert "quantization_config" not in opened.config
    (note,) = opened.notes
    assert str(tmp_path / "m") in note
    assert "float16" in note


@pytest.mark.parametrize("format_", [*FORMATS, "mxfp4"])
def test_expected_errors_are_those_of_rounding_to_the_nearest_code(tmp_path, format_):
    opened, values = made(format_, tmp_path / "m")
    view = opened.view(EXPERTS if format_ == "mxfp4" else NAME)
    errors = view.errors().read(0, size(view)).astype(np.float64)
    assert np.isfinite(errors).all()
    assert (errors >= 0).all()
    # Half the distance to another value that occurs bounds the error; its mean square is a third.
    if format_ in ("llm.int8", "int8 channel"):
        one = view.read(0, 160).astype(np.float64)
        step = np.diff(np.unique(one)).min()
        np.testing.assert_allclose(errors[1:159], step / np.sqrt(12), rtol=0.5)
    assert 0 < np.linalg.norm(errors) < 0.3 * np.linalg.norm(values)


def test_spreads_of_a_codebook():
    grid = spreads(np.array([0, 1, 3, 3.5], np.float32))
    halves = [(0, 0.5), (0.5, 1), (1, 0.25), (0.25, 0)]
    expected = [np.sqrt((h**3 + k**3) / (3 * (h + k))) for h, k in halves]
    np.testing.assert_allclose(grid, expected, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(BYTES))
def test_codebooks_of_bytes_are_torchs(name):
    torch = pytest.importorskip("torch")
    kind = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
            "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
            "F8_E5M2FNUZ": torch.float8_e5m2fnuz}[name]  # fmt: skip
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kind)
    np.testing.assert_array_equal(BYTES[name], codes.to(torch.float32).numpy())


def test_arithmetic_of_the_kernels_is_the_codebooks():
    every = np.array([widen_e4m3(np.uint32(code)) for code in range(256)])
    np.testing.assert_array_equal(every, BYTES["F8_E4M3"])
    every = np.array([widen_e2m1(np.uint32(code)) for code in range(16)])
    np.testing.assert_array_equal(every, E2M1)
    assert np.signbit(every[8])


def damaged(
    folder: Path, change: Any, said: dict[str, Any] | None = None, format_: Any = None
) -> str:
    """What is said of a checkpoint whose tensors, or config, were changed."""
    stored, _, config = (format_ or gptq(4, 32))(np.random.default_rng(3), NAME, SHAPE)
    change(stored)
    config = {"quantization_config": config if said is None else said}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_quantised(folder, stored, config))
    assert str(caught.value).startswith(f"{folder}: ")
    return str(caught.value)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    "said",
    [{}, GPTQ | {"bits": 5}, GPTQ | {"bits": 8}, GPTQ | {"checkpoint_format": "marlin"},
     GPTQ | {"quant_method": "exl2"}, GPTQ | {"quant_method": "awq", "version": "gemv"},
     GPTQ | {"quant_method": "awq"}],
)  # fmt: skip
def test_what_is_not_said_or_does_not_fit_is_refused(tmp_path, said):
    found = damaged(tmp_path / "m", lambda stored: None, said)
    assert found.endswith("give the model as it was before quantisation")


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_a_part_that_is_missing_is_named(tmp_path, lost):
    name = f"model.layers.0.mlp.up_proj.{lost}"
    found = damaged(tmp_path / "m", lambda stored: stored.pop(name))
    assert repr(name) in found
    assert found.endswith("download the model again")


def wrong(
    suffix: str, dtype: str | None = None, shape: tuple[int, ...] | None = None, add: int = 0
) -> Any:
    """Changes one stored tensor: its dtype, its shape, or its elements."""

    def change(stored: dict[str, Any]) -> None:
        name = next(each for each in stored if each.endswith(suffix))
        kind, array = stored[name]
        array = array if shape is None else np.zeros(shape, array.dtype)
        if dtype is not None:
            array = array.astype({"I64": "<i8", "F32": "<f4"}[dtype])
        stored[name] = dtype or kind, array + array.dtype.type(add)

    return change


@pytest.mark.parametrize(
    ("format_", "change"),
    [
        ("int8 channel", wrong("zero_point", shape=(1, 1))),
        ("packed 4 bits, zero points", wrong("zero_point", shape=(3, 5))),
        ("packed 4 bits, shuffled", wrong("g_idx", shape=(32,))),
        ("packed 4 bits, shuffled", wrong("g_idx", dtype="F32")),
        ("gptq 4", wrong("qzeros", dtype="I64")),
        ("gptq 4", wrong("g_idx", dtype="F32")),
        ("nf4 nested", wrong("nested_absmax", shape=(0,))),
        ("nf4 nested", wrong("nested_quant_map", shape=(16,))),
        ("nf4 nested", wrong("nested_absmax", dtype="I64")),
    ],
)
def test_parts_that_do_not_fit_their_weight_are_refused(tmp_path, format_, change):
    """Else what lies behind them in the file, or in memory, would be taken for them."""
    found = damaged(tmp_path / "m", change, format_=FORMATS[format_])
    assert found.endswith("give the model as it was before quantisation")


@pytest.mark.parametrize(
    ("format_", "add"),
    [("gptq 4 shuffled", 1), ("gptq 4 shuffled", -1), ("packed 4 bits, shuffled", 1)],
)
def test_groups_that_do_not_exist_are_an_error(tmp_path, format_, add):
    """Kernels do not check bounds: a group that is not there would be any memory."""
    stored, values, said = FORMATS[format_](np.random.default_rng(3), NAME, SHAPE)
    wrong("g_idx", add=add)(stored)
    folder = write_quantised(tmp_path / "m", stored, {"quantization_config": said})
    with pytest.raises(CheckpointError, match="g_idx") as caught:
        open_checkpoint(folder).view(NAME).read(0, values.size)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("rows", [192, 300])
def test_sizes_of_blocks_are_not_guessed(tmp_path, rows):
    """2 or 3 blocks over so many rows are of 128, or of 96 or 100: nothing here says which."""
    format_ = fp8(lambda r, c: (-(-r // 128), 1), "weight_scale_inv", {}, (128, 160))
    stored, values, _ = format_(np.random.default_rng(3), NAME, (rows, 160))
    for said in ({}, {"quant_method": "fp8", "weight_block_size": [64, 160]}):
        folder = write_quantised(tmp_path / "m", stored, {"quantization_config": said})
        with pytest.raises(CheckpointError, match="weight_scale_inv"):
            open_checkpoint(folder)
    said = {"quant_method": "fp8", "weight_block_size": [128, 160]}
    folder = write_quantised(tmp_path / "m", stored, {"quantization_config": said})
    got = open_checkpoint(folder).view(NAME).read(0, values.size)
    np.testing.assert_allclose(got, values.reshape(-1), rtol=4e-7)


def test_layers_that_store_in_and_out_the_other_way_are_refused(tmp_path):
    stored, _, said = gptq(4, 32)(np.random.default_rng(3), NAME, SHAPE)
    config = {"model_type": "gpt2", "quantization_config": said}
    with pytest.raises(CheckpointError, match="before quantisation"):
        open_checkpoint(write_quantised(tmp_path / "m", stored, config))


def test_a_weight_that_is_there_twice_is_refused(tmp_path):
    plain = {NAME: ("F32", np.zeros(SHAPE, "<f4"))}
    assert repr(NAME) in damaged(tmp_path / "m", lambda stored: stored.update(plain))


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_config_of_older_tools(tmp_path, file):
    format_ = awq if file == "quant_config.json" else gptq(4, 32)
    stored, values, _ = format_(np.random.default_rng(3), NAME, SHAPE)
    folder = write_quantised(tmp_path / "m", stored, {"model_type": "llama"})
    said = {"bits": 4, "group_size": 32, "desc_act": False}
    said = {"w_bit": 4, "q_group_size": 32, "zero_point": True} if format_ is awq else said
    (folder / file).write_text(json.dumps(said))
    got = open_checkpoint(folder).view(NAME).read(0, values.size)
    np.testing.assert_allclose(got, values.reshape(-1), rtol=4e-7, atol=1e-12)


def test_scales_of_activations_are_left_out_and_counted(tmp_path):
    stored, _, said = FORMATS["fp8 tensor"](np.random.default_rng(3), NAME, SHAPE)
    stored["model.layers.0.mlp.up_proj.input_scale"] = ("F32", np.ones(1, "<f4"))
    opened = open_checkpoint(write_quantised(tmp_path / "m", stored, {"quantization_config": said}))
    assert list(opened.tensors) == [NAME]
    assert "1 scales of activations" in opened.notes[0]
