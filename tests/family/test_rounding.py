"""Families with quantised members: merged as their widened weights are, and what is said of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import read_checkpoint, to_bf16
from tests.quantisers import FORMATS, Stored, bits16, cut16, mxfp4, write_quantised

import taskvec as tv
from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import size
from taskvec.family.rounding import errors_of

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16"}
Array = np.ndarray[Any, Any]


def quantised(folder: Path, format_: str, seed: int, **more: Any) -> tuple[Path, Array]:
    """A member in a format, and the values of its weight."""
    rng = np.random.default_rng(seed)
    make = mxfp4 if format_ == "mxfp4" else FORMATS[format_]
    name, shape = (EXPERTS, (2, 64, 40)) if format_ == "mxfp4" else (UP, (64, 160))
    stored, values, said = make(rng, name, shape)
    stored[NORM] = ("BF16", bits16(cut16(rng.standard_normal(64))))
    write_quantised(folder, stored, {**CONFIG, "quantization_config": said, **more})
    return folder, values


def widened_copy(folder: Path, of: Path) -> Path:
    """The same model in float32."""
    opened = open_checkpoint(of)
    stored: Stored = {}
    for name, info in opened.tensors.items():
        view = opened.view(name)
        block = view.read(0, info.size)
        block = (widened(block, view.dtype) if name != NORM else block).reshape(info.shape)
        stored[name] = ("BF16" if name == NORM else "F32", block)
    return write_quantised(folder, stored, CONFIG)


def merged(out: Path, anchor: Path, tasks: dict[str, Any], **options: Any) -> dict[str, Array]:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        family = tv.Family(anchor=anchor, tasks=tasks)
        tv.merge(family, out, method="task_arithmetic", cache="off", **options)
    return read_stored(out)


def read_stored(folder: Path) -> dict[str, Array]:
    opened = open_checkpoint(folder)
    return {name: opened.view(name).read(0, info.size) for name, info in opened.tensors.items()}


@pytest.mark.parametrize("format_", ["fp8 blocks", "nf4 nested", "gptq 4", "awq", "mxfp4"])
def test_a_merge_is_that_of_the_widened_weights(tmp_path, format_):
    members = [quantised(tmp_path / f"q{seed}", format_, seed)[0] for seed in range(3)]
    wide = [widened_copy(tmp_path / f"w{i}", member) for i, member in enumerate(members)]
    got, expected = (
        merged(tmp_path / out, of[0], {"a": of[1], "b": of[2]}, scale=0.7, dtype="bfloat16")
        for out, of in (("q", members), ("w", wide))
    )
    assert got.keys() == expected.keys()
    for name, bits in got.items():
        np.testing.assert_array_equal(bits, expected[name])


def test_a_quantised_target_is_written_in_16_bits_without_its_quantisation(tmp_path):
    more = {"text_config": {"model_type": "llama_text", "quantization_config": {"bits": 4}}}
    target, values = quantised(tmp_path / "q", "gptq 4", 1, **more)
    (target / "quantize_config.json").write_text("{}")
    (target / "tokenizer.json").write_text("{}")
    task, _ = quantised(tmp_path / "t", "gptq 4", 2)
    got = merged(tmp_path / "out", target, {"t": task}, scale=0.0)
    np.testing.assert_array_equal(got[UP], to_bf16(values.astype("<f4")).reshape(-1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "quantization_config" not in config["text_config"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_an_adapter_over_a_quantised_base(tmp_path):
    """QLoRA: the difference is the adapter's, and nothing warns of rounding."""
    base, values = quantised(tmp_path / "q", "nf4 nested", 1)
    rng = np.random.default_rng(5)
    a, b = cut16(rng.standard_normal((4, 160))), cut16(rng.standard_normal((64, 4)))
    module = f"base_model.model.{UP.removesuffix('.weight')}"
    adapter = write_quantised(
        tmp_path / "lora",
        {
            f"{module}.lora_A.weight": ("BF16", bits16(a)),
            f"{module}.lora_B.weight": ("BF16", bits16(b)),
        },
        {},
    )
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "config.json").unlink()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family = tv.Family(anchor=base, tasks={"t": adapter})
        tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=0.5, cache="off")
    got = read_checkpoint(tmp_path / "out")[UP]
    np.testing.assert_allclose(got, values + 0.5 * 2 * b @ a, rtol=2**-8, atol=1e-6)


