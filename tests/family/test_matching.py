"""Members that call their tensors otherwise than the target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tests.conftest import read_checkpoint, write_checkpoint
from tests.wild_architectures import TEXT

import taskvec as tv
from taskvec.errors import FamilyError
from taskvec.family.members import open_members

Arrays = dict[str, np.ndarray[Any, Any]]
LLAMA = {
    "model.embed_tokens.weight": (6, 4), "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.k_proj.weight": (2, 4),
    "model.layers.0.self_attn.v_proj.weight": (2, 4),
    "model.layers.0.mlp.gate_proj.weight": (5, 4), "model.layers.0.mlp.up_proj.weight": (5, 4),
    "model.norm.weight": (4,), "lm_head.weight": (6, 4),
}  # fmt: skip
VISION = {"visual.blocks.0.attn.qkv.weight": (12, 4), "visual.merger.mlp.0.weight": (4, 4)}


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def family(root: Path, anchor: Arrays, task: Arrays, **config: Any) -> tv.Family:
    write_checkpoint(root / "a", anchor, "F32", config=config)
    write_checkpoint(root / "t", task, "F32", config=config)
    return tv.Family(anchor=root / "a", tasks={"t": root / "t"})


def merge(found: tv.Family, out: Path, scale: float = 0.5) -> Arrays:
    tv.merge(found, out, method="task_arithmetic", scale=dict.fromkeys(found.tasks, scale))
    return read_checkpoint(out)


def notes(found: tv.Family) -> str:
    return "\n".join(open_members(found, needs_base=False, needs_anchor=True).notes)


def check(got: Arrays, anchor: Arrays, task: Arrays) -> None:
    """The target's names, and the mean of both."""
    assert got.keys() == anchor.keys()
    for name, start in anchor.items():
        np.testing.assert_allclose(got[name], (start + task[name]) / 2, atol=1e-6, err_msg=name)


WRAPPED = {
    "module": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "trl": lambda n: f"pretrained_model.{n}",
    "peft": lambda n: f"base_model.model.{n}",
    "fsdp": lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "bare": lambda n: n.removeprefix("model."),
    "text inside": lambda n: n.replace("model.", "model.language_model.", 1),
    "text inside, as before": lambda n: f"language_model.{n}",
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("which", ["task", "target"])
def test_wrappers_and_prefixes(tmp_path, kind, which):
    anchor, task = draw(LLAMA, 0), draw(LLAMA, 1)
    rename = WRAPPED[kind]
    expected = task
    if which == "task":
        found = family(tmp_path, anchor, {rename(n): t for n, t in task.items()})
    else:
        anchor = {rename(n): t for n, t in anchor.items()}
        expected = {rename(n): t for n, t in task.items()}
        found = family(tmp_path, anchor, task)
    check(merge(found, tmp_path / "out"), anchor, expected)
    said = notes(found)
    count = sum(rename(n) != n for n in LLAMA)
    assert f"{count} tensor" in said
    assert "task 't'" in said


def test_literal_names_are_not_spoken_of(tmp_path):
    found = family(tmp_path, draw(LLAMA, 0), draw(LLAMA, 1))
    assert "matched" not in notes(found)


def test_towers_of_a_model_with_images(tmp_path):
    shapes = LLAMA | VISION
    anchor, task = draw(shapes, 0), draw(shapes, 1)
    renamed = {
        f"model.{n}" if n.startswith("visual") else n.replace("model.", "model.language_model."): t
        for n, t in task.items()
    }
    check(merge(family(tmp_path, anchor, renamed), tmp_path / "out"), anchor, task)


@pytest.mark.parametrize("method", ["task_arithmetic", "average"])
def test_a_text_only_task_over_a_model_with_images(tmp_path, method):
    """The language model is merged, the tower is the target's, bit for bit."""
    anchor, task = draw(LLAMA | VISION, 0), draw(LLAMA, 1)
    anchor["visual.merger.mlp.0.weight"][0, 0] = -0.0
    found = family(tmp_path, anchor, task)
    if method == "average":
        found = tv.Family(target=tmp_path / "a", tasks={"t": tmp_path / "t"})
    tv.merge(found, tmp_path / "out", method=method, scale={"t": 0.5})
    got = read_checkpoint(tmp_path / "out")
    assert got.keys() == anchor.keys()
    for name in VISION:
        assert got[name].tobytes() == anchor[name].tobytes()
    if method == "task_arithmetic":
        check({n: got[n] for n in LLAMA}, {n: anchor[n] for n in LLAMA}, task)
        assert "are copied" in notes(found)


def test_a_task_with_images_beside_one_without(tmp_path):
    anchor, seeing, blind = draw(LLAMA | VISION, 0), draw(LLAMA | VISION, 1), draw(LLAMA, 2)
    for name, weights in (("a", anchor), ("s", seeing), ("b", blind)):
        write_checkpoint(tmp_path / name, weights, "F32", config={})
    found = tv.Family(anchor=tmp_path / "a", tasks={"s": tmp_path / "s", "b": tmp_path / "b"})
    got = merge(found, tmp_path / "out")
    for name in VISION:
        np.testing.assert_allclose(got[name], (anchor[name] + seeing[name]) / 2, atol=1e-6)
    assert "it changes nothing there" in notes(found)


def test_a_task_with_images_over_a_text_only_model(tmp_path):
    anchor, task = draw(LLAMA, 0), draw(LLAMA, 1)
    wrapped = {f"language_model.{name}": x for name, x in task.items()} | draw(VISION, 2)
    found = family(tmp_path, anchor, wrapped)
    check(merge(found, tmp_path / "out"), anchor, task)
    assert "visual.blocks.*" in notes(found)
    assert "left out" in notes(found)


def test_a_tower_that_lacks_a_tensor_is_still_refused(tmp_path):
    shapes = LLAMA | VISION
    anchor, task = draw(shapes, 0), draw(shapes, 1)
    del task["visual.blocks.0.attn.qkv.weight"]
    rest = {n: t for n, t in task.items() if n != "model.norm.weight"}
    with pytest.raises(FamilyError, match=r"lacks tensor 'model\.norm\.weight'"):
        merge(family(tmp_path, anchor, rest), tmp_path / "out")
    anchor["visual.blocks.1.attn.qkv.weight"] = anchor["visual.blocks.0.attn.qkv.weight"]
    with pytest.raises(FamilyError, match="lacks tensor 'visual"):
        merge(family(tmp_path / "2", anchor, task), tmp_path / "out")


def test_two_tensors_that_are_one_are_named(tmp_path):
    anchor, task = draw(LLAMA, 0), draw(LLAMA, 1)
    task["module.model.norm.weight"] = task["model.norm.weight"]
    with pytest.raises(FamilyError) as caught:
        merge(family(tmp_path, anchor, task), tmp_path / "out")
    assert "'model.norm.weight'" in str(caught.value)
    assert "'module.model.norm.weight'" in str(caught.value)


# --- fused and apart -----------------------------------------------------------------------------


def fused(weights: Arrays) -> Arrays:
    """q, k, v in one tensor, gate and up in another, as Phi-3 has them."""
    inside = "model.layers.0."
    out = {n: t for n, t in weights.items() if "_proj" not in n}
    qkv = [weights[f"{inside}self_attn.{x}_proj.weight"] for x in "qkv"]
    out[f"{inside}self_attn.qkv_proj.weight"] = np.concatenate(qkv)
    mlp = [weights[f"{inside}mlp.{x}_proj.weight"] for x in ("gate", "up")]
    out[f"{inside}mlp.gate_up_proj.weight"] = np.concatenate(mlp)
    return out


def experts(weights: Arrays, count: int) -> Arrays:
    """All experts in one tensor, as transformers has them in memory."""
    inside = "model.layers.0.mlp.experts"
    out = {n: t for n, t in weights.items() if ".experts." not in n}
    both = [
        np.concatenate([weights[f"{inside}.{e}.{x}_proj.weight"] for x in ("gate", "up")])
        for e in range(count)
    ]
    out[f"{inside}.gate_up_proj"] = np.stack(both)
    out[f"{inside}.down_proj"] = np.stack(
        [weights[f"{inside}.{e}.down_proj.weight"] for e in range(count)]
    )
    return out


SPARSE = {
    f"model.layers.0.mlp.experts.{e}.{x}_proj.weight": (3, 4) if x != "down" else (4, 3)
    for e in range(3)
    for x in ("gate", "up", "down")
} | {"model.norm.weight": (4,)}


@pytest.mark.parametrize("direction", ["into fused", "into apart"])
@pytest.mark.parametrize("kind", ["projections", "experts", "mixtral"])
def test_fused_and_separate_tensors(tmp_path, direction, kind):
    shapes = LLAMA if kind == "projections" else SPARSE
    anchor, task = draw(shapes, 0), draw(shapes, 1)

    def together(weights: Arrays) -> Arrays:
        return fused(weights) if kind == "projections" else experts(weights, 3)

    def apart(weights: Arrays) -> Arrays:
        if kind != "mixtral":
            return weights
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        return {
            next((n.replace(a, b) for a, b in names.items() if a in n), n).replace(
                ".mlp.", ".block_sparse_moe."
            ): t
            for n, t in weights.items()
        }

    one, other = (together, apart) if direction == "into fused" else (apart, together)
    found = family(tmp_path, one(anchor), other(task))
    check(merge(found, tmp_path / "out"), one(anchor), one(task))
    assert ("fused" if direction == "into fused" else "apart") in notes(found)


def test_a_vector_that_changes_a_part_of_a_fused_tensor(tmp_path):
    """What it leaves as it is stays so."""
    anchor, task = draw(LLAMA, 0), draw(LLAMA, 1)
    changed = {**anchor, "model.layers.0.self_attn.k_proj.weight": task[
        "model.layers.0.self_attn.k_proj.weight"]}  # fmt: skip
    tv.extract(family(tmp_path, anchor, changed), tmp_path / "v.safetensors")
    write_checkpoint(tmp_path / "fused", fused(anchor), "F32", config={})
    found = tv.Family(anchor=tmp_path / "fused", tasks={"t": tmp_path / "v.safetensors"})
    got = merge(found, tmp_path / "out", 1.0)
    for name, expected in fused(changed).items():
        np.testing.assert_allclose(got[name], expected, atol=1e-6)


# --- tables of transformers ----------------------------------------------------------------------


def test_names_of_another_version_of_transformers(tmp_path):
    """SAM 3's tracker and its like: names that only the published tables know."""
    config = tf.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "image_size": 28,
                       "intermediate_size": 48, "num_hidden_layers": 1, "patch_size": 14,
                       "num_attention_heads": 2},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "a")
    stored = read_checkpoint(tmp_path / "a")
    with torch.device("meta"):
        memory = tf.LlavaForConditionalGeneration(config).state_dict()
    rng = np.random.default_rng(1)
    task = {n: rng.normal(0, 1, tuple(t.shape)).astype(np.float32) for n, t in memory.items()}
    write_checkpoint(tmp_path / "t", task, "F32", config=config.to_dict())
    found = tv.Family(anchor=tmp_path / "a", tasks={"t": tmp_path / "t"})
    got = merge(found, tmp_path / "out", 1.0)
    assert got.keys() == stored.keys()
    back = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    for name, expected in task.items():
        if name in back:
            np.testing.assert_allclose(back[name].numpy(), expected, atol=1e-5, err_msg=name)


def test_a_rename_that_only_the_published_table_knows(tmp_path):
    config = {"architectures": ["BertModel"], "model_type": "bert"}
    from taskvec.family.renames import renamings

    assert renamings({}) is None
    assert renamings(config) is None or callable(renamings(config))
    phimoe = {"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe",
              **TEXT, "num_local_experts": 2}  # fmt: skip
    rename = renamings(phimoe)
    assert rename is not None
    assert rename("model.layers.0.block_sparse_moe.gate.weight") == rename(
        "model.layers.0.mlp.router.weight"
    )
