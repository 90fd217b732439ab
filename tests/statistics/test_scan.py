"""The scan: similarity, ρ, c and norms of layers against NumPy float64 on whole vectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.statistics.in_memory import as_stored, scanned, small_family

from taskvec.errors import CheckpointError, UsageError
from taskvec.layers import GRANULARITIES, classify
from taskvec.statistics.scan import Scan, layer_statistics, read_scan

# Gram entries carry the rounding of float32 sums (tests/kernels/test_gram.py). Tensors here have at
# most 324 elements and layers at most 6 tensors, so an entry is off by at most 330 parts in 2^24 of
# Σ|v_i v_j| ≤ ‖v_i‖‖v_j‖, and so is a cosine (twice, its norms included); a norm by half as much.
GAMMA = 330 * 2.0**-24


def vectors_by_layer(weights, task, granularity, dtype="BF16"):
    """Concatenated θ_pre, τ_instr and τ_t of every layer, in order of its first tensor."""
    stored = as_stored(weights, dtype)
    layers = {}
    for name in sorted(weights["anchor"]):
        anchor = stored["anchor"][name].ravel()
        row = (
            anchor,
            anchor - stored["base"][name].ravel(),
            stored[f"task:{task}"][name].ravel() - anchor,
        )
        layers.setdefault(classify(name).at(granularity, name), []).append(row)
    return {
        layer: [np.concatenate(part) for part in zip(*rows, strict=True)]
        for layer, rows in layers.items()
    }


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_statistics_of_concatenated_vectors(granularity, dtype):
    weights = small_family()
    scan = scanned(weights, dtype)
    gamma = GAMMA * (2.0**-29 if dtype == "F64" else 1)
    for task in scan.tasks:
        got = layer_statistics(scan, task, granularity)
        layers = vectors_by_layer(weights, task, granularity, dtype)
        assert got.layers == tuple(layers)
        assert len(layers) == {"tensor": 14, "module": 11, "block": 5}[granularity]
        rows = list(layers.values())
        instr, task_vector = [r[1] for r in rows], [r[2] for r in rows]

        def close(values, expected, tolerance=gamma):
            np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)

        close(got.similarity, [cosine(i + t, i) for i, t in zip(instr, task_vector, strict=True)],
              4 * gamma)  # the complex vector is a sum of three entries  # fmt: skip
        close(got.task_cosine, [cosine(t, i) for i, t in zip(instr, task_vector, strict=True)],
              2 * gamma)  # fmt: skip
        for values, members in ((got.anchor_norm, [r[0] for r in rows]),
                                (got.instruction_norm, instr),
                                (got.task_norm, task_vector)):  # fmt: skip
            norms = np.array([np.linalg.norm(v) for v in members])
            assert (np.abs(values - norms) <= gamma * norms).all()
        ratio = np.array([np.linalg.norm(t) / np.linalg.norm(i)
                          for i, t in zip(instr, task_vector, strict=True)])  # fmt: skip
        assert (np.abs(got.norm_ratio - ratio) <= 2 * gamma * ratio).all()
        np.testing.assert_array_equal(got.sizes, [len(r[0]) for r in rows])
        names = sorted(weights["anchor"])
        assert [got.layers[i] for i in got.tensor_layer] == [
            classify(n).at(granularity, n) for n in names
        ]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_similarity_is_a_function_of_ratio_and_cosine(granularity):
    scan = scanned(small_family(seed=4))
    for task in scan.tasks:
        got = layer_statistics(scan, task, granularity)
        rho, c = got.norm_ratio, got.task_cosine
        identity = (1 + rho * c) / np.sqrt(1 + 2 * rho * c + rho**2)
        # Both sides come from the same three entries: a handful of float64 roundings apart.
        np.testing.assert_allclose(got.similarity, identity, rtol=0, atol=16 * 2.0**-53)


def from_products(a, b, d):
    """A scan of one layer with ⟨τ_instr, τ_instr⟩ = a, ⟨τ, τ⟩ = b and ⟨τ_instr, τ⟩ = d."""
    gram = np.array([[[1.0, 0, 0], [0, a, d], [0, d, b]]])
    counts = np.zeros((1, 1, 1), np.int64)
    return Scan(("t",), ("w",), ((3,),), (classify("w"),), True, gram, counts, counts, {})


@settings(max_examples=300, deadline=None)
@given(st.floats(-6, 6), st.floats(-1, 1))
def test_identity_holds_for_any_ratio_and_cosine(log_ratio, c):
    rho = 10.0**log_ratio
    got = layer_statistics(from_products(1.0, rho**2, rho * c), "t", "tensor")
    complex_norm_squared = 1 + 2 * rho * c + rho**2
    expected = (1 + rho * c) / np.sqrt(complex_norm_squared) if complex_norm_squared > 0 else 0
    # Where τ_t nearly undoes τ_instr, what is left of the sums is rounding: it is amplified by the
    # size of the terms over the size of their sum.
    amplified = (1 + rho) ** 2 / max(complex_norm_squared, 1e-300)
    assert -1 <= got.similarity[0] <= 1
    assert abs(got.similarity[0] - expected) <= 8 * 2.0**-53 * max(amplified, 1) or amplified > 1e15
    assert got.norm_ratio[0] == pytest.approx(rho, rel=4 * 2.0**-53)
    assert got.task_cosine[0] == pytest.approx(c, abs=8 * 2.0**-53)


@pytest.mark.parametrize(("task", "similarity"), [
    ((3.0, 0.0), 1.0),  # along the instruction vector
    ((-0.5, 0.0), 1.0),  # against it, not so far as to turn the complex vector round
    ((-2.0, 0.0), -1.0),  # so far
    ((-1.0, 0.0), 0.0),  # exactly undone: nothing is left to be similar
    ((0.0, 1.0), np.sqrt(0.5)),  # at a right angle, as long
    ((-1.0, 1.0), 0.0),
])  # fmt: skip
def test_similarity_in_cases_worked_out_by_hand(task, similarity):
    """Instruction vector (1, 0)."""
    x, y = task
    got = layer_statistics(from_products(1.0, x * x + y * y, x), "t", "tensor")
    assert got.similarity[0] == pytest.approx(similarity, abs=2.0**-52)


# --- layers that did not move -------------------------------------------------------------------


def still(weights, role, like, names):
    for name in names:
        weights[role][name] = weights[like][name].copy()
    return weights


def test_no_instruction_vector_gives_similarity_zero():
    name = "model.norm.weight"
    scan = scanned(still(small_family(), "base", "anchor", [name]))
    for task in scan.tasks:
        got = layer_statistics(scan, task, "tensor")
        i = got.layers.index(name)
        assert got.similarity[i] == 0
        assert got.norm_ratio[i] == np.inf
        assert got.task_cosine[i] == 0
        assert np.isfinite(np.delete(got.norm_ratio, i)).all()


def test_no_task_vector_is_left_out():
    name = "model.norm.weight"
    scan = scanned(still(small_family(), "task:a", "anchor", [name]))
    got = layer_statistics(scan, "a", "tensor")
    i = got.layers.index(name)
    np.testing.assert_array_equal(np.isnan(got.similarity), np.arange(len(got.layers)) == i)
    assert (got.norm_ratio[i], got.task_cosine[i], got.task_norm[i]) == (0, 0, 0)
    assert not np.isnan(layer_statistics(scan, "b", "tensor").similarity).any()


def test_neither_moved():
    weights = small_family()
    name = "model.norm.weight"
    still(still(weights, "task:a", "anchor", [name]), "base", "anchor", [name])
    got = layer_statistics(scanned(weights), "a", "tensor")
    i = got.layers.index(name)
    assert np.isnan(got.similarity[i])
    assert got.norm_ratio[i] == 0


def test_a_block_of_which_one_tensor_moved_is_ranked():
    weights = small_family()
    block = [n for n in weights["anchor"] if n.startswith("model.layers.1.")]
    scan = scanned(still(weights, "task:a", "anchor", block[1:]))
    got = layer_statistics(scan, "a", "block")
    assert not np.isnan(got.similarity).any()
    got = layer_statistics(scan, "a", "tensor")
    assert sorted(np.array(got.layers)[np.isnan(got.similarity)]) == sorted(block[1:])


def test_huge_weights_have_the_statistics_of_small_ones():
    """Powers of two scale every bit alike, so similarity does not change, nor do ratios."""
    weights = small_family()
    factor = 2.0**83  # 1e25: squares overflow float32
    huge = {r: {n: w * factor for n, w in tensors.items()} for r, tensors in weights.items()}
    small, large = scanned(weights), scanned(huge)
    assert large.gram.max() > np.finfo(np.float32).max
    for task in small.tasks:
        a, b = (layer_statistics(s, task, "tensor") for s in (small, large))
        np.testing.assert_allclose(b.similarity, a.similarity, rtol=0, atol=4 * GAMMA)
        np.testing.assert_allclose(b.norm_ratio, a.norm_ratio, rtol=2 * GAMMA)
        np.testing.assert_allclose(b.task_norm, a.task_norm * factor, rtol=GAMMA)


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_json_keeps_every_bit(tasks, tmp_path):
    scan = scanned(small_family(tasks=tasks))
    path = tmp_path / "scan.json"
    path.write_text(json.dumps(scan.to_json()))
    back = Scan.from_json(read_scan(path), scan.keys)
    np.testing.assert_array_equal(back.gram.view(np.uint64), scan.gram.view(np.uint64))
    np.testing.assert_array_equal(back.agree, scan.agree)
    np.testing.assert_array_equal(back.support, scan.support)
    for field in ("tasks", "names", "shapes", "keys", "has_base"):
        assert getattr(back, field) == getattr(scan, field), field
    assert back.members == scan.members
    assert back.to_json() == scan.to_json()
    np.testing.assert_array_equal(back.sizes, [w.size for w in sized(scan)])


def sized(scan):
    return [np.empty(shape) for shape in scan.shapes]


def test_scalars_and_empty_tensors_have_sizes():
    rng = np.random.default_rng(0)
    weights = {
        role: {"scalar": rng.normal(size=()), "empty": np.zeros((0, 4)), "w": rng.normal(size=5)}
        for role in ("anchor", "base", "task:a")
    }
    scan = scanned(weights)
    assert dict(zip(scan.names, scan.sizes.tolist(), strict=True)) == {
        "scalar": 1, "empty": 0, "w": 5
    }  # fmt: skip
    got = layer_statistics(scan, "a", "tensor")
    assert np.isnan(got.similarity[scan.names.index("empty")])
    assert abs(got.similarity[scan.names.index("scalar")]) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 0}', b"\xff", b"[" * 100_000])
def test_what_is_no_scan_is_refused(content, tmp_path):
    path = tmp_path / "scan.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"scan\.json: .* scan file"):
        read_scan(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"none\.json: cannot be read: .*; expected a scan file"
    ):
        read_scan(tmp_path / "none.json")


def test_another_format_says_scan_again(tmp_path):
    path = tmp_path / "scan.json"
    path.write_text(json.dumps(scanned(small_family()).to_json() | {"format": 999}))
    with pytest.raises(CheckpointError, match=r"format must be .*; got 999; .*; scan again"):
        read_scan(path)


def test_unknown_task_is_named():
    scan = scanned(small_family())
    with pytest.raises(UsageError, match="no task 'maths' in this scan; it has a, b"):
        layer_statistics(scan, "maths", "tensor")
