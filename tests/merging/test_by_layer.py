"""Parameters that differ by layer, from recipe to folder, against the formulas in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import read_checkpoint, read_raw, run_cli, write_family
from tests.merging.test_sparsify import crumbs, draws, fused, keep_probability

from taskvec.errors import ParameterError, RecipeError, UsageError
from taskvec.merging.prepare import prepare
from taskvec.methods import METHODS
from taskvec.methods.selection import Selection
from taskvec.methods.table_file import SelectionEntry
from taskvec.outputs import run as engine
from taskvec.outputs.verify import verify
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.recipe import Family
from taskvec.recipes.replay import read_manifest, recipe_of
from taskvec.streaming import RunOptions

SCALES = {"code": 0.61, "math": 0.87}  # no two entries cancel exactly, whatever the arithmetic
DENSITY = {
    "depth": [1, 0.2],
    "embedding": 0.125,
    "head": 0,
    "outside": 0.5,
    "patterns": {"*.mlp.up*": 0.375, "*layernorm*": {"depth": [0.25, 0.75]}},
}
EPSILON = {"depth": [0.1, 0.3], "outside": 0.2}
MEAN = {"patterns": {"*.mlp.*": [0.3, 0.5, 0.7]}, "depth": 0.4, "outside": 0.6}


def density(name: str) -> float:
    """The density of each tensor, by hand."""
    if ".layers." not in name:
        return {"model.embed_tokens.weight": 0.125, "lm_head.weight": 0}.get(name, 0.5)
    block = int(name.split(".")[2])
    if ".mlp.up" in name:
        return 0.375
    return ([0.25, 0.5, 0.75] if "layernorm" in name else [1, 0.6, 0.2])[block]


def mean(name: str) -> float:
    """The same of `MEAN`."""
    if ".layers." not in name:
        return 0.6
    return [0.3, 0.5, 0.7][int(name.split(".")[2])] if ".mlp." in name else 0.4


def epsilon(name: str) -> float:
    """The same of `EPSILON`."""
    return [0.1, 0.2, 0.3][int(name.split(".")[2])] if ".layers." in name else 0.2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder)
    return folder


def write(root: Path, out: Path, method: object, tasks=SCALES, **more) -> Path:
    tasks = {t: s if isinstance(s, dict) else {"scale": s} for t, s in tasks.items()}
    data = {
        "instruct": str(root / "instruct"),
        "tasks": {t: {"model": str(root / t)} | s for t, s in tasks.items()},
        "method": method,
        "out": {"dtype": "float32"},
    } | more
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def merged(root: Path, out: Path, method: object, tasks=SCALES, options=None, **more) -> Path:
    recipe = load_recipe(write(root, out, method, tasks, **more))
    return engine.run(recipe, out, options=options or RunOptions(threads=1)).path


def vectors(root: Path) -> tuple[dict, dict[str, dict]]:
    """θ_pre, and τ_t by task; float32 as the kernels have them."""
    anchor = read_checkpoint(root / "instruct")
    return anchor, {t: {n: v - anchor[n] for n, v in read_checkpoint(root / t).items()}
                    for t in SCALES}  # fmt: skip


def trimmed(values, share: float):
    """The largest entries of one tensor, in float64, others 0; by a stable sort."""
    return crumbs(values, share, 0.0) * values.astype(np.float64)


def close(got: Path, expected: dict, rtol: float = 1e-6) -> None:
    found = read_checkpoint(got)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=1e-7, err_msg=name)


# --- values -------------------------------------------------------------------------------------


def test_magnitude_keeps_the_share_of_every_tensor(root, tmp_path):
    method = {"name": "magnitude", "density": DENSITY, "scope": "tensor"}
    out = merged(root, tmp_path / "out", method, {"math": 0.87})
    anchor, tau = vectors(root)
    expected = {n: v + 0.87 * trimmed(tau["math"][n], density(n)) for n, v in anchor.items()}
    close(out, expected)
    thresholds = read_manifest(out)["table"]["selection"]["thresholds"]["math"]
    found = read_checkpoint(out)
    for name, values in anchor.items():
        kept = int(np.count_nonzero(found[name] != values))
        assert kept <= round(density(name) * values.size), name
        if (tau["math"][name] != 0).all():
            assert abs(kept - density(name) * values.size) <= 0.5, name
    assert thresholds["lm_head.weight"][0] == 0x7FFFFFFF


@pytest.mark.parametrize("place", ["method", "task"])
@pytest.mark.parametrize(("elect", "merge"), [("mass", "mean"), ("count", "sum")])
def test_ties(root, tmp_path, place, elect, merge):
    """For all tasks, or for one beside a task with one number."""
    method = {"name": "ties", "scope": "tensor", "elect": elect, "merge": merge}
    tasks: dict = dict(SCALES)
    if place == "method":
        method["density"] = DENSITY
    else:
        method["density"] = 0.3
        tasks["math"] = {"scale": SCALES["math"], "density": DENSITY}
    anchor, tau = vectors(root)
    expected = {}
    for name, start in anchor.items():
        shares = {"math": density(name), "code": density(name) if place == "method" else 0.3}
        rows = [s * trimmed(tau[t][name], shares[t]) for t, s in SCALES.items()]
        expected[name] = fused(start, rows, elect, merge)
    close(merged(root, tmp_path / "out", method, tasks), expected)


def test_breadcrumbs_has_two_of_them(root, tmp_path):
    gamma = {"depth": [0, 0.2], "outside": 0.125}
    method = {"name": "breadcrumbs", "density": MEAN, "gamma": gamma}
    anchor, tau = vectors(root)
    expected = {}
    for name, start in anchor.items():
        top = [0, 0.1, 0.2][int(name.split(".")[2])] if ".layers." in name else 0.125
        kept = [s * crumbs(tau[t][name], mean(name), top) * tau[t][name] for t, s in SCALES.items()]
        expected[name] = fused(start, kept, "none", "sum")
    close(merged(root, tmp_path / "out", method), expected)


@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_dare(root, tmp_path, name, rescale):
    method = {"name": name, "density": MEAN, "rescale": rescale}
    anchor, tau = vectors(root)
    expected = {}
    for tensor, start in anchor.items():
        rows = []
        for task, scale in SCALES.items():
            values = tau[task][tensor].astype(np.float64)
            drawn = draws(3, task, tensor, values.size).reshape(values.shape)
            kept = values * (drawn < round(mean(tensor) * 2**32))
            total = np.abs(kept).sum()
            norm = np.abs(values).sum() / total if total else 1.0
            rows.append(
                scale * kept * {"density": 1 / mean(tensor), "l1": norm, "none": 1}[rescale]
            )
        how = ("none", "sum") if name == "dare" else ("mass", "mean")
        expected[tensor] = fused(start, rows, *how)
    close(merged(root, tmp_path / "out", method, seed=3), expected, 2e-6)


@pytest.mark.parametrize("rescale", ["probability", "l1"])
def test_della(root, tmp_path, rescale):
    method = {"name": "della", "density": MEAN, "epsilon": EPSILON, "rescale": rescale}
    anchor, tau = vectors(root)
    expected = {}
    for name, start in anchor.items():
        rows = []
        for task, scale in SCALES.items():
            q = keep_probability(tau[task][name], mean(name), epsilon(name))
            drawn = draws(0, task, name, q.size).reshape(q.shape)
            values = tau[task][name].astype(np.float64)
            kept = np.where(drawn < np.rint(q * 2.0**32), values, 0)
            total = np.abs(kept).sum()
            norm = np.abs(values).sum() / total if total else 1.0
            rows.append(scale * (kept / q if rescale == "probability" else kept * norm))
        expected[name] = fused(start, rows, "mass", "mean")
    close(merged(root, tmp_path / "out", method), expected, 2e-6)


def test_della_keeps_all_at_density_one_whatever_its_epsilon(root, tmp_path):
    some = {"depth": [1, 0.5], "outside": 1}
    out = merged(root, tmp_path / "out", {"name": "della", "density": some}, {"math": 1.0})
    anchor, tau = vectors(root)
    found = read_checkpoint(out)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        np.testing.assert_allclose(found[name], anchor[name] + tau["math"][name], atol=1e-7)


def test_sce_selects_by_the_share_of_its_tensor(root, tmp_path):
    anchor, tau = vectors(root)
    out = read_checkpoint(merged(root, tmp_path / "out", {"name": "sce", "density": DENSITY}))
    for name, start in anchor.items():
        one, two = (tau[t][name] for t in SCALES)
        spread = np.abs(one.astype(np.float64) - two).ravel()
        count = round(density(name) * spread.size)
        lowest = np.sort(spread)[::-1][count - 1] if count else np.inf
        changed = (out[name] != start).ravel()
        assert (spread[changed] >= lowest * (1 - 1e-5)).all(), name
        assert np.count_nonzero(changed) <= count, name
    assert (out["lm_head.weight"] == anchor["lm_head.weight"]).all()


def test_steps_and_masks_of_methods_that_combine_blocks(root, tmp_path):
    """`nearswap` by its formula; what `consensus` and `ram` take is their tensor's number."""
    step = {"depth": [0.001, 0.003], "outside": 0.004}
    anchor, tau = vectors(root)
    expected = {}
    for name, start in anchor.items():
        t = [0.001, 0.002, 0.003][int(name.split(".")[2])] if ".layers." in name else 0.004
        expected[name] = start + sum(s * np.clip(tau[k][name], -t, t) for k, s in SCALES.items())
    close(merged(root, tmp_path / "out", {"name": "nearswap", "t": step}), expected)
    for method, name in (("consensus", "mask_scale"), ("ram", "epsilon"), ("ram_plus", "alpha")):
        low, high, both = (
            read_checkpoint(merged(root, tmp_path / f"{method}{i}", {"name": method, name: value}))
            for i, value in enumerate((1e-4, 2, {"depth": [1e-4, 2], "outside": 2}))
        )
        for tensor in anchor:
            if ".layers.1." not in tensor:
                like = low if ".layers.0." in tensor else high
                np.testing.assert_array_equal(both[tensor], like[tensor])
        assert any((low[n] != high[n]).any() for n in anchor)


