"""Rows of fused projections: what they do in the forward pass, and refusals."""

from __future__ import annotations

import pytest
import torch
from tests.architectures import ARCHITECTURES
from tests.foreign_models import in_process
from tests.training.roles import check_roles, mask
from torch import nn

from taskvec.errors import ParameterError
from taskvec.layers import override
from taskvec.training.rows import RowRanges, frozen_rows, hold_rows
from taskvec.training.selection import ParameterSelection, freeze_rest, select

FUSED = {  # fused layer and output layer of the first block
    "bloom": ("transformer.h.0.self_attention", "query_key_value", "dense"),
    "falcon": ("transformer.h.0.self_attention", "query_key_value", "dense"),
    "falcon-new": ("transformer.h.0.self_attention", "query_key_value", "dense"),
    "falcon-rw": ("transformer.h.0.self_attention", "query_key_value", "dense"),
    "gpt2": ("transformer.h.0.attn", "c_attn", "c_proj"),
    "gpt-neox": ("gpt_neox.layers.0.attention", "query_key_value", "dense"),
    "mpt": ("transformer.blocks.0.attn", "Wqkv", "out_proj"),
    "phi3": ("model.layers.0.self_attn", "qkv_proj", "o_proj"),
}
IDS = torch.tensor([[3, 7, 11, 15, 19]])


@pytest.mark.parametrize("which", FUSED)
def test_rows_do_in_the_forward_pass_what_their_letter_says(which):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ARCHITECTURES[which].build(1).eval()
    path, fused, output = FUSED[which]
    attention = model.get_submodule(path)
    if which == "bloom":
        assert attention.num_heads > 1

    check_roles(
        model,
        getattr(attention, fused),
        getattr(attention, output),
        f"{path}.{fused}.weight",
        lambda: model(input_ids=IDS),
    )


def test_keys_and_values_of_cross_attention():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ARCHITECTURES["gpt2-cross-attention"].build(1).eval()
        encoded = torch.randn(1, 5, 16)
    path = "transformer.h.0.crossattention"
    attention = model.get_submodule(path)

    check_roles(
        model,
        attention.c_attn,
        attention.c_proj,
        f"{path}.c_attn.weight",
        lambda: model(input_ids=IDS, encoder_hidden_states=encoded),
        letters="kv",
    )


def test_rows_of_torchs_own_attention_make_its_result():
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(net.in_proj_bias)
    x = torch.randn(3, 5, 8)
    parts = []
    for letter in "qkv":
        rows = mask(net, "in_proj_weight", letter)
        assert torch.equal(rows, mask(net, "in_proj_bias", letter))
        part = x @ net.in_proj_weight[rows].T + net.in_proj_bias[rows]
        parts.append(part.view(3, 5, 2, 4).transpose(1, 2))
    q, k, v = parts
    heads = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v  # √4 = 2
    expected = net.out_proj(heads.transpose(1, 2).reshape(3, 5, 8))

    torch.testing.assert_close(net(x, x, x)[0], expected)


PROGRAM = """
from tests.training.roles import check_roles
timm = models()["timm-norms"].eval()
attention = timm.blocks[0].attn
check_roles(
    timm, attention.qkv, attention.proj, "blocks.0.attn.qkv.weight",
    lambda: timm(torch.ones(1, 3, 32, 32)),
)
from open_clip.transformer import Attention
net = torch.nn.ModuleDict({"attn": Attention(8, 2)})
from taskvec.layers import override
from taskvec.training.selection import select
rule = [override({"pattern": "in_proj", "module": "attention", "projection": "qkv"})]
found = [select(net, f"attention-{x}", rule).rows["attn.in_proj_weight"].ranges for x in "qkv"]
print(json.dumps(found))
"""


def test_rows_of_timm_and_open_clip():
    assert in_process(PROGRAM) == [[[0, 8]], [[8, 16]], [[16, 24]]]


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)


def test_a_class_that_is_not_known_trains_as_a_whole_only():
    net = nn.ModuleDict({"mixing": Mixing()})
    rule = [override({"pattern": "qkv", "module": "attention", "projection": "qkv"})]

    assert select(net, "attention", rule).names == ("mixing.qkv.weight",)
    with pytest.raises(ParameterError) as caught:
        select(net, "attention-q", rule)
    assert str(caught.value) == (
        "the rows of q and k and v in 'mixing.qkv.weight' are unknown, because the class "
        f"{Mixing.__module__}.Mixing is; train the whole attention"
    )


def test_a_shape_that_the_heads_do_not_make():
    model = ARCHITECTURES["phi3"].build(1)
    model.model.layers[0].self_attn.num_key_value_heads = 2

    with pytest.raises(ParameterError) as caught:
        select(model, "attention-k")
    assert str(caught.value) == (
        "'model.layers.0.self_attn.qkv_proj.weight' has 32 rows, by its heads "
        "1 × {'q': 16, 'k': 16, 'v': 16}; train the whole attention"
    )


class TestRowsKept:
    def selected(self) -> tuple[nn.Linear, ParameterSelection]:
        net = nn.Linear(2, 4, bias=False)
        selection = ParameterSelection(("weight",), {"weight": RowRanges(0, ((1, 3),))}, 4, 8)
        freeze_rest(net, selection)
        return net, selection

    def test_gradients_of_other_rows_are_zero_also_where_they_would_be_nan(self):
        net, selection = self.selected()
        with hold_rows(net, selection.rows):
            (net.weight * torch.tensor([[torch.nan], [2.0], [3.0], [torch.inf]])).sum().backward()
            (net.weight * 1.0).sum().backward()  # gradients are added up

        assert net.weight.grad.tolist() == [[0, 0], [3, 3], [4, 4], [0, 0]]

    def test_hooks_go_when_training_ends(self):
        net, selection = self.selected()
        with hold_rows(net, selection.rows):
            pass
        net.weight.sum().backward()

        assert net.weight.grad.tolist() == [[1, 1]] * 4

    def test_what_moved_is_put_back_in_the_dtype_of_the_moment(self):
        net, selection = self.selected()
        before = net.weight.detach().clone()
        with hold_rows(net, selection.rows) as put_back:
            net.to(torch.bfloat16)
            with torch.no_grad():
                net.weight += 1
            put_back()

        assert torch.equal(net.weight[::3], before[::3].to(torch.bfloat16))
        assert not torch.equal(net.weight[1:3], before[1:3].to(torch.bfloat16))

    def test_numbers_of_the_rows_that_stay(self):
        assert frozen_rows(RowRanges(0, ((1, 3), (4, 5))), 6).tolist() == [0, 3, 5]
