"""Vectors of what trained: adding one to the start gives what `save_pretrained` saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.architectures import ARCHITECTURES
from torch import nn

import taskvec as tv
from taskvec.checkpoints.vectors import open_vector
from taskvec.errors import FamilyError, UsageError
from taskvec.training.selection import ParameterSelection, select
from taskvec.training.vector_file import save_vector

# Names as they are, renamed on loading, fused on loading (experts, gate and up), tied, two towers.
MODELS = ("gpt2", "llama", "vit", "dinov2-swiglu", "mixtral", "bert", "t5", "gemma3-images")


def build(which: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARCHITECTURES[which].build(1)


def tune(module: nn.Module, selection: ParameterSelection, step: float = 0.02) -> None:
    """Move what is selected, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in selection.names:
            parameter = module.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator) * step
            if name in selection.rows:
                rows = selection.rows[name]
                for start, stop in rows.ranges:
                    part = parameter.narrow(rows.axis, start, stop - start)
                    part += noise.narrow(rows.axis, start, stop - start)
            else:
                parameter += noise.to(parameter.dtype)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("train", ["attention", "mlp+bias", "all"])
@pytest.mark.parametrize("which", MODELS)
def test_the_start_and_its_vector_are_the_fine_tune(which, train, tmp_path):
    module = build(which)
    module.save_pretrained(tmp_path / "start")
    selection = select(module, train)
    tune(module, selection)
    module.save_pretrained(tmp_path / "tuned")

    written = save_vector(module, tmp_path / "start", selection, tmp_path / "t.safetensors")
    family = tv.Family(anchor=tmp_path / "start", tasks={"t": tmp_path / "t.safetensors"})
    merged = tv.merge(family, tmp_path / "merged", method="task_arithmetic", scale={"t": 1.0})

    assert all("parameters are edited" in text for text in merged.warnings)  # a part is meant
    start, tuned, result = (weights(tmp_path / n) for n in ("start", "tuned", "merged"))
    changed = {name for name in tuned if not torch.equal(start[name], tuned[name])}
    assert set(load_file(tmp_path / "t.safetensors")) == set(written.tensors) == changed
    assert result.keys() == tuned.keys()
    for name in tuned:  # θ_ft − θ and θ + τ are rounded once each
        largest = max(start[name].abs().max(), tuned[name].abs().max())
        assert (result[name] - tuned[name]).abs().max() <= 2 * 2.0**-24 * largest, name
        if name not in changed:
            assert torch.equal(result[name], tuned[name])
    assert not list(tmp_path.glob(".vector-*"))


def test_bfloat16_gives_the_same_bits(tmp_path):
    module = build("llama").to(torch.bfloat16)
    module.save_pretrained(tmp_path / "start")
    selection = select(module, "attention")
    tune(module, selection)
    module.save_pretrained(tmp_path / "tuned")

    save_vector(module, tmp_path / "start", selection, tmp_path / "t.safetensors")
    family = tv.Family(anchor=tmp_path / "start", tasks={"t": tmp_path / "t.safetensors"})
    tv.merge(family, tmp_path / "merged", method="task_arithmetic", scale={"t": 1.0})

    tuned, result = weights(tmp_path / "tuned"), weights(tmp_path / "merged")
    assert all(torch.equal(result[name], tuned[name]) for name in tuned)


def test_rows_that_did_not_train_are_zero(tmp_path):
    module = build("gpt2")
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    selection = select(module, "attention-q")
    tune(module, selection)

    save_vector(module, start, selection, tmp_path / "q.safetensors")

    ((name, tau),) = load_file(tmp_path / "q.safetensors").items()
    assert name == "transformer.h.0.attn.c_attn.weight"
    assert torch.count_nonzero(tau[:, 16:]) == 0
    assert torch.count_nonzero(tau[:, :16]) == 16 * 16


def test_what_the_file_says(tmp_path):
    module = build("llama")
    module.save_pretrained(tmp_path / "start")
    selection = select(module, "attention")
    tune(module, selection)

    written = save_vector(
        module, tmp_path / "start", selection, tmp_path / "m.safetensors", task="math"
    )

    said = open_vector(tmp_path / "m.safetensors").metadata
    assert said["taskvec"] == "task vector"
    assert (said["task"], said["what"], said["anchor"]) == ("math", "task", "start")
    assert said["model"] == "<in memory>"
    assert said["anchor_fingerprint"] == written.anchor_fingerprint
    other = build("llama")
    tune(other, select(other, "all"))
    other.save_pretrained(tmp_path / "other")
    family = tv.Family(anchor=tmp_path / "other", tasks={"t": tmp_path / "m.safetensors"})
    with pytest.warns(tv.TaskvecWarning, match="another model than the anchor"):
        merged = tv.merge(family, tmp_path / "merged", method="task_arithmetic", scale={"t": 1.0})
    assert "another" in merged.warnings[0]


