"""Same bits for any order of tasks, threads, blocks, shards, processes; and again on replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.properties.families import SHAPES, contents, even, family, members, write

import taskvec as tv
from taskvec.family.members import open_members
from taskvec.merging.scans import scan_members
from taskvec.outputs.run import run
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.replay import read_manifest, recipe_of
from taskvec.streaming import BLOCK, CHUNK, RunOptions

SCALES = {"code": 0.4, "math": 0.9}
LARGE = SHAPES | {"model.layers.0.mlp.down_proj.weight": (3 * CHUNK + 1_000,), "empty": (0, 3)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A family with a tensor of several chunks, in one file and in three."""
    root = tmp_path_factory.mktemp("family")
    models = members(seed=9, shapes=LARGE)
    write(root, models, "BF16")
    write(root / "sharded", models, "BF16", shards=3)
    return root


def recipe(root, tasks=("code", "math"), out=None, method=None, **entries):
    data = {
        "base": str(root / "base"),
        "instruct": str(root / "anchor"),
        "tasks": {t: {"model": str(root / t), "scale": SCALES[t]} for t in tasks},
        "method": method or {"name": "lata", "scheme": "logarithmic", "granularity": "module"},
        "out": out or {},
        **entries,
    }
    return read_recipe(Document(data, "recipe"), Path("/"))


def scan(root, tasks=("code", "math"), **options):
    chosen = open_members(family(root, tasks), needs_base=True, needs_anchor=True)
    return scan_members(chosen, RunOptions(cache="off", **options))


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory):
    """Scan and merge as one thread with large blocks gives them."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(recipe(root), out, options=RunOptions(cache="off", threads=1, block=BLOCK))
    return scan(root, threads=1, block=BLOCK).to_json(), contents(out)


WAYS = [(1, CHUNK), (2, CHUNK), (2, BLOCK), (3, 2 * CHUNK)]


@pytest.mark.parametrize(("threads", "block"), WAYS)
def test_threads_and_blocks(root, expected, tmp_path, threads, block):
    assert scan(root, threads=threads, block=block).to_json() == expected[0]
    run(
        recipe(root),
        tmp_path / "out",
        options=RunOptions(cache="off", threads=threads, block=block),
    )
    assert contents(tmp_path / "out") == expected[1]


def without_paths(scan):
    data = json.loads(json.dumps(scan))
    for member in data["members"].values():
        del member["path"]
    return data


def test_shards_of_the_inputs(root, expected, tmp_path):
    assert without_paths(scan(root / "sharded").to_json()) == without_paths(expected[0])
    run(recipe(root / "sharded"), tmp_path / "out")
    assert contents(tmp_path / "out") == expected[1]


@pytest.mark.parametrize("size", [1, "1KB", "100KB"])
def test_shards_of_the_output(root, expected, tmp_path, size):
    result = run(recipe(root, out={"shard_size": size}), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert contents(tmp_path / "out") == expected[1]
    assert result.fingerprint == run(recipe(root), tmp_path / "one").fingerprint


def test_order_of_tasks(root, expected, tmp_path):
    assert scan(root, ("math", "code")).to_json() == expected[0]
    turned = recipe(root, ("math", "code"))
    assert list(turned.family.tasks) == ["math", "code"]
    run(turned, tmp_path / "out")
    assert contents(tmp_path / "out") == expected[1]
    tv.merge(
        family(root, ("math", "code")),
        tmp_path / "api",
        method={"name": "lata", "granularity": "module"},
        scale=dict(reversed(SCALES.items())),
    )
    assert contents(tmp_path / "api") == expected[1]


@pytest.mark.parametrize("hash_seed", ["0", "1234"])
def test_another_process(root, expected, tmp_path, hash_seed):
    code = """
import json, sys
import taskvec as tv
root, out = sys.argv[1:]
family = tv.Family(base=root + "/base", instruct=root + "/anchor",
                   tasks={"math": root + "/math", "code": root + "/code"})
scan = tv.scan(family, cache="off")
table = tv.lata(scan, granularity="module")
tv.merge(family, out, table=table, scale={"code": 0.4, "math": 0.9})
print(json.dumps(scan.to_json()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), str(tmp_path / "out")],
        capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )  # fmt: skip
    assert json.loads(done.stdout) == json.loads(json.dumps(expected[0]))
    assert contents(tmp_path / "out") == expected[1]


def test_a_scan_from_the_cache_is_the_scan(root, expected):
    chosen = family(root)
    first, second = tv.scan(chosen), tv.scan(chosen)
    assert first.to_json() == second.to_json() == expected[0]
    np.testing.assert_array_equal(first.gram.view(np.uint64), second.gram.view(np.uint64))


# --- the manifest -------------------------------------------------------------------------------


RECIPES = {
    "lata": {},
    "by task": {"method": {"name": "lata", "scheme": "linear", "normalize_weights": "norm"}},
    "threshold": {"method": {"name": "lata", "scheme": "threshold", "threshold": 0.97}},
    "average": {"method": "average"},
    "float32": {"out": {"dtype": "float32", "precision": "float64", "shard_size": "100KB"}},
    "excluded": {"exclude": ["*.mlp.*"], "method": "task_arithmetic"},
    "target": {"target": "other"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_manifest_replays_bit_for_bit(root, tmp_path, name):
    entries = dict(RECIPES[name])
    if "target" in entries:
        entries["target"] = str(root / entries["target"])
    first = run(recipe(root, **entries), tmp_path / "first")
    manifest = read_manifest(tmp_path / "first")
    again = recipe_of(manifest, "manifest")
    np.testing.assert_array_equal(
        again.table.weights.view(np.uint64), first.table.weights.view(np.uint64)
    )
    second = run(again, tmp_path / "second")
    assert second.fingerprint == first.fingerprint
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    checks = tv.verify(tmp_path / "first", replay=True)
    assert {check.outcome for check in checks} == {"same"}
    replayed = read_manifest(tmp_path / "second")
    assert replayed["recipe"] == manifest["recipe"]
    assert replayed["table"] == manifest["table"]
    assert replayed["members"] == manifest["members"]
    assert replayed["output"] == manifest["output"]


def test_the_manifest_of_a_given_table_names_the_base_it_rests_on(root, tmp_path):
    weights = tv.lata(tv.scan(family(root)))
    tv.merge(family(root), tmp_path / "out", table=weights, scale=SCALES)
    members = read_manifest(tmp_path / "out")["members"]
    assert members["base"]["path"] == str(root / "base")
    assert set(members) == {"anchor", "base", "target", "task:code", "task:math"}
    assert {check.outcome for check in tv.verify(tmp_path / "out", replay=True)} == {"same"}
    by_hand = replace(weights, digests={})
    tv.merge(family(root), tmp_path / "hand", table=by_hand, scale=SCALES)
    assert contents(tmp_path / "hand") == contents(tmp_path / "out")


def test_a_table_of_ones_is_task_arithmetic(root, tmp_path):
    tv.merge(family(root), tmp_path / "table", table=even(1.0, names=LARGE), scale=SCALES)
    tv.merge(family(root), tmp_path / "method", method="task_arithmetic", scale=SCALES)
    assert contents(tmp_path / "table") == contents(tmp_path / "method")
