"""The departure from linearity equals its formula; tangents are disentangled where J τ vanishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.disentanglement.toys import arrays, batches, fine_tune, mlp, mlp_logits, moved

from taskvec.disentanglement import (
    Departure,
    classification,
    disentanglement_error,
    linearised,
    linearity,
)
from taskvec.errors import UsageError

ALPHAS = (0.25, -1.0)


def measured(module: Any, **options: Any) -> list[Departure]:
    data = {"one": classification("one", batches(1))}
    vectors = {"one": fine_tune(module, 1)}
    arguments: Any = {"alphas": ALPHAS, "parts": "whole"} | options
    return linearity(module, vectors, data, **arguments)


def test_departure_is_its_formula() -> None:
    """The derivative of a ReLU network by hand: the gate is that of θ0."""
    module = mlp()
    start, tune = arrays(module.state_dict()), arrays(fine_tune(module, 1))
    tau = {name: tune[name] - value for name, value in start.items()}
    x = np.concatenate([x.numpy() for x, _ in batches(1)])
    labels = np.concatenate([y.numpy() for _, y in batches(1)])
    before = x @ start["0.weight"].T + start["0.bias"]
    hidden, gate = np.maximum(before, 0), before > 0
    step = (x @ tau["0.weight"].T + tau["0.bias"]) * gate
    change = step @ start["2.weight"].T + hidden @ tau["2.weight"].T + tau["2.bias"]
    f0 = mlp_logits(start, x)
    for found, alpha in zip(measured(module), ALPHAS, strict=True):
        f = mlp_logits(moved(start, {"one": tune}, {"one": alpha}), x)
        linear = f0 + alpha * change
        expected = np.linalg.norm(f - linear) / np.linalg.norm(f - f0)
        assert (found.task, found.part, found.share, found.alpha) == ("one", "whole", 1, alpha)
        assert found.departure.value == pytest.approx(expected)
        assert found.departure.low <= expected <= found.departure.high
        assert found.change == pytest.approx(np.sqrt(np.mean(((f - f0) ** 2).sum(1))))
        assert found.accuracy is not None
        assert found.linear_accuracy is not None
        assert found.accuracy.value == pytest.approx(np.mean(f.argmax(1) == labels))
        assert found.linear_accuracy.value == pytest.approx(np.mean(linear.argmax(1) == labels))
        assert found.agreement.value == pytest.approx(np.mean(f.argmax(1) == linear.argmax(1)))
    assert found.departure.value > 0.3


def test_a_model_that_is_linear_in_its_weights_departs_nowhere() -> None:
    torch.manual_seed(0)
    for found in measured(torch.nn.Linear(6, 4).double()):
        assert found.departure.value < 1e-12
        assert found.change > 0.1
        assert found.agreement.value == 1


class Attending(torch.nn.Module):
    """Names that the layer table knows: two blocks of attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for _ in range(2):
            block = torch.nn.Module()
            block.self_attn = torch.nn.Module()
            block.self_attn.q_proj = torch.nn.Linear(6, 6, bias=False)
            block.mlp = torch.nn.Module()
            block.mlp.up_proj = torch.nn.Linear(6, 6, bias=False)
            self.layers.append(block)
        self.lm_head = torch.nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.layers:
            x = x + torch.softmax(block.self_attn.q_proj(x), -1)  # type: ignore[operator, union-attr]
            x = x + torch.tanh(block.mlp.up_proj(x))  # type: ignore[operator, union-attr]
        return self.lm_head(x)


