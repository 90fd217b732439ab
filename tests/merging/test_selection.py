"""Methods that select entries, from recipe to folder, against the papers' formulas in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import (
    from_bf16,
    read_checkpoint,
    read_raw,
    write_checkpoint,
    write_family,
)

from taskvec.errors import CheckpointError, RecipeError, UsageError
from taskvec.outputs import run as engine
from taskvec.outputs.verify import verify
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.replay import read_manifest, recipe_of
from taskvec.streaming import RunOptions

SCALES = {"code": 0.61, "math": 0.87}  # no two entries cancel exactly, whatever the arithmetic
SELECTING = ("ties", "dare", "dare_ties", "magnitude", "breadcrumbs")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_family(tmp_path)
    return tmp_path


def merged(root: Path, name: str, method: object, scales=SCALES, options=None, **more) -> Path:
    data = {
        "instruct": "instruct",
        "tasks": {t: {"model": t, "scale": s} for t, s in scales.items()},
        "method": method,
        "out": {"dtype": "float32"},
    } | more
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return engine.run(load_recipe(path), root / name, options=options or RunOptions()).path


def vectors(root: Path) -> tuple[dict, dict[str, dict]]:
    """θ_pre, and τ_t by task; float32 as the kernels have them."""
    anchor = read_checkpoint(root / "instruct")
    return anchor, {t: {n: v - anchor[n] for n, v in read_checkpoint(root / t).items()}
                    for t in SCALES}  # fmt: skip


def largest(tau: dict, density: float, scope: str, drop: float = 0.0) -> dict:
    """1 for the entries that a trim keeps, 0 for others, by a stable sort."""
    names = sorted(tau)
    groups = [names] if scope == "model" else [[n] for n in names]
    masks = {}
    for group in groups:
        flat = np.concatenate([np.abs(tau[n]).ravel() for n in group])
        order = np.argsort(-flat, kind="stable")
        keep = np.zeros(len(flat))
        keep[order[: round((density + drop) * len(flat))]] = 1
        if drop and (cut := round(drop * len(flat))):
            keep[flat >= flat[order[cut - 1]]] = 0
        ends = np.cumsum([tau[n].size for n in group])[:-1]
        for name, part in zip(group, np.split(keep, ends), strict=True):
            masks[name] = part.reshape(tau[name].shape)
    return masks


def ties(anchor, tau, masks, elect="mass", merge="mean"):
    """Algorithm 1 of TIES in float64."""
    result = {}
    for name, start in anchor.items():
        rows = np.stack([SCALES[t] * masks[t][name] * tau[t][name].astype(float) for t in SCALES])
        ballot = (np.sign(rows) if elect == "count" else rows).sum(0)
        agrees = (np.sign(rows) == np.sign(ballot)) & (rows != 0)
        total = (rows * agrees).sum(0)
        number = agrees.sum(0)
        result[name] = start + (total / np.maximum(number, 1) if merge == "mean" else total)
    return result


def close(got: Path, expected: dict) -> None:
    found = read_checkpoint(got)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=3e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(("elect", "merge"), [("mass", "mean"), ("count", "mean"), ("mass", "sum")])
def test_ties(root, scope, elect, merge):
    anchor, tau = vectors(root)
    masks = {t: largest(tau[t], 0.3, scope) for t in SCALES}
    method = {"name": "ties", "density": 0.3, "scope": scope, "elect": elect, "merge": merge}
    close(merged(root, "out", method), ties(anchor, tau, masks, elect, merge))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_magnitude(root, scope):
    anchor, tau = vectors(root)
    masks = {t: largest(tau[t], 0.1, scope) for t in SCALES}
    expected = {
        n: v + sum(SCALES[t] * masks[t][n] * tau[t][n].astype(float) for t in SCALES)
        for n, v in anchor.items()
    }
    close(merged(root, "out", {"name": "magnitude", "density": 0.1, "scope": scope}), expected)


def test_breadcrumbs(root):
    anchor, tau = vectors(root)
    masks = {t: largest(tau[t], 0.4, "tensor", drop=0.1) for t in SCALES}
    expected = {
        n: v + sum(SCALES[t] * masks[t][n] * tau[t][n].astype(float) for t in SCALES)
        for n, v in anchor.items()
    }
    method = {"name": "breadcrumbs", "density": 0.4, "gamma": 0.1}
    close(merged(root, "out", method), expected)


def test_dare_keeps_its_share_rescaled_and_its_expectation(root):
    anchor, tau = vectors(root)
    got = read_checkpoint(merged(root, "out", {"name": "dare", "density": 0.25}, {"math": 1.0}))
    name = "model.embed_tokens.weight"
    change = got[name] - anchor[name]
    moved = tau["math"][name] != 0
    kept = (change != 0) & moved
    share, n = kept[moved].mean(), int(moved.sum())
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / n)
    np.testing.assert_allclose(change[kept], 4 * tau["math"][name][kept], rtol=1e-4, atol=2e-7)
    plain = read_checkpoint(
        merged(root, "o2", {"name": "dare", "density": 0.25, "rescale": "none"}, {"math": 1.0})
    )
    np.testing.assert_allclose(
        (plain[name] - anchor[name])[kept], tau["math"][name][kept], rtol=1e-4, atol=1e-7
    )


def test_seeds_draw_other_masks_and_tasks_draw_their_own(root):
    write_family(root, {"code": read_checkpoint(root / "math")})  # two equal tasks
    dare = {"name": "dare", "density": 0.5}
    one, again, other = (
        read_raw(merged(root, out, dare, seed=seed)) for out, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one == again
    assert one != other
    only = read_raw(merged(root, "d", dare, {"math": 1.48}, seed=3))
    assert only != one  # with one mask for both it would be the sum of λ


def test_dare_ties_elects_among_what_is_drawn(root):
    method = {"name": "dare_ties", "density": 1.0}
    anchor, tau = vectors(root)
    everything = {t: {n: np.ones_like(v) for n, v in tau[t].items()} for t in SCALES}
    close(merged(root, "out", method), ties(anchor, tau, everything))
    dropped = read_raw(merged(root, "o2", method | {"density": 0.5}))
    assert dropped != read_raw(root / "out")


@pytest.mark.parametrize("method", SELECTING)
def test_one_task_at_minus_one_points_against_its_vector(root, method):
    """mergekit's ties and della add it instead, because they divide by a negative sum."""
    anchor, tau = vectors(root)
    got = read_checkpoint(merged(root, "out", {"name": method, "density": 0.5}, {"math": -1.0}))
    change = np.concatenate([(got[n] - anchor[n]).ravel() for n in sorted(anchor)])
    vector = np.concatenate([tau["math"][n].ravel() for n in sorted(anchor)])
    cosine = change @ vector / np.linalg.norm(change) / np.linalg.norm(vector)
    assert cosine < -0.5