def test_a_vector_between_a_quantised_and_a_full_member_warns_with_both_norms(tmp_path):
    quantised_, values = quantised(tmp_path / "q", "int8 channel", 1)
    rng = np.random.default_rng(2)
    step = np.abs(np.diff(np.sort(values, axis=1), axis=1))
    steps = np.array([row[row > 0].min() for row in step])[:, np.newaxis]
    noise = rng.uniform(-0.5, 0.5, values.shape) * steps  # what rounding took away
    full = write_quantised(
        tmp_path / "f",
        {UP: ("F32", (values + noise).astype("<f4")), NORM: ("BF16", np.zeros(64, "<u2"))},
        CONFIG,
    )
    family = tv.Family(anchor=full, tasks={"t": quantised_}, include=[UP])
    with pytest.warns(UserWarning, match="rounding of quantised weights") as caught:
        scan = tv.scan(family, cache="off")
    (message,) = [str(w.message) for w in caught if "rounding" in str(w.message)]
    errors, norm = (float(message.split(word)[1].split()[0]) for word in ("about ", "‖τ‖ = "))
    expected = np.linalg.norm(noise)
    assert errors == pytest.approx(np.sqrt((steps**2 / 12).sum() * values.shape[1]), rel=0.01)
    assert errors == pytest.approx(expected, rel=0.05)
    assert norm == pytest.approx(expected, rel=0.05)
    assert scan.warnings


def test_members_that_are_not_quantised_warn_of_nothing(tmp_path):
    members = [
        widened_copy(tmp_path / f"w{i}", quantised(tmp_path / f"q{i}", "awq", i)[0]) for i in (0, 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tv.scan(tv.Family(anchor=members[0], tasks={"t": members[1]}), cache="off")


def test_errors_of_a_view_that_is_made_of_others(tmp_path):
    from taskvec.checkpoints.joined import Section, joined
    from taskvec.checkpoints.rows import gather

    view = open_checkpoint(quantised(tmp_path / "q", "awq", 1)[0]).view(UP)
    plain = open_checkpoint(widened_copy(tmp_path / "w", tmp_path / "q")).view(UP)
    expected = view.errors().read(0, size(view))
    assert errors_of(plain) is None
    assert errors_of(joined([plain, plain], (128, 160))) is None
    half = errors_of(Section(view, 160, (1, 160)))
    np.testing.assert_array_equal(half.read(0, 160), expected[160:320])
    both = errors_of(joined([plain, view], (128, 160)))
    np.testing.assert_array_equal(both.read(0, 2 * 64 * 160), np.append(0 * expected, expected))
    rows = errors_of(gather([view, plain], np.array([0, 1]), np.array([3, 3])))
    np.testing.assert_array_equal(rows.read(0, 320), np.append(expected[480:640], np.zeros(160)))


def test_every_verb_takes_quantised_members(tmp_path):
    anchor, values = quantised(tmp_path / "a", "fp8 blocks", 1)
    task, tuned = quantised(tmp_path / "t", "nf4 nested", 2)
    family = tv.Family(anchor=anchor, tasks={"t": task})
    with pytest.warns(UserWarning, match="rounding of quantised weights"):
        plan = tv.plan(family, method="task_arithmetic", scale=1.0)
    notes = "\n".join(plan.members.notes)
    assert f"{task}: 1 of 2 tensors are quantised, NF4 of bitsandbytes (1)" in notes
    assert f"{anchor}: 1 of 2 tensors are quantised, FP8 E4M3 (1)" in notes
    assert "the target is quantised" in notes
    with pytest.warns(UserWarning, match="rounding of quantised weights"):
        tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=1.0, cache="off")
    merged_ = read_checkpoint(tmp_path / "out")[UP]
    np.testing.assert_allclose(merged_, tuned, rtol=2**-8, atol=2**-20)
    assert all(check.outcome == "same" for check in tv.verify(tmp_path / "out", replay=True))
    with pytest.warns(UserWarning, match="rounding of quantised weights"):
        tv.extract(family, tmp_path / "v.safetensors", what="task", task="t")
    inspection = tv.inspect(anchor, norms=True)
    assert inspection.numbers[UP].norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
    assert inspection.tensors[UP].nbytes == values.size + 4 * 20
