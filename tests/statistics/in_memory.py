"""Families that lie in memory: what collecting reads, without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tests.kernels.reference import decode, encode

from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.dtypes import DTYPES, DType
from taskvec.layers import classify
from taskvec.statistics.collect import Collected, Sources, collect
from taskvec.statistics.scan import Scan, ScannedModel
from taskvec.streaming import RunOptions

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Mapping[str, Array]]  # by role (anchor, base, task:NAME), then by tensor


@dataclass(frozen=True, eq=False)
class InMemory:
    """A view of stored elements."""

    dtype: DType
    shape: tuple[int, ...]
    stored: Array

    is_difference = False

    def read(self, start: int, stop: int) -> Array:
        return self.stored[start:stop]


def sources(weights: Weights, dtype: str) -> list[Sources]:
    """What `collect` takes, tensors by name."""
    return [
        Sources(
            name,
            {
                role: InMemory(
                    DTYPES[dtype], tensors[name].shape, encode(tensors[name].ravel(), dtype)
                )
                for role, tensors in weights.items()
            },
        )
        for name in sorted(weights["anchor"])
    ]


def tasks_of(weights: Weights) -> tuple[str, ...]:
    return tuple(sorted(role[5:] for role in weights if role.startswith("task:")))


def collected(weights: Weights, dtype: str = "BF16", **options: Any) -> Collected:
    return collect(
        sources(weights, dtype),
        tasks_of(weights),
        with_base="base" in weights,
        options=RunOptions(**options),
    )


def scanned(weights: Weights, dtype: str = "BF16", **options: Any) -> Scan:
    """The scan of a family in memory."""
    got = collected(weights, dtype, **options)
    names = tuple(sorted(weights["anchor"]))
    shapes = {name: weights["anchor"][name].shape for name in names}
    described = {name: (dtype, shapes[name]) for name in names}
    return Scan(
        tasks=tasks_of(weights),
        names=names,
        shapes=tuple(shapes.values()),
        keys=tuple(classify(name) for name in names),
        has_base="base" in weights,
        gram=got.gram,
        agree=got.agree,
        support=got.support,
        members={
            role: ScannedModel(role, fingerprint(digests, described), digests)
            for role, digests in got.digests.items()
        },
    )


def as_stored(weights: Weights, dtype: str = "BF16") -> dict[str, dict[str, Array]]:
    """The values that the stored elements have, float64."""
    return {
        role: {
            name: decode(encode(array.ravel(), dtype), dtype).reshape(array.shape)
            for name, array in tensors.items()
        }
        for role, tensors in weights.items()
    }


def small_family(seed: int = 0, tasks: int = 2, blocks: int = 3, width: int = 6) -> dict[str, Any]:
    """Weights with the names of a Llama of a few hundred parameters; every layer moves differently.

    Sizes differ between tensors, so that weighting by parameters shows.
    """
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (11, width), "model.norm.weight": (width,)}
    for i in range(blocks):
        block = f"model.layers.{i}."
        shapes |= {
            block + "self_attn.q_proj.weight": (width, width),
            block + "self_attn.v_proj.weight": (width // 2, width),
            block + "mlp.up_proj.weight": (3 * width, width),
            block + "input_layernorm.weight": (width,),
        }
    base = {name: rng.normal(0, 0.1, shape) for name, shape in shapes.items()}

    def moved(weights: Mapping[str, Array], size: float) -> dict[str, Array]:
        return {
            name: array + size * rng.uniform(0.3, 3) * rng.normal(0, 1, array.shape)
            for name, array in weights.items()
        }

    anchor = moved(base, 0.02)
    family = {"anchor": anchor, "base": base}
    return family | {f"task:{'abcdef'[t]}": moved(anchor, 0.01 * (t + 1)) for t in range(tasks)}
