"""Members that differ in how they store the same model: tied heads, element types, buffers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import CONFIG, decode, encode, read_checkpoint, read_raw, write_checkpoint

import taskvec as tv
from taskvec.errors import FamilyError
from taskvec.family.members import open_members

# Families in which only what a test is about differs.
pytestmark = pytest.mark.filterwarnings("ignore:.*task vector is zero")

EMBED, HEAD, BODY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up.weight"
TIED = CONFIG | {"tie_word_embeddings": True}
UNTIED = CONFIG | {"tie_word_embeddings": False}


def weights(seed: int, head: bool | str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = (EMBED, BODY, *([HEAD] if head else []))
    found = {name: rng.normal(0, 1, (5, 3)).astype(np.float32) for name in names}
    return found | ({HEAD: found[EMBED]} if head == "copy" else {})


def family(root: Path, **members: tuple[bool | str, dict]) -> tv.Family:
    """A family in float32; of each member whether it stores a head, and its config."""
    folders = {
        name: write_checkpoint(root / name, weights(i, head), "F32", config=config)
        for i, (name, (head, config)) in enumerate(sorted(members.items()))
    }
    return tv.Family(anchor=folders.pop("anchor"), tasks=folders)


def merged(found: tv.Family, out: Path) -> tuple[dict[str, np.ndarray], dict]:
    scale = dict.fromkeys(found.tasks, 0.5)
    tv.merge(found, out, method="task_arithmetic", scale=scale, precision="float64", threads=1)
    return read_checkpoint(out), json.loads((out / "config.json").read_text())


def notes(found: tv.Family) -> str:
    return "\n".join(open_members(found, needs_base=False, needs_anchor=True).notes)


# --- tied heads ----------------------------------------------------------------------------------


def test_a_task_that_unties_the_head_unties_the_result(tmp_path):
    found = family(tmp_path, anchor=(False, TIED), math=(True, UNTIED))
    result, config = merged(found, tmp_path / "out")
    anchor, math = (read_checkpoint(tmp_path / name) for name in ("anchor", "math"))
    expected = anchor[EMBED].astype(np.float64)
    expected += 0.5 * (math[HEAD].astype(np.float64) - anchor[EMBED])
    np.testing.assert_array_equal(result[HEAD], expected.astype(np.float32))
    assert config["tie_word_embeddings"] is False
    assert notes(found) == (
        "lm_head.weight is tied to the embedding in anchor, target and not in all members: "
        "the result is untied"
    )


def test_a_task_that_ties_the_head_leaves_the_result_untied(tmp_path):
    found = family(tmp_path, anchor=(True, UNTIED), math=(False, TIED))
    result, config = merged(found, tmp_path / "out")
    anchor, math = (read_checkpoint(tmp_path / name) for name in ("anchor", "math"))
    expected = anchor[HEAD].astype(np.float64)
    expected += 0.5 * (math[EMBED].astype(np.float64) - anchor[HEAD])
    np.testing.assert_array_equal(result[HEAD], expected.astype(np.float32))
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("stored", ["anchor", "math", "both"])
def test_where_all_tie_the_head_is_left_out_as_transformers_does(tmp_path, stored):
    found = family(
        tmp_path,
        anchor=("copy" if stored != "math" else False, TIED),
        math=("copy" if stored != "anchor" else False, TIED),
    )
    result, config = merged(found, tmp_path / "out")
    assert sorted(result) == sorted([EMBED, BODY])
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize("anchor", [False, "copy"])
def test_a_head_that_is_not_the_embedding_is_merged_whatever_the_config_says(tmp_path, anchor):
    """Adapters with a saved head leave such models when they are merged into a tied one."""
    found = family(tmp_path, anchor=(anchor, TIED), math=(True, TIED))
    result, config = merged(found, tmp_path / "out")
    start, math = (read_checkpoint(tmp_path / name) for name in ("anchor", "math"))
    expected = start[EMBED].astype(np.float64)
    expected += 0.5 * (math[HEAD].astype(np.float64) - start[EMBED])
    np.testing.assert_array_equal(result[HEAD], expected.astype(np.float32))
    assert config["tie_word_embeddings"] is False
    assert f"{HEAD} is not the embedding in task:math" in notes(found)
    tv.merge(found, tmp_path / "zero", method="task_arithmetic", scale={"math": 0.0})
    zero = read_checkpoint(tmp_path / "zero")
    np.testing.assert_array_equal(zero[HEAD], start[EMBED])
    np.testing.assert_array_equal(zero[EMBED], start[EMBED])


def test_a_head_of_its_own_stays_under_a_config_that_ties_it_in_every_member(tmp_path):
    text = {"text_config": {"tie_word_embeddings": True}}
    found = family(tmp_path, anchor=(True, CONFIG | text), math=(True, CONFIG | text))
    result, config = merged(found, tmp_path / "out")
    start, math = (read_checkpoint(tmp_path / name) for name in ("anchor", "math"))
    expected = start[HEAD].astype(np.float64)
    expected += 0.5 * (math[HEAD].astype(np.float64) - start[HEAD])
    np.testing.assert_array_equal(result[HEAD], expected.astype(np.float32))
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("head", ["lm_head.weight", "proj_out.weight"])
@pytest.mark.parametrize("stored", ["anchor", "task"])
def test_a_copy_of_the_embedding_is_none_where_another_member_lacks_it(tmp_path, head, stored):
    """As in files of BART and Whisper, whose configs do not say that the head is tied."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.decoder.embed_tokens.weight": (6, 4),
        "model.decoder.layers.0.fc1.weight": (4, 4),
    }
    parts = {
        n: {k: rng.normal(size=s).astype("f4") for k, s in shapes.items()}
        for n in ("anchor", "task")
    }
    config = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}
    for name, weights in parts.items():
        copy = {head: weights["model.decoder.embed_tokens.weight"]} if name == stored else {}
        write_checkpoint(tmp_path / name, weights | copy, "F32", config=config)
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"t": tmp_path / "task"})
    tv.merge(family, tmp_path / "out", method="task_arithmetic", scale=1)
    got = read_checkpoint(tmp_path / "out")
    assert got.keys() == shapes.keys()
    for name, weight in parts["task"].items():
        np.testing.assert_allclose(got[name], weight, atol=1e-6)