# --- the same everywhere ------------------------------------------------------------------------

LAYERED = [
    (method.name, parameter)
    for method in METHODS.values()
    for parameter in method.parameters
    if parameter.by_layer
]


@given(data=st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_one_value_everywhere_is_that_number(root, tmp_path_factory, data):
    """Three blocks: the middle one is ½ a + ½ a, which is a in binary numbers too."""
    name, parameter = data.draw(st.sampled_from(LAYERED))
    low, high = max(parameter.low, 0.3), min(parameter.high, 0.9)
    value = data.draw(st.floats(low, high))
    form = data.draw(
        st.sampled_from(
            [
                {"patterns": {"*": value}},
                {"depth": [value, value], "outside": value},
                {"depth": value, "embedding": value, "head": value, "outside": value},
                {"depth": value / 2, "outside": value / 2, "times": 2},
            ]
        )
    )
    method: dict = {"name": name}
    if "scope" in [p.name for p in METHODS[name].parameters]:
        method["scope"] = "tensor"
    if name == "della":
        method |= {"epsilon": 0.1} if parameter.name == "density" else {"density": 0.5}
    folder = tmp_path_factory.mktemp("same")
    plain = merged(root, folder / "plain", method | {parameter.name: value})
    layered = merged(root, folder / "layered", method | {parameter.name: form})
    assert read_raw(layered) == read_raw(plain)


def test_every_selecting_method_has_a_density_by_layer():
    assert {name for name, parameter in LAYERED if parameter.name == "density"} == {
        "ties", "dare", "dare_ties", "magnitude", "breadcrumbs", "della", "sce",
        "safety_arithmetic",
    }  # fmt: skip


# --- again --------------------------------------------------------------------------------------

METHODS_HERE = {
    "ties": {"name": "ties", "density": DENSITY, "scope": "tensor"},
    "dare": {"name": "dare", "density": MEAN},
    "dare_ties": {"name": "dare_ties", "density": MEAN, "rescale": "l1"},
    "breadcrumbs": {"name": "breadcrumbs", "density": MEAN, "gamma": EPSILON},
    "della": {"name": "della", "density": MEAN, "epsilon": EPSILON},
}


@pytest.mark.parametrize("method", METHODS_HERE)
def test_manifest_replays_and_recipe_repeats(root, tmp_path, method):
    one = merged(root, tmp_path / "one", METHODS_HERE[method])
    assert {check.outcome for check in verify(one, replay=True)} == {"same"}
    other = RunOptions(threads=3, block=65_536)
    again = engine.run(load_recipe(one / "taskvec.yaml"), tmp_path / "again", options=other)
    assert read_raw(again.path) == read_raw(one)
    recipe = recipe_of(read_manifest(one), "one")
    assert read_raw(engine.run(recipe, tmp_path / "third").path) == read_raw(one)
    assert recipe.table.selection in (None, again.table.selection)


def test_a_selection_of_before_still_loads():
    old = {
        "thresholds": {}, "ceilings": {}, "densities": {"math": 0.5}, "rescale": {"math": 2},
        "election": "none", "merge": "sum", "seed": 1,
    }  # fmt: skip
    found = SelectionEntry(**old).to_selection()
    assert (found.densities, found.rescale) == ({"math": 0.5}, {"math": 2.0})
    layered = Selection(densities={"math": {"a": 0.5, "b": 1.0}}, rescale={"math": {"a": 2.0}})
    assert SelectionEntry(**layered.to_json()).to_selection() == layered


def test_a_stage_may_have_one(root, tmp_path):
    written = merged(root, tmp_path / "written", METHODS_HERE["dare_ties"])
    stage = yaml.safe_load((tmp_path / "written.yaml").read_text())
    data = {"stages": {"first": stage}, "target": "stage:first", "method": "passthrough"}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    out = engine.run(load_recipe(path), tmp_path / "two").path
    assert read_raw(out) == read_raw(written)
    assert {check.outcome for check in verify(out, replay=True)} == {"same"}


def test_the_command_line_says_that_it_differs_by_layer(root, tmp_path):
    path = write(root, tmp_path / "out", METHODS_HERE["ties"])
    code, out, _ = run_cli("plan", path)
    assert code == 0
    assert "math: scale 0.87; density by layer, scope tensor, elect mass" in out


def test_methods_says_which_may_differ_by_layer():
    code, out, _ = run_cli("methods", "breadcrumbs")
    assert code == 0
    marked = [line.split()[0] for line in out.splitlines() if "may differ by layer" in line]
    assert marked == ["density", "gamma"]


def test_a_saved_table_rests_on_scales_by_layer(root, tmp_path):
    scale = {"depth": [1, 3], "outside": 0}
    tasks = {"math": {"scale": scale}, "code": {"scale": 1}}
    path = write(root, tmp_path / "out", "average", tasks, base=str(root / "base"))
    code, _, err = run_cli("scan", path, "--save-table", tmp_path / "table.csv", "--quiet")
    assert (code, "error" in err) == (0, False), err
    lines = (tmp_path / "table.csv").read_text().splitlines()
    weights = {line.split(",")[0]: line.split(",")[1:3] for line in lines[1:]}
    assert [float(w) for w in weights["model.layers.1.mlp.up_proj.weight"]] == [1 / 3, 1 / 3]
    assert float(weights["lm_head.weight"][1]) == 1


def test_merging_in_python_takes_one(root, tmp_path):
    from taskvec.outputs.merge import merge

    family = Family({t: root / t for t in SCALES}, instruct=root / "instruct")
    done = merge(
        family, tmp_path / "python", method=METHODS_HERE["ties"], scale=SCALES, dtype="float32"
    )
    assert read_raw(done.path) == read_raw(merged(root, tmp_path / "out", METHODS_HERE["ties"]))


def test_a_weight_by_layer_beside_a_density_by_layer(root, tmp_path):
    scale = {"depth": [0.25, 0.75], "outside": 0.5}
    method = {"name": "magnitude", "density": DENSITY, "scope": "tensor"}
    out = merged(root, tmp_path / "out", method, {"math": {"scale": scale}})
    anchor, tau = vectors(root)
    expected = {}
    for name, start in anchor.items():
        factor = [0.25, 0.5, 0.75][int(name.split(".")[2])] if ".layers." in name else 0.5
        expected[name] = start + factor * trimmed(tau["math"][name], density(name))
    close(out, expected)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "tasks", "text"), [
    ({"name": "ties", "density": DENSITY}, SCALES,
     "density of task 'code' differs by layer, but entries are ranked over the whole model; set "
     "scope: tensor, or give one number"),
    ({"name": "magnitude"}, {"math": {"scale": 1, "density": DENSITY}, "code": 1},
     "density of task 'math' differs by layer, but entries are ranked over the whole model; set "
     "scope: tensor, or give one number"),
    ({"name": "breadcrumbs", "scope": "model", "gamma": EPSILON}, SCALES,
     "gamma of task 'code' differs by layer, but entries are ranked over the whole model; set "
     "scope: tensor, or give one number"),
    ({"name": "della", "density": MEAN | {"outside": 0.95}}, SCALES,
     "density ± epsilon / 2 of della must be above 0 and at most 1; got 0.95 ± 0.07 for task "
     "'code' in tensor 'lm_head.weight'; lower epsilon"),
    ({"name": "sce", "density": 0.5}, {"math": {"scale": 1, "density": DENSITY}, "code": 1},
     "density must be the same for all tasks; got code 0.5, math by layer"),
    ({"name": "sce", "density": DENSITY}, {"math": 1},
     "sce selects entries that vary across tasks; got one, math (those of λ = 0 do not count); add "
     "a task, or set density to 1"),
])  # fmt: skip
def test_what_a_method_cannot_work_with(root, tmp_path, method, tasks, text):
    with pytest.raises(ParameterError) as caught:
        engine.run(load_recipe(write(root, tmp_path / "out", method, tasks)), tmp_path / "out")
    assert str(caught.value) == text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "text"), [
    ([1, 0.5], "density of ties must be in [0, 1]; got [1, 0.5]; by layer: {depth: [1, 0.5]}"),
    ({"depth": [1, 1.5]}, "density of ties must be in [0, 1]; got 1.5"),
    ({"depth": [1, 0.6], "times": 2}, "density of ties must be in [0, 1]; got 2.0"),
    ({"depth": [1, "x"]}, "method.density.depth[1] must be a finite number; got 'x'"),
    ({"depth": [1], "times": "x"}, "method.density.times must be a finite number; got 'x'"),
    ({"depth": []}, "method.density.depth must be a list that is not empty; got []"),
    ({"patterns": ["*"]}, "method.density.patterns must be a mapping; got ['*']"),
    ({"times": 1}, "method.density gives no value; known: depth, embedding, final_norm, head, "
                   "outside, patterns, times"),
    ({"dept": 1}, "unknown key 'dept' in method.density; did you mean 'depth'?"),
])  # fmt: skip
def test_what_is_wrong_in_it_is_told_with_its_line(root, tmp_path, value, text):
    path = write(root, tmp_path / "out", {"name": "ties", "density": value})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).partition(": ")[2] == text
    assert str(caught.value).startswith(f"{path}:")


