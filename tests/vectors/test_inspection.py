"""What is said about checkpoints, files, vectors and adapters."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import xxhash
from tests.conftest import CONFIG, HIDDEN, VOCABULARY, tiny_llama, write_checkpoint

import taskvec as tv
from taskvec.errors import CheckpointError
from taskvec.streaming import BLOCK
from taskvec.vectors.inspection import inspect

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def weights():
    return tiny_llama(np.random.default_rng(0), blocks=2)


def test_a_model_from_its_headers(tmp_path, weights):
    weights["steps"] = np.array([1, 2])
    folder = write_checkpoint(tmp_path / "model", weights, {"odd": "F32"}, shards=3)
    found = inspect(folder)
    said = found.to_json()
    json.dumps(said, allow_nan=False)
    assert found.kind == "model"
    assert said["about"]["model_type"] == "llama"
    assert len(said["files"]) == 3
    assert sum(said["files"].values()) == sum(
        p.stat().st_size for p in folder.glob("*.safetensors")
    )
    assert said["tensors"] == len(weights)
    assert said["parameters"] == sum(w.size for w in weights.values())
    assert said["bytes"] == 2 * (said["parameters"] - 9) + 7 * 4 + 2 * 8
    assert said["dtypes"] == {"BF16": len(weights) - 2, "F32": 1, "I64": 1}
    assert said["blocks"] == {"model": 2}
    assert said["not_float"] == ["steps"]
    assert said["other"] == ["odd", "steps", "temperature"]
    by_module = {row["module"]: row for row in said["modules"]}
    assert by_module["attention"]["tensors"] == 8
    assert by_module["attention"]["parameters"] == 2 * 3 * HIDDEN * HIDDEN
    assert by_module["head"]["bytes"] == 2 * VOCABULARY * HIDDEN
    assert "norm" not in by_module["head"]
    row = {row["name"]: row for row in said["layers"]}[Q]
    assert (row["dtype"], row["shape"], row["block"]) == ("BF16", [HIDDEN, HIDDEN], 0)
    assert "layers" not in found.to_json(tensors=False)


@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_are_those_of_the_elements(tmp_path, weights, threads):
    weights["zeros"] = np.zeros(4, np.float32)
    weights[Q][0, :3] = 0
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    folder = write_checkpoint(tmp_path / "model", weights, "F32")
    found = inspect(folder, norms=True, threads=threads)
    for name, w in weights.items():
        numbers, exact = found.numbers[name], w.astype(np.float64)
        assert numbers.norm == pytest.approx(np.linalg.norm(exact), rel=1e-13)
        assert numbers.largest == np.abs(exact).max()
        assert numbers.zeros == (exact == 0).mean()
        assert (numbers.nan, numbers.infinite) == (0, 0)
    assert found.identical == [["lm_head.weight", "model.embed_tokens.weight"]]
    mlp = [w for name, w in weights.items() if ".mlp." in name]
    row = next(r for r in found.to_json()["modules"] if r["module"] == "mlp")
    total = math.sqrt(sum(float((w.astype(np.float64) ** 2).sum()) for w in mlp))
    assert row["norm"] == pytest.approx(total, rel=1e-13)
    assert row["largest"] == max(np.abs(w).max() for w in mlp)


def test_what_is_not_finite_is_counted(tmp_path):
    w = np.ones((3, 30_000), np.float32)  # several chunks
    w[0, :2], w[2, 5], w[2, 6] = np.nan, np.inf, -np.inf
    found = inspect(write_checkpoint(tmp_path / "m", {"w": w}, "F32"), norms=True)
    numbers = found.numbers["w"]
    assert (numbers.nan, numbers.infinite) == (2, 2)
    assert numbers.norm == pytest.approx(math.sqrt(w.size - 4))
    said = found.to_json()
    assert (said["nan"], said["infinite"]) == (2, 2)
    assert numbers.largest == 1
    assert numbers.zeros == 0


def test_a_square_too_large_for_float64_is_no_number_in_json(tmp_path):
    folder = write_checkpoint(tmp_path / "m", {"w": np.full(2, 1e200)}, "F64")
    said = inspect(folder, norms=True).to_json()
    json.dumps(said, allow_nan=False)
    assert said["layers"][0]["norm"] is None
    assert said["layers"][0]["largest"] == 1e200


def test_digests_and_norms_are_the_same_for_any_number_of_threads(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "model", weights)
    assert inspect(folder, norms=True, threads=1) == inspect(folder, norms=True, threads=2)


def test_a_tensor_of_several_blocks(tmp_path):
    w = np.random.default_rng(0).normal(size=2 * BLOCK + 7).astype(np.float32)
    found = inspect(write_checkpoint(tmp_path / "m", {"w": w}, "F32"), norms=True, threads=2)
    chunks = [xxhash.xxh3_128_digest(w[i : i + 65_536].tobytes()) for i in range(0, w.size, 65_536)]
    assert found.numbers["w"].digest == xxhash.xxh3_128_hexdigest(b"".join(chunks))
    assert found.numbers["w"].norm == pytest.approx(np.linalg.norm(w.astype(np.float64)), rel=1e-13)


@pytest.mark.parametrize(
    ("tie", "stored", "expected"),
    [
        (True, False, {"(not stored)": "model.embed_tokens.weight"}),
        (True, True, {"lm_head.weight": "model.embed_tokens.weight"}),
        (False, True, {}),
    ],
)
def test_tied_heads(tmp_path, weights, tie, stored, expected):
    if not stored:
        del weights["lm_head.weight"]
    config = CONFIG | {"tie_word_embeddings": tie}
    folder = write_checkpoint(tmp_path / "model", weights, config=config)
    assert inspect(folder).tied == expected


def test_vectors_adapters_and_single_files(tmp_path, weights):
    tuned = {name: w + 0.5 if name == Q else w for name, w in weights.items()}
    write_checkpoint(tmp_path / "anchor", weights, "F32")
    write_checkpoint(tmp_path / "math", tuned, "F32")
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    tv.extract(family, tmp_path / "math.safetensors")
    tv.extract(family, tmp_path / "lora", form="lora", rank=1)

    vector = inspect(tmp_path / "math.safetensors")
    assert (vector.kind, list(vector.tensors)) == ("vector", [Q])
    assert vector.about["task"] == "math"
    assert list(vector.files) == ["math.safetensors"]

    adapter = inspect(tmp_path / "lora", norms=True)
    assert adapter.kind == "adapter"
    assert adapter.about["r"] == 1
    assert len(adapter.tensors) == 2
    assert {(key.block, key.module) for key in adapter.keys.values()} == {(0, "attention")}

    plain = inspect(tmp_path / "math" / "model.safetensors")
    assert (plain.kind, len(plain.tensors)) == ("model", len(weights))
    assert plain.tied == {}


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "absent")
