"""Names, layer identifiers and overrides; whole models are in test_layers_architectures.py."""

import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taskvec import layers
from taskvec.errors import ParameterError, RecipeError
from taskvec.layers import GRANULARITIES, MODULES, LayerKey, classify, override

OTHER = LayerKey("model", None, "other", None, None)

# Names of older checkpoints and of buffers, which no model class of today has.
OLDER = {
    "bert.embeddings.LayerNorm.gamma": LayerKey("model", None, "norm", None, None),
    "bert.embeddings.position_ids": LayerKey("model", None, "embedding", None, None),
    "bert.encoder.layer.11.output.LayerNorm.beta": LayerKey("model", 11, "norm", None, None),
    "cls.predictions.transform.LayerNorm.gamma": LayerKey("model", None, "head", None, None),
    "roberta.embeddings.token_type_ids": LayerKey("model", None, "embedding", None, None),
    "roberta.pooler.dense.weight": LayerKey("model", None, "head", None, None),
    "model.layers.2.self_attn.rotary_emb.inv_freq": LayerKey("model", 2, "attention", None, None),
    "h.3.attn.bias": LayerKey("model", 3, "attention", None, None),
    "transformer.h.3.attn.masked_bias": LayerKey("model", 3, "attention", None, None),
    "gpt_neox.layers.4.attention.bias": LayerKey("model", 4, "attention", None, None),
    "gpt_neox.layers.4.attention.masked_bias": LayerKey("model", 4, "attention", None, None),
    "gpt_neox.layers.4.attention.rotary_emb.inv_freq": LayerKey(
        "model", 4, "attention", None, None
    ),
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": LayerKey(
        "decoder", 0, "attention", "cross_relative_bias", None
    ),
    "text_model.embeddings.position_ids": LayerKey("text", None, "embedding", None, None),
    "vision_model.embeddings.position_ids": LayerKey("vision", None, "embedding", None, None),
    "vision_tower.vision_model.encoder.layers.26.mlp.fc2.bias": LayerKey(
        "vision", 26, "mlp", "down", None
    ),
    "language_model.lm_head.weight": LayerKey("text", None, "head", None, None),
}

# One of each way to write a name.
KNOWN = (
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.3.mlp.experts.10.up_proj.weight",
    "model.layers.3.block_sparse_moe.experts.7.w2.weight",
    "model.layers.3.mlp.experts.gate_up_proj",
    "language_model.model.layers.3.self_attn.k_norm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    "transformer.h.0.attn.c_attn.bias",
    "h.11.mlp.c_proj.weight",
    "wpe.weight",
    "gpt_neox.layers.5.attention.dense.weight",
    "model.decoder.layers.1.fc1.weight",
    "bert.encoder.layer.9.attention.self.key.weight",
    "encoder.layer.9.attention.attention.key.weight",
    "vit.layers.4.mlp.fc1.bias",
    "encoder.layer.2.layer_scale1.lambda1",
    "decoder.block.6.layer.1.EncDecAttention.v.weight",
    "shared.weight",
    "vision_model.encoder.layers.2.layer_norm1.bias",
    "vision_model.pre_layrnorm.weight",
    "visual.transformer.resblocks.8.attn.in_proj_weight",
    "transformer.resblocks.8.ls_2.gamma",
    "text_projection",
    "visual_projection.weight",
    "logit_scale",
)


@pytest.mark.parametrize("name", OLDER)
def test_names_of_older_checkpoints_and_buffers(name):
    assert classify(name) == OLDER[name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "weight",
        "layers",
        "model.layers.0",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model.layers.007.self_attn.q_proj.weight",
        "model.layers.1e3.self_attn.q_proj.weight",
        "model.layers.\u0661.self_attn.q_proj.weight",  # a digit, but not one of ours
        "model.layers." + "9" * 5000 + ".self_attn.q_proj.weight",
        "layer_scale1.lambda1",
        "decoder.0.weight",
        "projector.0.weight",
        "visual.merger.mlp.2.scale",
        "model.layers.0.",
    ],
)
def test_a_name_that_fits_nothing_is_other(name):
    assert classify(name) == OTHER


