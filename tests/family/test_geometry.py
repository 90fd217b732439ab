"""Methods on the sphere and Model Stock, from recipe to folder, against formulas in NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import (
    CONFIG,
    family_weights,
    from_bf16,
    read_checkpoint,
    read_raw,
    to_bf16,
    write_checkpoint,
    write_family,
)

from taskvec.errors import CheckpointError, StaleError, UsageError
from taskvec.merging.decide import decide
from taskvec.merging.prepare import prepare
from taskvec.outputs import run as engine
from taskvec.recipes.reading import load_recipe
from taskvec.streaming import CHUNK, RunOptions

TWO = {"code": 0.3, "math": 0.9}
THREE = {"code": 0.3, "law": 0.5, "math": 0.9}
PAIRS = ("slerp", "nuslerp")
ON_MODELS = ("slerp", "nuslerp", "multislerp", "karcher")
METHODS = (*ON_MODELS, "model_stock")
ON_VECTORS = ("nuslerp", "multislerp", "model_stock")
CASES = [*((m, False) for m in ON_MODELS), *((m, True) for m in ON_VECTORS)]  # with an anchor?
ROWS = {"nuslerp": "row", "model_stock": "filter"}
WIDE = {"dtype": "float32"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Base, instruct, math and code, and a third fine-tune between the two."""
    weights = family_weights()
    rng = np.random.default_rng(5)
    weights["law"] = {
        n: (weights["math"][n] + weights["code"][n]) / 2 + rng.normal(0, 0.01, v.shape)
        for n, v in weights["math"].items()
    }
    write_family(tmp_path, weights)
    return tmp_path


def recipe(root: Path, name: str, method: object, scales=TWO, anchor=True, **more) -> Path:
    data = {
        **({"instruct": "instruct"} if anchor else {}),
        "tasks": {t: {"model": t, "scale": s} for t, s in scales.items()},
        "method": method,
        "out": WIDE,
    } | more
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def merged(root: Path, name: str, method: object, *args, options=None, **more) -> Path:
    path = recipe(root, name, method, *args, **more)
    return engine.run(load_recipe(path), root / name, options=options or RunOptions()).path


def wide(folder: Path) -> dict:
    return {n: np.asarray(v, np.float64) for n, v in read_checkpoint(folder).items()}


# The formulas, on whole tensors in float64


def norm(v):
    return np.linalg.norm(v)


def arc(one, two, alpha):
    length = norm(one) * norm(two)
    cosine = np.vdot(one, two) / length if length else 1
    if cosine < -0.9995 or cosine > 1 - 1e-12:
        return alpha[0] * one + alpha[1] * two
    angle = np.arccos(cosine)
    return (np.sin(alpha[0] * angle) * one + np.sin(alpha[1] * angle) * two) / np.sin(angle)


def on_sphere(vectors, alpha, steps):
    length = sum(a * norm(v) for a, v in zip(alpha, vectors, strict=True))
    given = [(a, v / norm(v)) for a, v in zip(alpha, vectors, strict=True) if norm(v)]
    total = sum(a for a, _ in given)
    x = sum(a / total * u for a, u in given)
    if not given or norm(x) < 1e-3 or min(np.vdot(x, u) for _, u in given) < -0.9995 * norm(x):
        return sum(a * v for a, v in zip(alpha, vectors, strict=True))
    x = x / norm(x)
    for _ in range(steps):
        way = 0
        for a, u in given:
            cosine = np.clip(np.vdot(x, u), -1, 1)
            flat = u - cosine * x
            if norm(flat) > 1e-15:
                way = way + a / total * np.arccos(cosine) * flat / norm(flat)
        if norm(way) < 1e-15:
            break
        x = np.cos(norm(way)) * x + np.sin(norm(way)) / norm(way) * way
    return length * x


def stock(vectors, scales):
    k = len(vectors)
    cosine = np.mean([
        np.vdot(v, w) / (norm(v) * norm(w)) if norm(v) * norm(w) else 0
        for i, v in enumerate(vectors) for w in vectors[:i]
    ])  # fmt: skip
    cosine = max(cosine, 0)
    t = k * cosine / (1 + (k - 1) * cosine)
    return t / k * sum(s * v for s, v in zip(scales, vectors, strict=True))


def formula(method, vectors, scales):
    alpha = np.array(scales) / sum(scales)
    if method in PAIRS:
        return arc(*vectors, alpha)
    if method == "model_stock":
        return stock(vectors, scales)
    return on_sphere(vectors, alpha, 1 if method == "multislerp" else 300)


