"""Task vectors as files: what is in them, that merging them is merging the fine-tune, refusals."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.conftest import read_file, write_checkpoint
from tests.properties import families
from tests.properties.families import SHAPES, contents, stored, values

import taskvec as tv
from taskvec.checkpoints.vectors import KIND, open_vector
from taskvec.errors import CheckpointError, FamilyError, OutputError, UsageError
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.streaming import RunOptions
from taskvec.vectors.difference import Wanted
from taskvec.vectors.vector_file import extract_vector

# Norm and scalar stay as they are in the fine-tune.
KEPT = ("model.layers.0.input_layernorm.weight", "temperature")


def written(root: Path, dtype: str, seed: int = 0) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """A family on disk whose tasks leave `KEPT` as it is; values by member as stored, float64."""
    models = families.members(seed)
    for task in ("code", "math"):
        models[task] = {**models[task], **{name: models["anchor"][name] for name in KEPT}}
    families.write(root, models, dtype)
    return {member: stored(model, dtype) for member, model in models.items()}


def vector(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Elements by the official library; float32 or float64."""
    return load_file(path)


@pytest.mark.parametrize("dtype", families.DTYPES)
def test_a_vector_is_the_difference_of_the_tensors_that_differ(tmp_path, dtype):
    models = written(tmp_path, dtype)
    done = tv.extract(families.family(tmp_path), tmp_path / "math.safetensors", task="math")
    found = vector(tmp_path / "math.safetensors")
    assert set(found) == set(SHAPES) - set(KEPT) == set(done.tensors)
    assert set(done.zero) == set(KEPT)
    for name, tau in found.items():
        exact = models["math"][name] - models["anchor"][name]
        # 16-bit weights of these sizes have differences that float32 holds exactly.
        assert tau.dtype == (np.float64 if dtype == "F64" else np.float32)
        assert np.array_equal(tau, exact.astype(tau.dtype)), name
        assert tau.any()


@pytest.mark.parametrize("dtype", families.DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.37, -0.8])
def test_merging_the_vector_is_merging_the_fine_tune_bit_for_bit(tmp_path, dtype, scale):
    models = written(tmp_path, dtype)
    whole = families.family(tmp_path, tasks=("math",))
    tv.extract(whole, tmp_path / "math.safetensors")
    apart = replace(whole, tasks={"math": tmp_path / "math.safetensors"})
    for family, out in ((whole, "a"), (apart, "b")):
        tv.merge(family, tmp_path / out, method="task_arithmetic", scale={"math": scale})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    if scale == 1 and dtype in ("BF16", "F16"):  # the differences are exact: nothing is lost
        for name, w in values(tmp_path / "b").items():
            assert np.array_equal(w, models["math"][name])


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_lata_weighs_and_forgets_by_the_vector_as_by_the_fine_tune(tmp_path, dtype):
    written(tmp_path, dtype)
    whole = families.family(tmp_path, target=tmp_path / "other")
    tv.extract(whole, tmp_path / "math.safetensors", task="math")
    apart = replace(whole, tasks={**whole.tasks, "math": tmp_path / "math.safetensors"})
    scales = {"math": 0.7, "code": 0.4}
    tables = [tv.lata(tv.scan(family)) for family in (whole, apart)]
    assert np.array_equal(tables[0].weights, tables[1].weights)
    assert len(np.unique(tables[0].weights)) > 3
    for family, name in ((whole, "a"), (apart, "b")):
        tv.merge(family, tmp_path / f"merged-{name}", method="lata", scale=scales)
        tv.forget(
            family,
            tmp_path / f"forgot-{name}",
            scale=scales,
            method=tv.method("lata", scheme="linear"),
        )
    assert contents(tmp_path / "merged-a") == contents(tmp_path / "merged-b")
    assert contents(tmp_path / "forgot-a") == contents(tmp_path / "forgot-b")
    assert contents(tmp_path / "merged-a") != contents(tmp_path / "forgot-a")


def test_what_is_merged_with_a_vector_can_be_verified(tmp_path):
    written(tmp_path, "BF16")
    family = families.family(tmp_path, tasks=("math",))
    tv.extract(family, tmp_path / "math.safetensors")
    apart = replace(family, tasks={"math": tmp_path / "math.safetensors"})
    tv.merge(apart, tmp_path / "out", method="task_arithmetic", scale={"math": 1.0})
    checks = tv.verify(tmp_path / "out", replay=True)
    assert {check.what: check.outcome for check in checks} == dict.fromkeys(
        ("output", "files", "anchor", "target", "task:math", "replay"), "same"
    )