# Names that the table does not have, but that have the number of a block.
NUMBERED = {
    "model.layers.4.self_attn.q_proj": ("model", "attention", "q"),
    "model.layers.4.self_attn.q_proj.weight_scale": ("model", "attention", None),
    "model.model.layers.4.self_attn.q_proj.weight": ("model", "attention", "q"),
    "module.base_model.model.layers.4.mlp.lora_A.weight": ("module", "mlp", None),
    "model.layers.4.block_sparse_moe.experts.2.w4.weight": ("model", "mlp", None),
    "model.layers.4.odd": ("model", "other", None),
    "layers.4.attn.qkv.weight": ("model", "attention", "qkv"),
    "stages.4.blocks.2.attn.qkv.weight": ("stages", "attention", "qkv"),
    "visual.layer1.4.conv1.weight": ("vision_layer1", "other", None),
    "down_blocks.4.attentions.2.transformer_blocks.0.attn1.to_out.0.weight": (
        "down_blocks",
        "attention",
        "o",
    ),
    "single_transformer_blocks.4.attn.to_q.weight": (
        "single_transformer_blocks",
        "attention",
        "q",
    ),
    "transformer_blocks.4.ff.net.2.weight": ("transformer_blocks", "mlp", "down"),
    "vision_model.global_transformer.layers.4.mlp.fc2.weight": (
        "vision_global_transformer",
        "mlp",
        "down",
    ),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_a_name_with_the_number_of_a_block_is_in_it_whatever_else_is_unknown(name):
    key = classify(name)

    assert key.block == 4
    assert (key.tower, key.module, key.projection) == NUMBERED[name]
    assert key.at("block", name) == f"{key.tower}/4"
    assert layers.renumber(name, 10) == name.replace(".4.", ".10.")


@pytest.mark.parametrize("name", KNOWN)
@given(numbers=st.lists(st.integers(0, 99_999), min_size=3, max_size=3))
def test_indices_are_read_and_change_nothing_else(name, numbers):
    """Of `layers.1` and `layers.10`, say; T5's `layer.1` inside a block is no index of interest."""
    key = classify(name)
    assert key.module != "other"
    new = iter(numbers)
    renamed = re.sub(r"(?<=\.)\d+(?=\.)", lambda _: str(next(new)), name)

    changed = classify(renamed)

    fixed = ("tower", "module", "projection")
    assert [getattr(changed, f) for f in fixed] == [getattr(key, f) for f in fixed]
    assert changed.block == (None if key.block is None else numbers[0])
    assert changed.expert == (None if key.expert is None else numbers[1])


SEGMENTS = ("model", "layers", "0", "10", "01", "self_attn", "q_proj", "mlp", "experts", "weight")
SEGMENTS += ("encoder", "decoder", "layer", "block", "h", "visual", "transformer", "resblocks", "")


@given(st.text() | st.lists(st.sampled_from(SEGMENTS)).map(".".join))
@example("." * 100_000)
@example(".0" * 100_000 + ".")
def test_no_name_fails(name):
    key = classify(name)

    assert key.module in MODULES
    assert all(isinstance(key.at(granularity, name), str) for granularity in GRANULARITIES)


# What may stand before a name: then it is read as if it stood there alone, but for the tower.
ROOTS = ("model.", "transformer.", "text.", "visual.", "encoder.", "decoder.", "bert.", "vit.")
JUNK = st.text(min_size=1) | st.sampled_from(("module.", "base_model.model.", ".", "x", "0.", "\n"))


@given(st.sampled_from(KNOWN), st.sampled_from(ROOTS) | JUNK, JUNK)
@example("text_projection", "x", ".weight")
def test_junk_before_or_after_a_known_name_is_never_misread(name, before, after):
    key = classify(name)

    found = classify(before + name)
    if before in ROOTS and found != OTHER and key.block is None:
        assert found == LayerKey(found.tower, key.block, key.module, key.projection, key.expert)
    if key.block is None and before not in ROOTS:
        assert found.module == "other" or found.block is not None
    for other in (found, classify(name + after)):
        if key.block is not None and not any(c.isdecimal() for c in before + after):
            assert other.block == key.block


def test_every_row_of_the_table_is_a_module_and_compiles():
    for family in layers._FAMILIES:
        assert family.roots
        assert bool(family.blocks) == bool(family.inside)
        for row in family.inside + family.outside:
            assert row.module in MODULES
            assert row.module != "other"
            named = set(re.compile(row.pattern).groupindex)
            assert named <= ({"expert"} if row in family.inside else set())


def test_a_kind_of_name_is_searched_for_once():
    """So that the 20,000 names of a mixture of experts cost 20,000 lookups, not searches."""
    layers._place.cache_clear()
    for block in range(20):
        for expert in range(100):
            for projection in ("gate", "up", "down"):
                name = f"model.layers.{block}.mlp.experts.{expert}.{projection}_proj.weight"
                assert classify(name) == LayerKey("model", block, "mlp", projection, expert)

    assert layers._place.cache_info().misses == 3


def test_importing_it_imports_nothing_heavy():
    program = "import sys, taskvec.layers; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert "taskvec" in done.stdout.split()
    assert not {"torch", "numpy", "numba", "transformers"} & set(done.stdout.split())


# --- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "block"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model/3/attention", "model/3"),
        ("model.layers.3.self_attn.q_norm.weight", "model/3/norm", "model/3"),
        ("model.layers.3.mlp.gate.weight", "model/3/mlp", "model/3"),
        ("model.layers.3.mlp.experts.5.up_proj.weight", "model/3/mlp", "model/3"),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", "model/3/mlp", "model/3"),
        ("model.layers.13.mlp.experts.down_proj", "model/13/mlp", "model/13"),
        ("encoder.block.0.layer.1.layer_norm.weight", "encoder/0/norm", "encoder/0"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", "decoder/0/attention", "decoder/0"),
        ("visual.transformer.resblocks.2.attn.in_proj_bias", "vision/2/attention", "vision/2"),
        ("transformer.resblocks.2.attn.in_proj_bias", "text/2/attention", "text/2"),
        ("model.embed_tokens.weight", None, None),
        ("model.norm.weight", None, None),
        ("visual.ln_pre.weight", None, None),
        ("lm_head.weight", None, None),
        ("layers.3.attn.qkv.weight", "model/3/attention", "model/3"),
    ],
)
def test_the_layer_of_a_tensor(name, module, block):
    key = classify(name)

    assert key.at("tensor", name) == name
    assert key.at("module", name) == (module or name)
    assert key.at("block", name) == (block or name)


