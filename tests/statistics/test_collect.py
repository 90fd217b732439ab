"""The collecting pass: same bits whatever the way, digests by content, huge and broken weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from tests.statistics.in_memory import as_stored, collected, scanned, small_family

from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.errors import CheckpointError
from taskvec.streaming import CHUNK

BLOCK = 16 * CHUNK


def large_family(size=5 * CHUNK + 4_321, seed=1):
    """One tensor of several chunks between small ones."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (3,), "b": (size,), "c": (40, 30), "d": (), "e": (0, 5)}
    anchor = {name: rng.normal(0, 0.1, shape) for name, shape in shapes.items()}
    moved = {
        role: {name: w + rng.normal(0, 0.02, w.shape) for name, w in anchor.items()}
        for role in ("base", "task:x", "task:y")
    }
    return {"anchor": anchor, **moved}


def assert_same(a, b):
    np.testing.assert_array_equal(a.gram.view(np.uint64), b.gram.view(np.uint64))
    np.testing.assert_array_equal(a.agree, b.agree)
    np.testing.assert_array_equal(a.support, b.support)
    assert a.digests == b.digests


def gram_reference(weights, dtype):
    """G of (θ_pre, τ_instr, τ_t …) by tensor, agreement and support, in float64."""
    stored = as_stored(weights, dtype)
    tasks = sorted(role for role in weights if role.startswith("task:"))
    grams, agree, support, scale = [], [], [], []
    for name in sorted(weights["anchor"]):
        anchor = stored["anchor"][name].ravel()
        base = stored["base"][name].ravel() if "base" in stored else anchor
        v = np.stack([anchor, anchor - base, *(stored[t][name].ravel() - anchor for t in tasks)])
        grams.append(v @ v.T)
        scale.append(np.abs(v) @ np.abs(v).T)
        sign = np.sign(v[2:])
        agree.append((sign[:, None] * sign[None] > 0).sum(-1))
        support.append((sign[:, None] * sign[None] != 0).sum(-1))
    return np.stack(grams), np.stack(scale), np.stack(agree), np.stack(support)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_gram_and_counts_of_every_tensor(dtype, with_base):
    weights = large_family()
    if not with_base:
        del weights["base"]
    got = collected(weights, dtype)
    gram, scale, agree, support = gram_reference(weights, dtype)
    # As in tests/kernels/test_gram.py: at most 2,048 additions in float32, the rest in float64.
    gamma = 2_050 * (2.0**-53 if dtype == "F64" else 2.0**-24) + CHUNK * 6 * 2.0**-53
    assert (np.abs(got.gram - gram) <= gamma * scale).all()
    np.testing.assert_array_equal(got.gram, got.gram.transpose(0, 2, 1))
    np.testing.assert_array_equal(got.agree, agree)
    np.testing.assert_array_equal(got.support, support)
    if not with_base:
        assert (got.gram[:, 1] == 0).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("block", [CHUNK, 2 * CHUNK, BLOCK])
def test_threads_and_blocks_change_no_bit(threads, block):
    weights = large_family()
    assert_same(collected(weights, threads=threads, block=block), collected(weights, threads=1))


def test_order_of_tasks_changes_no_bit():
    weights = large_family()
    turned = {role: weights[role] for role in reversed(list(weights))}
    assert_same(collected(turned), collected(weights))


def test_task_order_is_by_name():
    weights = small_family()
    renamed = {
        {"task:a": "task:z", "task:b": "task:b"}.get(role, role): w for role, w in weights.items()
    }
    here, there = collected(weights), collected(renamed)
    turned = [0, 1, 3, 2]
    np.testing.assert_array_equal(there.gram, here.gram[:, turned][:, :, turned])
    np.testing.assert_array_equal(there.agree, here.agree[:, ::-1, ::-1])


# --- weights whose squares overflow float32 -----------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_squares_that_overflow_float32_are_added_in_float64(dtype):
    weights = small_family()
    huge = {role: {n: w * 1e26 for n, w in tensors.items()} for role, tensors in weights.items()}
    got = collected(huge, dtype)
    gram, scale, agree, _ = gram_reference(huge, dtype)
    assert np.abs(gram).max() > np.finfo(np.float32).max
    assert (np.abs(got.gram - gram) <= 2_050 * 2.0**-24 * scale).all()
    np.testing.assert_array_equal(got.agree, agree)