def expected(root, method, scales, *, anchor, by_rows=False, by_columns=False):
    tasks = [wide(root / t) for t in sorted(scales)]
    start = wide(root / "instruct") if anchor else None
    found = {}
    for name, first in tasks[0].items():
        at = start[name] if anchor else 0 * first
        vectors = [task[name] - at for task in tasks]
        given = [scales[t] for t in sorted(scales)]
        if by_columns and at.ndim > 1:
            vectors = [np.moveaxis(v, 0, -1) for v in vectors]
        if not by_rows and not (by_columns and at.ndim > 1):
            found[name] = at + formula(method, vectors, given)
            continue
        rows = [v.reshape(-1, max((1, *v.shape[-1:]))) for v in vectors]
        change = [formula(method, list(row), given) for row in zip(*rows, strict=True)]
        change = np.reshape(change, vectors[0].shape)
        found[name] = at + (np.moveaxis(change, -1, 0) if by_columns else change)
    return found


def close(got: Path, formula: dict, rtol=1e-6) -> None:
    found = read_checkpoint(got)
    assert found.keys() == formula.keys()
    for name, values in formula.items():
        largest = np.abs(values).max(initial=0)
        np.testing.assert_allclose(
            found[name], values, rtol=rtol, atol=1e-6 * largest, err_msg=name
        )


@pytest.mark.parametrize("method", ON_MODELS)
def test_on_models(root, method):
    scales = TWO if method in PAIRS else THREE
    out = merged(root, "out", method, scales, anchor=False)
    close(out, expected(root, method, scales, anchor=False))


@pytest.mark.parametrize("method", ON_VECTORS)
def test_on_task_vectors(root, method):
    scales = TWO if method == "nuslerp" else THREE
    close(merged(root, "out", method, scales), expected(root, method, scales, anchor=True))


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_an_anchor_plays_no_part_where_none_is_needed(root, method):
    one = merged(root, "a", method)
    assert read_raw(one) == read_raw(merged(root, "b", method, anchor=False))


@pytest.mark.parametrize(("method", "word", "anchor"), [
    ("nuslerp", "row", True), ("nuslerp", "row", False), ("model_stock", "filter", True),
])  # fmt: skip
def test_by_rows(root, method, word, anchor):
    scales = TWO if method == "nuslerp" else THREE
    out = merged(root, "out", {"name": method, "granularity": word}, scales, anchor=anchor)
    close(out, expected(root, method, scales, anchor=anchor, by_rows=True))


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("members", ["family", "odd"])
def test_by_columns(root, members, anchor):
    if members == "odd":
        odd(root, "F32")
    method = {"name": "nuslerp", "granularity": "column"}
    out = merged(root, "out", method, anchor=anchor)
    close(out, expected(root, "nuslerp", TWO, anchor=anchor, by_columns=True))


