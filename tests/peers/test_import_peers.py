"""Configurations of mergekit 0.1.5: what it makes of them, and what we make of them, imported.

`--faithful` must give the same weights, within the rounding of float32, wherever no random mask is
drawn. mergekit works on float32 weights here; with 16 bits it rounds every step.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from taskvec.outputs import run as engine
from taskvec.recipes.located import parse_yaml
from taskvec.recipes.mergekit.convert import convert
from taskvec.recipes.reading import read_recipe
from taskvec.streaming import RunOptions

PYTHON = Path(__file__).resolve().parents[2] / ".venv-mergekit" / "bin" / "python"
HIDDEN, BLOCKS, VOCAB = 32, 3, 128

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="no .venv-mergekit here: run benchmarks/peer_env.sh"
    ),
]

MERGE_ALL = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, write_model_card=False, random_seed=0, quiet=True)
for name in json.load(open("names.json")):
    config = MergeConfiguration.model_validate(yaml.safe_load(open(name + ".yml")))
    run_merge(config, "theirs-" + name, options=options)
"""


def both(a: Any, b: Any, **more: Any) -> dict[str, Any]:
    """A configuration of two fine-tunes with their weights."""
    inputs = [{"model": "first", "parameters": {"weight": a}},
              {"model": "second", "parameters": {"weight": b}}]  # fmt: skip
    return {"models": inputs, "base_model": "anchor"} | more


def sliced(*sources: tuple[str, int, int], **parameters: Any) -> dict[str, Any]:
    listed = [{"model": m, "layer_range": [a, b]} for m, a, b in sources]
    return {"sources": listed} | ({"parameters": parameters} if parameters else {})


GRADIENT = [0.2, 1.0, 0.6]
FILTERED = [
    {"filter": "mlp", "value": [0.1, 0.9]},
    {"filter": "layers.1", "value": 0.3},
    {"filter": "norm", "value": [0.7, 0.4]},
    {"value": 0.5},
]
TRIMMED = {"density": 0.5}
SHARES = [1, 0.75, 0.125]  # of every tensor a whole number of entries
FILTERED_SHARES = [
    {"filter": "mlp", "value": [0.5, 0.25]},
    {"filter": "layers.1", "value": 0.75},
    {"filter": "norm", "value": [0.75, 0.5]},
    {"value": 0},
]