def test_a_pure_vector_is_weights_times_the_difference(tmp_path):
    models = written(tmp_path, "BF16")
    family = families.family(tmp_path)
    weights = dict(zip(SHAPES, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), strict=True))
    table = families.table({"code": dict.fromkeys(SHAPES, 9.0), "math": weights})
    plain, scaled = tmp_path / "plain.safetensors", tmp_path / "scaled.safetensors"
    tv.extract(family, plain, task="math", what="pure", table=table)
    scale = {"math": 0.5, "code": 7.0}
    tv.extract(family, scaled, task="math", what="pure", table=table, scale=scale, scaled=True)
    found, halved = vector(plain), vector(scaled)
    first = "model.embed_tokens.weight"  # of weight 0
    assert set(found) == set(halved) == set(SHAPES) - set(KEPT) - {first}
    for name, tau in found.items():
        exact = weights[name] * (models["math"][name] - models["anchor"][name])
        assert np.array_equal(tau, exact.astype(np.float32)), name  # the weights are short
        assert np.array_equal(halved[name], tau / 2)
    about = open_vector(scaled).metadata
    assert (about["what"], about["task"], about["scale"]) == ("pure", "math", "0.5")


def test_a_pure_vector_by_a_method_is_by_its_table(tmp_path):
    written(tmp_path, "BF16")
    family = families.family(tmp_path)
    table = tv.lata(tv.scan(family), scheme="linear")
    out = [tmp_path / "by-table.safetensors", tmp_path / "by-method.safetensors"]
    tv.extract(family, out[0], task="math", what="pure", table=table)
    method = {"name": "lata", "scheme": "linear"}
    tv.extract(family, out[1], task="math", what="pure", method=method)
    assert read_file(out[0])[1] == read_file(out[1])[1]


@pytest.mark.parametrize("dtype", ["BF16", "F64"])
def test_complex_and_instruction_vectors(tmp_path, dtype):
    models = written(tmp_path, dtype)
    family = families.family(tmp_path)
    tv.extract(family, tmp_path / "c.safetensors", task="math", what="complex")
    tv.extract(family, tmp_path / "i.safetensors", what="instruction")
    for path, end in (("c", "math"), ("i", "anchor")):
        found = vector(tmp_path / f"{path}.safetensors")
        assert set(found) == set(SHAPES)
        for name, tau in found.items():
            exact = models[end][name] - models["base"][name]
            assert np.array_equal(tau, exact.astype(tau.dtype)), name


def test_a_complex_vector_of_a_vector_is_that_of_its_fine_tune(tmp_path):
    models = written(tmp_path, "BF16")
    family = families.family(tmp_path, tasks=("math",))
    tv.extract(family, tmp_path / "math.safetensors")
    apart = replace(family, tasks={"math": tmp_path / "math.safetensors"})
    tv.extract(apart, tmp_path / "c.safetensors", what="complex")
    found = vector(tmp_path / "c.safetensors")
    assert set(found) == set(SHAPES)
    for name, tau in found.items():
        exact = models["math"][name] - models["base"][name]
        assert np.array_equal(tau, exact.astype(np.float32)), name


@pytest.mark.parametrize("word", ["bfloat16", "float16", "float64"])
def test_another_dtype_is_one_rounding(tmp_path, word):
    models = written(tmp_path, "F32")
    family = families.family(tmp_path, tasks=("math",))
    tv.extract(family, tmp_path / "v.safetensors", dtype=word)
    name = "model.layers.0.mlp.up_proj.weight"
    header, data = read_file(tmp_path / "v.safetensors")
    kind = {word: dtype for dtype, word in families.WORDS.items()}[word]
    assert header[name]["dtype"] == kind
    first, last = header[name]["data_offsets"]
    bits = {"BF16": "<u2", "F16": "<u2", "F64": "<f8"}[kind]
    got = families.decode(np.frombuffer(data[first:last], bits), kind).reshape(SHAPES[name])
    exact = models["math"][name] - models["anchor"][name]
    if word == "float64":
        assert np.array_equal(got, exact)
    else:
        single = exact.astype(np.float32).astype(np.float64)
        assert np.array_equal(got, families.rounded(single, kind))


