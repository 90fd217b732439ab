"""LoRA on parameters, such as the experts of a block in one tensor; formulas in NumPy float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.adapters import pair, write_adapter
from tests.conftest import CONFIG, Arrays, write_checkpoint

import taskvec as tv
from taskvec.errors import CheckpointError, TaskvecError

EXPERTS, HIDDEN, INNER, RANK = 3, 8, 5, 2
MLP = "model.layers.0.mlp.experts"
UP, DOWN = f"{MLP}.gate_up_proj", f"{MLP}.down_proj"
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RNG = np.random.default_rng(0)
FUSED = {UP: RNG.normal(size=(EXPERTS, 2 * INNER, HIDDEN)).astype("f4"),
         DOWN: RNG.normal(size=(EXPERTS, HIDDEN, INNER)).astype("f4")}  # fmt: skip


def factors(outs: int, ins: int, seed: int) -> tuple[Any, Any, Any]:
    """A and B as PEFT stores them, and the products by expert with the scaling 1.5."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(RANK * EXPERTS, ins)).astype("f4")
    b = rng.normal(size=(outs, RANK * EXPERTS)).astype("f4")
    by_expert = a.reshape(EXPERTS, RANK, ins).astype("f8")
    changes = np.einsum("orx,xri->xoi", b.reshape(outs, RANK, EXPERTS).astype("f8"), by_expert)
    return a, b, 1.5 * changes


def write(folder: Path, tensors: Arrays, targets: list[str] = TARGETS) -> Path:
    return write_adapter(folder, tensors, r=RANK, lora_alpha=3, target_parameters=targets)


def merged(tmp_path: Path, anchor: Arrays, adapter: Path, **config: Any) -> Arrays:
    write_checkpoint(tmp_path / "anchor", anchor, "F32", config={**CONFIG, **config})
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"a": adapter})
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=1)
    return load_file(tmp_path / "out" / "model.safetensors")


def both() -> tuple[Arrays, dict[str, Any]]:
    """An adapter of both parameters: the wrapper of the second is around that of the first."""
    a, b, up = factors(2 * INNER, HIDDEN, 1)
    c, d, down = factors(HIDDEN, INNER, 2)
    tensors = {f"{MLP}.base_layer.lora_A.weight": a, f"{MLP}.base_layer.lora_B.weight": b,
               f"{MLP}.lora_A.weight": c, f"{MLP}.lora_B.weight": d}  # fmt: skip
    return tensors, {UP: up, DOWN: down}


def test_experts_in_one_tensor(tmp_path):
    tensors, changes = both()
    got = merged(tmp_path, FUSED, write(tmp_path / "lora", tensors))
    for name, change in changes.items():
        np.testing.assert_allclose(got[name], FUSED[name] + change, rtol=0, atol=1e-5)


def test_one_parameter_of_a_module(tmp_path):
    a, b, change = factors(HIDDEN, INNER, 2)
    tensors = {f"{MLP}.lora_A.weight": a, f"{MLP}.lora_B.weight": b}
    got = merged(tmp_path, FUSED, write(tmp_path / "lora", tensors, ["down_proj"]))
    np.testing.assert_allclose(got[DOWN], FUSED[DOWN] + change, rtol=0, atol=1e-5)
    assert np.array_equal(got[UP], FUSED[UP])


def test_experts_that_are_stored_as_in_and_out(tmp_path):
    tensors, changes = both()
    turned = {name: np.ascontiguousarray(w.swapaxes(1, 2)) for name, w in FUSED.items()}
    got = merged(tmp_path, turned, write(tmp_path / "lora", tensors), model_type="gpt_oss")
    for name, change in changes.items():
        np.testing.assert_allclose(got[name], turned[name] + change.swapaxes(1, 2), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_of_square_experts_the_kind_of_model_says_how_they_are_stored(tmp_path, kind):
    a, b, change = factors(HIDDEN, HIDDEN, 3)
    anchor = {DOWN: RNG.normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype("f4")}
    tensors = {f"{MLP}.lora_A.weight": a, f"{MLP}.lora_B.weight": b}
    got = merged(tmp_path, anchor, write(tmp_path / "lora", tensors, TARGETS[1:]), model_type=kind)
    expected = change.swapaxes(1, 2) if kind == "gpt_oss" else change
    np.testing.assert_allclose(got[DOWN], anchor[DOWN] + expected, rtol=0, atol=1e-5)


def apart(fused: dict[str, Any]) -> Arrays:
    """The experts as files of Mixtral have them."""
    found = {}
    for e in range(EXPERTS):
        path = f"model.layers.0.block_sparse_moe.experts.{e}"
        gate, up = fused[UP][e, :INNER], fused[UP][e, INNER:]
        found |= {f"{path}.w1.weight": gate, f"{path}.w3.weight": up}
        found[f"{path}.w2.weight"] = fused[DOWN][e]
    return {name: np.ascontiguousarray(w, "f4") for name, w in found.items()}


def test_over_a_model_that_has_the_experts_apart(tmp_path):
    tensors, changes = both()
    got = merged(tmp_path, apart(FUSED), write(tmp_path / "lora", tensors))
    expected = apart({name: FUSED[name] + change for name, change in changes.items()})
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(got[name], weight, rtol=0, atol=1e-5)


def test_adapters_of_single_experts_over_a_model_that_has_them_fused(tmp_path):
    module = "model.layers.0.block_sparse_moe.experts.1.w3"
    tensors = pair(module, INNER, HIDDEN)
    got = merged(tmp_path, FUSED, write_adapter(tmp_path / "lora", tensors))
    a, b = (tensors[f"{module}.lora_{x}.weight"].astype("f8") for x in "AB")
    expected = FUSED[UP].astype("f8")
    expected[1, INNER:] += 1.5 * b @ a
    np.testing.assert_allclose(got[UP], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "names", "said"),
    [
        (["mlp.experts.gate_up_proj"], ["base_layer.", ""], "target_parameters"),
        (["mlp.other.gate_up_proj"], [""], "target_parameters"),
        ("gate_up_proj", [""], "target_parameters"),
    ],
)
def test_what_parameters_do_not_say_is_an_error(tmp_path, targets, names, said):
    a, b, _ = factors(2 * INNER, HIDDEN, 1)
    tensors = {f"{MLP}.{n}lora_{x}.weight": w for n in names for x, w in (("A", a), ("B", b))}
    with pytest.raises(CheckpointError, match=said):
        merged(tmp_path, FUSED, write(tmp_path / "lora", tensors, targets))


def test_another_rank_than_the_configs_is_an_error(tmp_path):
    a, b, _ = factors(2 * INNER, HIDDEN, 1)
    tensors = {f"{MLP}.lora_A.weight": a[:-1], f"{MLP}.lora_B.weight": b[:, :-1]}
    with pytest.raises(TaskvecError, match="rank is 2"):
        merged(tmp_path, FUSED, write(tmp_path / "lora", tensors, TARGETS[:1]))
