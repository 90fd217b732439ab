"""Against mergekit 0.1.5: nearswap, ram, ramplus_tl, arcee_fusion and sce, as it does them.

Both work in float32 here and write float32. What differs is asserted in numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peers.test_mergekit import MERGEKIT, TASKVEC, _load, _normal, _run, _save, _shapes

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not MERGEKIT.exists(), reason="no .venv-mergekit here: run benchmarks/peer_env.sh"
    ),
]

Weights = dict[str, Any]
TWO = ("first", "second")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an anchor and two fine-tunes that each change half of the entries."""
    folder = tmp_path_factory.mktemp("family")
    random = torch.Generator().manual_seed(0)
    anchor = {name: 0.02 * _normal(shape, random) for name, shape in _shapes().items()}
    members = {"anchor": anchor}
    for task in TWO:
        members[task] = {
            k: v + 0.005 * _normal(v.shape, random) * (torch.rand(v.shape, generator=random) > 0.5)
            for k, v in anchor.items()
        }
    for name, weights in members.items():
        _save(weights, folder / name)
    return {name: folder / name for name in members}


def both(
    family: dict[str, Path],
    folder: Path,
    names: tuple[str, str],
    tasks: tuple[str, ...],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    *,
    runs: str = "",
) -> tuple[Weights, Weights]:
    """What taskvec and mergekit merge by the methods of these names, with these parameters."""
    import json

    config = {
        "merge_method": names[1],
        "base_model": str(family["anchor"]),
        "models": [{"model": str(family[t])} for t in tasks],
        "parameters": theirs,
        "dtype": "float32",
    }
    recipe = {
        "anchor": str(family["anchor"]),
        "tasks": {t: str(family[t]) for t in tasks},
        "method": {"name": names[0], **ours},
        "out": {"dtype": "float32"},
    }
    (folder / "mergekit.yml").write_text(json.dumps(config))
    (folder / "taskvec.yml").write_text(json.dumps(recipe))
    _run(TASKVEC, "merge", folder / "taskvec.yml", folder / f"taskvec{runs}")
    _run(MERGEKIT, folder / "mergekit.yml", folder / f"mergekit{runs}")
    return _load(folder / f"taskvec{runs}"), _load(folder / f"mergekit{runs}")


def off(ours: Weights, theirs: Weights) -> float:
    """The largest difference of any entry."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n].double() - theirs[n].double()).abs().max()) for n in ours)


@pytest.mark.parametrize(
    ("names", "tasks", "ours", "theirs"),
    [
        (("nearswap", "nearswap"), TWO[:1], {"t": 0.003}, {"t": 0.003}),
        (("ram", "ram"), TWO, {}, {}),
        (("ram", "ram"), TWO, {"epsilon": 0.004}, {"epsilon": 0.004}),
        (("ram_plus", "ramplus_tl"), TWO, {}, {}),
        (("ram_plus", "ramplus_tl"), TWO, {"r": 2, "alpha": 3}, {"r": 2.0, "alpha": 3.0}),
    ],
)
def test_the_same(
    family: dict[str, Path],
    tmp_path: Path,
    names: tuple[str, str],
    tasks: tuple[str, ...],
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    assert off(*both(family, tmp_path, names, tasks, ours, theirs)) < 3e-8


def test_arcee_fusion_takes_the_same_entries(family: dict[str, Path], tmp_path: Path) -> None:
    names = ("arcee_fusion", "arcee_fusion")
    ours, theirs = both(family, tmp_path, names, TWO[:1], {}, {})
    start = _load(family["anchor"])
    taken = {n: (w != start[n].float(), theirs[n] != start[n].float()) for n, w in ours.items()}
    number = sum(int(a.sum()) for a, _ in taken.values())
    differing = sum(int((a != b).sum()) for a, b in taken.values())
    # mergekit works the divergence out in float32, so that entries near the threshold may differ.
    assert number > 1000
    assert differing / number < 0.02


def test_sce_of_mergekit_divides_by_the_weights_that_are_left(
    family: dict[str, Path], tmp_path: Path
) -> None:
    names = ("sce", "sce")
    ours, theirs = both(family, tmp_path, names, TWO, {"density": 1}, {"select_topk": 1.0})
    start = {k: v.double() for k, v in _load(family["anchor"]).items()}
    tuned = [{k: v.double() - start[k] for k, v in _load(family[t]).items()} for t in TWO]
    for name, first in start.items():
        vectors = torch.stack([weights[name] for weights in tuned])
        energies = vectors.square().flatten(1).sum(1)
        shares = (energies / energies.sum()).reshape(-1, *[1] * first.dim())
        agrees = (vectors.sign() == vectors.sum(0).sign()) & (vectors != 0)
        summed = (shares * vectors * agrees).sum(0)
        left = (shares * agrees).sum(0)
        assert (ours[name] - (first + summed)).abs().max() < 3e-8
        # One task alone at a position: mergekit takes its entry whole, the paper's sum η of it.
        whole = summed / left.clamp(min=1e-6)
        # Where a and −a cancel there is no majority: mergekit keeps what is positive.
        tied = (vectors.sum(0) == 0) & (vectors != 0).any(0)
        expected = first + torch.where(tied, vectors.amax(0), whole)
        assert (theirs[name] - expected).abs().max() < 3e-8
    assert off(ours, theirs) > 0.005
