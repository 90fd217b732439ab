"""Canonical names, and what a model calls a tensor that goes by another name."""

from __future__ import annotations

import pytest

from taskvec.checkpoints.names import Names, canonical, fits, forms
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.dtypes import DTYPES

Q = "layers.3.self_attn.q_proj.weight"
# Names of one parameter in each line.
SAME = [
    [Q, f"model.{Q}", f"module.model.{Q}", f"_orig_mod.model.{Q}", f"base_model.model.model.{Q}",
     f"pretrained_model.model.{Q}", f"model.language_model.{Q}", f"language_model.model.{Q}",
     f"_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module.{Q[9:]}", f"thinker.model.{Q}",
     "model.layers.3.self_attn.q_proj.base_layer.weight", f"0.auto_model.{Q}"],
    ["visual.blocks.7.attn.qkv.bias", "model.visual.blocks.7.attn.qkv.bias",
     "module.visual.blocks.7.attn.qkv.bias"],
    ["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
     "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
     "vision_model.encoder.layers.0.mlp.fc1.weight"],
    ["bert.encoder.layer.11.attention.output.LayerNorm.gamma",
     "encoder.layer.11.attention.output.LayerNorm.weight"],
    ["vit.encoder.layer.2.attention.attention.query.weight", "vit.layers.2.attention.q_proj.weight",
     "layers.2.attention.q_proj.weight"],
    ["vit.encoder.layer.2.output.dense.bias", "layers.2.mlp.fc2.bias"],
    ["model.layers.0.block_sparse_moe.experts.5.w1.weight",
     "model.layers.0.mlp.experts.5.gate_proj.weight"],
    ["language_model.lm_head.weight", "lm_head.weight", "module.lm_head.weight"],
    ["transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"],
]  # fmt: skip


@pytest.mark.parametrize("names", SAME, ids=lambda names: names[0])
def test_one_parameter_has_one_canonical_name(names):
    assert len({canonical(name) for name in names}) == 1


def test_different_parameters_have_different_ones():
    firsts = {canonical(names[0]) for names in SAME}
    assert len(firsts) == len(SAME)
    for one, other in [
        ("model.layers.1.w", "model.layers.10.w"),
        ("vision_model.encoder.layers.0.w", "text_model.encoder.layers.0.w"),
        ("encoder.layers.0.w", "decoder.layers.0.w"),
        ("model.layers.0.module.weight", "model.layers.0.weight_module"),
    ]:
        assert canonical(one) != canonical(other)


def test_numbers_are_carried_over_in_their_order():
    name = "module.model.layers.31.block_sparse_moe.experts.127.w2.weight"
    assert canonical(name) == "layers.31.mlp.experts.127.down_proj.weight"


def test_a_model_is_asked_for_literal_names_first():
    names = Names(["model.w.weight", "w.weight"])
    assert names.find("w.weight") == ["w.weight"]
    assert names.find("module.model.w.weight") == [
        "model.w.weight",
        "w.weight",
    ]  # which is not told
    assert names.find("other.weight") == []


def test_one_class_around_the_model_more_or_less():
    assert Names(["mine.embeddings.w"]).find("embeddings.w") == ["mine.embeddings.w"]
    assert Names(["embeddings.w"]).find("mine.embeddings.w") == ["embeddings.w"]


def test_a_bare_tower_is_not_taken_for_the_other():
    both = ["text_model.encoder.layers.0.w", "vision_model.encoder.layers.0.w"]
    assert Names(both).find("encoder.layers.0.w") != ["text_model.encoder.layers.0.w"]
    assert Names(both[:1]).find("encoder.layers.0.w") == both[:1]


def info(*shape: int) -> TensorInfo:
    return TensorInfo("w", DTYPES["F32"], shape, 0)


@pytest.mark.parametrize(
    ("whole", "parts", "expected"),
    [
        ((12, 8), [(4, 8), (4, 8), (4, 8)], True),
        ((8, 8), [(4, 8), (2, 8), (2, 8)], True),
        ((12, 8), [(4, 8), (4, 8)], False),
        ((8, 12), [(8, 4), (8, 8)], False),
        ((12,), [(4,), (8,)], True),
        ((2, 6, 4), [(3, 4)] * 4, True),
        ((2, 4, 6), [(3, 4)] * 4, False),
        ((2, 6, 4), [(3, 4)] * 3, False),
    ],
)
def test_parts_must_have_the_shape_of_the_whole(whole, parts, expected):
    assert fits(info(*whole), [info(*shape) for shape in parts]) is expected


def test_what_a_fused_tensor_may_be_made_of():
    (form,) = forms("layers.0.mlp.experts.gate_up_proj", 2)
    assert form.parts == tuple(
        f"layers.0.mlp.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up")
    )
    assert any(
        form.parts[0] == "layers.0.self_attn.q_proj.bias"
        for form in forms("layers.0.self_attn.qkv_proj.bias", 0)
    )
    assert not list(forms("layers.0.attention.query_key_value.weight", 0))  # interleaved by head
