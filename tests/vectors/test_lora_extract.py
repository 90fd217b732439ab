"""LoRA adapters made of task vectors: exact ranks, energies, the rest, what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.conftest import CONFIG, write_checkpoint
from tests.vectors.test_extract import refusal

import taskvec as tv
from taskvec.errors import OutputError, ParameterError, UsageError

BLOCK = "model.layers.0."
LINEAR = {
    f"{BLOCK}self_attn.q_proj": (96, 64),
    f"{BLOCK}mlp.up_proj": (120, 64),
    f"{BLOCK}mlp.down_proj": (64, 120),
    "lm_head": (80, 64),
}
NORM, EMBEDDING = f"{BLOCK}input_layernorm.weight", "model.embed_tokens.weight"
BIAS = f"{BLOCK}self_attn.q_proj.bias"
PREFIX = "base_model.model."


def anchor_weights() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    shapes = {f"{m}.weight": s for m, s in LINEAR.items()}
    shapes |= {NORM: (64,), EMBEDDING: (80, 64), BIAS: (96,)}
    return {name: rng.normal(0, 0.1, s).astype(np.float32) for name, s in shapes.items()}


def low_rank(rank: int, scale: float = 0.05) -> dict[str, np.ndarray[Any, Any]]:
    """τ of each linear weight, of exact rank but for float32's rounding."""
    rng = np.random.default_rng(1)
    return {
        f"{m}.weight": (scale * rng.normal(size=(a, rank)) @ rng.normal(size=(rank, b)))
        for m, (a, b) in LINEAR.items()
    }


def write(root: Path, changes: dict[str, Any], config: dict[str, Any] = CONFIG) -> tv.Family:
    anchor = anchor_weights()
    if config.get("tie_word_embeddings"):
        del anchor["lm_head.weight"]
    tuned = {n: (w + changes.get(n, 0)).astype(np.float32) for n, w in anchor.items()}
    write_checkpoint(root / "anchor", anchor, "F32", config=config)
    write_checkpoint(root / "math", tuned, "F32", config=config)
    return tv.Family(anchor=root / "anchor", tasks={"math": root / "math"})


def difference(root: Path) -> dict[str, np.ndarray[Any, Any]]:
    """τ as stored, float64."""
    a, b = (load_file(root / m / "model.safetensors") for m in ("anchor", "math"))
    return {name: b[name].astype(np.float64) - a[name].astype(np.float64) for name in a}


def product(adapter: Path, module: str) -> np.ndarray[Any, Any]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    b, a = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].astype(np.float64) for x in "BA")
    return b @ a  # α / r is 1


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def test_a_difference_of_exact_rank_is_recovered(tmp_path):
    family = write(tmp_path, low_rank(3))
    done = tv.extract(family, tmp_path / "lora", form="lora", rank=3)
    config, tau = config_of(tmp_path / "lora"), difference(tmp_path)
    assert config["target_modules"] == sorted({m.rpartition(".")[2] for m in LINEAR})
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] is None  # a local folder is no name on the hub
    assert config["modules_to_save"] is None
    for module in LINEAR:
        exact = tau[f"{module}.weight"]
        # Weights near 0.1 are rounded to parts in 2^24 of that; τ has a hundredth of it.
        assert np.linalg.norm(product(tmp_path / "lora", module) - exact) < 1e-5 * np.linalg.norm(
            exact
        )
    assert done.lost < 1e-10
    assert {row.kept for row in done.factored} == {"lora"}
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["anchor", "lora", "math"]


@pytest.mark.parametrize(("rank", "least", "most"), [(4, 0.1, 0.9), (9, 1e-4, 0.01)])
def test_reported_errors_are_those_of_the_stored_factors(tmp_path, rank, least, most):
    family = write(tmp_path, low_rank(9))  # under rank 9, all of the error is bfloat16's
    done = tv.extract(family, tmp_path / "lora", form="lora", rank=rank, dtype="bfloat16")
    tau = difference(tmp_path)
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(tmp_path / "lora" / "adapter_model.safetensors")
    lost = total = 0.0
    for row in done.factored:
        b, a = (tensors[f"{PREFIX}{row.name.removesuffix('weight')}lora_{x}.weight"] for x in "BA")
        assert b.dtype == a.dtype == torch.bfloat16
        rest = np.linalg.norm(tau[row.name] - (b.double() @ a.double()).numpy())
        assert row.norm == pytest.approx(np.linalg.norm(tau[row.name]), rel=1e-6)
        assert row.error == pytest.approx(rest / row.norm, rel=1e-4)
        assert least < row.error < most
        lost, total = lost + rest**2, total + row.norm**2
    assert done.lost == pytest.approx(lost / total, rel=1e-4)


def test_energy_gives_each_matrix_its_rank(tmp_path):
    changes = low_rank(2)
    q = f"{BLOCK}self_attn.q_proj.weight"
    changes[q] = 0.05 * np.random.default_rng(5).normal(size=LINEAR[q.removesuffix(".weight")])
    family = write(tmp_path, changes)
    done = tv.extract(family, tmp_path / "lora", form="lora", energy=0.9)
    tau, config = difference(tmp_path), config_of(tmp_path / "lora")
    for row in done.factored:
        values = np.linalg.svd(tau[row.name], compute_uv=False) ** 2
        smallest = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9)) + 1
        assert row.rank == smallest
        module = row.name.removesuffix(".weight")
        assert config["rank_pattern"].get(module, config["r"]) == smallest
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == smallest
        assert row.error**2 <= 0.1 + 1e-6
    assert len({row.rank for row in done.factored}) > 1


def test_what_is_no_linear_weight_is_refused_dropped_or_saved(tmp_path):
    rng = np.random.default_rng(7)
    rest = {NORM: rng.normal(size=64), BIAS: rng.normal(size=96)}
    rest[EMBEDDING] = 0.1 * rng.normal(size=(80, 64))
    family = write(tmp_path, low_rank(2) | rest)
    options = {"family": family, "task": None, "out": tmp_path / "lora", "form": "lora", "rank": 2}
    assert refusal(UsageError, tmp_path, **options) == (
        f"3 tensors that differ are no weights of linear layers, such as {EMBEDDING!r}; "
        "--rest drop leaves them out, --rest save keeps their modules whole"
    )
    tau = difference(tmp_path)
    done = tv.extract(family, tmp_path / "dropped", form="lora", rank=2, rest="drop")
    norms = {name: float((t**2).sum()) for name, t in tau.items()}
    share = sum(norms[name] for name in rest) / sum(norms.values())
    assert done.lost == pytest.approx(share, rel=1e-6)
    assert {row.name for row in done.factored if row.kept == "dropped"} == set(rest)
    assert set(done.tensors) == set(tau) - set(rest)

    saved = tv.extract(family, tmp_path / "saved", form="lora", rank=2, rest="save")
    q = f"{BLOCK}self_attn.q_proj"
    modules = [EMBEDDING.removesuffix(".weight"), NORM.removesuffix(".weight"), q]
    config = config_of(tmp_path / "saved")
    assert config["modules_to_save"] == sorted(modules)
    # The bias takes the weight along.
    assert config["target_modules"] == sorted(
        {"lm_head", "up_proj", "down_proj"}
    )  # the bias takes the weight along
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    tuned = load_file(tmp_path / "math" / "model.safetensors")
    for name in (NORM, EMBEDDING, BIAS, f"{q}.weight"):
        # anchor + (fine-tune − anchor), each in float32
        assert np.allclose(tensors[PREFIX + name], tuned[name], rtol=0, atol=2e-7)
        assert not np.array_equal(tensors[PREFIX + name], 0 * tuned[name])
    assert saved.lost < 1e-10


def test_conv1d_of_gpt2_is_stored_the_other_way_round(tmp_path):
    name, rng = "transformer.h.0.mlp.c_fc.weight", np.random.default_rng(3)
    weights = {name: rng.normal(size=(16, 64)).astype(np.float32)}  # (in, out)
    tau = rng.normal(size=(16, 2)) @ rng.normal(size=(2, 64))
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    write_checkpoint(tmp_path / "anchor", weights, "F32", config=config)
    write_checkpoint(tmp_path / "math", {name: weights[name] + tau}, "F32", config=config)
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    tv.extract(family, tmp_path / "lora", form="lora", rank=2)
    assert config_of(tmp_path / "lora")["fan_in_fan_out"] is True
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}transformer.h.0.mlp.c_fc.lora_A.weight"].shape == (2, 16)
    found = product(tmp_path / "lora", "transformer.h.0.mlp.c_fc").T
    assert np.linalg.norm(found - tau) < 1e-5 * np.linalg.norm(tau)


def test_an_adapter_is_a_task_again(tmp_path):
    family = write(tmp_path, low_rank(3))
    tv.extract(family, tmp_path / "lora", form="lora", rank=3)
    apart = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "lora"})
    tv.merge(apart, tmp_path / "out", method="task_arithmetic", scale={"math": 1.0})
    tuned = load_file(tmp_path / "math" / "model.safetensors")
    for name, w in load_file(tmp_path / "out" / "model.safetensors").items():
        assert np.allclose(w, tuned[name], rtol=0, atol=2e-6), name