def test_other_is_a_layer_of_its_own_but_for_its_block():
    key = LayerKey("model", 3, "other", None, None)

    layers_of = [key.at(granularity, "x.3.y") for granularity in GRANULARITIES]
    assert layers_of == ["x.3.y", "x.3.y", "model/3"]


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ParameterError) as caught:
        classify("lm_head.weight").at("modules", "lm_head.weight")

    assert str(caught.value) == "granularity: got 'modules'; did you mean 'module'?"


# --- overrides ---------------------------------------------------------------------------------

QWEN_VL = {
    "pattern": r"visual\.blocks\.(?P<block>\d+)\.attn\.",
    "tower": "vision",
    "module": "attention",
    "projection": "qkv",
}


def test_an_override_finds_its_pattern_anywhere_in_a_name():
    rules = [override(QWEN_VL)]
    key = LayerKey("vision", 17, "attention", "qkv", None)

    assert classify("visual.blocks.17.attn.qkv.weight", rules) == key
    assert classify("model.visual.blocks.17.attn.qkv.bias", rules) == key
    assert classify("visual.blocks.17.mlp.fc1.weight", rules).module == "mlp"
    assert key.at("module", "visual.blocks.17.attn.qkv.weight") == "vision/17/attention"


def test_overrides_come_before_the_table_and_the_first_one_wins():
    name = "model.layers.10.self_attn.q_proj.weight"
    first = override({"pattern": r"layers\.(?P<block>\d+)\.self_attn", "module": "mlp"})
    second = override({"pattern": "q_proj", "module": "head"})

    assert classify(name, [first, second]) == LayerKey("model", 10, "mlp", None, None)
    assert classify(name, [second, first]) == LayerKey("model", None, "head", None, None)
    assert classify("lm_head.weight", [first, second]) == classify("lm_head.weight")


