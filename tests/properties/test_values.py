"""What is in the merged model, through real files: identities, and NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import read_raw, write_checkpoint
from tests.kernels.reference import step
from tests.properties.families import (
    DTYPES,
    SHAPES,
    WORDS,
    assert_one_rounding,
    contents,
    encode,
    even,
    family,
    members,
    merged,
    stored,
    table,
    values,
    write,
)

import taskvec as tv
from taskvec.errors import OutputError, UsageError

HALF = {"code": 0.5, "math": 0.5}


@pytest.fixture
def root(tmp_path):
    write(tmp_path, members())
    return tmp_path


# --- nothing to do: the target's bytes ----------------------------------------------------------


def with_odd_bits(dtype):
    """Members whose target holds what arithmetic could change: zeros, subnormals, the largest."""
    models = members()
    tiny = {"BF16": 1e-40, "F16": 6e-8, "F32": 1e-45, "F64": 5e-324}[dtype]
    large = {"BF16": 3.3e38, "F16": 65504, "F32": 3.4e38, "F64": 1e150}[dtype]
    odd = np.array([0.0, -0.0, tiny, -tiny, large, -large])
    for name in ("anchor", "other"):
        models[name] = {**models[name], "model.norm.weight": odd}
    return models


@pytest.mark.parametrize("target", ["anchor", "other"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_zero_copies_the_target(dtype, target, tmp_path):
    write(tmp_path, with_odd_bits(dtype), dtype)
    for chosen in (
        {"table": even(1.0)},
        {"method": "task_arithmetic"},
        {"method": tv.method("lata", scheme="linear")},
    ):
        out = tmp_path / "out"
        tv.merge(
            family(tmp_path, target=tmp_path / target),
            out,
            **chosen,
            force=True,
            scale={"code": 0.0, "math": -0.0},
        )
        assert contents(out) == contents(tmp_path / target)


@pytest.mark.parametrize("target", ["anchor", "other"])
def test_layers_of_weight_zero_are_the_targets_bytes(target, root):
    names = list(SHAPES)
    off = set(names[::2])
    weights = table({
        "code": {n: 0.0 if n in off else 0.7 for n in names},
        "math": {n: 0.0 if n in off else 1.3 for n in names},
    })  # fmt: skip
    tv.merge(family(root, target=root / target), root / "out", table=weights, scale=HALF)
    before, after = contents(root / target), contents(root / "out")
    assert {n for n in names if before[n] == after[n]} == off


def test_lata_leaves_the_most_similar_layer_and_those_a_task_did_not_touch(root):
    models = members()
    models["math"] = {**models["math"], "temperature": models["anchor"]["temperature"]}
    write(root, models)
    only_math = family(root, ("math",))
    weights = tv.lata(tv.scan(only_math), scheme="linear")
    tv.merge(only_math, root / "out", table=weights, scale={"math": 1.0})
    before, after = contents(root / "anchor"), contents(root / "out")
    zero = {name for name, weight in weights.of("math").items() if weight == 0}
    assert "temperature" in zero
    assert len(zero) == 2
    assert {name for name in before if before[name] == after[name]} == zero


def test_excluded_tensors_are_the_targets_bytes(root):
    chosen = family(root, target=root / "other", exclude=("*.mlp.*", "temperature"))
    tv.merge(chosen, root / "out", method="task_arithmetic", scale=HALF)
    before, after = contents(root / "other"), contents(root / "out")
    for name in SHAPES:
        assert (before[name] == after[name]) == (".mlp." in name or name == "temperature")


def test_integer_tensors_are_copied(tmp_path):
    models = {
        name: {**stored(model, "BF16"), "ids": np.arange(7), "mask": np.array([True, False])}
        for name, model in members().items()
    }
    for name, model in models.items():
        write_checkpoint(tmp_path / name, model, "BF16")
    tv.merge(
        family(tmp_path), tmp_path / "out", method="task_arithmetic", scale=HALF, dtype="float32"
    )
    before, after = read_raw(tmp_path / "anchor"), read_raw(tmp_path / "out")
    for name in ("ids", "mask"):
        assert after[name] == before[name]
    assert after["model.norm.weight"][0] == "F32"


# --- scale 1 gives the fine-tune ----------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "wider"), [("BF16", "F32"), ("F16", "F32"), ("F32", "F64")])
def test_one_task_at_scale_one_is_the_fine_tune_exactly_one_dtype_wider(dtype, wider, tmp_path):
    models = members()
    write(tmp_path, models, dtype)
    tv.merge(
        family(tmp_path, ("math",)),
        tmp_path / "out",
        table=even(1.0, ("math",)),
        scale={"math": 1.0},
        dtype=WORDS[wider],
        precision="float64" if wider == "F64" else "float32",
    )
    got = values(tmp_path / "out")
    for name, expected in stored(models["math"], dtype).items():
        np.testing.assert_array_equal(got[name], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_task_at_scale_one_is_the_fine_tune_within_a_step(dtype, tmp_path):
    models = members()
    write(tmp_path, models, dtype)
    tv.merge(
        family(tmp_path, ("math",)),
        tmp_path / "out",
        table=even(1.0, ("math",)),
        scale={"math": 1.0},
    )
    got = values(tmp_path / "out")
    for name, expected in stored(models["math"], dtype).items():
        if dtype in ("BF16", "F16"):  # exact in float32, so rounding to the stored type is, too
            np.testing.assert_array_equal(got[name], expected)
            continue
        # Two roundings in the stored type itself: of the difference, and of the sum.
        difference = np.abs(expected - stored(models["anchor"], dtype)[name])
        allowed = (step(difference, dtype) + step(np.abs(expected), dtype)) / 2
        assert (np.abs(got[name] - expected) <= allowed).all()


# --- what is added can be taken away ------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.filterwarnings("ignore:threshold .* keeps every layer:taskvec.TaskvecWarning")
def test_adding_then_forgetting_returns_exactly_one_dtype_wider(dtype, scale, tmp_path):
    """Weights of a 16-bit type kept in float32, a power of two as scale: no step rounds."""
    models = {name: stored(model, dtype) for name, model in members().items()}
    write(tmp_path, models, "F32")
    only_math = family(tmp_path, ("math",))
    tv.merge(only_math, tmp_path / "more", table=even(1.0, ("math",)), scale={"math": scale})
    assert contents(tmp_path / "more") != contents(tmp_path / "anchor")
    tv.forget(
        family(tmp_path, ("math",), target=tmp_path / "more"),
        tmp_path / "back",
        scale={"math": scale},
        method=tv.method("lata", scheme="threshold", threshold=1.0),
    )
    assert contents(tmp_path / "back") == contents(tmp_path / "anchor")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:threshold .* keeps every layer:taskvec.TaskvecWarning")
def test_adding_then_forgetting_returns_within_the_roundings(dtype, tmp_path):
    models = members()
    write(tmp_path, models, dtype)
    only_math = family(tmp_path, ("math",))
    tv.merge(only_math, tmp_path / "more", table=even(1.0, ("math",)), scale={"math": 0.7})
    tv.forget(
        family(tmp_path, ("math",), target=tmp_path / "more"),
        tmp_path / "back",
        scale={"math": 0.7},
        method=tv.method("lata", scheme="threshold", threshold=1.0),
    )
    got, between = values(tmp_path / "back"), values(tmp_path / "more")
    for name, expected in stored(models["anchor"], dtype).items():
        # One rounding to the stored type each way; the difference and the product round alike both
        # times, so in arithmetic only the two sums differ, by a part in 2^24 (2^53) each.
        largest = np.maximum(np.abs(expected), np.abs(between[name]))
        arithmetic = 2 * largest * (2.0**-53 if dtype == "F64" else 2.0**-24)
        allowed = (step(between[name], dtype) + step(np.abs(expected), dtype)) / 2 + arithmetic
        assert (np.abs(got[name] - expected) <= allowed).all()


@pytest.mark.filterwarnings("ignore:threshold .* keeps every layer:taskvec.TaskvecWarning")
def test_forgetting_is_merging_with_a_negative_scale(root):
    scale = {"code": 0.3, "math": 0.8}
    lata = tv.method("lata", scheme="threshold", threshold=0.97)
    tv.forget(family(root), root / "forgotten", scale=scale, method=lata)
    weights = tv.lata(tv.scan(family(root)), scheme="threshold", threshold=0.97)
    negative = {task: -value for task, value in scale.items()}
    tv.merge(family(root), root / "merged", table=weights, scale=negative)
    method = {"name": "lata", "scheme": "threshold", "threshold": 0.97}
    tv.merge(family(root), root / "by_recipe", method=method, scale=negative)
    assert contents(root / "forgotten") == contents(root / "merged") == contents(root / "by_recipe")
    assert contents(root / "forgotten") != contents(root / "anchor")


def test_forgetting_takes_positive_scales_only(root):
    with pytest.raises(UsageError, match=r"scale of task 'math' must be positive; got -0\.5"):
        tv.forget(family(root), root / "out", scale={"code": 0.1, "math": -0.5})
    assert not (root / "out").exists()


# --- linearity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_scaling_a_task_vector_scales_its_share(factor, tmp_path):
    """Whole numbers: the scaled task vector is exact, so not a bit may differ."""
    rng = np.random.default_rng(7)
    models = {name: {n: rng.integers(-30, 31, shape).astype(float) for n, shape in SHAPES.items()}
              for name in ("base", "anchor", "code", "step")}  # fmt: skip
    anchor, change = models["anchor"], models.pop("step")
    models["math"] = {n: anchor[n] + 2 * change[n] for n in SHAPES}
    write(tmp_path / "one", models)
    models["math"] = {n: anchor[n] + 2 * factor * change[n] for n in SHAPES}
    write(tmp_path / "other", models)
    weights = table({"code": dict.fromkeys(SHAPES, 0.3), "math": dict.fromkeys(SHAPES, 0.9)})
    tv.merge(
        family(tmp_path / "one"),
        tmp_path / "a",
        table=weights,
        scale={"code": 0.4, "math": 0.7 * factor},
    )
    tv.merge(
        family(tmp_path / "other"), tmp_path / "b", table=weights, scale={"code": 0.4, "math": 0.7}
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_weights_and_scales_multiply(root):
    halves = tv.merge(family(root), root / "a", table=even(0.5), scale={"code": 1.0, "math": 0.25})
    quarters = tv.merge(
        family(root), root / "b", table=even(0.25), scale={"code": 2.0, "math": 0.5}
    )
    assert halves.fingerprint == quarters.fingerprint
    assert contents(root / "a") == contents(root / "b")


# --- NumPy float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_against_numpy(dtype, out, precision, tmp_path):
    models = members(seed=2)
    write(tmp_path, models, dtype)
    rng = np.random.default_rng(1)
    weights = {task: {n: rng.uniform(0, 1.5) for n in SHAPES} for task in HALF}
    scale = {"code": 0.6, "math": -0.9}
    tv.merge(
        family(tmp_path, target=tmp_path / "other"),
        tmp_path / "out",
        table=table(weights),
        scale=scale,
        dtype=WORDS[out],
        precision=precision,
    )
    got = values(tmp_path / "out")
    assert {about[0] for about in read_raw(tmp_path / "out").values()} == {out}
    on_disk = {name: stored(model, dtype) for name, model in models.items()}
    double = precision == "float64" or dtype == "F64"
    for name in SHAPES:
        exact, size = merged(
            on_disk["other"][name],
            on_disk["anchor"][name],
            {task: on_disk[task][name] for task in scale},
            {task: scale[task] * weights[task][name] for task in scale},
        )
        assert_one_rounding(got[name], exact, size, out, "float64" if double else "float32")
        if double:  # the reference is the same arithmetic in the same order: bit for bit
            expected = encode(exact.ravel(), out).tobytes()
            assert contents(tmp_path / "out")[name] == expected


@settings(
    max_examples=20, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # every example replaces the files
)  # fmt: skip
@given(data=st.data())
def test_any_family_any_weights(tmp_path, data):
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    out = data.draw(st.sampled_from(DTYPES), "out")
    models = members(data.draw(st.integers(0, 10**6), "seed"))
    weight = st.floats(-2, 2, width=32)
    weights = {
        task: {name: data.draw(weight, f"weight of {task}") for name in SHAPES} for task in HALF
    }
    scale = {task: data.draw(weight, f"scale of {task}") for task in HALF}
    write(tmp_path, models, dtype)
    tv.merge(
        family(tmp_path),
        tmp_path / "out",
        table=table(weights),
        scale=scale,
        dtype=WORDS[out],
        force=True,
    )
    got = values(tmp_path / "out")
    on_disk = {name: stored(model, dtype) for name, model in models.items()}
    for name in SHAPES:
        anchor = on_disk["anchor"][name]
        tasks = {task: on_disk[task][name] for task in scale}
        coefficients = {task: scale[task] * weights[task][name] for task in scale}
        exact, size = merged(anchor, anchor, tasks, coefficients)
        assert_one_rounding(got[name], exact, size, out, "float64" if dtype == "F64" else "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_average(dtype, tmp_path):
    models = members(seed=3)
    write(tmp_path, models, dtype)
    pair = tv.Family(tasks={"code": tmp_path / "code", "math": tmp_path / "math"})
    tv.merge(pair, tmp_path / "out", method="average", scale={"code": 1.0, "math": 3.0})
    got = values(tmp_path / "out")
    code, math = stored(models["code"], dtype), stored(models["math"], dtype)
    for name in SHAPES:
        exact = (code[name] + 3 * math[name]) / 4
        size = (np.abs(code[name]) + 3 * np.abs(math[name])) / 4
        precision = "float64" if dtype == "F64" else "float32"
        assert_one_rounding(got[name], exact, size, dtype, precision)


def test_average_of_one_model_is_that_model(root):
    tv.merge(tv.Family(tasks={"math": root / "math"}), root / "out", method="average", scale={})
    assert contents(root / "out") == contents(root / "math")


def test_average_takes_no_negative_scale(root):
    with pytest.raises(UsageError, match=r"average takes no negative scale; got -1.* task 'math'"):
        tv.merge(family(root), root / "out", method="average", scale={"math": -1.0})


# --- lata from the weights to the file ----------------------------------------------------------


@pytest.mark.parametrize("scheme", ["linear", "logarithmic", "threshold"])
def test_lata_from_weights_to_file(scheme, tmp_path):
    """The whole of it by hand: cosines, ranks, weights, sum."""
    models = members(seed=4)
    write(tmp_path, models, "F32")
    on_disk = {name: stored(model, "F32") for name, model in models.items()}
    names = sorted(SHAPES)
    scale = {"code": 0.5, "math": 0.8}
    coefficients = {}
    for task in scale:
        cosine = {}
        for name in names:
            instruction = (on_disk["anchor"][name] - on_disk["base"][name]).ravel()
            whole = (on_disk[task][name] - on_disk["base"][name]).ravel()
            lengths = np.linalg.norm(whole) * np.linalg.norm(instruction)
            cosine[name] = whole @ instruction / lengths
        ranks = {n: 1 + sum(c > cosine[n] for c in cosine.values()) for n in names}
        assert len(set(ranks.values())) == len(names)  # no ties in this family
        weight = {
            "linear": lambda n, r=ranks: (r[n] - 1) / (len(names) - 1),
            "logarithmic": lambda n, r=ranks: np.log(r[n]) / np.log(len(names)),
            "threshold": lambda n, c=cosine: float(c[n] <= 0.9),
        }[scheme]
        coefficients[task] = {n: scale[task] * weight(n) for n in names}
    method = {"name": "lata", "scheme": scheme, "threshold": 0.9}
    tv.merge(family(tmp_path), tmp_path / "out", method=method, scale=scale)
    got = values(tmp_path / "out")
    for name in names:
        anchor = on_disk["anchor"][name]
        exact, size = merged(anchor, anchor, {t: on_disk[t][name] for t in scale},
                             {t: coefficients[t][name] for t in scale})  # fmt: skip
        assert_one_rounding(got[name], exact, size, "F32", "float32")


def test_a_table_from_lata_can_be_given_to_merge(root):
    """The example of the README: the table rests on a base that merging itself does not read."""
    weights = tv.lata(tv.scan(family(root)), scheme="linear")
    by_table = tv.merge(family(root), root / "a", table=weights, scale=HALF)
    by_name = tv.merge(
        family(root), root / "b", method={"name": "lata", "scheme": "linear"}, scale=HALF
    )
    assert by_table.fingerprint == by_name.fingerprint
    assert contents(root / "a") == contents(root / "b")
    without_base = tv.Family(instruct=root / "anchor", tasks={t: root / t for t in HALF})
    tv.merge(without_base, root / "c", table=weights, scale=HALF)
    assert contents(root / "c") == contents(root / "b")


# --- what does not fit the stored type ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_overflow_names_the_tensor(dtype, tmp_path):
    """60,000 + 2 × 4,000 (float32 members: 2 × 10,000) is beyond float16."""
    models = members()
    name = "model.layers.1.mlp.up_proj.weight"
    for role, first in (("anchor", 60_000.0), ("math", 70_000.0 if dtype == "F32" else 64_000.0)):
        changed = models[role][name].copy()
        changed[4, 3] = first
        models[role] = {**models[role], name: changed}
    write(tmp_path, models, dtype)
    text = rf"^tensor '{name}' overflows float16; lower the scale or choose a wider out\.dtype$"
    with pytest.raises(OutputError, match=text):
        tv.merge(
            family(tmp_path, ("math",)),
            tmp_path / "out",
            table=even(1.0, ("math",)),
            scale={"math": 2.0},
            dtype="float16",
        )
    assert not (tmp_path / "out").exists()
    tv.merge(
        family(tmp_path, ("math",)),
        tmp_path / "out",
        table=even(1.0, ("math",)),
        scale={"math": 2.0},
        dtype="float32",
    )
    expected = 80_000.0 if dtype == "F32" else 68_000.0
    assert values(tmp_path / "out")[name][4, 3] == expected
