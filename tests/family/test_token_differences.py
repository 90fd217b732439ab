"""Adapters and vectors whose rows of tokens are not the anchor's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import read_checkpoint, write_checkpoint, write_safetensors

import taskvec as tv
from taskvec.errors import FamilyError

ROWS, ADDED = 12, ("<a>", "<b>")
EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS,
          "num_hidden_layers": 1, "tie_word_embeddings": False}  # fmt: skip
Arrays = dict[str, np.ndarray[Any, Any]]


def tokens(folder: Path, *added: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entries = [{"id": ROWS + i, "content": t, "special": True} | flags for i, t in enumerate(added)]
    vocabulary = {f"w{i}": i for i in range(ROWS)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": entries, "model": model})
    )


def draw(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@pytest.fixture
def base(tmp_path: Path) -> Arrays:
    weights = {EMBED: draw(0, ROWS, 4), HEAD: draw(1, ROWS, 4), f"{Q}.weight": draw(2, 4, 4)}
    write_checkpoint(tmp_path / "base", weights, "F32", config=CONFIG)
    tokens(tmp_path / "base")
    return weights


def adapter(folder: Path, stored: Arrays, **config: Any) -> Path:
    tokens(folder, *ADDED)
    a, b = draw(3, 2, 4), draw(4, 4, 2)
    factors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    named = {f"base_model.model.{n}": t for n, t in (factors | stored).items()}
    write_safetensors(folder / "adapter_model.safetensors", named, "F32")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def merge(root: Path, task: Path, out: str, **policy: Any) -> tuple[Arrays, dict[str, Any]]:
    family = tv.Family(anchor=root / "base", tasks={"t": task}, **policy)
    tv.merge(family, root / out, method="task_arithmetic", scale={"t": 1.0})
    return read_checkpoint(root / out), json.loads((root / out / "config.json").read_text())


# --- adapters ------------------------------------------------------------------------------------


def test_an_adapter_that_brings_rows_of_new_tokens(tmp_path, base):
    whole = {EMBED: draw(5, ROWS + 2, 4), HEAD: draw(6, ROWS + 2, 4)}
    task = adapter(tmp_path / "lora", whole)
    got, config = merge(tmp_path, task, "out", vocabulary="union")
    for name, expected in whole.items():
        np.testing.assert_allclose(got[name], expected, atol=1e-6)
    assert config["vocab_size"] == ROWS + 2
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [entry["content"] for entry in added] == list(ADDED)
    got, _ = merge(tmp_path, task, "known", vocabulary="by-token")
    assert got[EMBED].shape == (ROWS, 4)
    np.testing.assert_allclose(got[EMBED], whole[EMBED][:ROWS], atol=1e-6)


def test_an_adapter_of_a_grown_embedding(tmp_path, base):
    """PEFT stores the resized embedding beside the factors that are trained over it."""
    grown, a, b = draw(5, ROWS + 2, 4), draw(7, 2, ROWS + 2), draw(8, 4, 2)
    stored = {
        "model.embed_tokens.base_layer.weight": grown,
        "model.embed_tokens.lora_embedding_A": a,
        "model.embed_tokens.lora_embedding_B": b,
        HEAD: draw(6, ROWS + 2, 4),
    }
    got, _ = merge(tmp_path, adapter(tmp_path / "lora", stored), "out", vocabulary="union")
    np.testing.assert_allclose(got[EMBED], grown + 2 * (b @ a).T, atol=1e-5)


def test_fewer_rows_than_a_padded_base(tmp_path, base):
    whole = {EMBED: draw(5, ROWS - 2, 4), HEAD: draw(6, ROWS - 2, 4)}
    task = adapter(tmp_path / "lora", whole)
    vocabulary = {f"w{i}": i for i in range(ROWS - 2)}
    for folder in (tmp_path / "base", task):
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []})
        )
    got, config = merge(tmp_path, task, "out", vocabulary="truncate-padding")
    np.testing.assert_allclose(got[EMBED], whole[EMBED], atol=1e-6)
    assert config["vocab_size"] == ROWS - 2
    with pytest.raises(FamilyError, match="vocabulary: truncate-padding"):
        merge(tmp_path, task, "refused")


def test_new_rows_are_refused_with_the_policy_that_helps(tmp_path, base):
    whole = {EMBED: draw(5, ROWS + 2, 4), HEAD: draw(6, ROWS + 2, 4)}
    with pytest.raises(FamilyError, match="union to add it"):
        merge(tmp_path, adapter(tmp_path / "lora", whole), "out")


def test_an_adapter_with_new_tokens_as_the_model_itself(tmp_path, base):
    whole = {EMBED: draw(5, ROWS + 2, 4), HEAD: draw(6, ROWS + 2, 4)}
    lora = adapter(tmp_path / "lora", whole)
    family = tv.Family(base=tmp_path / "base", anchor=lora, tasks={"t": lora})
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale={"t": 1.0})
    got = read_checkpoint(tmp_path / "out")
    np.testing.assert_allclose(got[HEAD], whole[HEAD], atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ROWS + 2


def test_columns_are_still_the_models(tmp_path, base):
    task = adapter(tmp_path / "lora", {HEAD: draw(6, ROWS, 5)})
    with pytest.raises(FamilyError, match="give the model that it was trained over"):
        merge(tmp_path, task, "out", vocabulary="union")


# --- extracted vectors ---------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path: Path, base: Arrays) -> Arrays:
    weights = {n: np.concatenate([base[n] + 0.25, draw(9, 2, 4)]) for n in (EMBED, HEAD)}
    weights[f"{Q}.weight"] = base[f"{Q}.weight"] + draw(10, 4, 4)
    write_checkpoint(tmp_path / "tuned", weights, "F32", config=CONFIG | {"vocab_size": ROWS + 2})
    tokens(tmp_path / "tuned", *ADDED)
    return weights


@pytest.mark.parametrize("form", ["vector", "lora"])
def test_what_is_extracted_carries_its_tokens(tmp_path, tuned, form):
    family = tv.Family(
        anchor=tmp_path / "base", tasks={"t": tmp_path / "tuned"}, vocabulary="union"
    )
    task = tmp_path / ("v.safetensors" if form == "vector" else "lora-out")
    more = {} if form == "vector" else {"form": "lora", "rank": 4, "rest": "save"}
    done = tv.extract(family, task, **more)
    assert not any(name.startswith("taskvec.") for name in done.tensors)
    got, config = merge(tmp_path, task, "two", vocabulary="union")
    expected, _ = merge(tmp_path, tmp_path / "tuned", "one", vocabulary="union")
    assert got.keys() == expected.keys()
    for name in expected:
        if form == "vector":
            np.testing.assert_array_equal(got[name], expected[name])
        else:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5)
    one, two = (json.loads((tmp_path / o / "tokenizer.json").read_text()) for o in ("one", "two"))
    assert one == two
    assert config["vocab_size"] == ROWS + 2


def test_a_vector_is_not_put_onto_other_tokens(tmp_path, tuned):
    family = tv.Family(
        anchor=tmp_path / "base", tasks={"t": tmp_path / "tuned"}, vocabulary="union"
    )
    tv.extract(family, tmp_path / "v.safetensors")
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w3"', '"other"'))
    with pytest.raises(FamilyError, match="extract it over this anchor"):
        merge(tmp_path, tmp_path / "v.safetensors", "out", vocabulary="union")
    with pytest.raises(FamilyError):
        merge(tmp_path, tmp_path / "v.safetensors", "out")


def test_a_vector_whose_rows_are_the_anchors_says_nothing_of_tokens(tmp_path, base):
    write_checkpoint(tmp_path / "tuned", {n: t + 1 for n, t in base.items()}, "F32", config=CONFIG)
    family = tv.Family(anchor=tmp_path / "base", tasks={"t": tmp_path / "tuned"})
    tv.extract(family, tmp_path / "v.safetensors")
    from taskvec.checkpoints.safetensors import read_metadata

    assert "new_tokens" not in read_metadata(tmp_path / "v.safetensors")
