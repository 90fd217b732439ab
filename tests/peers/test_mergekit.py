"""Against mergekit 0.1.5, where task arithmetic and averaging mean the same there and here.

mergekit is asked to compute in float32 and to round once: under `dtype: bfloat16` it rounds every
difference, weight and sum: 3 % of the weights below are then more than one step off the formula.
Where terms cancel (0.7 · −9 + 0.3 · 21 is 0, but not in float32), a step of the tiny remainder is
finer than float32 can tell; there the two may differ by float32's rounding of the terms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

MERGEKIT = Path(__file__).resolve().parents[2] / ".venv-mergekit" / "bin" / "mergekit-yaml"
TASKVEC = Path(sys.executable).with_name("taskvec")
FLOAT32_ROUNDINGS = 4 * 2.0**-24  # a product, a difference and a sum or two
HIDDEN, BLOCKS, KEYS, MLP, VOCAB = 64, 2, 32, 128, 256

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not MERGEKIT.exists(), reason="no .venv-mergekit here: run benchmarks/peer_env.sh"
    ),
]

Weights = dict[str, Any]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an anchor and two fine-tunes, about 100,000 random bfloat16 weights each."""
    folder = tmp_path_factory.mktemp("family")
    random = torch.Generator().manual_seed(0)
    anchor = {name: 0.02 * _normal(shape, random) for name, shape in _shapes().items()}
    members = {"anchor": anchor}
    for task in ("first", "second"):
        members[task] = {k: v + 0.005 * _normal(v.shape, random) for k, v in anchor.items()}
    for name, weights in members.items():
        _save(weights, folder / name)
    return {name: folder / name for name in members}


@pytest.mark.parametrize(
    "scales",
    [{"first": 0.5, "second": 0.3}, {"first": 0.5, "second": -0.4}, {"second": -0.4}],
    ids=["add two", "add one, subtract one", "subtract one"],
)
def test_task_arithmetic_agrees_within_one_step(
    family: dict[str, Path], tmp_path: Path, scales: dict[str, float]
) -> None:
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(family["anchor"]),
        "models": _weighted(family, scales),
        "parameters": {"normalize": False},
    }
    theirs = _mergekit(config, tmp_path)
    ours = _taskvec(family, scales, "task_arithmetic", tmp_path)
    anchor, tasks = _load(family["anchor"]), {task: _load(family[task]) for task in scales}
    largest = _largest([anchor, *tasks.values()])
    formula = {
        name: value.double()
        + sum(scale * (tasks[t][name].double() - value.double()) for t, scale in scales.items())
        for name, value in anchor.items()
    }
    _assert_all_close(ours, theirs, formula, largest)


def test_average_agrees_with_linear_within_one_step(
    family: dict[str, Path], tmp_path: Path
) -> None:
    scales = {"first": 0.7, "second": 0.3}
    config = {
        "merge_method": "linear",
        "models": _weighted(family, scales),
        "parameters": {"normalize": True},
    }
    theirs = _mergekit(config, tmp_path)
    ours = _taskvec(family, scales, "average", tmp_path)
    first, second = _load(family["first"]), _load(family["second"])
    largest = _largest([first, second])
    formula = {k: 0.7 * first[k].double() + 0.3 * second[k].double() for k in first}
    _assert_all_close(ours, theirs, formula, largest)


def _assert_all_close(ours: Weights, theirs: Weights, formula: Weights, largest: Weights) -> None:
    assert ours.keys() == theirs.keys() == formula.keys()
    for name, exact in formula.items():
        rounded, slack = exact.bfloat16(), FLOAT32_ROUNDINGS * largest[name]
        assert _far(theirs[name], rounded, slack) == 0, f"{name}: mergekit against the formula"
        assert _far(ours[name], rounded, slack) == 0, f"{name}: taskvec against the formula"
        assert _far(ours[name], theirs[name], slack) == 0, f"{name}: taskvec against mergekit"


def _far(a: Any, b: Any, slack: Any) -> int:
    """How many entries are more than one representable bfloat16, and more than `slack`, apart."""
    assert a.dtype == b.dtype == torch.bfloat16
    assert a.shape == b.shape
    steps = (_ordered(a) - _ordered(b)).abs()
    return int(((steps > 1) & ((a.double() - b.double()).abs() > slack)).sum())


def _largest(members: list[Weights]) -> Weights:
    """Entry by entry, the largest magnitude among the members."""
    return {k: torch.stack([m[k].double().abs() for m in members]).amax(0) for k in members[0]}


def _ordered(values: Any) -> Any:
    """Bit patterns as integers in the order of the values; +0 and −0 are the same."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _weighted(family: dict[str, Path], scales: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"model": str(family[task]), "parameters": {"weight": scale}}
        for task, scale in scales.items()
    ]


def _mergekit(config: dict[str, Any], folder: Path) -> Weights:
    content = {**config, "dtype": "float32", "out_dtype": "bfloat16"}
    recipe, out = folder / "mergekit.yml", folder / "mergekit"
    recipe.write_text(json.dumps(content))
    _run(MERGEKIT, recipe, out)
    return _load(out)


def _taskvec(
    family: dict[str, Path], scales: dict[str, float], method: str, folder: Path
) -> Weights:
    content = {
        "anchor": str(family["anchor"]),
        "tasks": {t: {"model": str(family[t]), "scale": scale} for t, scale in scales.items()},
        "method": {"name": method},
    }
    recipe, out = folder / "taskvec.yml", folder / "taskvec"
    recipe.write_text(json.dumps(content))
    _run(TASKVEC, "merge", recipe, out)
    return _load(out)


def _run(*command: str | Path) -> None:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{Path(command[0]).name}: {done.stderr[-2000:]}"


def _shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    inner = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(BLOCKS)
        for name, shape in block.items()
    }
    outer = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {**outer, **inner}


def _normal(shape: Any, random: Any) -> Any:
    return torch.randn(tuple(shape), generator=random)


def _save(weights: Weights, folder: Path) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rounded = {name: value.bfloat16() for name, value in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


def _load(folder: Path) -> Weights:
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights
