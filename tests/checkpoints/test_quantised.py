"""Quantised checkpoints: every format against its formula in float64, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.quantisers import FORMATS, mxfp4, write_quantised

from taskvec.checkpoints import quantised_views
from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.views import size

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
    assert (info.dtype.name, info.shape, view.dtype.name) == ("F16", values.shape, "F32")
    assert info.nbytes < 2 * values.size
    expected = values.reshape(-1)
    for slab in (1 << 23, 4096):
        monkeypatch.setattr(quantised_views, "SLAB_BYTES", slab)
        view.slabs._kept.clear() if hasattr(view, "slabs") else None
        for start, stop in ((0, size(view)), (0, 1), (161, 161), (33, 1000), (5001, size(view))):
            got = view.read(start, stop)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected[start:stop], rtol=4e-7, atol=1e-12)
    assert "quantization_config" not in opened.config
    (note,) = opened.notes
    assert str(tmp_path / "m") in note
    assert "float16" in note