def test_threads_and_blocks_change_no_bit(tmp_path):
    rng = np.random.default_rng(5)
    big = {"a.weight": rng.normal(size=(300, 500)).astype(np.float32), "b": rng.normal(size=(3,))}
    write_checkpoint(tmp_path / "anchor", big)
    write_checkpoint(tmp_path / "math", {n: w + 0.1 for n, w in big.items()})
    data = {
        "anchor": str(tmp_path / "anchor"),
        "tasks": {"math": {"model": str(tmp_path / "math"), "scale": 1}},
        "method": "task_arithmetic",
    }
    recipe = read_recipe(Document(data, "test"), tmp_path)
    found = set()
    for threads, block in ((1, 65_536), (2, 131_072), (2, 2**20)):
        out = tmp_path / f"{threads}-{block}.safetensors"
        extract_vector(recipe, out, Wanted(), RunOptions(threads=threads, block=block))
        found.add(out.read_bytes())
    assert len(found) == 1


def test_what_the_file_says(tmp_path):
    written(tmp_path, "BF16")
    done = tv.extract(families.family(tmp_path), tmp_path / "math.safetensors", task="math")
    header, _ = read_file(tmp_path / "math.safetensors")
    said = header["__metadata__"]
    assert said["format"] == "pt"
    assert said["taskvec"] == KIND
    assert (said["what"], said["task"]) == ("task", "math")
    assert (said["anchor"], said["model"]) == ("anchor", "math")
    assert said["anchor_fingerprint"] == done.anchor_fingerprint != "0" * 32
    assert str(tmp_path) not in json.dumps(header)
    assert done.bytes == (tmp_path / "math.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "anchor", "base", "code", "math", "math.safetensors", "other",
    ]  # fmt: skip


def test_a_vector_of_another_anchor_is_told(tmp_path):
    written(tmp_path, "BF16")
    family = families.family(tmp_path, tasks=("math",))
    tv.extract(family, tmp_path / "math.safetensors")
    told = {}
    for anchor in ("anchor", "other"):
        apart = tv.Family(anchor=tmp_path / anchor, tasks={"math": tmp_path / "math.safetensors"})
        out = tmp_path / f"on-{anchor}"
        with warnings.catch_warnings(record=True) as issued:
            warnings.simplefilter("always")
            merged = tv.merge(apart, out, method="task_arithmetic", scale=1.0)
        told[anchor] = merged.warnings
        assert tuple(str(each.message) for each in issued) == merged.warnings
        assert {each.category for each in issued} <= {tv.TaskvecWarning}
        assert {Path(each.filename).name for each in issued} <= {Path(__file__).name}
    assert told["anchor"] == ()
    assert told["other"] == ("task 'math' is a vector from another model than the anchor (anchor)",)


def test_a_vector_is_no_model(tmp_path):
    written(tmp_path, "BF16")
    family = families.family(tmp_path, tasks=("math",))
    path = tmp_path / "math.safetensors"
    tv.extract(family, path)
    with pytest.raises(UsageError) as caught:
        tv.scan(tv.Family(anchor=path, tasks={"math": tmp_path / "math"}))
    assert str(caught.value) == (
        f"anchor ({path}): is a task vector where a model is needed; give the model itself"
    )
    averaged = tv.Family(tasks={"code": tmp_path / "code", "math": path})
    with pytest.raises(
        UsageError, match=r"task 'math' .* is a task vector where a model is needed"
    ):
        tv.merge(averaged, tmp_path / "out", method="average", scale={})


def refusal(error: type[Exception], root: Path, **options: Any) -> str:
    options = {"out": root / "v.safetensors", "task": "math"} | options
    family = options.pop("family", None) or families.family(root)
    with pytest.raises(error) as caught:
        tv.extract(family, **options)
    assert not [p for p in root.iterdir() if "taskvec" in p.name]
    return str(caught.value)


def test_a_vector_that_is_zero(tmp_path):
    models = families.members()
    families.write(tmp_path, {**models, "math": models["anchor"]})
    assert refusal(FamilyError, tmp_path) == (
        "the task vector of 'math' is zero: no tensor differs from anchor "
        f"({tmp_path}/anchor); is it the right folder?"
    )
    assert not (tmp_path / "v.safetensors").exists()


def test_whole_numbers_that_differ(tmp_path):
    for member, number in (("anchor", 1), ("math", 2)):
        tensors = {"w": np.full(3, float(number)), "steps": np.array([7, number])}
        write_checkpoint(tmp_path / member, tensors, "F32")
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    assert refusal(FamilyError, tmp_path, family=family) == (
        "task 'math': I64 tensor 'steps' differs from that of anchor; what is not floating-point "
        "must be equal, or be excluded"
    )


def test_weights_that_are_not_finite(tmp_path):
    for member, number in (("base", np.nan), ("anchor", 1.0), ("math", 2.0)):
        write_checkpoint(tmp_path / member, {"w": np.full(3, number)}, "F32")
    family = families.family(tmp_path, tasks=("math",))
    assert refusal(CheckpointError, tmp_path, family=family, what="complex") == (
        f"base ({tmp_path}/base): tensor 'w' holds nan at element 0 (3 in this block); repair the "
        "checkpoint or exclude the tensor"
    )


def test_a_difference_that_overflows(tmp_path):
    for member, number in (("anchor", 1.0), ("math", 1e5)):
        write_checkpoint(tmp_path / member, {"w": np.full(3, number)}, "F32")
    family = tv.Family(anchor=tmp_path / "anchor", tasks={"math": tmp_path / "math"})
    message = refusal(OutputError, tmp_path, family=family, dtype="float16")
    assert message.startswith("tensor 'w' overflows float16; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": None}, "tasks are code, math; name one of them"),
        ({"task": "mth"}, "task 'mth' is not in this family; did you mean 'math'?"),
        ({"what": "tau"}, "what must be in task | pure | complex | instruction; got 'tau'"),
        ({"what": "pure"}, 'method is missing; for example: method="lata"'),
        ({"scaled": True}, "scaled goes with a pure vector; got task"),
        ({"what": "pure", "method": "average"},
         "average gives no layer weights to task vectors; use task_arithmetic or lata"),
        ({"what": "pure", "method": "magnitude"},
         "magnitude gives no layer weights to task vectors; use task_arithmetic or lata"),
        ({"form": "zip"}, "form must be in vector | lora; got 'zip'"),
        ({"rank": 4}, "rank goes with the form lora; got 4 for a vector"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(tmp_path, options, message):
    written(tmp_path, "BF16")
    assert refusal(UsageError, tmp_path, **options) == message


def test_the_place_of_the_file(tmp_path):
    written(tmp_path, "BF16")
    there = tmp_path / "v.safetensors"
    there.write_bytes(b"mine")
    assert refusal(OutputError, tmp_path) == f"{there}: already exists; --force replaces it"
    assert there.read_bytes() == b"mine"
    tv.extract(families.family(tmp_path), there, task="math", force=True)
    assert set(vector(there)) == set(SHAPES) - set(KEPT)
    assert refusal(UsageError, tmp_path, out=tmp_path / "v") == (
        f"{tmp_path}/v: a vector is one file; give a name that ends in .safetensors"
    )
    inside = tmp_path / "math" / "v.safetensors"
    assert refusal(OutputError, tmp_path, out=inside) == (
        f"{inside}: is inside the input folder of task 'math' ({tmp_path}/math); write elsewhere"
    )
    (tmp_path / "folder.safetensors").mkdir()
    assert refusal(OutputError, tmp_path, out=tmp_path / "folder.safetensors") == (
        f"{tmp_path}/folder.safetensors: is a folder; give the name of a file"
    )


def test_a_vector_of_whole_numbers_is_damaged(tmp_path):
    from taskvec.checkpoints.safetensors import write_header
    from taskvec.dtypes import DTYPES

    path = tmp_path / "v.safetensors"
    header = write_header([("w", DTYPES["I64"], (1,))], {"taskvec": KIND})
    path.write_bytes(header + bytes(8))
    with pytest.raises(CheckpointError) as caught:
        open_vector(path)
    assert str(caught.value) == (
        f"{path}: tensor 'w' of a task vector is I64, expected floating point; extract it again"
    )
    path.write_bytes(write_header([("w", DTYPES["F32"], (1,))]) + bytes(4))
    with pytest.raises(CheckpointError) as caught:
        open_vector(path)
    assert str(caught.value) == (
        f"{path}: is not a task vector; expected a file that `taskvec extract` wrote"
    )
