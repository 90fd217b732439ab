"""LoRA through PEFT: targets by the layer table; the result as adapter and as vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.architectures import ARCHITECTURES
from tests.training.test_vectors import build, weights
from torch import nn

import taskvec as tv
from taskvec.errors import FamilyError, ParameterError
from taskvec.training.lora import add_lora, wants_lora
from taskvec.training.selection import freeze_rest, select
from taskvec.training.vector_file import save_vector

pytest.importorskip("peft")
MODELS = ("llama", "gpt2", "t5", "clip", "falcon-new", "vit", "dinov2")


def train(model: nn.Module) -> None:
    """Move the factors, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize("which", MODELS)
def test_factors_go_on_what_the_preset_selects(which):
    module = build(which)
    expected = {name.removesuffix(".weight") for name in select(module, "linear").names}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    sizes = {name: p.shape for name, p in module.named_parameters()}

    model, selection = add_lora(module, "lora:linear", rank=3, alpha=6)

    ends = (".lora_A.default.weight", ".lora_B.default.weight")
    assert set(selection.names) == {f"base_model.model.{m}{e}" for m in expected for e in ends}
    assert selection.parameters == sum(3 * sum(sizes[f"{m}.weight"]) for m in expected)
    freeze_rest(model, selection)
    train(model)
    for name, parameter in model.get_base_model().named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])


def test_lora_alone_is_lora_of_the_attention():
    module = build("llama")
    expected = select(module, "attention").names

    _, selection = add_lora(module)

    assert len(selection.names) == 2 * len(expected)
    assert all("self_attn" in name for name in selection.names)
    assert wants_lora("lora")
    assert wants_lora("lora:attention-qv")
    assert not wants_lora("attention")
    assert not wants_lora(["lora"])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT asks it
@pytest.mark.parametrize("which", MODELS)
def test_the_vector_is_what_the_factors_make(which, tmp_path):
    module = build(which)
    module.save_pretrained(tmp_path / "start")
    before = weights(tmp_path / "start")
    model, selection = add_lora(module, "lora:attention", rank=2, alpha=5)
    train(model)

    save_vector(model, tmp_path / "start", selection, tmp_path / "t.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")

    vector, tuned = load_file(tmp_path / "t.safetensors"), weights(tmp_path / "tuned")
    assert set(vector) == {name for name in tuned if not torch.equal(tuned[name], before[name])}
    for name, tau in vector.items():
        torch.testing.assert_close(before[name] + tau, tuned[name], rtol=0, atol=1e-7)
    assert_same_task(tmp_path)


def assert_same_task(folder: Path) -> None:
    """The adapter as a task gives what the vector gives."""
    family = tv.Family(anchor=folder / "start", tasks={"t": folder / "adapter"})
    tv.extract(family, folder / "u.safetensors")
    one, other = load_file(folder / "t.safetensors"), load_file(folder / "u.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT asks it
@pytest.mark.parametrize("which", ["vit", "vit-bare", "dinov2", "dinov2-bare", "dinov2-registers"])
def test_an_adapter_of_a_model_of_images_is_a_task(which, tmp_path):
    """PEFT has the names in memory, the files have others; bit for bit what PEFT merges."""
    module = build(which)
    module.save_pretrained(tmp_path / "start")
    model, _ = add_lora(module, "lora:linear", rank=2, alpha=4)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")

    tasks = {"t": str(tmp_path / "adapter")}
    family = tv.Family(anchor=tmp_path / "start", tasks=tasks)
    tv.merge(family, tmp_path / "merged", method="task_arithmetic", scale={"t": 1.0})

    start, tuned, merged = (weights(tmp_path / name) for name in ("start", "tuned", "merged"))
    assert tuned.keys() == merged.keys()
    assert all(torch.equal(tuned[name], merged[name]) for name in tuned)
    changed = [name for name in tuned if not torch.equal(start[name], tuned[name])]
    assert len(changed) == 6  # q, k, v, o and two of the MLP, in one block
    scan = tv.scan(family, cache="off")
    squares = dict(zip(scan.names, scan.gram[:, -1, -1], strict=True))
    assert {name for name, square in squares.items() if square} == set(changed)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_factors_on_half_of_a_tensor_of_the_file_are_refused(tmp_path):
    """DINOv2's gate and up are one tensor in files."""
    module = build("dinov2-swiglu")
    module.save_pretrained(tmp_path / "start")
    model, _ = add_lora(module, "lora:*up_proj.weight", rank=2)
    model.save_pretrained(tmp_path / "adapter")
    family = tv.Family(anchor=tmp_path / "start", tasks={"t": str(tmp_path / "adapter")})
    with pytest.raises(FamilyError, match=r"mlp.up_proj.weight', which the model that it is over"):
        tv.scan(family, cache="off")


def test_small_changes_are_not_lost_in_bfloat16(tmp_path):
    module = build("llama").to(torch.bfloat16)
    module.save_pretrained(tmp_path / "start")
    model, selection = add_lora(module, "lora:attention-q", rank=1, alpha=1)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1e-3)
        layer.lora_B["default"].weight.fill_(1e-3)

    save_vector(model, tmp_path / "start", selection, tmp_path / "t.safetensors")

    (tau,) = load_file(tmp_path / "t.safetensors").values()
    torch.testing.assert_close(tau, torch.full_like(tau, 1e-6), rtol=0, atol=2.0**-27)


@pytest.mark.parametrize(
    ("which", "train", "message"),
    [
        (
            "gpt2",
            "lora:attention-q",
            "lora: 'transformer.h.0.attn.c_attn.weight' covers more than the selection; "
            "LoRA factors need a whole layer: use lora:attention",
        ),
        (
            "llama",
            "lora:norms",
            "lora: 'model.layers.0.input_layernorm.weight' is not the weight of a linear layer "
            "that PEFT supports; train it without lora",
        ),
        (
            "mixtral",
            "lora:mlp",
            "lora: 'model.layers.0.mlp.gate.weight' is not the weight of a linear layer that PEFT "
            "supports; train it without lora",
        ),
        ("llama", "lora:x", "train 'x' is neither a preset nor a parameter; known: all, "),
    ],
)
def test_what_has_no_factors(which, train, message):
    module = ARCHITECTURES[which].build(1)

    with pytest.raises(ParameterError) as caught:
        add_lora(module, train)
    assert str(caught.value).startswith(message)
    assert not any("lora" in name for name, _ in module.named_parameters())


def test_torchs_own_attention_has_none():
    with pytest.raises(ParameterError) as caught:
        add_lora(nn.MultiheadAttention(4, 2), "lora:attention-o")
    assert str(caught.value) == (
        "lora: 'out_proj.weight' is not the weight of a linear layer that PEFT supports; train it "
        "without lora"
    )


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0}, {"dropout": 1}])
def test_values_out_of_range(values):
    with pytest.raises(ParameterError) as caught:
        add_lora(nn.Linear(2, 2), "lora:weight", **values)
    got = {"rank": 8, "alpha": 16, "dropout": 0} | values
    assert str(caught.value) == (
        "lora: rank must be at least 1, alpha above 0, dropout in [0, 1); got "
        + ", ".join(str(value) for value in got.values())
    )