def test_a_seed_and_nothing_else_changes_the_factors(tmp_path):
    shape = (400, 300)  # large enough for a random projection
    name = f"{BLOCK}self_attn.q_proj.weight"
    weights = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    write_checkpoint(tmp_path / "anchor", {name: 0 * weights[name]}, "F32")
    write_checkpoint(tmp_path / "math", weights, "F32")
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})

    def made(out: str, **options: Any) -> bytes:
        tv.extract(family, tmp_path / out, form="lora", rank=2, **options)
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    first = made("a")
    assert made("b", threads=1) == first
    assert made("c", seed=1) != first


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "a LoRA adapter needs either a rank or an energy; give one of them"),
        ({"rank": 2, "energy": 0.5}, UsageError,
         "a LoRA adapter needs either a rank or an energy; give one of them"),
        ({"rank": 0}, ParameterError, "rank must be a whole number above 0; got 0"),
        ({"energy": 1.5}, ParameterError, "energy must be in (0, 1]; got 1.5"),
        ({"rank": 2, "rest": "keep"}, ParameterError,
         "rest must be in refuse | drop | save; got 'keep'"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be(tmp_path, options, error, message):
    family = write(tmp_path, low_rank(2))
    options = {"family": family, "task": None, "out": tmp_path / "lora", "form": "lora", **options}
    assert refusal(error, tmp_path, **options) == message


def test_other_refusals(tmp_path):
    family = write(tmp_path, {NORM: np.ones(64)})
    options = {"family": family, "task": None, "out": tmp_path / "lora", "form": "lora", "rank": 2}
    assert refusal(UsageError, tmp_path, **options, rest="drop") == (
        "the task vector of 'math' leaves no weight of a linear layer to be factored (a layer "
        "whose bias differs is saved whole); take --rest drop, or extract a vector"
    )
    for member, number in (("a", 0.0), ("b", 1.0)):
        tensors = {"temperature": np.full((), number), "lm_head.weight": np.full((3, 3), number)}
        write_checkpoint(tmp_path / member, tensors, "F32")
    options["family"] = tv.Family(anchor=tmp_path / "a", tasks={"math": tmp_path / "b"})
    assert refusal(UsageError, tmp_path, **options, rest="save") == (
        "tensor 'temperature' belongs to no module, so that PEFT cannot save it; exclude it, "
        "or take --rest drop"
    )
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").touch()
    message = refusal(OutputError, tmp_path, **options, rest="drop")
    assert message == f"{tmp_path}/lora: is not empty; --force replaces the whole folder"


def test_an_embedding_that_is_tied_to_the_head(tmp_path):
    changes = {n: t for n, t in low_rank(2).items() if n != "lm_head.weight"}
    changes[EMBEDDING] = np.ones((80, 64))
    family = write(tmp_path, changes, CONFIG | {"tie_word_embeddings": True})
    with pytest.warns(tv.TaskvecWarning, match="tied to the head"):
        done = tv.extract(family, tmp_path / "lora", form="lora", rank=2, rest="save")
    assert config_of(tmp_path / "lora")["ensure_weight_tying"] is True
    assert done.warnings == (
        "the saved embedding is tied to the head: load the adapter with a PEFT that knows "
        "ensure_weight_tying (0.21 does), or the head keeps the old rows",
    )
    name, linear = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"
    for member, number in (("a", 0.0), ("b", 1.0)):
        tensors = {name: np.full((9, 4), number), linear: np.full((4, 8), number)}
        write_checkpoint(tmp_path / member, tensors, "F32", config={"model_type": "gpt2"})
    options = {"task": None, "out": tmp_path / "no", "form": "lora", "rank": 1, "rest": "save"}
    family = tv.Family(anchor=tmp_path / "a", tasks={"math": tmp_path / "b"})
    assert refusal(UsageError, tmp_path, family=family, **options) == (
        "'transformer.wte' is tied to the head, which PEFT would part from it; exclude it, or take "
        "--rest drop"
    )


def test_the_base_is_named_as_the_recipe_says(tmp_path):
    family = replace(write(tmp_path, low_rank(3)), hubs={"anchor": "org/name@v1"})
    tv.extract(family, tmp_path / "lora", form="lora", rank=3)
    assert config_of(tmp_path / "lora")["base_model_name_or_path"] == "org/name"
