"""Roles that were mixed up are noticed, and those that are right are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conftest import write_checkpoint

import taskvec as tv
from taskvec.statistics.plausibility import role_warnings

SHAPES = {"model.layers.0.mlp.up_proj.weight": (40, 30), "model.norm.weight": (30,)}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Base; instruct at distance 1; two small fine-tunes of it; a model trained apart."""
    rng = np.random.default_rng(0)

    def step(size: float) -> dict[str, np.ndarray]:
        return {name: size * rng.normal(0, 1, shape) for name, shape in SHAPES.items()}

    def plus(model: dict[str, np.ndarray], change: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: model[name] + change[name] for name in model}

    base = step(3.0)
    instruct = plus(base, step(0.5))
    weights = {
        "base": base,
        "instruct": instruct,
        "math": plus(instruct, step(0.2)),
        "code": plus(instruct, step(0.2)),
        "other": step(3.0),
    }
    weights["early"] = plus(base, step(0.2))
    for name, model in weights.items():
        write_checkpoint(tmp_path / name, model, "F32")
    return {name: str(tmp_path / name) for name in weights}


def warnings_of(base: str | None, instruct: str, **tasks: str) -> list[str]:
    return role_warnings(tv.scan(tv.Family(base=base, instruct=instruct, tasks=tasks), cache="off"))


def test_right_roles_are_plausible(models):
    roles = {t: models[t] for t in ("math", "code")}
    assert warnings_of(models["base"], models["instruct"], **roles) == []
    assert warnings_of(None, models["instruct"], **roles) == []


def test_exchanged_base_and_instruct(models):
    (text,) = warnings_of(
        models["instruct"], models["base"], math=models["math"], code=models["code"]
    )
    assert "exchanged" in text
    assert "swap" in text
    assert "c = -0.9" in text  # the figures


def test_a_task_tuned_from_base(models):
    (text,) = warnings_of(
        models["base"], models["instruct"], math=models["math"], early=models["early"]
    )
    assert "'early'" in text
    assert "nearer to base" in text


def test_a_task_that_is_the_base(models):
    for more in ({}, {"math": models["math"]}):
        (text,) = warnings_of(models["base"], models["instruct"], x=models["base"], **more)
        assert "'x' is nearer to base than to instruct" in text
        assert "c = -1.00" in text


def test_a_task_of_another_model(models):
    (text,) = warnings_of(models["base"], models["instruct"], other=models["other"])
    assert "'other'" in text
    assert "1.4" in text  # near the square root of 2


def test_a_merge_says_it_too(models, tmp_path):
    family = tv.Family(
        base=models["instruct"], instruct=models["base"], tasks={"math": models["math"]}
    )
    table = tv.lata(tv.scan(family, cache="off"))
    assert any("exchanged" in warning for warning in table.warnings)