@pytest.mark.parametrize(("value", "text"), [
    ({"outside": 0.5}, "density of task 'code' has no value for 'model.layers.0.input_layernorm."
                       "weight'; give depth: [FIRST, LAST]"),
    ({"depth": 0.5}, "density of task 'code' has no value for 'lm_head.weight', which is in no "
                     "block; give head: NUMBER"),
    ({"depth": 0.5, "outside": 1, "patterns": {"*.attn_x.*": 1}},
     "density of task 'code': pattern '*.attn_x.*' fits no tensor"),
    ({"depth": 0.5, "outside": 1, "patterns": {"*norm*": [1, 0.5]}},
     "pattern '*norm*' of density of task 'code' has no value for 'model.norm.weight', which is in "
     "no block; give outside: NUMBER"),
])  # fmt: skip
def test_a_value_that_lacks_is_told_from_headers_alone(root, tmp_path, value, text):
    method = {"name": "ties", "density": value, "scope": "tensor"}
    with pytest.raises(UsageError) as caught:
        prepare(load_recipe(write(root, tmp_path / "out", method)))
    assert str(caught.value) == text


def test_what_is_ranked_over_the_model_alone_takes_one_number(root, tmp_path):
    path = write(root, tmp_path / "out", {"name": "pcb", "density": {"depth": [1, 0.5]}})
    with pytest.raises(RecipeError, match=r"density of pcb must be in \[0, 1\]; got .*; it cannot"):
        load_recipe(path)
