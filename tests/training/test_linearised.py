"""The linearised model: its definition, its derivatives, what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest

from taskvec.errors import FamilyError, ParameterError, UsageError
from taskvec.training.rows import RowRanges

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from taskvec.training.linearised import Linearised, call_at, combine, derivative  # noqa: E402

Model = tuple[Any, dict[str, Any]]  # the module and what it is called with

VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def tokens() -> Any:
    return torch.arange(14).reshape(2, 7) * 5 % 64


def padded() -> Any:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return mask


def noise(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def llama() -> Model:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config)
    for part in module.modules():  # its own norm computes in float32
        for name in [n for n, child in part.named_children() if "RMSNorm" in type(child).__name__]:
            setattr(part, name, nn.RMSNorm(16, eps=1e-6))
    return module, {"input_ids": tokens(), "attention_mask": padded()}


def gpt2() -> Model:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens()}


def bert() -> Model:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    module = transformers.BertForSequenceClassification(config)
    return module, {"input_ids": tokens(), "attention_mask": padded()}


def vit() -> Model:
    module = transformers.ViTModel(transformers.ViTConfig(**VISION))
    return module, {"pixel_values": noise(1, 2, 3, 16, 16)}


def dinov2() -> Model:
    module = transformers.Dinov2Model(transformers.Dinov2Config(**VISION))
    return module, {"pixel_values": noise(1, 2, 3, 16, 16)}


def clip() -> Model:
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=8)
    module = transformers.CLIPVisionModelWithProjection(config)
    return module, {"pixel_values": noise(1, 2, 3, 16, 16)}


def encoder() -> Model:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": noise(1, 2, 5, 16)}


MODELS = (llama, gpt2, bert, vit, dinov2, clip, encoder)


def made(make: Callable[[], Model]) -> Model:
    torch.manual_seed(0)
    module, kwargs = make()
    return module.double().eval(), kwargs


def direction(module: Any, seed: int, names: Collection[str] | None = None) -> dict[str, Any]:
    parameters = dict(module.named_parameters())
    return {
        name: noise(seed + place, *parameters[name].shape)
        for place, name in enumerate(parameters)
        if names is None or name in names
    }


def attention(module: Any) -> list[str]:
    return [n for n, p in module.named_parameters() if p.ndim == 2 and "att" in n]


def floats(output: Any) -> list[Any]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def plain(module: Any, kwargs: dict[str, Any]) -> Any:
    """The module's own output, by the attention that a linearised one uses."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # under no_grad: nn's own fused encoder
        return module.requires_grad_(True)(**kwargs)


def assert_equal_up_to_rounding(ours: Any, own: Any) -> None:
    """Not bit for bit: which matrix product is taken depends on who asks for gradients."""
    for a, b in zip(floats(ours), floats(own), strict=True):
        assert (a - b).detach().abs().max() <= 1e-14 * max(1.0, b.detach().abs().max().item())


@pytest.mark.parametrize("make", MODELS)
def test_is_the_model_at_its_start(make: Callable[[], Model]) -> None:
    module, kwargs = made(make)
    own = plain(module, kwargs)
    ours = Linearised(module, [name for name, _ in module.named_parameters()])(**kwargs)
    assert type(ours) is type(own)
    assert_equal_up_to_rounding(ours, own)


@pytest.mark.parametrize("some", [False, True], ids=["all", "attention"])
@pytest.mark.parametrize("make", MODELS)
def test_derivative_is_that_of_central_differences(make: Callable[[], Model], some: bool) -> None:
    module, kwargs = made(make)
    tau = direction(module, 2, attention(module) if some else None)
    assert len(tau) >= 4
    _, change = derivative(module, tau, **kwargs)
    ends = []
    for step in (1e-5, -1e-5):
        theta0 = {name: p.detach().clone() for name, p in module.named_parameters()}
        with torch.no_grad():
            for name in tau:
                module.get_parameter(name).add_(tau[name], alpha=step)
            ends.append([x.detach() for x in floats(plain(module, kwargs))])
            for name in tau:
                module.get_parameter(name).copy_(theta0[name])
    for found, up, down in zip(floats(change), *ends, strict=True):
        wanted = (up - down) / 2e-5
        scale = float(wanted.abs().max())
        assert scale > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("make", [llama, dinov2])