def test_equal_heads_that_a_config_does_not_tie_are_two_tensors(tmp_path):
    found = family(tmp_path, anchor=("copy", UNTIED), math=(True, UNTIED))
    result, config = merged(found, tmp_path / "out")
    assert sorted(result) == sorted([EMBED, HEAD, BODY])
    assert config["tie_word_embeddings"] is False


# --- copies of one embedding ---------------------------------------------------------------------

SHARED, COPIES = "shared.weight", ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
T5 = {"model_type": "t5", "tie_word_embeddings": False}


def t5(folder: Path, seed: int, copies: str) -> dict[str, np.ndarray]:
    """A model with copies of its embedding: none, the same, or others."""
    rng = np.random.default_rng(seed)
    found = {name: rng.normal(0, 1, (5, 3)).astype(np.float32) for name in (SHARED, QUERY)}
    more = {
        name: found[SHARED] if copies == "same" else rng.normal(0, 1, (5, 3)).astype(np.float32)
        for name in COPIES
    }
    found |= more if copies != "none" else {}
    write_checkpoint(folder, found, "F32", config=T5)
    return found


@pytest.mark.parametrize(("one", "other"), [("same", "none"), ("none", "same"), ("same", "same")])
def test_copies_of_the_embedding_are_one_tensor(tmp_path, one, other):
    start, math = t5(tmp_path / "anchor", 0, one), t5(tmp_path / "math", 1, other)
    found = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    result, _ = merged(found, tmp_path / "out")
    assert sorted(result) == sorted([SHARED, QUERY])
    expected = start[SHARED].astype(np.float64)
    expected += 0.5 * (math[SHARED].astype(np.float64) - start[SHARED])
    np.testing.assert_array_equal(result[SHARED], expected.astype(np.float32))
    assert all(copy in notes(found) for copy in COPIES)


def test_embeddings_that_are_no_copies_stay_apart(tmp_path):
    start, math = t5(tmp_path / "anchor", 0, "other"), t5(tmp_path / "math", 1, "none")
    found = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    result, _ = merged(found, tmp_path / "out")
    for copy in COPIES:
        expected = start[copy].astype(np.float64)
        expected += 0.5 * (math[SHARED].astype(np.float64) - start[copy])
        np.testing.assert_array_equal(result[copy], expected.astype(np.float32))


def test_a_head_that_is_missing_and_not_tied_is_refused(tmp_path):
    found = family(tmp_path, anchor=(True, UNTIED), math=(False, UNTIED))
    with pytest.raises(FamilyError, match=r"task 'math' .*: lacks tensor 'lm_head.weight'"):
        merged(found, tmp_path / "out")


def test_a_type_that_ties_by_default_is_known(tmp_path):
    tied = CONFIG | {"model_type": "gpt2"}
    found = family(tmp_path, anchor=("copy", tied), math=(False, tied))
    assert HEAD not in merged(found, tmp_path / "out")[0]