@pytest.mark.parametrize("method", SELECTING)
def test_threads_blocks_and_replay_change_no_bit(root, method):
    one = merged(root, "a", {"name": method}, options=RunOptions(threads=1))
    other = RunOptions(threads=3, block=65_536)
    assert read_raw(merged(root, "b", {"name": method}, options=other)) == read_raw(one)
    assert all(check.outcome == "same" for check in verify(one, replay=True))
    recipe = recipe_of(read_manifest(one), "a")
    assert read_raw(engine.run(recipe, root / "c").path) == read_raw(one)


@pytest.mark.parametrize("method", SELECTING)
def test_float64_arithmetic_is_close(root, method):
    single = read_checkpoint(merged(root, "a", {"name": method}))
    out = {"dtype": "float32", "precision": "float64"}
    double = read_checkpoint(merged(root, "b", {"name": method}, out=out))
    anchor = read_checkpoint(root / "instruct")
    for name, values in single.items():
        # Four roundings of terms that are at most as large as start and result together.
        largest_term = np.abs(values).max() + np.abs(anchor[name]).max()
        np.testing.assert_allclose(double[name], values, rtol=0, atol=4 * 2.0**-24 * largest_term)


@pytest.mark.parametrize("method", SELECTING)
def test_weights_of_lata_go_into_what_is_ranked(root, method):
    """A layer of weight 0 is left as it is, and ranks are those of the pure vectors."""
    lata = {"name": "lata", "scheme": "threshold", "threshold": 0.9}
    out = merged(root, "out", {"name": method}, base="base", layer_weights=lata)
    table = read_manifest(out)["table"]["weights"]["math"]
    assert set(table.values()) == {0.0, 1.0}
    anchor, got = read_checkpoint(root / "instruct"), read_checkpoint(out)
    both = read_manifest(out)["table"]["weights"]
    dropped = [n for n in table if all(both[t][n] == 0 for t in both)]
    for name in dropped:
        np.testing.assert_array_equal(got[name], anchor[name])
    if method in ("ties", "magnitude"):
        _, tau = vectors(root)
        pure = {t: {n: both[t][n] * v for n, v in tau[t].items()} for t in SCALES}
        masks = {t: largest(pure[t], 0.2, "model") for t in SCALES}
        if method == "ties":
            close(out, ties(anchor, pure, masks))


