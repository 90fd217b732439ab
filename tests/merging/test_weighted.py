"""`merge: weighted`: what agrees, divided by the sum of |λ| of those that agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import read_checkpoint, read_raw, write_family

from taskvec.outputs import run as engine
from taskvec.outputs.verify import verify
from taskvec.recipes.reading import load_recipe


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_family(tmp_path)
    return tmp_path


def merged(root: Path, name: str, scales: dict, **method) -> Path:
    data = {
        "instruct": "instruct",
        "tasks": {t: {"model": t, "scale": s} for t, s in scales.items()},
        "method": {"name": "ties", "density": 1} | method,
        "out": {"dtype": "float32"},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return engine.run(load_recipe(path), root / name).path


@pytest.mark.parametrize(
    "scales", [{"math": 0.7, "code": 0.2, "base": 1.3}, {"math": 0.7, "code": -0.2, "base": 1.3}]
)
def test_against_the_formula(root, scales):
    got = merged(root, "out", scales, merge="weighted")
    anchor = read_checkpoint(root / "instruct")
    members = {t: read_checkpoint(root / t) for t in scales}
    for name, value in read_checkpoint(got).items():
        start = anchor[name].astype(float)
        y = np.stack([s * (members[t][name] - start) for t, s in scales.items()])
        share = np.abs(list(scales.values())).reshape(-1, *[1] * start.ndim)
        agrees = (np.sign(y) == np.sign(y.sum(0))) & (y != 0)
        divisor = (agrees * share).sum(0)
        step = (agrees * y).sum(0) / np.where(divisor > 0, divisor, 1)
        off = np.abs(value - (start + step)) > 1e-6
        cancel = np.abs(y.sum(0)) < 1e-6  # but for float32's rounding, which then has the say
        assert not (off & ~cancel).any(), name
        assert cancel.mean() < 0.1
    assert {check.outcome for check in verify(got, replay=True)} == {"same"}


def test_with_equal_scales_only_their_ratio_counts(root):
    one = read_checkpoint(merged(root, "one", {"math": 1, "code": 1}, merge="mean"))
    half = read_checkpoint(merged(root, "half", {"math": 0.5, "code": 0.5}, merge="weighted"))
    for name, value in one.items():
        np.testing.assert_allclose(half[name], value, rtol=1e-6, atol=1e-7)


def test_one_task_subtracted_points_against_its_vector(root):
    got = read_checkpoint(merged(root, "out", {"math": -0.3}, merge="weighted"))
    anchor, math = (read_checkpoint(root / n) for n in ("instruct", "math"))
    for name, value in got.items():
        np.testing.assert_allclose(value, 2 * anchor[name] - math[name], rtol=1e-5, atol=1e-6)


def test_scales_by_layer_weigh_tensor_by_tensor(root):
    """With one task the weight cancels, whatever it is in a layer."""
    by_layer = {"math": {"depth": [0.2, 0.8], "outside": 3}}
    plain = read_raw(merged(root, "plain", {"math": 0.5}, merge="weighted"))
    got = read_raw(merged(root, "layers", by_layer, merge="weighted"))
    for name, (dtype, shape, raw) in plain.items():
        close = np.frombuffer(got[name][2], "<f4"), np.frombuffer(raw, "<f4")
        assert got[name][:2] == (dtype, shape)
        np.testing.assert_allclose(*close, rtol=1e-5, atol=1e-6)
