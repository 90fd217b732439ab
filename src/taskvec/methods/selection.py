"""Selection: which entries of the pure vectors are kept, and how tasks are combined.

A method that sparsifies or elects signs returns a selection with its weights; the kernel `elect`
applies it. It is small and can be saved, and a merge can be repeated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from taskvec.methods.parameters import Values
from taskvec.statistics.trim import Threshold

Array = np.ndarray[Any, Any]

ELECTIONS = ("none", "mass", "count")
MERGES = ("sum", "mean", "weighted")


@dataclass(frozen=True, slots=True)
class Selection:
    """The kept entries of each task, and how tasks are combined.

    Attributes:
        thresholds: Smallest kept magnitude, by task, then by tensor; if absent, all are kept.
        ceilings: Entries with this magnitude (bits) or above are dropped, by task, then by tensor.
        densities: Share of entries that a draw keeps, by task, for all tensors or for each; if
            absent, all are kept.
        rescale: Factor of the kept entries, by task, for all tensors or for each; 1 if absent.
        factors: A further factor, by task, then by tensor; 1 if absent.
        limits: Values over the whole model for the method's `combine`, by task, then by name.
        election: How the sign of an entry is elected: `none`, `mass` or `count`.
        merge: `sum`, `mean` over the tasks that agree, or `weighted`: their sum over Σ |λ_t|.
        seed: Seed of the draws, which also depend on task, tensor and element.
    """

    thresholds: Mapping[str, Mapping[str, Threshold]] = field(default_factory=dict)
    ceilings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    densities: Mapping[str, Values] = field(default_factory=dict)
    rescale: Mapping[str, Values] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    election: str = "none"
    merge: str = "sum"
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `table_file` reads again."""
        return {
            "thresholds": {
                task: {name: [t.lower, t.kept, list(t.equal)] for name, t in mine.items()}
                for task, mine in self.thresholds.items()
            },
            "ceilings": {task: dict(mine) for task, mine in self.ceilings.items()},
            "densities": {task: _copy(values) for task, values in self.densities.items()},
            "rescale": {task: _copy(values) for task, values in self.rescale.items()},
            "factors": {task: dict(mine) for task, mine in self.factors.items()},
            "limits": {task: dict(mine) for task, mine in self.limits.items()},
            "election": self.election,
            "merge": self.merge,
            "seed": self.seed,
        }


def _copy(values: Values) -> Values:
    if isinstance(values, Mapping):
        return {name: float(value) for name, value in values.items()}
    return float(values)


def mask_key(seed: int, task: str, tensor: str) -> int:
    """The key of the mask of one task in one tensor, 64 bits."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{task}\0{tensor}".encode())


def bound(probability: float) -> int:
    """The bound of a draw that keeps an element, in [0, 2^32]; probabilities round to 2^-32.

    >>> bound(0.0), bound(0.5), bound(1.0)
    (0, 2147483648, 4294967296)
    """
    return round(probability * 2**32)


def fused(target: Array, rows: Array, scales: Array, election: str, merge: str) -> Array:
    """θ_target plus the agreeing entries of y_t = λ_t x_t, combined as in `kernels.elect`.

    Args:
        target: θ_target, any shape, float32 or float64.
        rows: x_t, sparsified, shape (K, …), of the same type.
        scales: λ_t, shape (K,), of the same type.
        election: `none`, `mass` or `count`.
        merge: `sum`, `mean` or `weighted`.
    """
    from taskvec.kernels import elect

    tasks, count = len(rows), target.size
    space = np.zeros((3 + tasks, count), target.dtype)  # unused, y_t …, ballot, total
    for y, x, scale in zip(space[1:], rows, scales, strict=False):
        np.multiply(x.reshape(-1), scale, out=y)
        space[-2] += np.sign(y) if election == "count" else y
    space[-1] = target.reshape(-1)
    elections = {"none": elect.NONE, "mass": elect.MASS, "count": elect.COUNT}
    merges = {"sum": elect.SUM, "mean": elect.MEAN, "weighted": elect.WEIGHTED}
    shares = np.concatenate([scales, np.abs(scales)])
    elect.combine_rows(space, shares, tasks, count, elections[election], merges[merge])
    merged: Array = space[-1].reshape(target.shape)
    return merged
