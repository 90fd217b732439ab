"""Breadcrumbs with an election, DARE to the L1 norm, DELLA, Consensus, PCB: against NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.conftest import read_checkpoint, read_raw, write_checkpoint
from tests.properties.families import table

from taskvec.errors import ParameterError, UsageError
from taskvec.methods import consensus as consensus_method
from taskvec.methods import della
from taskvec.methods import pcb as pcb_method
from taskvec.methods.method import Block, Inputs
from taskvec.methods.selection import Selection, mask_key
from taskvec.outputs import run as engine
from taskvec.outputs.verify import verify
from taskvec.recipes.reading import load_recipe
from taskvec.recipes.replay import read_manifest, recipe_of
from taskvec.streaming import CHUNK, RunOptions

SCALES = {"a": 0.61, "b": 0.87, "c": 0.43}  # no two entries cancel exactly
DELLA = {p.name: p.default for p in della.METHOD.parameters}
SHAPES = {
    "column": (37, 1), "cube": (5, 4, 6), "empty": (0, 4), "equal": (6, 9), "large": (310, 431),
    "long": (4200, 16), "one": (1,), "row": (53,), "same": (4, 5), "scalar": (),
    "wide": (2, CHUNK + 77),
}  # fmt: skip


def write(root: Path, dtype: str = "F32", size: float = 1.0) -> None:
    """An anchor and three tasks. `same` no task changes; changes of `equal` are all as large."""
    random = np.random.default_rng(5)
    anchor = {n: size * random.normal(0, 0.1, shape) for n, shape in SHAPES.items()}
    anchor["equal"] = np.full(SHAPES["equal"], 0.5) * size
    write_checkpoint(root / "anchor", anchor, dtype)
    for task in SCALES:
        tuned = {n: w + size * random.normal(0, 0.02, w.shape) for n, w in anchor.items()}
        tuned["same"] = anchor["same"]
        tuned["equal"] = anchor["equal"] + size * random.choice([-(2**-7), 2**-7], SHAPES["equal"])
        bound = 65504 if dtype == "F16" else np.inf
        tuned = {n: np.clip(w, -bound, bound) for n, w in tuned.items()}
        write_checkpoint(root / task, tuned, dtype)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def merged(root: Path, name: str, method: object, scales=SCALES, options=None, **more) -> Path:
    tasks = {t: s if isinstance(s, dict) else {"scale": s} for t, s in scales.items()}
    data = {
        "anchor": "anchor",
        "tasks": {t: {"model": t} | s for t, s in tasks.items()},
        "method": method,
        "out": {"dtype": "float32"},
    } | more
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return engine.run(load_recipe(path), root / name, options=options or RunOptions()).path


def vectors(root: Path, tasks=SCALES) -> tuple[dict, dict[str, dict]]:
    """θ_pre, and τ_t by task, rounded to float32 as the program has them."""
    anchor = {n: w.astype(np.float32) for n, w in read_checkpoint(root / "anchor").items()}
    return anchor, {t: {n: (v.astype(np.float32) - anchor[n]) for n, v in
                        read_checkpoint(root / t).items()} for t in tasks}  # fmt: skip


def close(got: Path, expected: dict, rtol: float = 4e-7, atol: float = 4e-8) -> None:
    found = read_checkpoint(got)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=atol, err_msg=name)


def fused(start, rows, elect: str, merge: str):
    """Election and merging of λ_t m_t τ_t in float64."""
    rows = np.stack(rows).astype(np.float64)
    ballot = (np.sign(rows) if elect == "count" else rows).sum(0)
    agrees = rows != 0
    if elect != "none":
        agrees &= np.sign(rows) == np.sign(ballot)
    total, number = (rows * agrees).sum(0), agrees.sum(0)
    return start + (total / np.maximum(number, 1) if merge == "mean" else total)


def draws(seed: int, task: str, name: str, count: int):
    """32 bits an entry: the finaliser of splitmix64 on key + entry · golden ratio."""
    with np.errstate(over="ignore"):
        z = np.uint64(mask_key(seed, task, name)) + np.arange(count, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(32)


# --- breadcrumbs --------------------------------------------------------------------------------


def crumbs(values, density: float, gamma: float):
    """1 for the entries in the middle of a tensor, by a stable sort."""
    flat = np.abs(values).ravel()
    order = np.argsort(-flat, kind="stable")
    keep = np.zeros(flat.size)
    keep[order[: round((density + gamma) * flat.size)]] = 1
    if cut := round(gamma * flat.size):
        keep[flat >= flat[order[cut - 1]]] = 0
    return keep.reshape(values.shape)


@pytest.mark.parametrize("elect", ["none", "mass", "count"])
@pytest.mark.parametrize("merge", ["sum", "mean"])
def test_breadcrumbs_elects_and_merges(root, elect, merge):
    anchor, tau = vectors(root)
    expected = {
        n: fused(v, [s * crumbs(tau[t][n], 0.4, 0.1) * tau[t][n] for t, s in SCALES.items()],
                 elect, merge)
        for n, v in anchor.items()
    }  # fmt: skip
    method = {"name": "breadcrumbs", "density": 0.4, "gamma": 0.1, "elect": elect, "merge": merge}
    close(merged(root, "out", method), expected)


def test_breadcrumbs_without_these_words_adds(root):
    plain = merged(root, "one", {"name": "breadcrumbs", "density": 0.4})
    said = {"name": "breadcrumbs", "density": 0.4, "elect": "none", "merge": "sum"}
    assert read_raw(plain) == read_raw(merged(root, "two", said))


# --- dare to the L1 norm ------------------------------------------------------------------------


def l1_rows(tau, density: float, seed: int = 0, scales=SCALES):
    """λ_t m_t τ_t with the L1 norm of τ_t, by tensor."""
    rows = {}
    for name in SHAPES:
        rows[name] = []
        for task, scale in scales.items():
            values = tau[task][name].astype(np.float64)
            keep = draws(seed, task, name, values.size) < round(density * 2**32)
            kept = values * keep.reshape(values.shape)
            total = np.abs(kept).sum()
            factor = np.abs(values).sum() / total if total else 1.0
            rows[name].append(scale * factor * kept)
    return rows


@pytest.mark.parametrize("density", [0.3, 1e-6, 1.0])
def test_dare_keeps_the_l1_norm(root, density):
    anchor, tau = vectors(root)
    rows = l1_rows(tau, density, seed=3)
    method = {"name": "dare", "density": density, "rescale": "l1"}
    close(merged(root, "out", method, seed=3),
          {n: fused(v, rows[n], "none", "sum") for n, v in anchor.items()}, 2e-6)  # fmt: skip


def test_dare_ties_elects_what_has_the_l1_norm(root):
    anchor, tau = vectors(root)
    rows = l1_rows(tau, 0.5)
    close(merged(root, "out", {"name": "dare_ties", "density": 0.5, "rescale": "l1"}),
          {n: fused(v, rows[n], "mass", "mean") for n, v in anchor.items()}, 2e-6)  # fmt: skip


def test_the_l1_norm_is_that_of_the_pure_vector(root):
    _, tau = vectors(root)
    out = merged(root, "out", {"name": "dare", "density": 0.2, "rescale": "l1"}, {"a": 1.0},
                 out={"dtype": "float64", "precision": "float64"})  # fmt: skip
    anchor = read_checkpoint(root / "anchor")
    for name in ("large", "wide", "equal"):
        change = read_checkpoint(out)[name] - anchor[name]
        assert (change == 0).mean() > 0.7
        np.testing.assert_allclose(
            np.abs(change).sum(), np.abs(tau["a"][name].astype(float)).sum(), rtol=1e-6
        )


def test_each_task_may_be_rescaled_in_its_own_way(root):
    scales = {"a": {"scale": 1.0, "rescale": "l1"}, "b": {"scale": 1.0, "rescale": "none"}}
    out = merged(root, "out", {"name": "dare", "density": 0.5}, scales)
    selection = read_manifest(out)["table"]["selection"]
    assert set(selection["factors"]) == {"a"}
    assert set(selection["factors"]["a"]) == set(SHAPES)
    assert selection["rescale"] == {}


# --- della --------------------------------------------------------------------------------------


def keep_probability(values, density: float, epsilon: float):
    """By rank of magnitude within a row (a vector is one), equal entries at their mean rank."""
    rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
    place = np.full(rows.shape, 0.5)
    if rows.shape[1] > 1:
        sizes = np.abs(rows)
        ordered = np.sort(sizes, axis=1)
        for i, (row, sorted_row) in enumerate(zip(sizes, ordered, strict=True)):
            below = np.searchsorted(sorted_row, row, "left")
            up_to = np.searchsorted(sorted_row, row, "right")
            place[i] = (below + up_to - 1) / 2 / (rows.shape[1] - 1)
    return (density + epsilon * (place - 0.5)).reshape(values.shape)


def della_rows(tau, density, epsilon, *, seed=0, rescale=True):
    """λ_t m_t τ_t / q_t by tensor."""
    rows = {}
    for name in SHAPES:
        rows[name] = []
        for task, scale in SCALES.items():
            values = tau[task][name].astype(np.float64)
            q = keep_probability(tau[task][name], density, epsilon)
            drawn = draws(seed, task, name, values.size).reshape(values.shape)
            kept = np.where(drawn < np.rint(q * 2.0**32), values, 0)
            rows[name].append(scale * kept / (q if rescale else 1))
    return rows


@pytest.mark.parametrize(("elect", "merge"), [("mass", "mean"), ("count", "sum"), ("none", "sum")])
@pytest.mark.parametrize(("density", "epsilon"), [(0.7, 0.14), (0.3, 0.5), (1.0, 0.0)])
def test_della(root, elect, merge, density, epsilon):
    anchor, tau = vectors(root)
    rows = della_rows(tau, density, epsilon, seed=2)
    method = {"name": "della", "density": density, "epsilon": epsilon, "elect": elect}
    expected = {n: fused(v, rows[n], elect, merge) for n, v in anchor.items()}
    close(merged(root, "out", method | {"merge": merge}, seed=2), expected, 1e-6)


@pytest.mark.parametrize(("density", "epsilon"), [(0.6, 0.3), (1e-3, 0.0), (1.0, 0.5)])
def test_della_keeps_the_l1_norm(root, density, epsilon):
    anchor, tau = vectors(root)
    plain = della_rows(tau, density, epsilon if density < 1 else 0, seed=3, rescale=False)
    rows = {name: [] for name in plain}
    for name, kept in plain.items():
        for task, scale, mine in zip(SCALES, SCALES.values(), kept, strict=True):
            norm = np.abs(scale * tau[task][name].astype(np.float64)).sum()
            total = np.abs(mine).sum()
            rows[name].append(mine * (norm / total if total else 1.0))
    method = {"name": "della", "density": density, "epsilon": epsilon, "rescale": "l1"}
    expected = {n: fused(v, rows[n], "mass", "mean") for n, v in anchor.items()}
    out = merged(root, "out", method, seed=3)
    close(out, expected, 2e-6)
    factors = read_manifest(out)["table"]["selection"]["factors"]
    assert set(factors) == set(SCALES)
    assert (set(factors["a"].values()) == {1.0}) == (density == 1)


def test_della_rescales_each_task_in_its_own_way(root):
    anchor, tau = vectors(root)
    scales = {"a": {"scale": 1.0, "rescale": "l1"}, "b": {"scale": 1.0, "rescale": "none"},
              "c": {"scale": 1.0}}  # fmt: skip
    method = {"name": "della", "elect": "none", "merge": "sum"}
    out = merged(root, "out", method, scales)
    assert set(read_manifest(out)["table"]["selection"]["factors"]) == {"a"}
    alone = {t: read_checkpoint(merged(root, f"of-{t}", method, {t: s})) for t, s in scales.items()}
    found = read_checkpoint(out)
    for name, start in anchor.items():
        both = sum(one[name].astype(np.float64) - start for one in alone.values())
        np.testing.assert_allclose(found[name], start + both, rtol=1e-6, atol=2e-7)
    change = alone["a"]["large"] - anchor["large"].astype(np.float64)
    norm = np.abs(tau["a"]["large"]).sum(dtype=np.float64)
    assert np.abs(change).sum() == pytest.approx(norm, rel=1e-5)
    kept = alone["b"]["large"] != anchor["large"]
    change = alone["b"]["large"][kept] - anchor["large"][kept]
    np.testing.assert_allclose(change, tau["b"]["large"][kept], atol=2e-8)


def test_della_without_rescaling_keeps_entries_as_they_are(root):
    anchor, tau = vectors(root)
    rows = della_rows(tau, 0.7, 0.14, rescale=False)
    expected = {n: fused(v, rows[n], "mass", "mean") for n, v in anchor.items()}
    close(merged(root, "out", {"name": "della", "rescale": "none"}), expected)


def test_della_keeps_the_larger_half_of_a_row_more_often(root):
    """The mean probability is the density; the two halves of a row differ by half of epsilon."""
    out = merged(root, "out", {"name": "della", "density": 0.5, "epsilon": 0.8}, {"a": 1.0})
    anchor, tau = vectors(root)
    kept = read_checkpoint(out)["large"] != anchor["large"]
    sizes = np.abs(tau["a"]["large"])
    larger = sizes > np.median(sizes, axis=1, keepdims=True)
    n = kept.size
    assert kept.mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(n))
    assert kept[larger].mean() == pytest.approx(0.7, abs=5 * 0.5 / np.sqrt(n / 2))
    assert kept[~larger].mean() == pytest.approx(0.3, abs=5 * 0.5 / np.sqrt(n / 2))


def test_della_keeps_expectations(root):
    """Over 200 seeds the mean of a changed tensor is within five standard errors of τ."""
    anchor, tau = vectors(root)
    chosen, zeros = DELLA | {"density": 0.4, "epsilon": 0.6}, np.zeros((1, 53), np.float32)
    row, one = tau["a"]["row"].reshape(1, 1, 53), np.ones(1, np.float32)
    block = Block("row", zeros, row, ("a",), one, {"a": chosen})
    found = np.stack([della.combine(replace(block, seed=seed))[0] for seed in range(200)])
    q = keep_probability(tau["a"]["row"], 0.4, 0.6)
    error = np.abs(tau["a"]["row"]) * np.sqrt((1 - q) / q / 200)
    assert (np.abs(found.mean(0) - tau["a"]["row"]) < 5 * error).all()
    assert anchor["row"].shape == (53,)


@pytest.mark.parametrize("rescale", ["probability", "l1"])
def test_rows_of_nothing_are_left_as_they_are(root, rescale):
    for member in ("anchor", *SCALES):
        weights = read_checkpoint(root / member)
        write_checkpoint(root / member, weights | {"hollow": np.zeros((4, 0))}, "F32")
    out = merged(root, "out", {"name": "della", "rescale": rescale})
    assert read_checkpoint(out)["hollow"].shape == (4, 0)


def test_della_refuses_probabilities_that_are_none(root):
    with pytest.raises(UsageError) as caught:
        merged(root, "out", {"name": "della", "density": 0.9, "epsilon": 0.3})
    assert str(caught.value) == (
        "density ± epsilon / 2 of della must be above 0 and at most 1; got 0.9 ± 0.15 for task "
        "'a'; lower epsilon"
    )
    assert not (root / "out").exists()


# --- consensus ----------------------------------------------------------------------------------


def consensus(start, taus, scales, wanted: int, factors):
    """TALL masks and what at least `wanted` of them hold, in float64."""
    signed = [np.sign(s) * t.astype(np.float64) for s, t in zip(scales, taus, strict=True)]
    both = sum(signed)
    users = sum(np.abs(y) >= f * np.abs(both - y) for y, f in zip(signed, factors, strict=True))
    return start + (users >= wanted) * sum(s * t for s, t in zip(scales, taus, strict=True))


@pytest.mark.parametrize("scales", [SCALES, {"a": 0.6, "b": -0.9, "c": 0.4}, {"a": -1, "b": -2}])
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_consensus(root, scales, wanted):
    if wanted > len(scales):
        return
    anchor, tau = vectors(root)
    got = read_checkpoint(merged(root, "out", {"name": "consensus", "min_tasks": wanted}, scales))
    for name, values in anchor.items():
        taus = [tau[t][name] for t in scales]
        expected = consensus(values, taus, scales.values(), wanted, [0.4] * len(scales))
        far = np.abs(got[name] - expected) > 4e-7 * np.abs(expected) + 1e-7
        assert far.sum() <= 1, name  # an entry may stand at the edge of a mask
    kept = (got["large"] != anchor["large"]).mean()
    assert (kept > 0.9) == (wanted == 1)


def test_consensus_masks_each_task_by_its_own_factor(root):
    anchor, tau = vectors(root)
    factors = {"a": 0.2, "b": 0.4, "c": 1.3}
    scales = {t: {"scale": s, "mask_scale": factors[t]} for t, s in SCALES.items()}
    got = read_checkpoint(merged(root, "out", "consensus", scales))
    for name, values in anchor.items():
        taus = [tau[t][name] for t in SCALES]
        expected = consensus(values, taus, SCALES.values(), 2, factors.values())
        far = np.abs(got[name] - expected) > 4e-7 * np.abs(expected) + 1e-7
        assert far.sum() <= 1, name


def test_consensus_by_hand():
    """Four entries: used by both, by one (selfish), by none (catastrophic), by nobody."""
    vectors = np.array([[1, 2, 1, 0], [1, 0.1, -1, 0]], np.float32)
    chosen = {"min_tasks": 2.0, "mask_scale": 1.1}
    block = Block("w", np.ones(4, np.float32), vectors, ("a", "b"), np.ones(2, np.float32),
                  dict.fromkeys(("a", "b"), chosen))  # fmt: skip
    # Sums are 2, 2.1, 0, 0; distances of a 1, 0.1, 1, 0 and of b 1, 2, 1, 0.
    assert consensus_method.combine(block).tolist() == [1, 1, 1, 1]
    gentle = replace(block, parameters=dict.fromkeys(("a", "b"), chosen | {"mask_scale": 0.9}))
    assert consensus_method.combine(gentle).tolist() == [3, 1, 1, 1]
    one = {"min_tasks": 1, "mask_scale": 0.9}
    single = replace(block, parameters=dict.fromkeys(("a", "b"), one))
    np.testing.assert_allclose(consensus_method.combine(single), [3, 3.1, 1, 1], rtol=1e-6)


def test_consensus_of_one_task_that_one_must_use_is_its_vector(root):
    anchor, tau = vectors(root)
    out = merged(root, "out", {"name": "consensus", "min_tasks": 1}, {"a": 1.0})
    close(out, {n: w + tau["a"][n] for n, w in anchor.items()})


@pytest.mark.parametrize(("given", "scales", "message"), [
    ({"min_tasks": 1.5}, SCALES, "min_tasks of consensus must be a whole number; got 1.5"),
    ({}, {"a": 1.0},
     "min_tasks of consensus is 2, but the tasks are a: nothing would be added; lower it or name "
     "more"),
])  # fmt: skip
def test_consensus_refuses_what_cannot_be_met(root, given, scales, message):
    with pytest.raises(UsageError) as caught:
        merged(root, "out", {"name": "consensus", **given}, scales)
    assert str(caught.value) == message
    assert not (root / "out").exists()


# --- pcb ----------------------------------------------------------------------------------------


def pcb(anchor, tau, scales, density: float):
    """The published algorithm on whole vectors in float64; what it changes, by tensor."""
    names = sorted(anchor)
    x = np.stack([
        np.concatenate([np.sign(s) * tau[t][n].astype(np.float64).ravel() for n in names])
        for t, s in scales.items()
    ])  # fmt: skip
    n, d = x.shape
    beyond = round(1e-4 * d)
    ordered = np.sort(np.abs(x), axis=1)
    smallest = ordered[:, [beyond]] if beyond else np.zeros((n, 1))
    largest = ordered[:, [d - max(1, beyond)]]
    held = np.clip(np.abs(x), smallest, largest)
    place = (held - smallest) / (largest - smallest)
    score = np.exp(n * place**2) * np.tanh(x * x.sum(0))
    score = score.astype(np.float32).astype(np.float64)
    cut = -np.sort(-score, axis=1)[:, [max(1, round(density * d)) - 1]]
    top = score.max(axis=1, keepdims=True)
    share = np.where(top > cut, np.clip((score - cut) / np.where(top > cut, top - cut, 1), 0, 1),
                     score >= cut)  # fmt: skip
    size = np.abs(np.array(list(scales.values())))[:, None]
    total = share.sum(0)
    change = (size * share * np.sign(x) * held).sum(0) / np.where(total > 0, total, 1)
    ends = np.cumsum([anchor[n].size for n in names])[:-1]
    parts = np.split(change, ends)
    return {n: part.reshape(anchor[n].shape) for n, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("density", [0.1, 0.7, 1.0, 0.0])
@pytest.mark.parametrize("scales", [SCALES, {"a": 0.6, "b": -0.9, "c": 0.4}, {"b": 1.0}])
def test_pcb(root, scales, density):
    anchor, tau = vectors(root)
    got = read_checkpoint(merged(root, "out", {"name": "pcb", "density": density}, scales))
    expected = pcb(anchor, tau, scales, density)
    for name, values in anchor.items():
        far = np.abs(got[name] - values - expected[name]) > 1e-6 * np.abs(values) + 2e-7
        assert far.sum() <= 2, name  # an entry may stand at a cut
    moved = sum((got[n] != w).sum() for n, w in anchor.items())
    assert (moved > 100) == (density > 0)  # a density of 0 leaves the largest score of a task


def test_pcb_of_two_tasks_by_hand():
    """Entries on which tasks agree are weighed by size, the one on which they do not is lost."""
    vectors = np.array([[1, 0.5, -0.25, 0], [1, 0.25, 0.25, 0]], np.float32)
    sizes = np.array([[1, 0.5, 0.25, 0], [1, 0.25, 0.25, 0]])
    scores = np.exp(2 * sizes**2) * np.tanh(vectors * vectors.sum(0))
    limits = {"smallest": 0.0, "largest": 1.0, "cut": 0.0}
    tops = {t: limits | {"top": float(s.max())} for t, s in zip("ab", scores, strict=True)}
    block = Block("w", np.zeros(4, np.float32), vectors, ("a", "b"), np.ones(2, np.float32),
                  {}, selection=Selection(limits=tops))  # fmt: skip
    shares = scores / scores.max(1, keepdims=True)
    second = (0.5 * shares[0, 1] + 0.25 * shares[1, 1]) / (shares[0, 1] + shares[1, 1])
    np.testing.assert_allclose(pcb_method.combine(block), [1, second, 0, 0], rtol=1e-6)


def test_pcb_needs_fewer_than_its_exponent_bears():
    tasks = tuple(f"t{i:02}" for i in range(81))
    given = Inputs(tasks, ("w",), dict.fromkeys(tasks, 1.0), {t: {"density": 0.1} for t in tasks})
    with pytest.raises(ParameterError, match=r"^pcb takes at most 80 tasks; got 81$"):
        pcb_method.decide(given)


def test_pcb_keeps_what_it_was_measured_by(root):
    out = merged(root, "out", "pcb", SCALES | {"c": 0.0})
    limits = read_manifest(out)["table"]["selection"]["limits"]
    assert set(limits) == {"a", "b"}
    for mine in limits.values():
        assert 0 <= mine["smallest"] < mine["largest"]
        assert 0 < mine["cut"] < mine["top"]


def test_pcb_of_tasks_that_change_nothing(root):
    for task in SCALES:
        write_checkpoint(root / task, read_checkpoint(root / "anchor"), "F32")
    out = merged(root, "out", "pcb")
    assert read_raw(out) == read_raw(root / "anchor")


# --- what all of them hold to -------------------------------------------------------------------

METHODS = {
    "breadcrumbs": {"name": "breadcrumbs", "density": 0.5, "elect": "mass"},
    "dare": {"name": "dare", "density": 0.5, "rescale": "l1"},
    "dare_ties": {"name": "dare_ties", "density": 0.5, "rescale": "l1"},
    "della": {"name": "della", "density": 0.5, "epsilon": 0.2},
    "della_l1": {"name": "della", "density": 0.5, "epsilon": 0.2, "rescale": "l1"},
    "consensus": {"name": "consensus"},
    "pcb": {"name": "pcb", "density": 0.3},
}


@pytest.mark.parametrize("method", METHODS)
def test_threads_blocks_order_and_replay_change_no_bit(root, method):
    one = merged(root, "one", METHODS[method], options=RunOptions(threads=1))
    other = RunOptions(threads=3, block=CHUNK)
    assert read_raw(merged(root, "two", METHODS[method], options=other)) == read_raw(one)
    turned = dict(reversed(SCALES.items()))
    assert read_raw(merged(root, "three", METHODS[method], turned)) == read_raw(one)
    assert all(check.outcome == "same" for check in verify(one, replay=True))
    recipe = recipe_of(read_manifest(one), "one")
    assert read_raw(engine.run(recipe, root / "four").path) == read_raw(one)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_of_a_task_at_scale_zero(root, method):
    without = {t: s for t, s in SCALES.items() if t != "b"}
    some = merged(root, "some", METHODS[method], SCALES | {"b": 0.0})
    assert read_raw(some) == read_raw(merged(root, "others", METHODS[method], without))
    none = merged(root, "none", METHODS[method], dict.fromkeys(SCALES, 0.0))
    assert read_raw(none) == read_raw(root / "anchor")


@pytest.mark.parametrize("method", METHODS)
def test_one_task_at_minus_one_points_against_its_vector(root, method):
    anchor, tau = vectors(root)
    whole = METHODS[method] | ({"min_tasks": 1} if method == "consensus" else {})
    got = read_checkpoint(merged(root, "out", whole, {"a": -1.0}))
    change = np.concatenate([(got[n] - anchor[n]).ravel() for n in sorted(anchor)])
    vector = np.concatenate([tau["a"][n].ravel() for n in sorted(anchor)])
    assert change @ vector / np.linalg.norm(change) / np.linalg.norm(vector) < -0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_every_dtype_is_close_to_float64_arithmetic(root, method, dtype):
    """float16 near its largest value too: nothing overflows on the way."""
    write(root, dtype, size=1.2e5 if dtype == "F16" else 1.0)
    single = read_checkpoint(merged(root, "single", METHODS[method]))
    wide = {"dtype": "float32", "precision": "float64"}
    double = read_checkpoint(merged(root, "double", METHODS[method], out=wide))
    for name, values in single.items():
        largest = np.abs(values).max(initial=0) + np.abs(double[name]).max(initial=0)
        far = np.abs(double[name] - values) > 8 * 2.0**-24 * largest
        assert far.sum() <= 2, name  # a sign that is elected by what roundings leave of a sum


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_of_weight_zero_is_left_as_it_is(root, method):
    weights = {t: {n: 0.0 if n == "large" else 1.5 for n in SHAPES} for t in SCALES}
    path = root / f"{method}.yaml"
    merged(root, method, METHODS[method])
    out = engine.run(replace(load_recipe(path), table=table(weights)), root / "out").path
    got, plain = read_checkpoint(out), read_checkpoint(root / method)
    anchor, _ = vectors(root)
    np.testing.assert_array_equal(got["large"], anchor["large"])
    if method == "pcb":  # which entries win depends on the other layers
        return
    change, before = got["wide"] - anchor["wide"], plain["wide"] - anchor["wide"]
    np.testing.assert_allclose(change, 1.5 * before, rtol=1e-4, atol=4e-7)


@pytest.mark.parametrize("method", ["dare", "consensus", "pcb"])
def test_a_stage_may_use_it(root, method):
    """What a stage gives is what a merge of its own gives, but for one rounding less."""
    own = read_checkpoint(merged(root, "own", METHODS[method], out={"dtype": "float64"}))
    stage = {
        "anchor": "anchor",
        "tasks": {t: {"model": t, "scale": s} for t, s in SCALES.items()},
        "method": METHODS[method],
        "out": {"dtype": "float64"},
    }
    data = {"target": "stage:first", "method": "passthrough", "stages": {"first": stage}}
    (root / "stages.yaml").write_text(yaml.safe_dump(data))
    out = engine.run(load_recipe(root / "stages.yaml"), root / "out").path
    for name, values in read_checkpoint(out).items():
        np.testing.assert_array_equal(values, own[name].astype(values.dtype))
    assert all(check.outcome == "same" for check in verify(out, replay=True))
