"""Inner products of task vectors and of task models, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.reference import encode
from tests.statistics.in_memory import InMemory, as_stored, scanned, small_family

from taskvec.dtypes import DTYPES
from taskvec.errors import CheckpointError
from taskvec.statistics.collect import Sources
from taskvec.statistics.products import products_of_models, products_of_vectors
from taskvec.streaming import CHUNK, RunOptions

TASKS = ("x", "y", "z")
SHAPES = {"a": (3,), "b": (2 * CHUNK + 4_321,), "c": (40, 30), "d": (), "e": (0, 5)}


def models(size=1.0):
    rng = np.random.default_rng(4)
    shared = {name: rng.normal(0, 1, shape) for name, shape in SHAPES.items()}
    return {
        f"task:{t}": {n: size * (w + rng.normal(0, 0.3, w.shape)) for n, w in shared.items()}
        for t in TASKS
    }


def sources(weights, dtype):
    return [
        Sources(name, {
            role: InMemory(DTYPES[dtype], shape, encode(tensors[name].ravel(), dtype))
            for role, tensors in weights.items()
        })
        for name, shape in SHAPES.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("BF16", 1.0), ("F16", 12_000.0), ("F32", 1.0), ("F64", 1.0), ("BF16", 1e30)],
)
def test_products_of_models(dtype, size):
    """Also where squares are too large for the stored type, or for float32."""
    weights = models(size)
    got = products_of_models(sources(weights, dtype), TASKS, options=RunOptions(threads=1))
    stored = as_stored(weights, dtype)
    assert not got.of_vectors
    assert got.digests.keys() == set(weights)
    for gram, name in zip(got.gram, SHAPES, strict=True):
        v = np.stack([stored[role][name].ravel() for role in weights]).astype(float)
        np.testing.assert_allclose(gram, v @ v.T, rtol=1e-6, err_msg=name)


def test_threads_and_blocks_change_no_bit():
    given = sources(models(), "BF16")
    one = products_of_models(given, TASKS, options=RunOptions(threads=1))
    other = products_of_models(given, TASKS, options=RunOptions(threads=3, block=CHUNK))
    assert one.gram.tobytes() == other.gram.tobytes()
    assert one.digests == other.digests


def test_products_of_vectors_are_those_of_a_scan():
    scan = scanned(small_family())
    got = products_of_vectors(scan)
    assert got.of_vectors
    np.testing.assert_array_equal(got.gram, scan.gram[:, 2:, 2:])
    assert got.digests == {role: member.digests for role, member in scan.members.items()}


def test_broken_weights_are_told():
    weights = models()
    weights["task:y"]["c"][3, 4] = np.inf
    with pytest.raises(CheckpointError, match="task 'y': tensor 'c' holds inf at element 94"):
        products_of_models(sources(weights, "F32"), TASKS, options=RunOptions(threads=1))
