"""Stages: what a stage gives is what its recipe would have written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import read_raw, write_family
from tests.merging import test_sparsify

from taskvec.checkpoints.views import size
from taskvec.errors import RecipeError, StaleError
from taskvec.merging import stages as stages_module
from taskvec.merging.arithmetic import result_of
from taskvec.merging.prepare import prepare
from taskvec.outputs import run as engine
from taskvec.outputs.verify import verify
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.replay import read_manifest, recipe_of
from taskvec.streaming import CHUNK, RunOptions

FIRST = {
    "base": "base",
    "instruct": "instruct",
    "tasks": {"math": {"model": "math", "scale": 0.7}},
    "method": {"name": "lata", "scheme": "linear"},
}
SECOND = {
    "base": "base",
    "instruct": "instruct",
    "target": "stage:skills",
    "tasks": {"code": {"model": "code", "scale": -0.4}},
    "method": {"name": "lata", "scheme": "threshold", "threshold": 0.5},
}


def write(root: Path, name: str, recipe: dict) -> Path:
    path = root / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def merged(path: Path, out: Path, **options: object) -> Path:
    return engine.run(load_recipe(path), out, options=RunOptions(**options)).path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_family(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_a_stage_gives_what_writing_it_and_reading_it_gives(root, dtype):
    """Also where the stage is rounded to another element type than the result."""
    out = {} if dtype is None else {"out": {"dtype": dtype}}
    merged(write(root, "first.yaml", FIRST | out), root / "written")
    two = SECOND | {"target": "written", "out": {"dtype": "bfloat16"}}
    expected = read_raw(merged(write(root, "two.yaml", two), root / "two"))
    one = SECOND | {"stages": {"skills": FIRST | out}, "out": {"dtype": "bfloat16"}}
    assert read_raw(merged(write(root, "one.yaml", one), root / "one")) == expected


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3, "block": 65_536}])
def test_threads_and_blocks_change_no_bit(root, options):
    recipe = write(root, "one.yaml", SECOND | {"stages": {"skills": FIRST}})
    expected = read_raw(merged(recipe, root / "a", threads=2))
    assert read_raw(merged(recipe, root / "b", **options)) == expected


def test_a_stage_may_be_a_task_and_may_read_an_earlier_stage(root):
    """Every method reads a stage; a stage in two roles is one model."""
    recipe = {
        "instruct": "instruct",
        "tasks": {"both": {"model": "stage:second", "scale": 1.0}},
        "method": "task_arithmetic",
        "stages": {"skills": FIRST, "second": SECOND},
    }
    merged(write(root, "first.yaml", FIRST), root / "w1")
    merged(write(root, "second.yaml", SECOND | {"target": "w1"}), root / "w2")
    third = recipe | {"tasks": {"both": {"model": "w2", "scale": 1.0}}, "stages": {}}
    expected = read_raw(merged(write(root, "third.yaml", third), root / "w3"))
    assert read_raw(merged(write(root, "r.yaml", recipe), root / "out")) == expected


def test_nothing_of_a_stage_is_written(root):
    merged(write(root, "one.yaml", SECOND | {"stages": {"skills": FIRST}}), root / "one")
    names = {"base", "instruct", "math", "code", "one", "one.yaml"}
    assert {path.name for path in root.iterdir()} == names


def test_the_manifest_repeats_the_merge_with_the_tables_of_its_stages(root):
    """The tables of its stages are taken from it: with another the stage is not what was read."""
    merged(write(root, "one.yaml", SECOND | {"stages": {"skills": FIRST}}), root / "one")
    manifest = read_manifest(root / "one")
    kept = manifest["stages"]["skills"]["weights"]["math"]
    assert min(kept.values()) == 0.0
    assert max(kept.values()) == 1.0
    assert all(check.outcome == "same" for check in verify(root / "one", replay=True))
    manifest["stages"]["skills"]["weights"]["math"] = dict.fromkeys(kept, 0.5)
    (root / "one" / "taskvec-manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StaleError, match="stage:skills"):
        engine.run(recipe_of(manifest, "edited"), root / "again")
    assert not (root / "again").exists()


def test_the_card_names_the_models_that_stages_are_made_of(root):
    first = FIRST | {"instruct": {"model": "instruct", "hub": "org/instruct"}}
    merged(write(root, "one.yaml", SECOND | {"stages": {"skills": first}}), root / "one")
    card = (root / "one" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == ["org/instruct"]  # the others are local
    assert str(root) not in card


def test_weights_of_a_stage_that_changed_are_noticed(root):
    """The stage is scanned anew, whatever the cache holds; a plain scan would be believed."""
    recipe = write(root, "one.yaml", SECOND | {"stages": {"skills": FIRST}})
    before = read_raw(merged(recipe, root / "a"))
    write_family(root, {"math": _other(root / "math")})
    assert read_raw(merged(recipe, root / "b")) != before


def _other(folder: Path) -> dict:
    from tests.conftest import read_checkpoint

    return {name: values * 1.5 for name, values in read_checkpoint(folder).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "stage:skils"}, "target: unknown stage 'skils'; did you mean 'skills'?"),
        ({"stages": {}}, "target: unknown stage 'skills'; none is before this"),
        ({"stages": {"skills": FIRST | {"target": "stage:skills"}}},
         "target: unknown stage 'skills'; none is before this"),
        ({"stages": {"skills": FIRST | {"stages": {}}}}, "unknown key 'stages'"),
        ({"stages": {"skills": FIRST | {"out": {"shard_size": "1GB"}}}},
         "unknown key 'shard_size' in stages.skills.out"),
        ({"stages": [FIRST]}, "stages must be a mapping"),
    ],
)  # fmt: skip
def test_recipes_with_wrong_stages(root, change, message):
    recipe = SECOND | {"stages": {"skills": FIRST}} | change
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(root, "bad.yaml", recipe))
    assert message in str(caught.value)


def test_the_line_in_a_stage_is_named(root):
    path = root / "bad.yaml"
    path.write_text(
        "stages:\n  one:\n    instruct: a\n    tasks: {t: b}\n    metod: lata\nmethod: ties\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}:5: unknown key 'metod' in stages.one")


def test_a_stage_draws_by_the_seed_of_the_recipe(root):
    stage = FIRST | {"method": {"name": "dare", "density": 0.5}}
    one = {"target": "stage:skills", "method": "passthrough", "stages": {"skills": stage}}
    a, again, b = (
        read_raw(merged(write(root, "r.yaml", one | {"seed": seed}), root / name))
        for name, seed in (("a", 1), ("again", 1), ("b", 2))
    )
    assert a == again
    assert a != b
    written = merged(write(root, "r.yaml", stage | {"seed": 1}), root / "w")
    assert read_raw(written) == a


# Methods that must see more at once than a reader asks for.

WIDE = {
    "della": {"name": "della", "density": 0.5, "epsilon": 0.2, "rescale": "l1"},
    "nuslerp": {"name": "nuslerp", "granularity": "row"},
    "sce": {"name": "sce", "density": 0.5},
    "tsv": {"name": "tsv"},
    "iso_c": {"name": "iso_c"},
    "ties": {"name": "ties", "density": 0.3},
    "dare": {"name": "dare", "density": 0.5},
}


def wide(root: Path, method: str, dtype: str = "F32") -> dict:
    """A recipe of two tasks, with tensors of several chunks."""
    test_sparsify.write(root, dtype)
    tasks = {"a": {"model": "a", "scale": 0.6}, "b": {"model": "b", "scale": 0.8}}
    return {"anchor": "anchor", "tasks": tasks, "method": WIDE[method]}


@pytest.mark.parametrize("method", WIDE)
def test_a_stage_of_any_method_gives_what_writing_it_gives(root, method):
    recipe = wide(root, method)
    expected = read_raw(merged(write(root, "w.yaml", recipe), root / "written"))
    one = {"target": "stage:s", "method": "passthrough", "stages": {"s": recipe}}
    path = write(root, "one.yaml", one)
    for threads in (1, 3):
        out = merged(path, root / f"out{threads}", threads=threads, block=CHUNK)
        assert read_raw(out) == expected
    assert all(check.outcome == "same" for check in verify(root / "out3", replay=True))


def test_a_task_may_be_a_stage_of_whole_rows(root):
    recipe = wide(root, "della") | {"out": {"dtype": "bfloat16"}}
    merged(write(root, "w.yaml", recipe), root / "written")
    found = []
    for model, stages in (("written", {}), ("stage:s", {"stages": {"s": recipe}})):
        tasks = {"both": {"model": model, "scale": 0.5}, "c": {"model": "c", "scale": 0.5}}
        data = {"anchor": "anchor", "tasks": tasks, "method": WIDE["ties"]} | stages
        path = write(root, f"{len(found)}.yaml", data)
        found.append(read_raw(merged(path, root / f"out{len(found)}", block=CHUNK)))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", WIDE)
def test_any_part_of_a_tensor_is_that_part_of_the_whole(root, method):
    """Rows of tokens are read from anywhere; in 16 bits many entries equal the cut of `ties`."""
    recipe = wide(root, method, "BF16")
    one = {"target": "stage:s", "method": "passthrough", "stages": {"s": recipe}}
    stages = prepare(load_recipe(write(root, "one.yaml", one))).stages
    random = np.random.default_rng(0)
    for name in ("large", "long", "wide", "cube", "scalar", "empty"):
        view = stages["s"].view(name)
        count = size(view)
        whole = view.read(0, count)
        for _ in range(6):
            start, stop = sorted(random.integers(0, count + 1, 2).tolist())
            np.testing.assert_array_equal(view.read(start, stop), whole[start:stop])


def test_a_whole_tensor_is_worked_out_once_for_readers_of_its_parts(root, monkeypatch):
    recipe = wide(root, "sce")
    one = {"target": "stage:s", "method": "passthrough", "stages": {"s": recipe}}
    calls: list[str] = []

    def counted(edit, *rest):
        calls.append(edit.name)
        return result_of(edit, *rest)

    monkeypatch.setattr(stages_module, "result_of", counted)
    # One thread: of two, one may fall so far behind that its stretch is no longer kept.
    merged(write(root, "one.yaml", one), root / "out", threads=1, block=CHUNK)
    assert sorted(calls) == sorted(test_sparsify.SHAPES)


def test_a_plan_counts_what_a_stage_must_hold(root):
    one = {"target": "stage:s", "method": "passthrough"}
    peaks = []
    for method in ("ties", "tsv"):
        data = one | {"stages": {"s": wide(root, method)}}
        recipe = load_recipe(write(root, "p.yaml", data))
        peaks.append(prepare(recipe, RunOptions(threads=1)).estimate.peak_bytes)
    largest = 4 * 310 * 431
    assert peaks[1] - peaks[0] > 3 * 22 * largest  # one thread, and two stretches that are kept