def test_a_model_that_was_renamed_is_told_as_in_memory(tmp_path):
    module = build("vit")
    module.save_pretrained(tmp_path / "start")
    selection = select(module, "attention")
    tune(module, selection)
    save_vector(module, tmp_path / "start", selection, tmp_path / "v.safetensors")

    said = open_vector(tmp_path / "v.safetensors").metadata["model"]
    assert said.startswith("<in memory")


def test_dtype_and_force(tmp_path):
    module = build("llama")
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    selection = select(module, "norms")
    tune(module, selection)
    file = tmp_path / "n.safetensors"

    save_vector(module, start, selection, file, dtype="bfloat16")
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    save_vector(module, start, selection, file, force=True)
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("which", "part", "names"),
    [
        ("gpt2", "transformer", {"h.0.attn.c_attn.weight"}),
        (
            "vit",
            "vit",
            {f"encoder.layer.0.attention.attention.{x}.weight" for x in ("query", "value")},
        ),
    ],
)
def test_the_start_may_be_the_model_without_its_head(which, part, names, tmp_path):
    module = build(which)
    getattr(module, part).save_pretrained(tmp_path / "start")
    selection = select(module, "attention-qv")
    tune(module, selection)

    written = save_vector(module, tmp_path / "start", selection, tmp_path / "t.safetensors")

    assert set(written.tensors) == names


def test_a_tied_parameter_has_the_name_that_the_start_stores(tmp_path):
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    start = {"b.weight": np.zeros((2, 2), np.float32)}

    written = save_vector(net, start, select(net, "all"), tmp_path / "t.safetensors")

    assert written.tensors == ("b.weight",)


def test_only_what_was_selected_is_looked_at(tmp_path):
    """A model that is held in a narrower dtype than its file differs from it everywhere."""
    module = build("llama")
    module.save_pretrained(tmp_path / "start")
    module.to(torch.bfloat16)
    selection = select(module, "attention-q")
    tune(module, selection)

    written = save_vector(module, tmp_path / "start", selection, tmp_path / "t.safetensors")

    assert written.tensors == ("model.layers.0.self_attn.q_proj.weight",)


class TestRefusals:
    def save(self, module: nn.Module, start: Any, train: str, tmp_path: Path) -> str:
        selection = select(module, train)
        with pytest.raises((FamilyError, UsageError)) as caught:
            save_vector(module, start, selection, tmp_path / "t.safetensors")
        assert not (tmp_path / "t.safetensors").exists()
        return str(caught.value)

    def test_a_head_that_the_start_lacks(self, tmp_path):
        module = build("llama-classifier")
        build("llama").save_pretrained(tmp_path / "start")

        assert self.save(module, tmp_path / "start", "heads", tmp_path) == (
            f"{tmp_path}/start: lacks 'score.weight', which trained (1 such); give the model that "
            "training started from, or freeze what it does not have, such as a new head"
        )
        start = {"weight": torch.zeros(1)}
        assert self.save(nn.Linear(1, 1), start, "bias", tmp_path) == (
            "<in memory>: lacks 'bias', which trained (1 such); give the model that "
            "training started from, or freeze what it does not have, such as a new head"
        )

    def test_nothing_changed(self, tmp_path):
        module = build("llama")
        start = {name: p.detach().clone() for name, p in module.named_parameters()}

        assert self.save(module, start, "attention", tmp_path) == (
            "the task vector of 'task' is zero: no tensor differs from anchor (<in memory>); "
            "is it the right folder?"
        )

    def test_another_shape(self, tmp_path):
        start = {"weight": np.zeros((2, 3), np.float32)}

        assert "tensor 'weight' has shape [4, 3]" in self.save(
            nn.Linear(3, 4), start, "weight", tmp_path
        )

    def test_a_vector_is_no_start(self, tmp_path):
        net = nn.Linear(2, 2)
        start = {"weight": torch.zeros(2, 2)}
        selection = select(net, "weight")
        save_vector(net, start, selection, tmp_path / "a.safetensors")

        assert self.save(net, tmp_path / "a.safetensors", "weight", tmp_path) == (
            f"{tmp_path}/a.safetensors: is an adapter or a task vector; give the whole model"
        )

    def test_a_selection_of_another_module(self, tmp_path):
        with pytest.raises(UsageError, match="select on the module that is trained"):
            save_vector(
                nn.Linear(2, 2),
                {},
                ParameterSelection(("other",), {}, 1, 1),
                tmp_path / "t.safetensors",
            )