def test_an_override_reads_experts_and_groups_that_took_no_part():
    rule = override(
        {
            "pattern": r"^blk\.(?P<block>\d+)\.ffn(?:\.(?P<expert>\d+))?\.up$",
            "module": "mlp",
            "projection": "up",
        }
    )

    assert classify("blk.2.ffn.31.up", [rule]) == LayerKey("model", 2, "mlp", "up", 31)
    assert classify("blk.2.ffn.up", [rule]) == LayerKey("model", 2, "mlp", "up", None)


def test_an_override_may_leave_out_tower_and_projection_and_may_say_other():
    found = override({"pattern": "x", "module": "other", "projection": None})
    assert (found.pattern.text, found.tower, found.module, found.projection) == (
        "x", "model", "other", None,
    )  # fmt: skip
    assert classify("lm_head.weight", [override({"pattern": "head", "module": "other"})]) == OTHER


def test_a_group_that_captures_no_number_is_an_error():
    rule = override({"pattern": r"stage(?P<block>\w+)\.", "module": "mlp"})

    assert classify("stage3.x", [rule]) == LayerKey("model", 3, "mlp", None, None)
    with pytest.raises(RecipeError) as caught:
        classify("stage_a.x", [rule])
    assert str(caught.value) == (
        r"override 'stage(?P<block>\\w+)\\.': group 'block' captured '_a' in tensor 'stage_a.x', "
        r"expected a whole number; let it match \d+ only"
    )


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("x", "override: got 'x', expected a mapping with pattern and module"),
        (
            {"pattern": "x", "module": "mlp", "projektion": "q"},
            "override: unknown key 'projektion'; did you mean 'projection'?",
        ),
        (
            {"pattern": "x", "module": "mlp", 7: "q"},
            "override: unknown key 7; known: module, pattern, projection, tower",
        ),
        ({"module": "mlp"}, "override: key 'pattern' is missing in {'module': 'mlp'}"),
        ({"pattern": "x"}, "override: key 'module' is missing in {'pattern': 'x'}"),
        (
            {"pattern": "", "module": "mlp"},
            "override: pattern must be text that is not empty, got ''",
        ),
        (
            {"pattern": 3, "module": "mlp"},
            "override: pattern must be text that is not empty, got 3",
        ),
        (
            {"pattern": "x", "module": None},
            "override: module must be text that is not empty, got None",
        ),
        (
            {"pattern": "x", "module": "attentions"},
            "override 'x': unknown module 'attentions'; did you mean 'attention'?",
        ),
        (
            {"pattern": "x", "module": "mlp", "tower": "a/b"},
            "override: tower must be a word of letters, digits and underscores, got 'a/b'",
        ),
        (
            {"pattern": "x", "module": "mlp", "tower": None},
            "override: tower must be text that is not empty, got None",
        ),
        (
            {"pattern": "x", "module": "mlp", "projection": False},
            "override: projection must be text that is not empty, got False",
        ),
        (
            {"pattern": "(x", "module": "mlp"},
            "override '(x': pattern is not a valid regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
        (
            {"pattern": "x{99999999999999999999}", "module": "mlp"},
            "override 'x{99999999999999999999}': pattern is not a valid regular expression: "
            "the repetition number is too large",
        ),
        (
            {"pattern": r"(?P<blocks>\d+)", "module": "mlp"},
            r"override '(?P<blocks>\\d+)': group 'blocks' means nothing; did you mean 'block'?",
        ),
    ],
)
def test_a_wrong_override_says_what_is_wrong(entry, text):
    with pytest.raises(RecipeError) as caught:
        override(entry)

    assert str(caught.value) == text
