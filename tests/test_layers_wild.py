"""`classify` on models that the table does not spell out: where every tensor with a number is."""

import re

import pytest
from tests.wild_architectures import BLOCKS, DIFFUSION, WILD, names_of

from taskvec.layers import classify, renumber

# Lists of blocks of the models that have other than one.
TOWERS = {
    "qwen2_5_vl": {"text", "vision"},
    "qwen3_vl": {"text", "vision", "vision_deepstack_merger_list"},
    "llava": {"text", "vision"},
    "whisper": {"encoder", "decoder"},
    "bart": {"encoder", "decoder"},
    "marian": {"encoder", "decoder"},
}
# What takes the place of attention in some blocks, and is neither attention nor MLP.
MIXERS = re.compile(r".*\.(mamba|mixer|conv)\..*")
NUMBERED = re.compile(r".*\.(layers|h|layer|blocks)\.(\d+)\.")


@pytest.mark.parametrize("which", WILD)
def test_every_tensor_with_a_block_number_is_in_that_block(which):
    names = names_of(which)
    keys = {name: classify(name) for name in names}

    for name, key in keys.items():
        found = NUMBERED.match(name)
        assert key.block == (int(found[2]) if found else key.block), name
        if key.block is not None and not MIXERS.fullmatch(name):
            assert key.module in ("attention", "mlp", "norm"), name
    towers = {key.tower for key in keys.values() if key.block is not None}
    assert towers == TOWERS.get(which, {"model"})
    for tower in towers - {"vision_deepstack_merger_list"}:
        blocks = {key.block for key in keys.values() if key.tower == tower}
        assert blocks - {None} == set(range(BLOCKS))
        for block in range(BLOCKS):
            inside = {k.module for k in keys.values() if (k.tower, k.block) == (tower, block)}
            assert "norm" in inside


@pytest.mark.parametrize("which", WILD)
def test_a_block_can_be_given_another_number(which):
    names = names_of(which)
    moved = [renumber(name, 7) for name in names if classify(name).block is not None]

    assert {classify(name).block for name in moved} == {7}
    outside = [name for name in names if classify(name).block is None]
    assert [renumber(name, 7) for name in outside] == outside


@pytest.mark.parametrize("line", DIFFUSION.replace("\\\n", "").strip().splitlines())
def test_blocks_of_models_that_make_images(line):
    name, tower, block, module, projection = line.split()
    key = classify(name)

    assert (key.tower, str(key.block).replace("None", "-")) == (tower, block)
    assert (key.module, key.projection or "-") == (module, projection)


def test_what_a_block_adds_is_known_where_a_stack_scales_it():
    for which in ("phi", "starcoder2", "gpt_oss", "deepseek_v3", "llama4_text", "lfm2", "mamba"):
        keys = [classify(name) for name in names_of(which)]
        ends = {k.projection for k in keys if k.block == BLOCKS - 1}
        assert "o" in ends
