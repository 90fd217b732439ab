"""Methods on the sphere and Model Stock against mergekit 0.1.5: what agrees, and what does not.

Checkpoints are float32 and both tools write float32. Formulas are worked out in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
Family = dict[str, Path]
TWO = {"first": 0.7, "second": 0.3}
THREE = {"first": 0.2, "second": 0.3, "third": 0.9}
EQUAL = dict.fromkeys(THREE, 1.0)
ROUNDING = 2e-6  # of a tensor's largest entry: some float32 roundings


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """An anchor, three fine-tunes that share a part of their change, and two special ones.

    `near` is 0.02 radians from `first`; `against` goes the other way than `first`, and aside.
    """
    folder = tmp_path_factory.mktemp("family")
    random = torch.Generator().manual_seed(1)
    anchor = {n: 0.02 * _normal(shape, random) for n, shape in _shapes().items()}
    shared = {n: 0.03 * _normal(w.shape, random) for n, w in anchor.items()}
    members = {"anchor": anchor}
    for place, task in enumerate(THREE):
        own = {n: 0.01 * (1 + place) * _normal(w.shape, random) for n, w in anchor.items()}
        members[task] = {n: w + shared[n] + own[n] for n, w in anchor.items()}
    first = members["first"]
    members["near"] = {n: w + 0.0005 * _normal(w.shape, random) for n, w in first.items()}
    members["against"] = {
        n: w - 0.3 * (first[n] - w) + 0.01 * _normal(w.shape, random) for n, w in anchor.items()
    }
    for name, weights in members.items():
        _save(weights, folder / name)
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return {name: folder / name for name in members}


def mergekit(
    family: Family, folder: Path, method: str, scales: dict[str, float], **more: Any
) -> Weights:
    models = [{"model": str(family[t]), "parameters": {"weight": s}} for t, s in scales.items()]
    content = {"merge_method": method, "models": models, "dtype": "float32"} | more
    recipe, out = folder / f"{method}.yml", folder / f"mergekit-{method}"
    recipe.write_text(json.dumps(content))
    _run(MERGEKIT, recipe, out)
    return {name: w.double() for name, w in _load(out).items()}


def taskvec(
    family: Family,
    folder: Path,
    method: str,
    scales: dict[str, float],
    *,
    anchor: bool,
    **more: str,
) -> Weights:
    content = {
        **({"anchor": str(family["anchor"])} if anchor else {}),
        "tasks": {t: {"model": str(family[t]), "scale": scale} for t, scale in scales.items()},
        "method": {"name": method, **more},
    }
    recipe, out = folder / "taskvec.yml", folder / "taskvec"
    recipe.write_text(json.dumps(content))
    _run(TASKVEC, "merge", recipe, out)
    return {name: w.double() for name, w in _load(out).items()}


def apart(one: Weights, other: Weights) -> float:
    """The largest difference of an entry, as a share of the largest entry of its tensor."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in one)


def by_formula(family: Family, scales: dict[str, float], anchor: bool, change: Any) -> Weights:
    """Tensor by tensor what `change(vectors, α)` gives, on the anchor if that is meant."""
    start = {n: w.double() * anchor for n, w in _load(family["anchor"]).items()}
    tasks = [_load(family[t]) for t in scales]
    alpha = [s / sum(scales.values()) for s in scales.values()]
    return {n: w + change([t[n].double() - w for t in tasks], alpha) for n, w in start.items()}


def angle(one: Any, two: Any, dim: int | None) -> Any:
    """Between whole tensors, or along one dimension of matrices, which is kept."""
    along = tuple(range(one.ndim)) if dim is None or one.ndim == 1 else (dim,)
    lengths = [v.norm(dim=along, keepdim=True) for v in (one, two)]
    cosine = (one * two).sum(along, keepdim=True) / (lengths[0] * lengths[1])
    return torch.arccos(cosine.clamp(-1, 1))


def arc(dim: int | None) -> Any:
    def change(vectors: list[Any], alpha: list[float]) -> Any:
        omega = angle(*vectors, dim)
        first, second = (torch.sin(a * omega) / torch.sin(omega) for a in alpha)
        return first * vectors[0] + second * vectors[1]

    return change


def chord(vectors: list[Any], alpha: list[float]) -> Any:
    return sum(a * v for a, v in zip(alpha, vectors, strict=True))


def direction(vectors: list[Any], alpha: list[float]) -> Any:
    """The direction of the linear mean of directions, as long as vectors are on average."""
    total = sum(a * v / v.norm() for a, v in zip(alpha, vectors, strict=True))
    return total / total.norm() * sum(a * v.norm() for a, v in zip(alpha, vectors, strict=True))


def test_slerp_agrees(family: Family, tmp_path: Path) -> None:
    ours = taskvec(family, tmp_path, "slerp", TWO, anchor=False)
    base = str(family["first"])
    theirs = mergekit(
        family, tmp_path, "slerp", {"second": 1}, base_model=base, parameters={"t": 0.3}
    )
    assert apart(ours, theirs) < ROUNDING
    assert apart(ours, by_formula(family, TWO, False, chord)) > 0.01


def test_slerp_near_parallel_they_take_the_chord_and_we_the_arc(
    family: Family, tmp_path: Path
) -> None:
    scales = {"first": 0.7, "near": 0.3}
    ours = taskvec(family, tmp_path, "slerp", scales, anchor=False)
    base = str(family["first"])
    theirs = mergekit(
        family, tmp_path, "slerp", {"near": 1}, base_model=base, parameters={"t": 0.3}
    )
    assert apart(theirs, by_formula(family, scales, False, chord)) < 2e-7
    assert apart(ours, by_formula(family, scales, False, arc(None))) < 2e-7
    assert 1e-5 < apart(ours, theirs) < 1.25e-4  # Ω²/8 at cos Ω = 0.9995, where they change over


@pytest.mark.parametrize("anchor", [False, True])
def test_nuslerp_agrees(family: Family, tmp_path: Path, anchor: bool) -> None:
    ours = taskvec(family, tmp_path, "nuslerp", TWO, anchor=anchor)
    more = {"base_model": str(family["anchor"])} if anchor else {}
    assert apart(ours, mergekit(family, tmp_path, "nuslerp", TWO, **more)) < ROUNDING


@pytest.mark.parametrize("anchor", [False, True])
def test_nuslerp_by_row_is_what_they_call_column(
    family: Family, tmp_path: Path, anchor: bool
) -> None:
    """`nuslerp_row_wise: false` has one angle a row, `true` one a column; as their page has it not.

    A vector has one angle everywhere.
    """
    ours = taskvec(family, tmp_path, "nuslerp", TWO, anchor=anchor, granularity="row")
    more = {"base_model": str(family["anchor"])} if anchor else {}
    theirs = {}
    for word in (False, True):
        (tmp_path / str(word)).mkdir()
        given = {"nuslerp_flatten": False, "nuslerp_row_wise": word}
        theirs[word] = mergekit(
            family, tmp_path / str(word), "nuslerp", TWO, parameters=given, **more
        )
    assert apart(ours, theirs[False]) < ROUNDING
    assert apart(theirs[True], by_formula(family, TWO, anchor, arc(0))) < ROUNDING
    assert apart(ours, theirs[True]) > 0.02


@pytest.mark.parametrize("anchor", [False, True])
def test_multislerp_of_theirs_is_the_direction_of_the_linear_mean(
    family: Family, tmp_path: Path, anchor: bool
) -> None:
    """Projected without the angle, the ways to all models cancel, and nothing is interpolated."""
    ours = taskvec(family, tmp_path, "multislerp", THREE, anchor=anchor)
    more = {"base_model": str(family["anchor"])} if anchor else {}
    theirs = mergekit(family, tmp_path, "multislerp", THREE, **more)
    assert apart(theirs, by_formula(family, THREE, anchor, direction)) < ROUNDING
    assert 0.01 < apart(ours, theirs) < 0.1


def test_karcher_agrees_for_equal_weights_and_they_ignore_others(
    family: Family, tmp_path: Path
) -> None:
    equal = taskvec(family, tmp_path, "karcher", EQUAL, anchor=False)
    theirs = mergekit(family, tmp_path, "karcher", THREE)
    assert apart(equal, theirs) < 2e-5  # they stop at 1e-5 radians
    (tmp_path / "weighed").mkdir()
    weighed = taskvec(family, tmp_path / "weighed", "karcher", THREE, anchor=False)
    assert apart(weighed, theirs) > 0.1


@pytest.mark.parametrize("names", [("first", "second"), tuple(THREE)])
@pytest.mark.parametrize("word", ["layer", "filter"])
def test_model_stock_agrees(
    family: Family, tmp_path: Path, names: tuple[str, ...], word: str
) -> None:
    scales = dict.fromkeys(names, 1.0)
    ours = taskvec(family, tmp_path, "model_stock", scales, anchor=True, granularity=word)
    given = {"filter_wise": word == "filter"}
    base = str(family["anchor"])
    theirs = mergekit(family, tmp_path, "model_stock", scales, base_model=base, parameters=given)
    assert apart(ours, theirs) < ROUNDING


def test_model_stock_beyond_a_right_angle_they_turn_round_and_we_stay(
    family: Family, tmp_path: Path
) -> None:
    scales = {"against": 1.0, "first": 1.0}
    ours = taskvec(family, tmp_path, "model_stock", scales, anchor=True)
    anchor = {n: w.double() for n, w in _load(family["anchor"]).items()}
    assert apart(ours, anchor) == 0
    base = str(family["anchor"])
    theirs = mergekit(family, tmp_path, "model_stock", scales, base_model=base)
    tasks = [_load(family[task]) for task in scales]
    for name, at in anchor.items():
        vectors = [task[name].double() - at for task in tasks]
        cosine = torch.cos(angle(*vectors, None))
        t = 2 * cosine / (1 + cosine)
        assert cosine < -0.1
        expected = at + t * sum(vectors) / 2
        assert (theirs[name] - expected).abs().max() < ROUNDING * expected.abs().max()
