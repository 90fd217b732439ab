"""Methods that sparsify against mergekit 0.1.5: where they mean the same, and by how much not.

Checkpoints are float32, so that hardly any two changes are equally large and a rank is no matter of
order; both tools write float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.peers.test_mergekit import MERGEKIT, TASKVEC, _load, _normal, _run, _save, _shapes

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not MERGEKIT.exists(), reason="no .venv-mergekit here: run benchmarks/peer_env.sh"
    ),
]

Weights = dict[str, Any]
SCALES = {"first": 0.6, "second": 0.9}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an anchor and two fine-tunes, about 100,000 random float32 weights each."""
    folder = tmp_path_factory.mktemp("family")
    random = torch.Generator().manual_seed(1)
    members = {"anchor": {n: 0.02 * _normal(shape, random) for n, shape in _shapes().items()}}
    for task in SCALES:
        anchor = members["anchor"]
        members[task] = {n: w + 0.005 * _normal(w.shape, random) for n, w in anchor.items()}
    for name, weights in members.items():
        _save(weights, folder / name)
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return {name: folder / name for name in members}


def mergekit(
    family: dict[str, Path], folder: Path, method: str, scales: dict[str, float], **common: Any
) -> Weights:
    """What mergekit writes; parameters of each model in `each`, others for all of it."""
    each = common.pop("each", {})
    models = [
        {"model": str(family[t]), "parameters": {"weight": scale, **each}}
        for t, scale in scales.items()
    ]
    content = {
        "merge_method": method,
        "base_model": str(family["anchor"]),
        "models": models,
        "parameters": common,
        "dtype": "float32",
    }
    recipe, out = folder / f"{method}.yml", folder / f"mergekit-{method}"
    recipe.write_text(json.dumps(content))
    _run(MERGEKIT, recipe, out, "--random-seed", "1")
    return _load(out)


def taskvec(
    family: dict[str, Path], folder: Path, method: dict[str, Any], scales: dict[str, float]
) -> Weights:
    content = {
        "anchor": str(family["anchor"]),
        "tasks": {t: {"model": str(family[t]), "scale": scale} for t, scale in scales.items()},
        "method": method,
    }
    recipe, out = folder / "taskvec.yml", folder / "taskvec"
    recipe.write_text(json.dumps(content))
    _run(TASKVEC, "merge", recipe, out)
    return _load(out)


def changes(family: dict[str, Path], merged: Weights) -> dict[str, np.ndarray]:
    anchor = _load(family["anchor"])
    assert merged.keys() == anchor.keys()
    return {n: (merged[n].double() - anchor[n].double()).numpy() for n in anchor}


def task_vector(family: dict[str, Path], task: str) -> dict[str, np.ndarray]:
    return changes(family, _load(family[task]))


@pytest.mark.parametrize(
    ("theirs", "ours"), [("breadcrumbs", {}), ("breadcrumbs_ties", {"elect": "mass"})]
)
def test_breadcrumbs_agrees(family, tmp_path, theirs, ours):
    """Sizes of tensors times density may be rounded otherwise: one entry a task and tensor."""
    each = {"density": 0.4, "gamma": 0.1}
    got = changes(
        family, taskvec(family, tmp_path, {"name": "breadcrumbs", **each, **ours}, SCALES)
    )
    wanted = changes(family, mergekit(family, tmp_path, theirs, SCALES, each=each))
    for name, values in got.items():
        far = np.abs(values - wanted[name]) > 1e-8
        assert far.sum() <= 2 * len(SCALES), name


@pytest.mark.parametrize(("theirs", "ours"), [("dare_linear", "dare"), ("dare_ties", "dare_ties")])
def test_dare_to_the_l1_norm_is_what_mergekit_rescales_to(family, tmp_path, theirs, ours):
    """Draws differ. One task at weight 1: the L1 norm of every tensor is the task vector's."""
    each = {"density": 0.3}
    method = {"name": ours, "rescale": "l1", **each}
    got = changes(family, taskvec(family, tmp_path, method, {"first": 1.0}))
    wanted = changes(family, mergekit(family, tmp_path, theirs, {"first": 1.0}, each=each))
    tau = task_vector(family, "first")
    for name, values in tau.items():
        norm = np.abs(values).sum()
        assert np.abs(got[name]).sum() == pytest.approx(norm, rel=1e-5), name
        assert np.abs(wanted[name]).sum() == pytest.approx(norm, rel=1e-5), name
    share = np.concatenate([(v != 0).ravel() for v in got.values()]).mean()
    peer = np.concatenate([(v != 0).ravel() for v in wanted.values()]).mean()
    assert share == pytest.approx(0.3, abs=0.01)
    assert peer == pytest.approx(0.3, abs=0.01)


def kept_of_rows(family: dict[str, Path], merged: Weights) -> tuple[float, float, float]:
    """Share of entries that are changed: all, the smallest tenth of each row, the largest tenth."""
    tau, got = task_vector(family, "first"), changes(family, merged)
    kept, places = [], []
    for name, values in tau.items():
        rows = values.reshape(-1, values.shape[-1])
        ranks = np.argsort(np.argsort(np.abs(rows), axis=1), axis=1)
        places.append((ranks / (rows.shape[1] - 1)).ravel())
        kept.append((got[name] != 0).ravel())
    place, is_kept = np.concatenate(places), np.concatenate(kept)
    return tuple(is_kept[of].mean() for of in (place >= 0, place < 0.1, place > 0.9))


@pytest.mark.parametrize(("theirs", "elect"), [("della", "mass"), ("della_linear", "none")])
def test_della_draws_by_rank_as_mergekit_does(family, tmp_path, theirs, elect):
    """Their epsilon is half of ours, which is the paper's. They rescale to the L1 norm."""
    each = {"density": 0.5, "epsilon": 0.2}
    wanted = mergekit(family, tmp_path, theirs, {"first": 1.0}, each=each)
    method = {"name": "della", "density": 0.5, "epsilon": 0.4, "elect": elect}
    got = taskvec(family, tmp_path, method, {"first": 1.0})
    for merged in (wanted, got):
        assert kept_of_rows(family, merged) == pytest.approx((0.5, 0.32, 0.68), abs=0.015)
    tau, ours, peers = task_vector(family, "first"), changes(family, got), changes(family, wanted)
    for name, values in tau.items():
        norm = np.abs(values).sum()
        assert np.abs(peers[name]).sum() == pytest.approx(norm, rel=1e-5)
    factors = [float(np.ptp(np.abs(c[n])[c[n] != 0] / np.abs(tau[n])[c[n] != 0]))
               for c in (ours, peers) for n in ("model.embed_tokens.weight",)]  # fmt: skip
    assert factors[0] == pytest.approx(1 / 0.3 - 1 / 0.7, abs=0.05)  # by rank: 1 / q
    assert factors[1] < 0.01  # one for the tensor


@pytest.mark.parametrize(("theirs", "elect"), [("della", "mass"), ("della_linear", "none")])
def test_della_to_the_l1_norm_is_what_mergekit_rescales_to(family, tmp_path, theirs, elect):
    """Draws differ; what is kept has one factor a tensor, and the L1 norm is the task vector's."""
    each = {"density": 0.5, "epsilon": 0.2}
    wanted = mergekit(family, tmp_path, theirs, {"first": 1.0}, each=each)
    method = {"name": "della", "density": 0.5, "epsilon": 0.4, "elect": elect, "rescale": "l1"}
    got = taskvec(family, tmp_path, method, {"first": 1.0})
    assert kept_of_rows(family, got) == pytest.approx((0.5, 0.32, 0.68), abs=0.015)
    ours, peers = changes(family, got), changes(family, wanted)
    for name, values in task_vector(family, "first").items():
        norm = np.abs(values).sum()
        for change in (ours[name], peers[name]):
            assert np.abs(change).sum() == pytest.approx(norm, rel=1e-5), name
            kept = (change != 0) & (np.abs(values) > 1e-3)
            factors = change[kept] / values[kept]
            assert np.ptp(factors) < 1e-3 * factors.mean(), name


def test_della_at_minus_one_is_added_by_mergekit_and_subtracted_here(family, tmp_path):
    each = {"density": 0.5, "epsilon": 0.2}
    theirs = mergekit(family, tmp_path, "della", {"first": -1.0}, each=each)
    method = {"name": "della", "density": 0.5, "epsilon": 0.4}
    ours = taskvec(family, tmp_path, method, {"first": -1.0})
    vector = np.concatenate([v.ravel() for v in task_vector(family, "first").values()])

    def cosine(merged: Weights) -> float:
        change = np.concatenate([v.ravel() for v in changes(family, merged).values()])
        return float(change @ vector / np.linalg.norm(change) / np.linalg.norm(vector))

    assert cosine(theirs) > 0.5
    assert cosine(ours) < -0.5
