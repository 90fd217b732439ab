"""What the config of a stack says of its blocks, and whether transformers can load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from tests.conftest import read_raw, write_checkpoint
from tests.wild_architectures import TEXT, WILD

from taskvec.errors import FamilyError
from taskvec.outputs import run as engine
from taskvec.recipes.reading import load_recipe

N = 4


def model(folder: Path, config: dict[str, Any], blocks: int = N, root: str = "model.") -> Path:
    """A folder whose blocks hold one weight each, filled with their number."""
    tensors: dict[str, Any] = {
        f"{root}layers.{i}.self_attn.o_proj.weight": np.full((3, 3), float(i))
        for i in range(blocks)
    }
    tensors |= {f"{root}embed_tokens.weight": np.ones((5, 3)), f"{root}norm.weight": np.ones(3)}
    return write_checkpoint(folder, tensors, config=config)


def stacked(folder: Path, *pieces: tuple[int, int], **more: Any) -> dict[str, Any]:
    data = {
        "target": {"stack": [{"model": str(folder), "blocks": list(p), **more} for p in pieces]},
        "method": "passthrough",
    }
    recipe = folder.parent / "stack.yaml"
    recipe.write_text(yaml.safe_dump(data))
    out = engine.run(load_recipe(recipe), folder.parent / "out").path
    assert out is not None
    return json.loads((out / "config.json").read_text())


def test_every_list_by_block_is_stacked_and_no_other(tmp_path):
    config = {
        "num_hidden_layers": N,
        "kinds_of_mine": ["a", "b", "c", "d"],
        "intermediate_size": [10, 20, 30, 40],
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_only_layers": [0, 3],
        "eos_token_id": [7, 8, 9, 10],
        "architectures": ["A", "B", "C", "D"],
        "mrope_section": [1, 2, 3, 4],
        "vision_config": {"num_hidden_layers": N, "kinds": [1, 2, 3, 4]},
    }
    got = stacked(model(tmp_path / "m", config), (0, 4), (2, 4))

    assert got["num_hidden_layers"] == 6
    assert got["kinds_of_mine"] == ["a", "b", "c", "d", "c", "d"]
    assert got["intermediate_size"] == [10, 20, 30, 40, 30, 40]
    assert got["no_rope_layers"] == [1, 1, 1, 0, 1, 0]
    assert got["mlp_only_layers"] == [0, 3, 5]
    for key in ("eos_token_id", "architectures", "mrope_section", "vision_config"):
        assert got[key] == config[key]


def test_the_config_of_the_language_model_inside_is_stacked_too(tmp_path):
    text = {"num_hidden_layers": N, "layer_types": list("abcd"), "vocab_size": 5}
    config = {"text_config": text, "vision_config": {"num_hidden_layers": 2}}
    folder = model(tmp_path / "m", config, root="model.language_model.")
    tower = {f"model.visual.blocks.{i}.attn.qkv.weight": np.ones((3, 3)) for i in range(2)}
    tensors = {
        f"model.language_model.layers.{i}.self_attn.o_proj.weight": np.full((3, 3), float(i))
        for i in range(N)
    }
    write_checkpoint(folder, tensors | tower, config=config)

    got = stacked(folder, (0, 2), (1, 4))

    assert got["text_config"]["num_hidden_layers"] == 5
    assert got["text_config"]["layer_types"] == list("abbcd")
    assert got["vision_config"] == config["vision_config"]
    names = read_raw(tmp_path / "out")
    assert set(tower) <= set(names)
    assert "model.language_model.layers.4.self_attn.o_proj.weight" in names


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gemma2"}, {"layer_types": "SFSFSF"}),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, {"layer_types": "SFSFSF"}),
        ({"model_type": "cohere2"}, {"layer_types": "SSSFSF"}),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9,
             "max_window_layers": 3},
            {"layer_types": "FFFSFS"},
        ),
        ({"model_type": "smollm3"}, {"no_rope_layers": [1, 1, 1, 0, 1, 0]}),
        (
            {"model_type": "llama4_text", "interleave_moe_layer_step": 2},
            {"no_rope_layers": [1, 1, 1, 0, 1, 0], "moe_layers": [1, 3, 5]},
        ),
    ],
)  # fmt: skip
def test_kinds_that_follow_from_the_number_are_written_out(tmp_path, config, expected):
    got = stacked(model(tmp_path / "m", {"num_hidden_layers": N, **config}), (0, 4), (2, 4))

    words = {"S": "sliding_attention", "F": "full_attention"}
    for key, value in expected.items():
        assert got[key] == ([words[c] for c in value] if isinstance(value, str) else value)


def test_rules_are_set_anew_where_they_can_say_it(tmp_path):
    config = {
        "num_hidden_layers": N, "model_type": "jamba",
        "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 4, "expert_layer_offset": 0,
        "first_k_dense_replace": 1, "decoder_sparse_step": 2,
    }  # fmt: skip
    got = stacked(model(tmp_path / "m", config), (1, 4))

    assert [i % got["attn_layer_period"] == got["attn_layer_offset"] for i in range(3)] == [
        True, False, True,
    ]  # fmt: skip
    assert not any(i % got["expert_layer_period"] == got["expert_layer_offset"] for i in range(3))
    assert got["first_k_dense_replace"] == 0
    assert (got["decoder_sparse_step"], got["mlp_only_layers"]) == (1, [1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hybrid_override_pattern": "M-*E"}, {"hybrid_override_pattern": "-*-*"}),
        (
            {"attention_types": [[["global", "local"], 2]]},
            {"attention_types": [[["local"], 1], [["global"], 1], [["local"], 1], [["global"], 1]]},
        ),
        (
            {"num_transformer_layers": N, "ffn_multipliers": [1.0, 1.5, 2.0, 2.5]},
            {"num_transformer_layers": 4, "ffn_multipliers": [1.5, 2.0, 1.5, 2.0]},
        ),
        (
            {
                "model_type": "modernbert",
                "global_attn_every_n_layers": 2,
                "pieces": [(0, 4), (2, 4)],
            },
            {"global_attn_every_n_layers": 2},
        ),
        (
            {"thinker_config": {"text_config": {"num_hidden_layers": N, "kinds": list("abcd")}}},
            {"thinker_config": {"text_config": {"num_hidden_layers": 4, "kinds": list("bcbc")}}},
        ),
    ],
)
def test_other_ways_to_say_what_a_block_is(tmp_path, config, expected):
    config = dict(config)
    pieces = config.pop("pieces", [(1, 3), (1, 3)])
    got = stacked(model(tmp_path / "m", {"num_hidden_layers": N, **config}), *pieces)
    for key, value in expected.items():
        assert got[key] == value


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"global_attn_every_n_layers": 3}, "global_attn_every_n_layers"),
        ({"attention_types": [["global", 2, 3]]}, "attention_types"),
        ({"attn_layer_period": 4, "attn_layer_offset": 3}, "attn_layer_period"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
    ],
)
def test_rules_that_cannot_say_it_are_refused_by_name(tmp_path, config, key):
    folder = model(tmp_path / "m", {"num_hidden_layers": N, **config})
    with pytest.raises(FamilyError, match=key):
        stacked(folder, (0, 4), (3, 4), (0, 1))


def test_blocks_beyond_those_of_the_config_are_refused(tmp_path):
    """Layers that predict further tokens stand behind the blocks, as DeepSeek V3 has them."""
    folder = model(tmp_path / "m", {"num_hidden_layers": N - 1})
    with pytest.raises(FamilyError, match="its config names 3"):
        stacked(folder, (0, 2), (1, 3))


def test_a_scale_is_refused_where_it_is_not_known_what_a_block_adds(tmp_path):
    folder = model(tmp_path / "m", {"num_hidden_layers": N})
    tensors = {f"model.layers.{i}.strange.weight": np.ones((3, 3)) for i in range(N)}
    write_checkpoint(folder, tensors, config={"num_hidden_layers": N})
    with pytest.raises(FamilyError, match="remove scale"):
        stacked(folder, (0, 2), scale=0.5)


@pytest.mark.parametrize(
    "which", ["phi", "starcoder2", "smollm3", "gpt_oss", "jamba", "qwen3_next"]
)
def test_stacks_load_in_transformers(tmp_path, which):
    cls, options = WILD[which]
    config = tf.AutoConfig.for_model(which, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = getattr(tf, cls)(config)
    built.save_pretrained(tmp_path / "m")

    stacked(tmp_path / "m", (0, 2), (0, 2))
    loaded, found = getattr(tf, cls).from_pretrained(tmp_path / "out", output_loading_info=True)

    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = built.state_dict()
    for name, tensor in loaded.state_dict().items():
        old = name.replace(".2.", ".0.", 1).replace(".3.", ".1.", 1) if "layers" in name else name
        assert torch.equal(tensor, theirs[old]), name


def test_a_stack_that_transformers_cannot_load_is_not_written(tmp_path, monkeypatch):
    """Found on the meta device, before anything is written."""
    folder = tmp_path / "m"
    with torch.random.fork_rng():
        tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).save_pretrained(folder)

    def one_too_many(pieces, sources, counts):
        return {**sources[0].config, "num_hidden_layers": 5}

    monkeypatch.setattr("taskvec.family.stacking.stacked_config", one_too_many)
    with pytest.raises(FamilyError, match=r"missing keys.*model\.layers\.4\."):
        stacked(folder, (0, 2), (0, 2))
    assert not (tmp_path / "out").exists()