@pytest.mark.parametrize("threads", [1, 2])
def test_huge_weights_in_one_chunk_leave_the_others_alone(threads):
    """Whether a chunk is done again in float64 must not depend on what it was read with.

    Only the norm of the anchor is huge: the members agree there, so that the last bits of the other
    products can still be seen.
    """
    weights = large_family()
    for tensors in weights.values():
        tensors["b"][2 * CHUNK + 5 :][:3] = 1e27
    small = collected(weights, "F32", block=CHUNK, threads=threads)
    assert np.isfinite(small.gram).all()
    assert small.gram[1, 0, 0] > np.finfo(np.float32).max > small.gram[1, 1:].max()
    assert_same(small, collected(weights, "F32", block=BLOCK, threads=threads))


def test_squares_that_overflow_float64_are_refused():
    weights = small_family()
    weights["task:a"]["model.norm.weight"][2] = 1e200
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight'.*too large"):
        collected(weights, "F64")


# --- weights that are no numbers ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("role", ["anchor", "base", "task:y"])
def test_nan_and_infinity_are_refused_by_name(role, bad, dtype):
    weights = large_family()
    weights[role]["b"][CHUNK + 3] = bad
    weights[role]["b"][CHUNK + 7] = bad
    who = "task 'y'" if role == "task:y" else role
    text = rf"^{who}: tensor 'b' holds {bad} at element 65,539 \(2 in this block\); repair"
    with pytest.raises(CheckpointError, match=text):
        collected(weights, dtype)


# --- digests ------------------------------------------------------------------------------------


def fingerprints(weights, dtype="BF16", **options):
    return {r: m.fingerprint for r, m in scanned(weights, dtype, **options).members.items()}


def test_one_bit_changes_one_digest_and_one_fingerprint():
    weights = large_family()
    before, prints = collected(weights), fingerprints(weights)
    for place in (0, CHUNK - 1, CHUNK, 5 * CHUNK + 4_320):
        changed = copy.deepcopy(weights)
        old = as_stored(weights)["task:x"]["b"][place]
        changed["task:x"]["b"][place] = old * (1 + 2.0**-7)  # the next bfloat16 or the one after
        after = collected(changed)
        different = {
            (role, name)
            for role, digests in after.digests.items()
            for name, digest in digests.items()
            if digest != before.digests[role][name]
        }
        assert different == {("task:x", "b")}
        others = fingerprints(changed)
        assert [r for r in prints if prints[r] != others[r]] == ["task:x"]


def test_the_sign_of_zero_is_content():
    weights = large_family()
    prints = []
    for zero in (0.0, -0.0):
        weights["anchor"]["a"][1] = zero
        prints.append(fingerprints(weights)["anchor"])
    assert prints[0] != prints[1]


@pytest.mark.parametrize("block", [CHUNK, BLOCK])
def test_swapped_chunks_change_the_digest(block):
    weights = large_family(2 * CHUNK)
    before = collected(weights, block=block).digests["base"]["b"]
    weights["base"]["b"] = np.roll(weights["base"]["b"], CHUNK)
    assert collected(weights, block=block).digests["base"]["b"] != before


def test_equal_bytes_of_another_dtype_or_shape_are_another_model():
    digests = {"w": "0" * 32}
    here = fingerprint(digests, {"w": ("BF16", (4, 6))})
    assert fingerprint(digests, {"w": ("BF16", (4, 6))}) == here
    assert fingerprint(digests, {"w": ("F16", (4, 6))}) != here
    assert fingerprint(digests, {"w": ("BF16", (6, 4))}) != here
    assert fingerprint(digests, {"w": ("BF16", (24,))}) != here
    assert fingerprint({"v": "0" * 32}, {"v": ("BF16", (4, 6))}) != here
    assert fingerprint({"w": "1" * 32}, {"w": ("BF16", (4, 6))}) != here


def test_a_fingerprint_does_not_know_the_order_of_tensors():
    digests = {"a": "0" * 32, "b": "1" * 32}
    described = {"a": ("F32", (1,)), "b": ("F32", ())}
    turned = dict(reversed(digests.items()))
    assert fingerprint(digests, described) == fingerprint(turned, described)


def test_progress_adds_up_to_all_bytes():
    done, promised = [], []

    class Bar:
        def __init__(self, label, total):
            promised.append((label, total))

        def __enter__(self):
            return done.append

        def __exit__(self, *error):
            return None

    weights = large_family()
    collected(weights, "F32", progress=Bar)
    total = sum(w.size * 4 for tensors in weights.values() for w in tensors.values())
    assert promised == [("scan", total)]
    assert sum(done) == total
