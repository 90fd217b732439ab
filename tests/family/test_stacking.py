"""Layers stacked from several models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import CONFIG, read_checkpoint, read_raw, tiny_llama, write_checkpoint

from taskvec.errors import FamilyError, RecipeError
from taskvec.outputs import run as engine
from taskvec.outputs.verify import verify
from taskvec.recipes.reading import load_recipe

Q, OUT, DOWN = "self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two models of three blocks, a and b."""
    for i, name in enumerate("ab"):
        weights = tiny_llama(np.random.default_rng(i))
        config = CONFIG | {"layer_types": [f"{name}{block}" for block in range(3)]}
        write_checkpoint(tmp_path / name, weights, config=config)
    return tmp_path


def recipe(root: Path, *pieces: dict, **more: object) -> Path:
    data = {"target": {"stack": list(pieces)}, "method": "passthrough"} | more
    path = root / "stack.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def built(path: Path, out: Path) -> Path:
    return engine.run(load_recipe(path), out).path


def test_blocks_are_renumbered_and_ends_come_from_the_ends(root):
    out = built(
        recipe(root, {"model": "a", "blocks": [0, 2]}, {"model": "b", "blocks": [1, 3]}),
        root / "out",
    )
    a, b, got = (read_raw(root / name) for name in ("a", "b", "out"))
    for new, (model, old) in enumerate([(a, 0), (a, 1), (b, 1), (b, 2)]):
        for part in (Q, OUT, DOWN, "input_layernorm.weight"):
            assert got[f"model.layers.{new}.{part}"] == model[f"model.layers.{old}.{part}"]
    assert not any(name.startswith("model.layers.4.") for name in got)
    assert got["model.embed_tokens.weight"] == a["model.embed_tokens.weight"]
    assert got["model.norm.weight"] == b["model.norm.weight"]
    assert got["lm_head.weight"] == b["lm_head.weight"]
    assert got["odd"] == a["odd"]  # whatever it is
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["a0", "a1", "b1", "b2"]
    assert all(check.outcome == "same" for check in verify(out, replay=True))
    card = (out / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])  # no names on the hub
    assert "| target | stack of a + b |" in card


def test_one_model_may_come_twice(root):
    built(
        recipe(root, {"model": "a", "blocks": [0, 2]}, {"model": "a", "blocks": [1, 2]}),
        root / "out",
    )
    a, got = read_raw(root / "a"), read_raw(root / "out")
    for new, old in enumerate([0, 1, 1]):
        assert got[f"model.layers.{new}.{Q}"] == a[f"model.layers.{old}.{Q}"]


def test_numbered_parts_of_what_is_no_block_may_have_any_shape(root):
    """As in the merger of Qwen2.5-VL, between its vision tower and its blocks."""
    weights = {**tiny_llama(np.random.default_rng(0)), "visual.merger.mlp.0.bias": np.ones(128),
               "visual.merger.mlp.2.bias": np.ones(32)}  # fmt: skip
    write_checkpoint(root / "seeing", weights, config=CONFIG)
    built(recipe(root, *[{"model": "seeing", "blocks": [0, 2]}] * 2), root / "out")
    assert "visual.merger.mlp.2.bias" in read_raw(root / "out")


def test_scale_is_of_what_a_block_adds_to_the_residual_stream(root):
    built(
        recipe(
            root,
            {"model": "a", "blocks": [0, 1]},
            {"model": "a", "blocks": [1, 2], "scale": 0.5},
        ),
        root / "out",
    )
    a, got = read_checkpoint(root / "a"), read_checkpoint(root / "out")
    for part, factor in ((Q, 1.0), (OUT, 0.5), (DOWN, 0.5), ("mlp.up_proj.weight", 1.0)):
        np.testing.assert_array_equal(
            got[f"model.layers.1.{part}"], factor * a[f"model.layers.1.{part}"]
        )
        np.testing.assert_array_equal(got[f"model.layers.0.{part}"], a[f"model.layers.0.{part}"])


def test_a_stack_may_be_a_target_of_task_arithmetic(root):
    """Every member is stacked alike, so that task vectors fit."""

    def stack(name: str) -> dict:
        return {"stack": [{"model": name, "blocks": [0, 1]}, {"model": name, "blocks": [2, 3]}]}

    path = root / "r.yaml"
    data = {
        "instruct": stack("a"),
        "tasks": {"t": {"model": stack("b"), "scale": 1.0}},
        "method": "task_arithmetic",
        "out": {"precision": "float64"},
    }
    path.write_text(yaml.safe_dump(data))
    built(path, root / "out")
    b, got = read_raw(root / "b"), read_raw(root / "out")
    for new, old in enumerate([0, 2]):
        assert got[f"model.layers.{new}.{Q}"] == b[f"model.layers.{old}.{Q}"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([0, 4], "blocks [0, 4) of {a} are not among its 3 (0 to 2; the second number is the block "
                 "after the last)"),
        ([-1, 2], "blocks [-1, 2) of {a} are not among its 3"),
    ],
)  # fmt: skip
def test_blocks_that_a_model_does_not_have(root, blocks, message):
    with pytest.raises(FamilyError) as caught:
        built(recipe(root, {"model": "a", "blocks": blocks}), root / "out")
    assert message.format(a=root / "a") in str(caught.value)
    assert not (root / "out").exists()


def test_models_of_another_width(root):
    weights = {n: w[..., :10] if w.ndim else w for n, w in read_checkpoint(root / "b").items()}
    write_checkpoint(root / "b", weights)
    with pytest.raises(FamilyError, match="blocks of one model must be of one shape"):
        built(
            recipe(root, {"model": "a", "blocks": [0, 1]}, {"model": "b", "blocks": [0, 1]}),
            root / "out",
        )


def test_a_model_without_blocks(root):
    write_checkpoint(root / "flat", {"w": np.ones(3)})
    with pytest.raises(FamilyError, match="must have one tower of blocks; found none"):
        built(recipe(root, {"model": "flat", "blocks": [0, 1]}), root / "out")


def test_a_scale_that_a_norm_would_undo(root):
    weights = read_checkpoint(root / "a") | {
        "model.layers.0.post_feedforward_layernorm.weight": np.ones(3)
    }
    write_checkpoint(root / "a", weights)
    with pytest.raises(FamilyError, match="would have no effect"):
        built(recipe(root, {"model": "a", "blocks": [0, 1], "scale": 0.5}), root / "out")


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ({"model": "a"}, "blocks is missing in target.stack[0]"),
        ({"model": "a", "blocks": 3}, "blocks must be [first, the one after the last]; got 3"),
        ({"model": "a", "blocks": [2, 2]}, "blocks must be [first, the one after the last]"),
        ({"model": "a", "blocks": [0, True]}, "blocks must be [first, the one after the last]"),
        ({"model": "a", "blocks": [0, 1], "scale": ".nan"}, "scale must be a finite number"),
        ({"model": "a", "blocks": [0, 1], "scle": 1}, "unknown key 'scle'"),
    ],
)
def test_recipes_with_wrong_stacks(root, piece, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(root, piece))
    assert message in str(caught.value)


def test_passthrough_takes_no_tasks_and_needs_a_target(root):
    with pytest.raises(RecipeError, match="passthrough takes no tasks; remove them"):
        load_recipe(recipe(root, {"model": "a", "blocks": [0, 1]}, tasks={"t": "b"}))
    (root / "r.yaml").write_text("method: passthrough\nseed: 1\n")
    with pytest.raises(RecipeError, match="target is missing: passthrough writes it"):
        load_recipe(root / "r.yaml")
