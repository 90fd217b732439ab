"""Methods that combine blocks by a function of their own, whatever the blocks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import read_checkpoint, read_raw, write_checkpoint

from taskvec.errors import CheckpointError, OutputError
from taskvec.methods.method import Method
from taskvec.outputs.run import run
from taskvec.recipes.recipe import Family, Output, Recipe, TaskSpec
from taskvec.streaming import CHUNK, RunOptions

SCALES = {"a": 0.5, "b": -2.0}
SHAPES = {"scalar": (), "row": (5,), "odd": (3, 1, 7), "none": (0, 4), "large": (301, 777)}


def weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) for name, shape in SHAPES.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("anchor", "a", "b")):
        write_checkpoint(tmp_path / name, weights(seed), "F32")
    return tmp_path


def method(combine, alignment="element", **declared) -> Method:
    def decide(inputs):
        return inputs.layer_weights()

    return Method(
        "toy", "a toy", "none", "θ", decide, combine=combine, alignment=alignment, **declared
    )


def merged(root: Path, made: Method, scales=SCALES, out="out", options=None, **output) -> Path:
    tasks = {name: TaskSpec(root / name, scale) for name, scale in scales.items()}
    recipe = Recipe(Family(tasks, anchor=root / "anchor"), made, Output(**output), seed=7)
    return run(recipe, root / out, options=options or RunOptions()).path


def sign(block):
    return block.target + np.sign(np.tensordot(block.scales, block.vectors, 1))


def test_a_method_gets_vectors_scales_and_target(root):
    out = read_checkpoint(merged(root, method(sign), dtype="float64"))
    anchor, a, b = (read_checkpoint(root / name) for name in ("anchor", "a", "b"))
    for name in SHAPES:
        tau = [(x[name] - anchor[name]).astype(np.float32) for x in (a, b)]
        expected = anchor[name] + np.sign(0.5 * tau[0] - 2 * tau[1])
        np.testing.assert_allclose(out[name], expected, rtol=1e-6)


def test_without_an_anchor_vectors_are_the_models(root):
    made = method(lambda block: block.vectors.max(0), needs_anchor=False)
    out = read_checkpoint(merged(root, made))
    a, b = read_checkpoint(root / "a"), read_checkpoint(root / "b")
    assert all(np.array_equal(out[name], np.maximum(a[name], b[name])) for name in SHAPES)


@pytest.mark.parametrize("alignment", ["element", "row", "tensor"])
def test_blocks_have_the_shape_that_is_declared(root, alignment):
    seen: dict[str, list] = {}

    def note(block):
        seen.setdefault(block.name, []).append((block.start, block.target.shape))
        assert block.vectors.shape == (2, *block.target.shape)
        return block.target

    merged(root, method(note, alignment), options=RunOptions(threads=1, block=CHUNK))
    large = sorted(seen["large"])
    assert sum(math.prod(shape) for _, shape in large) == 301 * 777
    if alignment == "element":
        assert len(large) == 4
        assert {shape for _, shape in seen["odd"]} == {(21,)}
    if alignment == "row":
        assert all(shape[1] == 777 and start % 777 == 0 for start, shape in large)
        assert {name: seen[name][0][1] for name in ("scalar", "row", "odd", "none")} == {
            "scalar": (1, 1), "row": (1, 5), "odd": (3, 7), "none": (0, 4),
        }  # fmt: skip
    if alignment == "tensor":
        assert {name: places for name, places in seen.items() if len(places) > 1} == {}
        assert {name: shapes[0][1] for name, shapes in seen.items()} == SHAPES


def by_row(block):
    """Something that cannot be right if a row is cut."""
    return block.target + np.sort(block.vectors[0], axis=-1)


@pytest.mark.parametrize(("combine", "alignment"), [(sign, "element"), (by_row, "row")])
def test_bits_do_not_depend_on_blocks_and_threads(root, combine, alignment):
    write_checkpoint(root / "anchor", {"w": np.zeros((3000, 2 * CHUNK // 1000))}, "F32")
    for seed, task in enumerate(SCALES):
        values = np.random.default_rng(seed).normal(size=(3000, 2 * CHUNK // 1000))
        write_checkpoint(root / task, {"w": values}, "BF16")
    made = method(combine, alignment)
    outs = [
        read_raw(
            merged(root, made, out=f"out{i}", options=RunOptions(threads=threads, block=block))
        )
        for i, (threads, block) in enumerate([(1, CHUNK), (3, 2 * CHUNK), (2, 16 * CHUNK)])
    ]
    assert outs[0] == outs[1] == outs[2]


def test_a_tensor_that_no_task_weighs_stays(root):
    def never(block):
        raise AssertionError(block.name)

    merged(root, method(never), {"a": 0.0, "b": 0.0})
    assert read_raw(root / "out") == read_raw(root / "anchor")


def test_nan_in_a_member_is_told_even_if_the_method_would_hide_it(root):
    broken = weights(1)
    broken["row"][2] = np.nan
    write_checkpoint(root / "a", broken, "F32")
    with pytest.raises(CheckpointError, match=r"task 'a'.*'row' holds nan at element 2"):
        merged(root, method(lambda block: np.nan_to_num(block.target)))


def test_a_result_that_is_too_large_is_refused(root):
    with pytest.raises(OutputError, match="overflows float16"):
        merged(root, method(lambda block: block.target + 1e5), dtype="float16")
    assert not (root / "out").exists()


def test_the_manifest_names_the_seed_that_a_method_was_told(root):
    seeds = set()

    def note(block):
        seeds.add(block.seed)
        return block.target

    out = merged(root, method(note))
    assert seeds == {json.loads((out / "taskvec-manifest.json").read_text())["recipe"]["seed"]}
