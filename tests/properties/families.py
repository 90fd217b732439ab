"""Families of a few hundred weights on disk, and what merging them must give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tests.conftest import read_raw, write_checkpoint
from tests.kernels.reference import decode, encode, rounded, step

import taskvec as tv
from taskvec.methods.table import Table

Array = np.ndarray[Any, Any]
Model = Mapping[str, Array]

DTYPES = ("BF16", "F16", "F32", "F64")
WORDS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
SHAPES = {
    "model.embed_tokens.weight": (13, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.up_proj.weight": (9, 6),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.1.self_attn.q_proj.weight": (6, 6),
    "model.layers.1.mlp.up_proj.weight": (9, 6),
    "model.norm.weight": (6,),
    "temperature": (),
}


def members(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Model]:
    """base, anchor, two tasks and another target, of sizes between 0.01 and 1.

    Their exponents differ by at most 8, so that differences of 16-bit weights are exact in float32
    and those of float32 weights in float64.
    """
    rng = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...]) -> Array:
        return rng.uniform(0.01, 1, shape) * rng.choice([-1, 1], shape)

    def moved(model: Model, size: float) -> Model:
        out = {}
        for name, w in model.items():
            step = size * rng.uniform(0.2, 2) * rng.normal(0, 1, w.shape)
            out[name] = np.clip(np.abs(w + step), 0.01, 1) * np.sign(w)
        return out

    base = {name: drawn(shape) for name, shape in shapes.items()}
    anchor = moved(base, 0.05)
    tasks = {"code": moved(anchor, 0.02), "math": moved(anchor, 0.05)}
    return {"base": base, "anchor": anchor, "other": moved(anchor, 0.1), **tasks}


def stored(model: Model, dtype: str) -> dict[str, Array]:
    """The model with the values that it has on disk, float64."""
    return {name: rounded(w, dtype) for name, w in model.items()}


def write(root: Path, models: Mapping[str, Model], dtype: str = "BF16", shards: int = 1) -> None:
    """Folders by member. The bytes are this project's reference encoding, not NumPy's float32."""
    for name, model in models.items():
        write_checkpoint(root / name, stored(model, dtype), dtype, shards)


def family(root: Path, tasks: tuple[str, ...] = ("code", "math"), **options: Any) -> tv.Family:
    return tv.Family(
        base=root / "base", instruct=root / "anchor", tasks={t: root / t for t in tasks}, **options
    )


def table(weights: Mapping[str, Mapping[str, float]]) -> Table:
    """A table from weights by task and tensor."""
    names = tuple(sorted(next(iter(weights.values()))))
    tasks = tuple(sorted(weights))
    return Table(tasks, names, np.array([[weights[t][n] for n in names] for t in tasks], float))


def even(value: float, tasks: tuple[str, ...] = ("code", "math"), names: Any = SHAPES) -> Table:
    """A table of one value."""
    return table({task: dict.fromkeys(names, value) for task in tasks})


def contents(folder: Path) -> dict[str, bytes]:
    """Stored bytes by tensor."""
    return {name: raw for name, (_, _, raw) in read_raw(folder).items()}


def values(folder: Path) -> dict[str, Array]:
    """Values by tensor, float64."""
    kinds = {"BF16": "<u2", "F16": "<u2", "F32": "<f4", "F64": "<f8"}
    return {
        name: decode(np.frombuffer(raw, kinds[dtype]), dtype).reshape(shape)
        for name, (dtype, shape, raw) in read_raw(folder).items()
    }


def merged(
    target: Array, anchor: Array, tasks: Mapping[str, Array], coefficients: Mapping[str, float]
) -> tuple[Array, Array]:
    """θ_target + Σ_t c_t (θ_ft,t − θ_pre) in float64, and Σ of the sizes of its terms."""
    total, size = target, np.abs(target)
    for task, c in coefficients.items():
        total = total + c * (tasks[task] - anchor)
        size = size + np.abs(c) * (np.abs(tasks[task]) + np.abs(anchor))
    return total, size


def assert_one_rounding(got: Array, exact: Array, size: Array, out: str, precision: str) -> None:
    """Half a step of the stored type, and the arithmetic before it.

    That is, for each of the two tasks, one rounding each of coefficient, difference, product and
    sum: parts in 2^24 (float32) or 2^53 of the sizes of the terms.
    """
    arithmetic = 9 * (2.0**-24 if precision == "float32" else 2.0**-53) * size
    allowed = step(np.abs(exact) + arithmetic, out) / 2 + arithmetic
    assert (np.abs(got - exact) <= allowed).all()


__all__ = [
    "DTYPES", "SHAPES", "WORDS", "assert_one_rounding", "contents", "encode", "even", "family",
    "members", "merged", "stored", "table", "values", "write",
]  # fmt: skip