def test_columns_are_seen_whole(tmp_path):
    """However small the blocks; the plan counts with whole tensors then, and only then."""
    for seed, name in enumerate(("instruct", "math", "code")):
        values = np.random.default_rng(seed).normal(size=(3000, 2 * CHUNK // 1000))
        write_checkpoint(tmp_path / name, {"w": values}, "F32")
    columns = {"name": "nuslerp", "granularity": "column"}
    cut = RunOptions(threads=3, block=CHUNK)
    whole = read_raw(merged(tmp_path, "whole", columns))
    assert read_raw(merged(tmp_path, "cut", columns, options=cut)) == whole
    values = expected(tmp_path, "nuslerp", TWO, anchor=True, by_columns=True)
    close(tmp_path / "cut", values)
    by_rows = {"name": "nuslerp", "granularity": "row"}
    plans = [
        prepare(
            load_recipe(recipe(tmp_path, "plan", method)), RunOptions(threads=1)
        ).estimate.peak_bytes
        for method in (by_rows, columns)
    ]
    assert plans[1] - plans[0] > 4 * 3000 * 2 * CHUNK // 1000


@pytest.mark.parametrize("method", ON_VECTORS)
def test_vectors_go_on_another_target(root, method):
    out = read_checkpoint(merged(root, "out", method, target="base"))
    anchor, base = wide(root / "instruct"), wide(root / "base")
    for name, values in expected(root, method, TWO, anchor=True).items():
        np.testing.assert_allclose(out[name], values - anchor[name] + base[name], atol=1e-6)


ODD = {
    "scalar": (), "one": (1,), "column": (9, 1), "row": (1, 9), "conv": (4, 3, 2, 2),
    "empty": (0, 3), "still": (3, 4), "equal": (3, 4), "lone": (3, 4),
}  # fmt: skip


def odd(root: Path, dtype: str, size: float = 1.0) -> None:
    """Models of odd tensors: some that no task changes, one that one task alone changes."""
    rng = np.random.default_rng(3)
    anchor = {n: size * rng.uniform(0.5, 1, s) for n, s in ODD.items()}
    members = {"instruct": anchor}
    for place, task in enumerate(THREE):
        sign = np.where(np.arange(12).reshape(3, 4) % (place + 2), 1, -1)
        members[task] = {n: v * rng.uniform(0.9, 1, v.shape) for n, v in anchor.items()} | {
            "still": anchor["still"],
            "equal": anchor["equal"] - size * 2.0**-4 * sign,
            **({"lone": anchor["lone"]} if place else {}),
        }
    for name, tensors in members.items():
        write_checkpoint(root / name, tensors, dtype, config=CONFIG)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(
    ("method", "anchor", "by_rows"),
    [*((*case, False) for case in CASES), *((*case, True) for case in CASES if case[0] in ROWS)],
)
def test_odd_tensors(tmp_path, method, anchor, by_rows, dtype):
    odd(tmp_path, dtype)
    given = {"name": method, **({"granularity": ROWS[method]} if by_rows else {})}
    scales = TWO if method in PAIRS else THREE
    out = merged(tmp_path, "out", given, scales, anchor=anchor)
    close(out, expected(tmp_path, method, scales, anchor=anchor, by_rows=by_rows))


@pytest.mark.parametrize(("method", "anchor"), CASES)
def test_float16_near_its_maximum_does_not_overflow(tmp_path, method, anchor):
    odd(tmp_path, "F16", size=60_000)  # up to 63,750 of 65,504
    out = merged(tmp_path, "out", method, anchor=anchor, out={"dtype": "float16"})
    for name, values in expected(tmp_path, method, TWO, anchor=anchor).items():
        got = read_checkpoint(out)[name].astype(float)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, values, rtol=2.0**-10, err_msg=name)


@pytest.mark.parametrize("anchor", [False, True])
def test_multislerp_projected_straight_down_is_the_direction_of_the_linear_mean(root, anchor):
    method, alpha = {"name": "multislerp", "projection": "orthogonal"}, np.array([3, 5, 9]) / 17
    found = read_checkpoint(merged(root, "out", method, THREE, anchor=anchor))
    tasks, start = [wide(root / t) for t in sorted(THREE)], wide(root / "instruct")
    for name, value in start.items():
        at = value if anchor else 0 * value
        expected = at + on_sphere([task[name] - at for task in tasks], alpha, steps=0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ON_MODELS)
def test_one_task_at_weight_one_is_copied(root, method):
    out = merged(root, "out", method, {"math": 1.0, "code": 0.0}, anchor=False, out={})
    assert read_raw(out) == read_raw(root / "math")


def test_model_stock_at_scale_zero_copies_the_target(root):
    for word in ("layer", "filter"):
        method = {"name": "model_stock", "granularity": word}
        out = merged(root, word, method, {"math": 0, "code": 0}, out={})
        assert read_raw(out) == read_raw(root / "instruct")


@pytest.mark.parametrize(("method", "anchor"), CASES)
def test_scales_by_layer(root, method, anchor):
    """α_t, and which tasks count, are those of each tensor."""
    depth = {"depth": [0.2, 0.8], "outside": 0.5}
    out = merged(root, "out", method, {"code": depth, "math": 0.5}, anchor=anchor)
    found = read_checkpoint(out)
    for block, scale in enumerate((0.2, 0.5, 0.8)):
        scales = {"code": scale, "math": 0.5}
        values = expected(root, method, scales, anchor=anchor)
        name = f"model.layers.{block}.mlp.up_proj.weight"
        np.testing.assert_allclose(found[name], values[name], atol=1e-6)


@pytest.mark.parametrize(("method", "anchor"), CASES)
def test_weights_that_change_after_they_were_measured_are_noticed(root, method, anchor):
    path = recipe(root, "out", method, {"law": 0.3, "math": 0.9}, anchor=anchor)
    read = load_recipe(path)
    table = decide(prepare(read, RunOptions(cache="off"))).table
    roles = {"task:law", "task:math"}
    assert table.digests.keys() == (roles | {"anchor"} if anchor else roles)
    weights = read_checkpoint(root / "math")
    weights["lm_head.weight"][0, 0] += 1
    write_checkpoint(root / "math", weights)
    with pytest.raises(
        StaleError, match=r"task 'math' .* tensor 'lm_head.weight' are not those that were"
    ):
        engine.run(replace(read, table=table), root / "out")
    assert not (root / "out").exists()


@pytest.mark.parametrize("method", ON_MODELS)
def test_nan_is_told(root, method):
    weights = read_checkpoint(root / "math")
    weights["odd"] = np.full(7, np.nan, np.float32)
    write_checkpoint(root / "math", weights)
    with pytest.raises(CheckpointError, match=r"task 'math'.*'odd' holds nan at element 0"):
        merged(root, "out", method, anchor=False)


@pytest.mark.parametrize(
    ("method", "scales", "message"),
    [
        ("slerp", {"math": 1}, "slerp takes exactly 2 tasks; got 1; multislerp and karcher take"),
        ("nuslerp", dict.fromkeys(THREE, 1), "nuslerp takes exactly 2 tasks; got 3"),
        ("karcher", {"math": 1, "code": -1}, "karcher takes no negative scale"),
        ("model_stock", {"math": 1}, "model_stock takes two tasks or more"),
    ],
)
def test_what_cannot_be_meant(root, method, scales, message):
    with pytest.raises(UsageError, match=message):
        merged(root, "out", method, scales)
    assert not (root / "out").exists()


def test_a_mean_without_direction_is_warned_of(tmp_path):
    for name, value in (("math", 1.0), ("code", -2.0)):
        write_checkpoint(tmp_path / name, {"scalar": np.float32(value), "w": np.ones(3)}, "F32")
    path = recipe(tmp_path, "out", "karcher", anchor=False)
    done = engine.run(load_recipe(path), tmp_path / "out")
    assert any("point against each other in 'scalar' (1 tensors)" in w for w in done.warnings)
    got = read_checkpoint(tmp_path / "out")
    np.testing.assert_allclose(got["scalar"], (0.9 * 1 - 0.3 * 2) / 1.2, rtol=1e-6)


def test_bfloat16_output_rounds_once(root):
    values = read_checkpoint(merged(root, "a", "karcher", THREE))
    for name, (_, shape, data) in read_raw(
        merged(root, "b", "karcher", THREE, out={"dtype": "bfloat16"})
    ).items():
        got = np.frombuffer(data, "<u2").reshape(shape)
        np.testing.assert_array_equal(from_bf16(got), from_bf16(to_bf16(values[name])))


@pytest.mark.parametrize("method", ["slerp", "multislerp", "karcher"])
def test_as_the_method_of_a_stage(root, method):
    folder = merged(root, "between", method, out={"dtype": "bfloat16"})
    common = {
        "instruct": "instruct",
        "tasks": {t: {"model": t, "scale": s} for t, s in TWO.items()},
    }
    stage = common | {"method": method, "out": {"dtype": "bfloat16"}}
    tasks = {"code": {"model": "code", "scale": 0.5}}
    plain = recipe(root, "a", "task_arithmetic", target=str(folder), tasks=tasks)
    staged = recipe(
        root, "b", "task_arithmetic", target="stage:between", tasks=tasks, stages={"between": stage}
    )
    one, other = (engine.run(load_recipe(p), root / p.stem).path for p in (plain, staged))
    assert read_raw(one) == read_raw(other)


@pytest.mark.parametrize(("method", "anchor"), [("karcher", False), ("nuslerp", True)])
def test_a_stage_as_a_task(root, method, anchor):
    between = merged(root, "between", "task_arithmetic", out={"dtype": "bfloat16"})
    common = {
        "instruct": "instruct",
        "tasks": {t: {"model": t, "scale": s} for t, s in TWO.items()},
    }
    stage = common | {"method": "task_arithmetic", "out": {"dtype": "bfloat16"}}
    found = []
    for name, model, stages in (
        ("a", str(between), {}), ("b", "stage:between", {"stages": {"between": stage}}),
    ):  # fmt: skip
        tasks = {"law": {"model": "law"}, "new": {"model": model, "scale": 0.5}}
        found.append(read_raw(merged(root, name, method, anchor=anchor, tasks=tasks, **stages)))
    assert found[0] == found[1]
