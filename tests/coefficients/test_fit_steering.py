"""Steering a module: θ(w) against a merge, slopes against autograd, memory of gradients."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.modules import llama  # noqa: E402

import taskvec as tv  # noqa: E402
from taskvec.coefficients.fit import directions as directions_module  # noqa: E402
from taskvec.coefficients.fit import steering as steering_module  # noqa: E402
from taskvec.coefficients.fit.directions import (  # noqa: E402
    check_is_target,
    live_names,
    open_directions,
)
from taskvec.coefficients.fit.steering import Steered  # noqa: E402
from taskvec.errors import UsageError  # noqa: E402

IDS = torch.tensor([[3, 9, 4, 1, 5, 60], [7, 7, 2, 11, 0, 0]])


def state(module):
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


def steered(dtype=torch.float32, *, tie=False, hold=True, stored=torch.bfloat16):
    """A Llama with two fine-tunes, the second of which lacks a change in most tensors."""
    module = llama(0, tie).to(stored)
    family = tv.Family(
        anchor=state(module),
        tasks={"a": state(llama(1, tie).to(stored)), "b": state(llama(2, tie).to(stored))},
    )
    found = open_directions(family)
    module = module.to(dtype)
    names = live_names(found, module)
    packs = {names[n]: found.pack(n, "cpu", hold=hold) for n in reversed(found.names)}
    return found, names, Steered(module, packs, 2), family


def drawn(found, names, seed=0):
    """Random weights by tensor, the same for names of one parameter."""
    by_own = {}
    rng = np.random.default_rng(seed)
    for name in found.names:
        by_own.setdefault(names[name], rng.uniform(-1, 1, 2))
    return by_own


def loss_of(module):
    logits = module(input_ids=IDS).logits.float()
    return (logits.log_softmax(-1)[..., 5] * torch.arange(6)).sum()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hold", [True, False])
def test_the_module_is_what_merge_writes(stored, hold):
    found, names, it, family = steered(stored=stored, dtype=stored, hold=hold)
    weights = drawn(found, names)
    it.put(weights)
    table = found.table(np.array([weights[names[n]] for n in found.names]).T, "drawn")
    out = {name: p.to(stored) for name, p in state(llama(0)).items()}
    tv.merge(family, out, table=table, scale={"a": 1.0, "b": 1.0})
    ulp = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-22}[stored]
    for name, expected in out.items():
        got = it.module.state_dict()[name]
        assert got.dtype == stored
        # Terms cancel, so that their rounding in float32 counts beside that of the result.
        least = max(2**-22 * float(expected.float().abs().max()), 2**-24)  # float16's smallest
        far = sum(
            abs(float(w))
            * (family.tasks[task].model[name].float() - family.start[name].float()).abs()
            for w, task in zip(weights[names[name]], "ab", strict=True)
        )
        # Task vectors that are held are rounded as they are stored, by half of a last place.
        slack = least + ulp * expected.float().abs() + (far * ulp / 2 if hold else 0)
        assert ((got.float() - expected.float()).abs() <= slack).all(), name


def test_putting_again_does_not_add_up():
    found, names, it, _ = steered(dtype=torch.bfloat16)
    weights = drawn(found, names)
    it.put(weights)
    first = state(it.module)
    for seed in range(1, 6):
        it.put(drawn(found, names, seed))
    it.put(weights)
    for name, p in state(it.module).items():
        assert torch.equal(p, first[name]), name


def test_restoring_gives_every_bit_back_also_of_negative_zeros():
    module = llama(0)
    with torch.no_grad():
        module.lm_head.weight[0] = -0.0
    family = tv.Family(anchor=state(module), tasks={"a": state(llama(1))})
    found = open_directions(family)
    names = live_names(found, module)
    packs = {names[n]: found.pack(n, "cpu", hold=True) for n in found.names}
    it, before = Steered(module, packs, 1), state(module)
    it.put({n: np.ones(1) for n in packs})
    it.restore()
    for name, p in state(module).items():
        assert torch.equal(p.view(torch.int16), before[name].view(torch.int16)), name


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("hold", [True, False])
def test_slopes_are_those_of_autograd_through_the_sum(tie, hold, monkeypatch):
    for module in (directions_module, steering_module):
        monkeypatch.setattr(module, "CHUNK", 100)  # tensors are cut, unevenly
    found, names, it, family = steered(tie=tie, hold=hold, stored=torch.float32)
    weights = drawn(found, names)
    with it.steering():
        it.put(weights)
        loss_of(it.module).backward()
        slopes = {name: each.copy() for name, each in it.slopes.items()}

    leaves = {n: torch.tensor(w).float().requires_grad_() for n, w in weights.items()}
    start = {n: p.float() for n, p in family.start.items()}
    merged = {}
    for name in found.names:
        own = names[name]
        total = start[name]
        for i, task in enumerate("ab"):
            total = total + leaves[own][i] * (family.tasks[task].model[name].float() - start[name])
        merged.setdefault(own, total)
    module = llama(0, tie).float()
    if tie:
        merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    logits = torch.func.functional_call(module, merged, (), {"input_ids": IDS}).logits
    (logits.log_softmax(-1)[..., 5] * torch.arange(6)).sum().backward()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(slopes[name], leaf.grad, rtol=2e-3, atol=2e-4, err_msg=name)


def test_a_tied_parameter_has_one_slope_for_both_of_its_uses():
    _, names, it, _ = steered(tie=True)
    assert "lm_head.weight" not in it.names
    assert names["model.embed_tokens.weight"] == "model.embed_tokens.weight"


def test_one_gradient_is_there_at_a_time(monkeypatch):
    found, names, it, _ = steered()
    at_once = []
    take = Steered._take

    def counting(self, name, parameter):
        at_once.append(sum(p.grad is not None for p in self.module.parameters()))
        take(self, name, parameter)

    monkeypatch.setattr(Steered, "_take", counting)
    with it.steering():
        it.put(drawn(found, names))
        loss_of(it.module).backward()
        assert all(p.grad is None for p in it.module.parameters())
    assert len(at_once) == len(it.names)
    assert max(at_once) == 1


def test_modes_and_what_requires_a_gradient_are_as_before():
    _, _, it, _ = steered()
    it.module.train()
    it.module.lm_head.weight.requires_grad_(False)
    with it.steering():
        assert not it.module.training
        assert it.module.lm_head.weight.requires_grad
    assert it.module.training
    assert not it.module.lm_head.weight.requires_grad


def test_loading_a_member_gives_the_fine_tune(tmp_path):
    found, names, it, family = steered(dtype=torch.bfloat16)
    it.load(lambda name: found.member("task:b", name), names)
    for name, p in state(it.module).items():
        assert torch.equal(p, family.tasks["b"].model[name]), name
    path = tmp_path / "a.safetensors"
    tv.extract(family, path, task="a")
    as_vector = open_directions(tv.Family(anchor=family.start, tasks={"a": path}))
    it.load(lambda name: as_vector.member("target", name), names)
    it.load(lambda name: as_vector.member("task:a", name), names)
    for name, p in state(it.module).items():
        assert torch.equal(p, family.tasks["a"].model[name]), name


def test_a_module_that_is_not_the_target_is_refused():
    found, names, it, _ = steered()
    with torch.no_grad():
        it.module.model.norm.weight[3] += 1
    with pytest.raises(UsageError, match=r"not the target: tensor 'model\.norm\.weight' differs"):
        check_is_target(found, it.module, names)


def test_a_module_of_another_shape_is_refused():
    found, _, it, _ = steered()
    it.module.resize_token_embeddings(70)
    with pytest.raises(UsageError, match=r"no tensor '.*' of shape \[64, 16\] but one of shape"):
        live_names(found, it.module)