def test_is_linear_in_tau(make: Callable[[], Model]) -> None:
    module, kwargs = made(make)
    first, second = direction(module, 3), direction(module, 400)
    linear = Linearised(module, list(first))
    with torch.no_grad():
        start = floats(linear(**kwargs))
        changes = []
        for tau in (first, second, combine([first, second], [0.3, -2.0])):
            linear.put(tau)
            changes.append([a - b for a, b in zip(floats(linear(**kwargs)), start, strict=True)])
    for one, two, both in zip(*changes, strict=True):
        scale = float(one.abs().max() + two.abs().max())
        torch.testing.assert_close(both, 0.3 * one - 2.0 * two, rtol=0, atol=1e-12 * scale)


def test_linear_model_is_itself_everywhere() -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 3).double().eval()
    tau, x = direction(module, 1), noise(9, 4, 5)
    linear = Linearised(module, ["weight", "bias"])
    linear.put(tau)
    wanted = x @ (module.weight + tau["weight"]).T + module.bias + tau["bias"]
    torch.testing.assert_close(linear(x), wanted, rtol=1e-14, atol=1e-14, check_dtype=True)
    torch.testing.assert_close(call_at(module, tau, x), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("make", [llama, clip, encoder])
def test_gradients_are_those_of_finite_differences(make: Callable[[], Model]) -> None:
    module, kwargs = made(make)
    names = attention(module)
    linear = Linearised(module, names)
    start = combine([direction(module, 5, names)], [0.05])
    probe = direction(module, 60, names)

    def loss() -> Any:
        return sum(x.sin().sum() for x in floats(linear(**kwargs)))

    linear.put(start)
    loss().backward()
    found = sum((tau.grad * probe[n]).sum() for n, tau in zip(names, linear.tau, strict=True))
    ends = []
    for step in (1e-6, -1e-6):
        linear.put(combine([start, probe], [1.0, step]))
        ends.append(loss().detach())
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)


