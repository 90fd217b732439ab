"""Families of a few hundred weights, on disk, in every element type and in odd shapes."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.checkpoints.folder import open_stored
from taskvec.checkpoints.safetensors import write_header
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import size
from taskvec.dtypes import DTYPES
from taskvec.streaming import CHUNK

Array = np.ndarray[Any, Any]
Model = dict[str, Array]

TASKS = ("a", "b", "c")
FLOATS = ("BF16", "F16", "F32", "F64")
STEP = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23, "F64": 2.0**-52}
STILL, LARGE = "still", "large"  # that no task changes; of values near the largest float16
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.up_proj.weight": (9, 6),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.1.self_attn.q_proj.weight": (6, 6),
    "model.layers.1.mlp.down_proj.weight": (6, 9),
    "convolution": (3, 2, 2, 2),
    "scalar": (),
    "one": (1,),
    "row": (1, 5),
    "column": (7, 1),
    "empty": (0, 3),
    "equal": (4, 5),
    STILL: (4, 5),
    LARGE: (5, 6),
}
LONG: dict[str, tuple[int, ...]] = {"vector": (CHUNK + 1_500,), "matrix": (4_200, 16), "odd": (7,)}


@functools.cache
def family(dtype: str, shapes: str) -> Path:
    """Folders `base`, `anchor` and one a task; they go when the process ends.

    Args:
        dtype: Element type of every tensor.
        shapes: `odd` or `long`, in which one tensor is cut into blocks.
    """
    folder = tempfile.TemporaryDirectory(prefix="taskvec-testing-")
    atexit.register(folder.cleanup)
    models = _models(SHAPES if shapes == "odd" else LONG, is_half=dtype == "F16")
    for member, model in models.items():
        tensors = [(name, DTYPES[dtype], array.shape) for name, array in model.items()]
        content = b"".join(_encode(array, dtype).tobytes() for array in model.values())
        (Path(folder.name) / member).mkdir()
        path = Path(folder.name) / member / "model.safetensors"
        path.write_bytes(write_header(tensors) + content)
        (path.parent / "config.json").write_text('{"model_type": "conformance"}')
    return Path(folder.name)


def _models(shapes: Mapping[str, tuple[int, ...]], *, is_half: bool) -> dict[str, Model]:
    """Members by name, float64. No weight is near 0, and vectors are a few percent of weights."""
    rng = np.random.default_rng(20260714)

    def move(model: Model, share: float) -> Model:
        return {name: w * (1 + share * rng.uniform(-1, 1, w.shape)) for name, w in model.items()}

    base = {n: rng.uniform(0.1, 1, s) * rng.choice([-1, 1], s) for n, s in shapes.items()}
    anchor = move(base, 0.05)
    models = {"base": base, "anchor": anchor} | {task: move(anchor, 0.05) for task in TASKS}
    if LARGE not in shapes:
        return models
    anchor["equal"] = np.round(16 * anchor["equal"]) / 16  # bfloat16 has it, and 1/32 more, exactly
    for place, task in enumerate(TASKS):
        models[task][STILL] = anchor[STILL]
        sign = np.where(np.arange(20).reshape(4, 5) % (place + 2), 1, -1)
        models[task]["equal"] = anchor["equal"] + 2.0**-5 * sign
    for place, model in enumerate(models.values()) if is_half else ():
        # Tasks shrink it, so that what amplifies vectors does not have to overflow.
        shrunk = rng.uniform(0.95, 1, shapes[LARGE]) if place >= 2 else 1
        model[LARGE] = np.sign(anchor[LARGE]) * 60_000 * shrunk
    return models


def _encode(values: Array, dtype: str) -> Array:
    """Stored elements; bfloat16 is truncated."""
    if dtype == "BF16":
        return (np.asarray(values, "<f4").view("<u4") >> 16).astype("<u2")
    return np.asarray(values).astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])


def stored_model(dtype: str, member: str) -> Model:
    """Stored elements of a member by tensor, shape (n,)."""
    source = open_stored(family(dtype, "odd") / member)
    views = {name: source.view(name) for name in source.tensors}
    return {name: view.read(0, size(view)) for name, view in views.items()}


def read(dtype: str, member: str) -> Model:
    """Values of a member by tensor, shape (n,), float64."""
    stored = stored_model(dtype, member)
    return {n: widened(a, DTYPES[dtype]).astype(np.float64) for n, a in stored.items()}


def flat(model: Mapping[str, Array]) -> Array:
    """Every tensor one after another, by name."""
    return np.concatenate([model[name] for name in sorted(model)])


def allowed_error(values: Array, dtype: str, roundings: float) -> Array:
    """A step of the stored type, and roundings of the arithmetic, by entry."""
    arithmetic = STEP["F64" if dtype == "F64" else "F32"]
    largest = float(np.abs(values).max(initial=0))
    return np.asarray(STEP[dtype] * np.abs(values) + roundings * arithmetic * largest)