# --- element types -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["F32", "F16", "F64", "BF16"])
@pytest.mark.parametrize("anchor", ["BF16", "F16", "F32"])
def test_members_may_differ_in_element_type(tmp_path, anchor, task):
    values = {
        "anchor": np.random.default_rng(0).normal(0, 1, (70,)),
        "math": np.random.default_rng(1).normal(0, 1, (70,)),
    }
    for name, dtype in (("anchor", anchor), ("math", task)):
        write_checkpoint(tmp_path / name, {"w": values[name]}, dtype)
    found = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    tv.merge(
        found, tmp_path / "o", method="task_arithmetic", scale={"math": 0.5}, precision="float64"
    )
    start, end = (
        decode(encode(values[name], dtype), dtype, (70,)).astype(np.float64)
        for name, dtype in (("anchor", anchor), ("math", task))
    )
    written, _, data = read_raw(tmp_path / "o")["w"]
    assert written == anchor  # the target's
    if anchor == "BF16":  # NumPy's way from float64 there would round twice
        got = decode(data, anchor, (70,)).astype(np.float64)
        exact = start + 0.5 * (end - start)
        assert (np.abs(got - exact) <= np.abs(exact) * 2.0**-8).all()
    else:
        assert data == encode(start + 0.5 * (end - start), anchor)
    expected = "" if anchor == task else "task 'math' is "
    assert notes(found).startswith(expected)


def test_a_float32_task_is_not_rounded_to_the_anchors_type_first(tmp_path):
    """τ = 2^-9 is lost if the task is rounded to bfloat16; four times it is half a step and not."""
    write_checkpoint(tmp_path / "anchor", {"w": np.array([1.0])}, "BF16")
    write_checkpoint(tmp_path / "math", {"w": np.array([1.0 + 2.0**-9])}, "F32")
    found = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    tv.merge(found, tmp_path / "o", method="task_arithmetic", scale={"math": 4.0})
    assert read_checkpoint(tmp_path / "o")["w"] == 1.0 + 2.0**-7
    assert notes(found) == (
        "task 'math' is float32 beside bfloat16: read as it is, worked with in float32 (or "
        "out.precision), rounded once"
    )


# --- buffers -------------------------------------------------------------------------------------

CACHE = "model.layers.0.self_attn.rotary_emb.inv_freq"
MASK = "h.0.attn.bias"


def buffers(root: Path, anchor: dict, math: dict) -> tv.Family:
    body = {"w": np.ones(3)}
    for name, extra in (("anchor", anchor), ("math", math)):
        write_checkpoint(root / name, {**body, **extra}, "F32")
    return tv.Family(anchor=root / "anchor", tasks={"math": root / "math"})


def test_what_a_model_works_out_itself_may_be_missing_or_differ(tmp_path):
    mask = np.ones((1, 1, 2, 2))
    found = buffers(
        tmp_path, {CACHE: np.array([1.0, 2.0]), MASK: mask}, {CACHE: np.array([3.0, 4.0])}
    )  # fmt: skip
    result, _ = merged(found, tmp_path / "out")
    np.testing.assert_array_equal(result[CACHE], [1.0, 2.0])
    np.testing.assert_array_equal(result[MASK], mask)


def test_what_a_model_works_out_itself_may_be_in_a_task_only(tmp_path):
    found = buffers(tmp_path, {}, {CACHE: np.array([3.0, 4.0]), "e.position_ids": np.arange(3)})
    with pytest.raises(FamilyError, match=r"has tensor 'e\.position_ids'"):
        merged(found, tmp_path / "out")
    found = buffers(tmp_path, {}, {CACHE: np.array([3.0]), "embeddings.position_ids": np.arange(3)})
    assert sorted(merged(found, tmp_path / "out")[0]) == ["w"]


def test_a_bias_of_a_projection_is_no_mask(tmp_path):
    found = buffers(tmp_path, {MASK: np.array([1.0])}, {MASK: np.array([3.0])})
    assert merged(found, tmp_path / "out")[0][MASK] == 2.0


def test_running_statistics_stay_the_targets(tmp_path):
    mine = {"bn.running_var": np.array([1.0]), "bn.num_batches_tracked": np.array(5)}
    other = {"bn.running_var": np.array([9.0]), "bn.num_batches_tracked": np.array(7)}
    found = buffers(tmp_path, mine, other)
    result, _ = merged(found, tmp_path / "out")
    assert result["bn.running_var"] == 1.0
    assert result["bn.num_batches_tracked"] == 5
    assert "running statistics stay the target's ('bn.num_batches_tracked', 2 in all)" in notes(
        found
    )


def test_an_extra_tower_is_refused_with_the_pattern_that_leaves_it_out(tmp_path):
    extra = {"v_head.summary.weight": np.ones(2), "v_head.summary.bias": np.ones(1)}
    found = buffers(tmp_path, {}, extra)
    with pytest.raises(FamilyError) as caught:
        merged(found, tmp_path / "out")
    assert str(caught.value).endswith('(2 extra); to leave it out, use exclude: '
                                      '["v_head.*"]')  # fmt: skip
    left = tv.Family(anchor=found.anchor, tasks=found.tasks, exclude=("v_head.*",))
    assert sorted(merged(left, tmp_path / "out")[0]) == ["w"]