def own(first: dict[str, Any], second: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A configuration of two fine-tunes with parameters of their own."""
    inputs = [{"model": "first", "parameters": first}, {"model": "second", "parameters": second}]
    return {"models": inputs, "base_model": "anchor"} | more


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": both(0.7, 0.6, base_model=None, merge_method="linear"),
    "linear-layers": both(GRADIENT, FILTERED, base_model=None, merge_method="linear"),
    "linear-negative": both(1.0, -0.3, base_model=None, merge_method="linear"),
    "linear-base": both(1.0, 2.0, merge_method="linear", parameters={"weight": 0.5}),
    "arithmetic": both(0.7, -0.6, merge_method="task_arithmetic", parameters={"lambda": 0.8}),
    "arithmetic-layers": both(GRADIENT, FILTERED, merge_method="task_arithmetic"),
    "arithmetic-normalized": both(
        0.7, -0.3, merge_method="task_arithmetic", parameters={"normalize": True}
    ),
    "arithmetic-lambda": both(GRADIENT, 0.5, merge_method="task_arithmetic", parameters={
        "lambda": [0.5, 1.5]}),
    "arithmetic-lambda-filters": both(
        0.7, GRADIENT, merge_method="task_arithmetic", parameters={"lambda": FILTERED}),
    "arithmetic-normalized-layers": both(
        GRADIENT, FILTERED, merge_method="task_arithmetic", parameters={
            "normalize": True, "lambda": [0.9, 0.6]}),
    "arithmetic-normalized-negative": both(
        [1, 0.5, 0.8], [-0.2, -0.4], merge_method="task_arithmetic", parameters={
            "normalize": True}),
    "dare-linear-normalized": both(
        GRADIENT, 0.5, merge_method="dare_linear", parameters={"normalize": True}),
    "ties-lambda": both(0.4, 0.4, merge_method="ties", parameters=TRIMMED | {"lambda": FILTERED}),
    "ties": both(0.4, 0.4, merge_method="ties", parameters=TRIMMED | {"lambda": 1.5}),
    "ties-unequal": both(0.7, 0.2, merge_method="ties", parameters=TRIMMED),
    "ties-layers": both(GRADIENT, FILTERED, merge_method="ties", parameters=TRIMMED),
    "ties-sum": both(0.7, -0.2, merge_method="ties", parameters=TRIMMED | {"normalize": False}),
    "ties-default": both(0.7, 0.2, merge_method="ties"),
    "ties-minus-one": {
        "merge_method": "ties", "base_model": "anchor",
        "models": [{"model": "first", "parameters": {"weight": -1}}],
    },
    "ties-density": own(
        {"weight": 1.0, "density": SHARES}, {"weight": [0, 0.3, 0.7, 1], "density": 0.5},
        merge_method="ties", parameters={"int8_mask": True}),
    "ties-density-filters": both(
        0.4, 0.4, merge_method="ties", parameters={"density": FILTERED_SHARES}),
    "ties-density-slices": {
        "merge_method": "ties", "base_model": "anchor",
        "slices": [
            sliced(("first", 0, 2), ("anchor", 0, 2), weight=0.9, density=[0.25, 0.75]),
            sliced(("second", 1, 3), ("anchor", 1, 3), weight=0.9, density=0.5),
        ],
    },
    "ties-density-published": own(
        {"weight": 1.0, "density": [1, 0.7, 0.1]},
        {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}], "density": 0.33},
        merge_method="ties", parameters={"int8_mask": True}),
    "dare-linear": both(0.7, 0.2, merge_method="dare_linear"),
    "dare-ties": both(0.7, 0.2, merge_method="dare_ties"),
    "dare-ties-normalized": both(
        0.7, 0.2, merge_method="dare_ties", parameters={"normalize": True}
    ),
    "della": both(0.7, 0.2, merge_method="della"),
    "della-linear": both(0.7, 0.2, merge_method="della_linear"),
    "breadcrumbs": both(
        0.7, 0.2, merge_method="breadcrumbs", parameters={"density": 0.5, "gamma": 0.125}
    ),
    "breadcrumbs-layers": both(
        0.7, 0.2, merge_method="breadcrumbs", parameters={
            "density": [0.5, 0.25], "gamma": [0.125, 0.25]}),
    "breadcrumbs-filters": both(
        0.7, 0.2, merge_method="breadcrumbs_ties", parameters={
            "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.875}], "gamma": 0.25}),
    "breadcrumbs-full": both(
        0.7, 0.2, merge_method="breadcrumbs", parameters={"density": 0.875, "gamma": 0.25}
    ),
    "breadcrumbs-ties": both(0.7, 0.2, merge_method="breadcrumbs_ties", parameters={
        "density": 0.5, "gamma": 0.125}),
    "slerp": {
        "merge_method": "slerp", "base_model": "first",
        "slices": [sliced(("first", 0, BLOCKS), ("second", 0, BLOCKS))],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3]},
                             {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.4}]},
    },
    "nuslerp": both(0.7, 0.2, merge_method="nuslerp"),
    "nuslerp-models": both(0.7, 0.2, base_model=None, merge_method="nuslerp"),
    "nuslerp-rows": both(
        0.7, 0.2, merge_method="nuslerp", parameters={"nuslerp_flatten": False}
    ),
    "nuslerp-columns": both(0.7, 0.2, merge_method="nuslerp", parameters={
        "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "nearswap": {
        "merge_method": "nearswap", "base_model": "anchor", "parameters": {"t": 0.003},
        "models": [{"model": "first"}],
    },
    "nearswap-layers": {
        "merge_method": "nearswap", "base_model": "anchor", "models": [{"model": "first"}],
        "parameters": {"t": [{"filter": "mlp", "value": 0.002}, {"value": [0.003, 0.001]}]},
    },
    "model-stock": {"merge_method": "model_stock", "base_model": "anchor",
                    "models": [{"model": "first"}, {"model": "like-first"}]},
    "model-stock-filters": {
        "merge_method": "model_stock", "base_model": "anchor",
        "models": [{"model": "first"}, {"model": "like-first"}],
        "parameters": {"filter_wise": True},
    },
    "arcee-fusion": {
        "merge_method": "arcee_fusion", "base_model": "anchor", "models": [{"model": "first"}],
    },
    "ram": {"merge_method": "ram", "base_model": "anchor", "parameters": {"epsilon": 0.004},
            "models": [{"model": "first"}, {"model": "second"}]},
    "ram-plus": {
        "merge_method": "ramplus_tl", "base_model": "anchor", "parameters": {"epsilon": 0.004},
        "models": [{"model": "first"}, {"model": "second"}],
    },
    "ram-plus-layers": {
        "merge_method": "ramplus_tl", "base_model": "anchor",
        "models": [{"model": "first"}, {"model": "second"}],
        "parameters": {
            "epsilon": [0.001, 0.006], "r": [{"filter": "mlp", "value": 1}, {"value": 0.1}],
            "alpha": [0.1, 2]},
    },
    "linear-sum": both(0.7, 0.6, base_model=None, merge_method="linear", parameters={
        "normalize": False}),
    "linear-sum-layers": both(GRADIENT, FILTERED, base_model=None, merge_method="linear",
                              parameters={"normalize": False}),
    "sce": {"merge_method": "sce", "base_model": "anchor",
            "models": [{"model": "first"}, {"model": "second"}]},
    "sce-half": {"merge_method": "sce", "base_model": "anchor",
                 "parameters": {"select_topk": 0.5},
                 "models": [{"model": "first"}, {"model": "second"}]},
    "sce-light": {"merge_method": "sce", "base_model": "anchor", "parameters": {
        "select_topk": [0.25, 0.75]}, "models": [{"model": "light"}, {"model": "lighter"}]},
    "multislerp": both(0.7, 0.2, merge_method="multislerp"),
    "multislerp-models": {
        "merge_method": "multislerp", "parameters": {"weight": GRADIENT},
        "models": [{"model": n} for n in ("anchor", "first", "second")]},
    "layers": {"merge_method": "passthrough",
               "slices": [sliced(("first", 0, 2)), sliced(("second", 1, 3))]},
    "layers-scaled": {
        "merge_method": "passthrough",
        "slices": [
            sliced(("first", 0, 3)),
            sliced(("second", 1, 3), scale=[{"filter": "o_proj", "value": 0},
                                            {"filter": "down_proj", "value": 0}, {"value": 1}]),
        ],
    },
    "layers-merged": {
        "merge_method": "ties", "base_model": "anchor",
        "slices": [
            sliced(("first", 0, 2), ("anchor", 0, 2), weight=[0.2, 0.9], density=0.5),
            sliced(("second", 1, 3), ("anchor", 1, 3), weight=0.4, density=0.5),
        ],
    },
    "karcher": {
        "merge_method": "karcher", "parameters": {"max_iter": 100, "tol": 1e-9},
        "models": [{"model": "anchor"}, {"model": "first"}, {"model": "second"}],
    },
    "module": {
        "merge_method": "linear",
        "modules": {"default": {
            "models": [{"model": "first"}, {"model": "second"}], "parameters": {"weight": 2}}},
    },
}  # fmt: skip
ROUNDING = 1e-7  # of weights that are below 0.1 in magnitude


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, configurations and what mergekit made of each."""
    folder = tmp_path_factory.mktemp("import")
    random = torch.Generator().manual_seed(0)
    anchor = {name: 0.02 * _normal(shape, random) for name, shape in _shapes().items()}
    first, second = (
        {k: v + 0.005 * _normal(v.shape, random) for k, v in anchor.items()} for _ in range(2)
    )
    like = {k: v + 0.002 * _normal(v.shape, random) for k, v in first.items()}
    moved = {k: torch.rand(v.shape, generator=random) < 0.5 for k, v in anchor.items()}
    light, lighter = (
        {k: v + size * _normal(v.shape, random) * moved[k] for k, v in anchor.items()}
        for size in (0.0009, 0.0003)
    )
    members = {"anchor": anchor, "first": first, "second": second, "like-first": like,
               "light": light, "lighter": lighter}  # fmt: skip
    for name, weights in members.items():
        _save(weights, folder / name)
    for name, config in CONFIGS.items():
        content = {k: v for k, v in config.items() if v is not None} | {"dtype": "float32"}
        (folder / f"{name}.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    (folder / "names.json").write_text(json.dumps(list(CONFIGS)))
    done = subprocess.run(
        [PYTHON, "-c", MERGE_ALL], cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def imported(root: Path, name: str, *, faithful: bool) -> dict[str, Any]:
    path = root / f"{name}.yml"
    recipe = convert(parse_yaml(path.read_text(), path.name), root, faithful=faithful).recipe
    kind = "faithful" if faithful else "meant"
    file = root / f"{name}-{kind}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    out = root / f"ours-{name}-{kind}"
    options = RunOptions(force=True, cache="off", threads=2)
    engine.run(read_recipe(parse_yaml(file.read_text(), ""), root), out, options=options)
    return _load(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_faithful_import_gives_their_weights(root: Path, name: str) -> None:
    ours, theirs = imported(root, name, faithful=True), _load(root / f"theirs-{name}")
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        gap = (ours[tensor].double() - expected.double()).abs()
        if name == "arcee-fusion":  # its divergence is taken in float32: noise moves entries
            assert (gap > ROUNDING).double().mean() < 0.25, tensor
            continue
        if name in ("ties-density-published", "sce-half", "sce-light"):  # rounded down there
            assert (gap > ROUNDING).sum() <= 2, tensor
            continue
        assert gap.max() <= ROUNDING, f"{tensor}: {gap.max()}"


def towards(root: Path, merged: dict[str, Any], task: str) -> float:
    """Cosine of what a merge changed with a task vector."""
    anchor, tuned = _load(root / "anchor"), _load(root / task)
    change = torch.cat([(merged[k] - v).flatten() for k, v in anchor.items()])
    vector = torch.cat([(tuned[k] - v).flatten() for k, v in anchor.items()])
    return float(torch.nn.functional.cosine_similarity(change, vector, dim=0))


def test_one_model_at_minus_one_is_added_there_and_subtracted_here(root: Path) -> None:
    assert towards(root, _load(root / "theirs-ties-minus-one"), "first") > 0.999
    assert towards(root, imported(root, "ties-minus-one", faithful=False), "first") < -0.5


def test_a_gradient_gives_the_head_its_first_value_there_and_its_last_here(root: Path) -> None:
    theirs = _load(root / "theirs-arithmetic-layers")
    ours = imported(root, "arithmetic-layers", faithful=False)
    anchor, first, second = (_load(root / n) for n in ("anchor", "first", "second"))
    for merged, scale in ((theirs, GRADIENT[0]), (ours, GRADIENT[-1])):
        for name in ("lm_head.weight",):
            start = anchor[name]
            expected = start + scale * (first[name] - start) + 0.5 * (second[name] - start)
            torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)


def test_a_density_gradient_gives_the_head_its_first_value_there_and_its_last_here(root) -> None:
    anchor = _load(root / "anchor")["lm_head.weight"]
    theirs = _load(root / "theirs-ties-density")["lm_head.weight"]
    ours = imported(root, "ties-density", faithful=False)["lm_head.weight"]
    assert (theirs != anchor).double().mean() > 0.999  # density 1 of the first, weight 0 beside it
    assert 0.5 < (ours != anchor).double().mean() < 0.5 + 0.125 + 0.01


def test_without_a_density_nothing_is_dropped_there(root: Path) -> None:
    anchor = _load(root / "anchor")
    theirs = _load(root / "theirs-ties-default")
    ours = imported(root, "ties-default", faithful=False)

    def changed(merged: dict[str, Any]) -> float:
        return float(torch.cat([(merged[k] != v).flatten() for k, v in anchor.items()])
                     .double().mean())  # fmt: skip

    assert changed(theirs) > 0.999
    assert 0.2 < changed(ours) < 0.4


def _normal(shape: Any, random: Any) -> Any:
    return torch.randn(tuple(shape), generator=random)


def _shapes() -> dict[str, tuple[int, ...]]:
    square, wide = (HIDDEN, HIDDEN), (2 * HIDDEN, HIDDEN)
    block = {
        "self_attn.q_proj": square, "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": square,
        "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1],
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    inner = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(BLOCKS)
        for name, shape in block.items()
    }
    outer = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {**outer, **inner, "lm_head.weight": (VOCAB, HIDDEN)}


def _save(weights: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _load(folder: Path) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights
