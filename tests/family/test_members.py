"""Families: what is opened, what does not fit together, and weights that are no numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.conftest import (
    family_weights,
    read_checkpoint,
    read_raw,
    to_bf16,
    write_checkpoint,
    write_family,
)

import taskvec as tv
from taskvec.errors import CheckpointError, FamilyError, OutputError, UsageError
from taskvec.family.members import open_members

# Families in which only what a test is about differs.
pytestmark = pytest.mark.filterwarnings("ignore:.*task vector is zero")

Q0 = "model.layers.0.self_attn.q_proj.weight"
REMEDY = "exclude it in the recipe, or use checkpoints of one architecture"
SMALL = {"a": np.array([1.0, 2.0]), "b": np.array([[3.0]]), "c.weight": np.array([4.0])}


def small_family(root: Path, dtype: object = "F32", **members: object) -> tv.Family:
    """A family of few numbers; a member that is not given is SMALL."""
    folders = {
        name: write_checkpoint(root / name, members.get(name, SMALL), dtype)
        for name in ("base", "instruct", "math", "target")
    }
    target = folders["target"] if "target" in members else None
    return tv.Family(base=folders["base"], instruct=folders["instruct"],
                     tasks={"math": folders["math"]}, target=target)  # fmt: skip


def opened(family: tv.Family, **patterns: tuple[str, ...]) -> object:
    given = {s: getattr(family, s) for s in ("tasks", "instruct", "base", "target")}
    return open_members(tv.Family(**given, **patterns), needs_base=True, needs_anchor=True)


def refusal(error: type[Exception], family: tv.Family, **patterns: tuple[str, ...]) -> str:
    with pytest.raises(error) as caught:
        opened(family, **patterns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def merge(
    family: tv.Family, out: Path, scale: float = 1.0, **options: object
) -> tv.engine.run.Merged:
    method = options.pop("method", "task_arithmetic")
    return tv.merge(
        family, out, method=method, scale=dict.fromkeys(family.tasks, scale), threads=1, **options
    )


# --- what does not fit ---------------------------------------------------------------------------


def test_member_lacks_a_tensor(tmp_path):
    family = small_family(tmp_path, math={"a": SMALL["a"]})
    assert refusal(FamilyError, family) == (
        f"task 'math' ({tmp_path}/math): lacks tensor 'b' of the target (2 missing); {REMEDY}"
    )


def test_member_has_one_more(tmp_path):
    family = small_family(tmp_path, base={**SMALL, "z": np.ones(1)})
    assert refusal(FamilyError, family) == (
        f"base ({tmp_path}/base): has tensor 'z', which the target lacks (1 extra); "
        'to leave it out, use exclude: ["z"]'
    )


def test_vector_of_another_model(tmp_path):
    path = tmp_path / "other.safetensors"
    other = {"encoder.x": np.ones(2, np.float32), "encoder.y": np.ones(2, np.float32)}
    save_file(other, path, metadata={"taskvec": "task vector"})
    family = replace(small_family(tmp_path), tasks={"math": str(path)})
    assert refusal(FamilyError, family) == (
        f"task 'math' ({path}): has no tensor in common with the target ({tmp_path}/instruct), "
        "but 'encoder.x' and 1 more; it belongs to another model"
    )


def test_other_target_lacks_a_tensor(tmp_path):
    family = small_family(tmp_path, target={"a": SMALL["a"], "b": SMALL["b"]})
    assert refusal(FamilyError, family) == (
        f"instruct ({tmp_path}/instruct): has tensor 'c.weight', which the target lacks (1 extra); "
        'to leave it out, use exclude: ["c.weight"]'
    )


def test_other_shape(tmp_path):
    family = small_family(tmp_path, math={**SMALL, "b": np.ones((1, 2))})
    assert refusal(FamilyError, family) == (
        f"task 'math' ({tmp_path}/math): tensor 'b' has shape [1, 2], the target has [1, 1]; "
        f"{REMEDY}"
    )


def test_same_size_of_another_shape(tmp_path):
    family = small_family(tmp_path, math={**SMALL, "b": np.ones(1)})
    assert "tensor 'b' has shape [1], the target has [1, 1]" in refusal(FamilyError, family)


def test_whole_numbers_beside_floating_point(tmp_path):
    family = small_family(tmp_path)
    write_checkpoint(tmp_path / "math", SMALL, {"a": "I32", "b": "F32", "c.weight": "F32"})
    assert refusal(FamilyError, family) == (
        f"task 'math' ({tmp_path}/math): tensor 'a' is I32, the target has F32; {REMEDY}"
    )


def test_broken_member_is_named_by_its_file(tmp_path):
    family = small_family(tmp_path)
    (tmp_path / "math" / "model.safetensors").write_bytes(b"")
    assert refusal(CheckpointError, family).startswith(
        f"{tmp_path}/math/model.safetensors: file has 0"
    )


def test_roles_that_are_missing(tmp_path):
    family = small_family(tmp_path)
    tasks, instruct, base = family.tasks, family.instruct, family.base
    message = "instruct (or anchor) is missing: task vectors are measured from it"
    with pytest.raises(UsageError) as caught:
        open_members(tv.Family(tasks, base=base), needs_base=True, needs_anchor=True)
    assert str(caught.value) == message
    message = "base is missing: this method compares with the step from base to instruct"
    with pytest.raises(UsageError) as caught:
        open_members(tv.Family(tasks, instruct=instruct), needs_base=True, needs_anchor=True)
    assert str(caught.value) == message


def test_base_is_not_opened_where_it_is_not_needed(tmp_path):
    family = small_family(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    members = open_members(family, needs_base=False, needs_anchor=True)
    assert set(members.sources) == {"target", "anchor", "task:math"}


def test_one_folder_in_two_roles_is_opened_once(tmp_path):
    family = small_family(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "instruct")
    members = open_members(
        tv.Family(family.tasks, instruct=tmp_path / "link", base=tmp_path / "instruct"),
        needs_base=True, needs_anchor=True,
    )  # fmt: skip
    assert members.sources["base"] is members.sources["anchor"]
    assert len(members.distinct) == 2
    assert members.warnings == ("base and instruct are one folder: the instruction vector is zero",)


# --- patterns ------------------------------------------------------------------------------------


def test_include_and_exclude(tmp_path):
    members = opened(small_family(tmp_path), include=("a", "c.*"), exclude=("*weight",))
    assert members.merged == ("a",)
    assert members.kept == ("b", "c.weight")


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_pattern_that_fits_nothing(tmp_path, key):
    assert refusal(UsageError, small_family(tmp_path), **{key: ("a", "model.*")}) == (
        f"{key} pattern 'model.*' fits no tensor of any member, such as 'a'"
    )


def test_patterns_that_leave_nothing(tmp_path):
    assert refusal(UsageError, small_family(tmp_path), exclude=("*",)) == (
        "include and exclude leave no floating-point tensor to merge"
    )


def test_patterns_are_case_sensitive(tmp_path):
    assert "fits no tensor" in refusal(UsageError, small_family(tmp_path), include=("A",))


def test_excluded_tensors_need_not_fit(tmp_path):
    """A head of another shape, a tensor that one member has alone, integers that differ."""
    family = small_family(
        tmp_path,
        instruct={**SMALL, "head": np.ones((2, 3)), "ids": np.arange(3)},
        base={**SMALL, "head": np.ones((5, 3)), "ids": np.arange(4), "head.extra": np.ones(1)},
        math={**SMALL, "ids": np.arange(3) * 2},
    )
    members = opened(family, exclude=("head*", "ids"))
    assert members.merged == ("a", "b", "c.weight")
    assert members.kept == ("head", "ids")


def test_not_included_tensors_need_not_fit(tmp_path):
    family = small_family(tmp_path, math={"a": SMALL["a"], "z": np.ones(1)})
    assert opened(family, include=("a",)).merged == ("a",)


def test_excluded_tensors_keep_the_bytes_of_the_target(tmp_path):
    folders = write_family(tmp_path)
    family = tv.Family(base=folders["base"], instruct=folders["instruct"],
                       tasks={"math": folders["math"]}, target=folders["code"],
                       exclude=("model.embed_tokens.weight", "*.1.*"))  # fmt: skip
    merge(family, tmp_path / "out", 0.5, method={"name": "lata", "scheme": "linear"})
    before, after = read_raw(folders["code"]), read_raw(tmp_path / "out")
    same = {name for name in before if before[name] == after[name]}
    excluded = {n for n in before if n == "model.embed_tokens.weight" or ".1." in n}
    assert len(excluded) == 10
    assert excluded <= same
    assert len(same - excluded) <= 2  # the most similar layer has weight 0 and is copied too


def test_include_by_flag_and_by_recipe_agree(tmp_path, cli):
    folders = write_family(tmp_path)
    flags = ["--instruct", folders["instruct"], "--task", f"math={folders['math']}:0.5", "--method",
             "task_arithmetic", "--include", "model.layers.*", "--exclude", "*norm*"]  # fmt: skip
    assert cli("merge", tmp_path / "one", *flags)[0] == 0
    (tmp_path / "r.yaml").write_text(
        "instruct: instruct\ntasks: {math: {model: math, scale: 0.5}}\nmethod: task_arithmetic\n"
        "include: ['model.layers.*']\nexclude: ['*norm*']\n"
    )
    assert cli("merge", tmp_path / "r.yaml", tmp_path / "two")[0] == 0
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two")
    changed = {
        n
        for n, raw in read_raw(folders["instruct"]).items()
        if raw != read_raw(tmp_path / "one")[n]
    }
    assert changed == {n for n in read_raw(folders["base"]) if "layers" in n and "norm" not in n}


# --- NaN and infinity ----------------------------------------------------------------------------

PLACES = [("model.embed_tokens.weight", 66_000), (Q0, 5), ("temperature", 0), ("lm_head.weight", 0)]


def spoiled(member: str, name: str, at: int, value: float) -> dict[str, dict[str, np.ndarray]]:
    weights = family_weights()
    weights[member][name] = weights[member][name].copy()
    weights[member][name].reshape(-1)[at] = value
    return weights


@pytest.mark.parametrize("verb", ["scan", "lata", "task_arithmetic"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nan_or_infinity_is_named(tmp_path, cli, verb, dtype):
    """In a scan and in a merge, by member, tensor and place; nothing is written."""
    kinds = [("math", "task 'math'", np.nan, "nan"), ("instruct", "instruct", -np.inf, "-inf")]
    for i, (member, word, value, got) in enumerate(kinds):
        name, at = PLACES[i]
        folders = write_family(tmp_path / str(i), spoiled(member, name, at, value), dtype)
        flags = ["--base", folders["base"], "--instruct", folders["instruct"],
                 "--task", f"math={folders['math']}:1",
                 "--task", f"code={folders['code']}:1"]  # fmt: skip
        words = [verb] if verb == "scan" else ["merge", tmp_path / "out", "--method", verb]
        code, out, err = cli(*words, *flags)
        assert (code, out) == (1, "")
        assert err.startswith(
            f"taskvec: error: {word} ({folders[member]}): "
            f"tensor '{name}' holds {got} at element {at:,} "
        )
        assert err.endswith("; repair the checkpoint or exclude the tensor\n")
        assert err.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == [str(j) for j in range(i + 1)]


def test_nan_in_the_base_is_named(tmp_path):
    folders = write_family(tmp_path, spoiled("base", *PLACES[2], np.nan))
    family = tv.Family(
        base=folders["base"], instruct=folders["instruct"], tasks={"math": folders["math"]}
    )
    with pytest.raises(CheckpointError) as caught:
        tv.scan(family)
    assert str(caught.value).startswith(
        f"base ({tmp_path}/base): tensor 'temperature' holds nan at element 0 "
    )


def test_nan_in_a_tensor_that_is_only_copied(tmp_path):
    """Excluded, so only the target has a say; but the result would hold it."""
    weights = spoiled("instruct", *PLACES[0], np.inf)
    folders = write_family(tmp_path, weights)
    family = tv.Family(instruct=folders["instruct"], tasks={"math": folders["math"]},
                       exclude=("model.embed_tokens.weight",))  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        merge(family, tmp_path / "out")
    assert str(caught.value).startswith(
        f"instruct ({tmp_path}/instruct): tensor 'model.embed_tokens.weight' holds inf at element "
        "66,000 (1 in this block); "
    )
    assert not (tmp_path / "out").exists()


def test_nan_in_a_member_whose_tensor_is_excluded_is_nobodys_business(tmp_path):
    folders = write_family(tmp_path, spoiled("math", *PLACES[0], np.nan))
    family = tv.Family(instruct=folders["instruct"], tasks={"math": folders["math"]},
                       exclude=("model.embed_tokens.weight",))  # fmt: skip
    merge(family, tmp_path / "out")
    assert np.isfinite(read_checkpoint(tmp_path / "out")["model.embed_tokens.weight"]).all()


def test_result_that_overflows(tmp_path):
    weights = {"a": np.array([60_000.0])}
    family = small_family(
        tmp_path, "F16", base=weights, instruct={"a": np.array([1000.0])}, math=weights
    )
    with pytest.raises(OutputError) as caught:
        merge(family, tmp_path / "out", 2.0)
    assert str(caught.value) == (
        "tensor 'a' overflows float16; lower the scale or choose a wider out.dtype"
    )
    assert not (tmp_path / "out").exists()
    merge(family, tmp_path / "out", 2.0, dtype="float32")
    assert read_checkpoint(tmp_path / "out")["a"] == [119_000]


# --- integers ------------------------------------------------------------------------------------


def integers(**other: np.ndarray) -> dict[str, np.ndarray]:
    return {**SMALL, "ids": np.arange(70_000), "mask": np.array([True, False]), **other}


def test_integers_that_agree_are_copied(tmp_path):
    family = small_family(tmp_path, base=integers(), instruct=integers(), math=integers())
    merge(family, tmp_path / "out", dtype="float16")
    raw = read_raw(tmp_path / "out")
    assert raw["ids"] == ("I64", (70_000,), np.arange(70_000).astype("<i8").tobytes())
    assert raw["mask"] == ("BOOL", (2,), b"\1\0")
    assert raw["a"][0] == "F16"


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [("ids", "I64", np.r_[np.arange(69_999), 0]), ("mask", "BOOL", np.array([True, True]))],
)
def test_integers_that_differ(tmp_path, name, kind, value):
    family = small_family(
        tmp_path, base=integers(), instruct=integers(), math=integers(**{name: value})
    )
    with pytest.raises(FamilyError) as caught:
        merge(family, tmp_path / "out")
    assert str(caught.value) == (
        f"task 'math' ({tmp_path}/math): {kind} tensor {name!r} differs from the target's; "
        "what is not floating-point must be equal, or be excluded"
    )
    assert not (tmp_path / "out").exists()
    excluded = tv.Family(family.tasks, instruct=family.instruct, exclude=(name,))
    merge(excluded, tmp_path / "out")
    assert read_raw(tmp_path / "out")[name] == read_raw(tmp_path / "instruct")[name]


# --- odd sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("method", ["lata", "task_arithmetic", "average"])
def test_scalars_and_tensors_without_elements(tmp_path, method, dtype):
    """They go through every step; the empty one lies last in its file."""
    base = {
        "s": np.array(1.0),
        "w": np.array([1.0, 2.0]),
        "x": np.ones(1),
        "zero": np.zeros((0, 3)),
    }
    instruct = {name: array + 1 for name, array in base.items()}
    math = {name: array * 3 for name, array in instruct.items()}
    math["w"] = instruct["w"] * [1, 2]  # so that layers differ
    family = small_family(tmp_path, dtype, base=base, instruct=instruct, math=math)
    merge(family, tmp_path / "out", method=method)
    raw = read_raw(tmp_path / "out")
    assert raw["zero"] == (dtype, (0, 3), b"")
    assert raw["s"][1] == ()
    if method != "lata":
        assert read_checkpoint(tmp_path / "out")["s"] == 6
        assert read_checkpoint(tmp_path / "out")["w"].tolist() == [2, 6]


def test_many_tiny_tensors_and_one_of_several_blocks(tmp_path):
    """Tensors at the edges of a chunk: the last entry of each is worked out."""
    rng = np.random.default_rng(3)
    sizes = [1, 2, 3, 65_535, 65_536, 65_537, 131_073]
    instruct = {f"t{n:06}": rng.normal(0, 1, n).astype(np.float32) for n in sizes}
    math = {name: array + 1 for name, array in instruct.items()}
    family = small_family(tmp_path, instruct=instruct, base=instruct, math=math)
    merge(family, tmp_path / "out", 0.5)
    for name, array in read_checkpoint(tmp_path / "out").items():
        np.testing.assert_allclose(array, instruct[name].astype(np.float64) + 0.5, atol=1e-6)


# --- what looks odd ------------------------------------------------------------------------------


def test_task_that_is_the_anchor_itself_is_said_once(tmp_path, cli):
    folders = write_family(tmp_path)
    code, _, err = cli(
        "merge", tmp_path / "out", "--base", folders["base"], "--instruct", folders["instruct"],
        "--task", f"math={folders['instruct']}:1", "--method", "lata",
    )  # fmt: skip
    assert code == 0
    assert err.count("task 'math'") == 1


def test_task_that_is_the_anchor_itself(tmp_path):
    folders = write_family(tmp_path)
    family = tv.Family(instruct=folders["instruct"], tasks={"same": folders["instruct"]})
    merged = merge(family, tmp_path / "out")
    assert merged.warnings == ("task 'same' is identical to the anchor: its task vector is zero",)
    assert read_raw(tmp_path / "out") == read_raw(folders["instruct"])


@pytest.mark.parametrize("method", ["lata", "task_arithmetic"])
def test_task_that_is_identical_to_the_anchor(tmp_path, cli, method):
    weights = family_weights()
    folders = write_family(tmp_path, {**weights, "math": weights["instruct"]})
    code, _, err = cli(
        "merge", tmp_path / "out", "--base", folders["base"], "--instruct", folders["instruct"],
        "--task", f"math={folders['math']}:1", "--task", f"code={folders['code']}:0.5",
        "--method", method,
    )  # fmt: skip
    assert code == 0
    assert "taskvec: warning: task 'math' is identical to the anchor" in err
    assert err.count("task 'math'") == 1
    assert "task 'code'" not in err


def test_home_of_nobody_is_no_folder(tmp_path):
    family = tv.Family(instruct="~nobody-of-that-name/x", tasks={"a": tmp_path})
    with pytest.raises(CheckpointError, match=r"^~nobody-of-that-name/x: no such folder"):
        tv.scan(family)


def test_bf16_helper_rounds_to_even():
    """The tests' own rounding, against values worked out by hand."""
    assert to_bf16(1 + 2**-8) == 0x3F80
    assert to_bf16(1 + 3 * 2**-8) == 0x3F82
    assert to_bf16(1 + 2**-8 + 2**-20) == 0x3F81


# --- architectures, advice, and how much is edited -----------------------------------------------


def named(folder: Path, architecture: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))


def test_other_architectures_are_told_before_tensors(tmp_path):
    family = small_family(tmp_path, math={**SMALL, "z": np.ones(1)})
    for name in ("base", "instruct", "target"):
        named(tmp_path / name, "LlamaForCausalLM")
    named(tmp_path / "math", "Qwen2ForCausalLM")
    text = refusal(FamilyError, family)
    assert text.startswith(
        f"task 'math' ({tmp_path}/math): is Qwen2ForCausalLM, the target ({tmp_path}/instruct) is "
        "LlamaForCausalLM; "
    )
    assert "'z'" in text
    assert "exclude" not in text


def test_other_architectures_with_the_same_tensors_are_merged(tmp_path):
    family = small_family(tmp_path)
    named(tmp_path / "instruct", "LlamaForCausalLM")
    named(tmp_path / "math", "MistralForCausalLM")
    merge(family, tmp_path / "out")


def test_advice_to_exclude_leaves_the_tensors_of_the_target(tmp_path):
    blocks = {f"model.layers.{i}.q.weight": np.ones((1, 1)) for i in range(3)}
    biases = {name.replace("weight", "bias"): np.ones(1) for name in blocks}
    whole = {**SMALL, **blocks}
    members = dict.fromkeys(("base", "instruct", "target"), whole)
    family = small_family(tmp_path, math=whole | biases | {"v.a": np.ones(1)}, **members)
    patterns = re.findall('"([^"]+)"', refusal(FamilyError, family).partition("exclude: ")[2])
    assert not any(fnmatchcase(name, pattern) for name in whole for pattern in patterns)
    merged = merge(replace(family, exclude=tuple(patterns)), tmp_path / "out")
    assert not any("of the parameters" in warning for warning in merged.warnings)


def test_little_that_is_edited_is_told(tmp_path):
    merged = merge(replace(small_family(tmp_path), include=("b",)), tmp_path / "out")
    assert any(warning.startswith("25.0% of the parameters") for warning in merged.warnings)


def test_a_target_without_a_tokenizer_is_told(tmp_path):
    folders = write_family(tmp_path)
    family = tv.Family(instruct=folders["instruct"], tasks={"math": folders["math"]})
    assert not any("tokenizer" in w for w in merge(family, tmp_path / "none").warnings)
    (folders["math"] / "tokenizer.json").write_text("{}")
    assert any("no tokenizer" in warning for warning in merge(family, tmp_path / "out").warnings)
    (folders["instruct"] / "tokenizer.json").write_text("{}")
    assert not any("tokenizer" in w for w in merge(family, tmp_path / "two").warnings)


def test_a_stage_that_is_not_there(tmp_path):
    family = replace(small_family(tmp_path), target="stage:x")
    assert "stage:x" in refusal(UsageError, family)