def test_a_task_that_leaves_everything_as_it_is(root):
    write_family(root, {"math": read_checkpoint(root / "instruct")})
    out = merged(root, "out", "ties", {"math": 1.0})
    anchor = read_checkpoint(root / "instruct")
    for name, values in read_checkpoint(out).items():
        np.testing.assert_array_equal(values, anchor[name])


def test_density_one_is_task_arithmetic(root):
    merged(root, "b", "task_arithmetic")
    close(merged(root, "a", {"name": "magnitude", "density": 1.0}), read_checkpoint(root / "b"))


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ({"name": "ties", "density": 1.5}, {}, r"density of ties must be in \[0, 1\]; got 1.5"),
        ({"name": "dare", "density": 0}, {}, r"density of dare must be in \[1e-06, 1\]; got 0"),
        ("task_arithmetic", {"layer_weights": "lata"},
         "task_arithmetic takes no layer_weights"),
        ("ties", {"layer_weights": "average"}, "average gives no layer weights; for example: lata"),
        ("ties", {"layer_weights": {"name": "lata", "shceme": "linear"}},
         "unknown key 'shceme' in layer_weights; did you mean 'scheme'"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_meant(root, method, more, message):
    with pytest.raises(RecipeError, match=message):
        merged(root, "out", method, **more)


def test_parameters_that_cannot_differ_by_task(root):
    data = {
        "instruct": "instruct",
        "tasks": {"math": {"model": "math", "scope": "tensor"}, "code": {"model": "code"}},
        "method": "ties",
    }
    (root / "r.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UsageError) as caught:
        engine.run(load_recipe(root / "r.yaml"), root / "out")
    assert str(caught.value) == (
        "scope must be the same for all tasks; got code model, math tensor"
    )
    assert not (root / "out").exists()


def test_bf16_output_rounds_once(root):
    wide = read_checkpoint(merged(root, "a", "ties"))
    for name, (dtype, shape, data) in read_raw(
        merged(root, "b", "ties", out={"dtype": "bfloat16"})
    ).items():
        assert dtype == "BF16"
        got = from_bf16(np.frombuffer(data, "<u2")).reshape(shape)
        assert (np.abs(got - wide[name]) <= np.abs(wide[name]) * 2.0**-8).all()


@pytest.mark.parametrize("method", SELECTING)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told_even_where_it_is_not_selected(root, method, value):
    broken = read_checkpoint(root / "math")
    broken["model.norm.weight"][1] = value
    write_checkpoint(root / "math", broken)
    with pytest.raises(CheckpointError, match=r"task 'math'.*'model\.norm\.weight' holds"):
        merged(root, "out", method)
    assert not (root / "out").exists()