def test_training_lowers_the_loss_and_leaves_the_start() -> None:
    module, kwargs = made(gpt2)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    linear = Linearised(module, attention(module)).train()
    optimizer = torch.optim.AdamW([p for p in linear.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        logits = linear(**kwargs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())
    vector = linear.vector()
    assert list(vector) == attention(module)
    assert all(value.abs().max() > 0 for value in vector.values())


def test_rows_of_a_fused_projection() -> None:
    """W_q and W_v of GPT-2 are columns of a Conv1D; the others have no τ."""
    module, kwargs = made(gpt2)
    name = "transformer.h.0.attn.c_attn.weight"
    columns = torch.cat([torch.arange(16), torch.arange(32, 48)])
    linear = Linearised(module, [name], rows={name: RowRanges(1, ((0, 16), (32, 48)))})
    assert [tuple(tau.shape) for tau in linear.tau] == [(16, 32)]
    tau = direction(module, 7, [name])
    tau[name][:, 16:32] = 0
    linear.put(tau)
    assert torch.equal(linear.vector()[name], tau[name])
    whole = Linearised(module, [name])
    whole.put(tau)
    for model in (linear, whole):
        model(**kwargs).logits.sin().sum().backward()
    assert torch.equal(linear(**kwargs).logits, whole(**kwargs).logits)
    torch.testing.assert_close(linear.tau[0].grad, whole.tau[0].grad[:, columns])
    with pytest.raises(FamilyError) as caught:
        linear.put(direction(module, 7, [name]))
    assert str(caught.value) == (
        f"vector: {name!r} is not zero outside the 32 rows that are linearised; "
        "linearise the whole parameter"
    )


def test_put_takes_what_a_vector_lacks_as_zero() -> None:
    linear = Linearised(nn.Linear(2, 3).double(), ["weight", "bias"])
    linear.put({"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    linear.put({"bias": torch.full((3,), 2.0)})
    assert torch.equal(linear.vector()["weight"], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(linear.vector()["bias"], torch.full((3,), 2.0, dtype=torch.float64))


def test_combined_is_the_sum_over_all_names() -> None:
    a, b = {"x": torch.ones(2)}, {"x": torch.full((2,), 3.0), "y": torch.ones(1)}
    found = combine([a, b], [2.0, -1.0])
    assert {name: value.tolist() for name, value in found.items()} == {"x": [-1, -1], "y": [-1]}


def test_post_hoc_is_the_model_with_the_vector_added() -> None:
    module, kwargs = made(bert)
    tau = combine([direction(module, 8)], [0.1])
    with torch.no_grad():
        found = call_at(module, tau, **kwargs).logits
        for name in tau:
            module.get_parameter(name).add_(tau[name])
        assert torch.equal(found, module(**kwargs).logits)


def test_dropout_stays_off_and_parameters_stay_frozen() -> None:
    module, kwargs = made(encoder)
    linear = Linearised(module, attention(module)).train()
    assert linear.training
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(linear(**kwargs), linear(**kwargs))


@pytest.mark.parametrize("make", [llama, encoder])
def test_works_without_gradients_and_in_inference_mode(make: Callable[[], Model]) -> None:
    module, kwargs = made(make)
    linear = Linearised(module, attention(module))
    linear.put(direction(module, 9, attention(module)))
    wanted = linear(**kwargs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_equal_up_to_rounding(linear(**kwargs), wanted)


def test_integers_in_the_output_stay() -> None:
    class Both(nn.Linear):
        def forward(self, x: Any) -> dict[str, Any]:
            y = super().forward(x)
            return {"y": y, "best": y.argmax(-1), "name": "both"}

    module = Both(3, 2).double().eval()
    found = Linearised(module, ["weight"])(noise(1, 4, 3))
    wanted = module(noise(1, 4, 3))
    assert torch.equal(found["y"], wanted["y"])
    assert torch.equal(found["best"], wanted["best"])
    assert found["name"] == "both"


def test_linear_layers_without_tangents_cost_nothing_more() -> None:
    """Forward y₁, ẏ₁ = Ẇ₁ x, y₂, ẏ₂ = W₂ ẋ; backward two: products of 4 × 8 by 8 × 8 entries."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double().eval()
    linear = Linearised(module, ["0.weight"])
    with FlopCounterMode(display=False) as counter:
        linear(noise(1, 4, 8)).sin().sum().backward()
    assert counter.get_total_flops() == 6 * 2 * 4 * 8 * 8


@pytest.mark.parametrize("names", [["bias"], ["weight"], ["weight", "bias"]])
@pytest.mark.parametrize("moving", [False, True], ids=["first", "second"])
def test_every_part_of_a_linear_layer(names: list[str], moving: bool) -> None:
    """ẏ = W ẋ + Ẇ x + ḃ in NumPy, whichever of them there is."""
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    module = nn.Sequential(first, second).double().eval()
    chosen = [f"1.{name}" for name in names] + (["0.weight"] if moving else [])
    tau, x = direction(module, 3, chosen), noise(1, 5, 3)
    value, change = derivative(module, tau, x)
    parts = {name: p.detach().numpy() for name, p in module.named_parameters()}
    hidden = x.numpy() @ parts["0.weight"].T + parts["0.bias"]
    zero = {name: np.zeros_like(part) for name, part in parts.items()}
    moves = zero | {name: part.numpy() for name, part in tau.items()}
    wanted = x.numpy() @ moves["0.weight"].T @ parts["1.weight"].T
    wanted = wanted + hidden @ moves["1.weight"].T + moves["1.bias"]
    np.testing.assert_allclose(change.detach().numpy(), wanted, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        value.detach().numpy(), hidden @ parts["1.weight"].T + parts["1.bias"], rtol=1e-12
    )


def test_module_in_training_mode_is_refused() -> None:
    module, kwargs = made(encoder)
    with pytest.raises(UsageError) as caught:
        derivative(module.train(), direction(module, 1), **kwargs)
    assert str(caught.value) == (
        "TransformerEncoder is in training mode, where dropout makes its derivative noise; "
        "call eval() on it"
    )


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return 2 * grad


class Distances(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.cdist(x, x)


class Odd(nn.Module):
    def forward(self, x: Any) -> Any:
        return Doubled.apply(x)


REMEDY = (
    " has no derivative in forward mode, so that the model cannot be linearised as it is; load it "
    "with attn_implementation='sdpa' or 'eager' if this is its attention; otherwise use plain "
    "operations there, or give the autograd.Function setup_context and jvp"
)


def test_operation_without_forward_derivative_is_named() -> None:
    apart = nn.Sequential(nn.Linear(3, 3), Distances()).double().eval()
    with pytest.raises(UsageError) as caught:
        derivative(apart, direction(apart, 1), noise(1, 1, 4, 3))
    assert str(caught.value) == "Sequential, 1: _cdist_forward" + REMEDY
    odd = nn.Sequential(nn.Linear(3, 3), Odd()).double().eval()
    with pytest.raises(UsageError) as caught:
        derivative(odd, direction(odd, 1), noise(1, 1, 3))
    assert str(caught.value) == "Sequential, 1: an autograd.Function" + REMEDY


def test_other_errors_pass() -> None:
    module = nn.Linear(3, 3).double().eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        derivative(module, direction(module, 1), noise(1, 1, 4))


def test_loss_and_cache_of_the_model_are_refused() -> None:
    module, kwargs = made(llama)
    module.config.use_cache = True
    linear = Linearised(module, attention(module))
    with pytest.raises(UsageError) as caught:
        linear(**kwargs, labels=tokens())
    assert str(caught.value) == (
        "labels: the loss of a linearised model is not the linearised loss; leave labels out and "
        "compute the loss from the outputs"
    )
    with pytest.raises(UsageError) as caught:
        linear(**kwargs, use_cache=True)
    assert str(caught.value) == "use_cache: a linearised model keeps no cache; leave it out"
    assert linear(**kwargs).past_key_values is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "names: none is given, so nothing would be linearised"),
        (["weights"], "names: 'weights' is not a parameter of Linear; did you mean 'weight'?"),
        (["bias", "bias"], "names: 'bias' is given twice"),
    ],
)
def test_names_that_cannot_be(names: list[str], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        Linearised(nn.Linear(2, 2), names)
    assert str(caught.value) == message


def test_tied_names_are_one_parameter() -> None:
    module, _ = made(llama)
    with pytest.raises(ParameterError) as caught:
        Linearised(module, ["model.embed_tokens.weight", "lm_head.weight"])
    assert str(caught.value) == (
        "names: 'lm_head.weight' and 'model.embed_tokens.weight' are one parameter; give one"
    )


def test_vector_that_does_not_fit() -> None:
    linear = Linearised(nn.Linear(2, 3), ["weight"])
    with pytest.raises(FamilyError) as caught:
        linear.put({"bias": torch.ones(3)})
    assert str(caught.value) == "vector: 'bias' is not linearised here; known: weight"
    with pytest.raises(FamilyError) as caught:
        linear.put({"weight": torch.ones(2, 3)})
    assert str(caught.value) == (
        "vector: 'weight' has shape [2, 3], the parameter has [3, 2]; give a vector of this model"
    )