class Whole(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Attending()

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


def test_parts_are_by_the_layer_table() -> None:
    torch.manual_seed(0)
    module = Whole().double()
    tune = fine_tune(module, 1)
    tune["model.layers.0.mlp.up_proj.weight"] = module.state_dict()[
        "model.layers.0.mlp.up_proj.weight"
    ].clone()

    def parts(kind: str) -> dict[str, float]:
        data = {"one": classification("one", batches(1))}
        found = linearity(module, {"one": tune}, data, alphas=(0.5,), parts=kind)
        return {each.part: each.share for each in found}

    by_module = parts("module")
    assert list(by_module) == ["whole", "attention", "mlp", "other"]
    assert sum(by_module.values()) == pytest.approx(2)
    assert list(parts("block")) == ["whole", "model/0", "model/1"]
    assert parts("whole") == {"whole": 1}
    # A part is the vector restricted to it.
    only = {**{n: v.clone() for n, v in module.state_dict().items()}}
    only |= {name: tune[name] for name in tune if "self_attn" in name}
    data = {"one": classification("one", batches(1))}
    alone = linearity(module, {"one": only}, data, alphas=(0.5,), parts="whole")
    both = linearity(module, {"one": tune}, data, alphas=(0.5,), parts="module")
    assert alone[0].departure == both[1].departure
    assert both[0].departure != both[1].departure


def test_the_module_is_left_alone_and_measurements_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mlp()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = measured(module, out=tmp_path)
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.training
    monkeypatch.setattr("taskvec.disentanglement.tangent._measure", None)
    assert measured(module, out=tmp_path) == found


def test_refuses_what_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match=r"parts must be in whole \| module \| block; got 'head'"):
        measured(mlp(), parts="head")
    with pytest.raises(UsageError, match=r"finite numbers other than 0; got \[0.0\]"):
        measured(mlp(), alphas=(0.0,))


# Tangents


def test_a_tangent_is_disentangled_where_the_others_share_vanishes() -> None:
    """f_lin(θ0 + α1 τ1 + α2 τ2) on D1 is f_lin(θ0 + α1 τ1) iff J τ2 is 0 there."""
    module = mlp()
    with torch.no_grad():  # hidden units 0–3 are off on inputs of task two, 4–7 on those of one
        module[0].weight[:] = 0.1 * module[0].weight
        module[0].weight[:4, 0], module[0].weight[4:, 0] = 5.0, -5.0
        module[0].bias[:] = 0
    vectors = {"one": fine_tune(module, 1, 3.0), "two": fine_tune(module, 2, 3.0)}
    start = module.state_dict()
    for tune, off in zip(vectors.values(), (slice(4, 8), slice(0, 4)), strict=True):
        tune["0.weight"][off], tune["0.bias"][off] = start["0.weight"][off], start["0.bias"][off]
        tune["2.weight"][:, off], tune["2.bias"] = (
            start["2.weight"][:, off],
            start["2.bias"].clone(),
        )
    data = {}
    for name, sign in (("one", 1.0), ("two", -1.0)):
        found = batches({"one": 1, "two": 2}[name])
        for x, _ in found:
            x[:, 0] = sign * (1 + x[:, 0].abs())
        data[name] = classification(name, found)
    alphas = (-2.0, 0.0, 2.0)
    tangent, states = linearised(module, vectors)
    found_tangent = disentanglement_error(tangent, states, data, alphas=alphas)
    np.testing.assert_array_equal(found_tangent.values, np.zeros((3, 3)))
    # The model itself is not: far from θ0 the units of one task answer on the other's inputs.
    found_model = disentanglement_error(module, vectors, data, alphas=alphas)
    assert found_model.values.max() > 0.2
    # And a tangent is not by being one.
    mixed = {"one": data["two"], "two": data["one"]}
    assert disentanglement_error(tangent, states, mixed, alphas=alphas).values.max() > 0.2


def test_vectors_put_into_a_tangent_are_applied_linearly() -> None:
    module = mlp()
    vectors = {"one": fine_tune(module, 1), "two": fine_tune(module, 2)}
    data = {name: classification(name, batches(3)) for name in vectors}
    tangent, states = linearised(module, vectors)
    found = linearity(module, vectors, data, alphas=(1.0,), parts="whole")
    grid = disentanglement_error(tangent, states, data, alphas=(0.0, 1.0))
    for each, cell in zip(found, (grid.cells[1][0], grid.cells[0][1]), strict=True):
        assert each.linear_accuracy == cell.accuracy[each.task]
    assert any(each.accuracy != each.linear_accuracy for each in found)
