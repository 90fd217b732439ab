"""Selection: which entries of the pure vectors are kept, and how tasks are combined.

A method that sparsifies or elects signs hands this to the engine beside its weights; the kernel
`elect` says what becomes of it. It is small, it can be saved, and a merge is repeated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from taskvec.statistics.trim import Threshold

ELECTIONS = ("none", "mass", "count")
MERGES = ("sum", "mean")


@dataclass(frozen=True, slots=True)
class Selection:
    """What is kept of each task, and how tasks are combined.

    Attributes:
        thresholds: Smallest magnitude kept, by task, then by tensor; everything where absent.
        ceilings: Entries of this magnitude (bits) or above are dropped; likewise.
        densities: Share of entries that a draw keeps by task; all where absent.
        rescale: Factor of what is kept by task; 1 where absent.
        election: How the sign of an entry is elected: `none`, `mass` or `count`.
        merge: `sum`, or `mean` over the tasks that agree.
        seed: What draws depend on besides task, tensor and element.
    """

    thresholds: Mapping[str, Mapping[str, Threshold]] = field(default_factory=dict)
    ceilings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    densities: Mapping[str, float] = field(default_factory=dict)
    rescale: Mapping[str, float] = field(default_factory=dict)
    election: str = "none"
    merge: str = "sum"
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `selection_from_json` takes."""
        return {
            "thresholds": {
                task: {name: [t.lower, t.kept, list(t.equal)] for name, t in mine.items()}
                for task, mine in self.thresholds.items()
            },
            "ceilings": {task: dict(mine) for task, mine in self.ceilings.items()},
            "densities": dict(self.densities),
            "rescale": dict(self.rescale),
            "election": self.election,
            "merge": self.merge,
            "seed": self.seed,
        }


def selection_from_json(data: Mapping[str, Any]) -> Selection:
    """The selection that `to_json` gave.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: not such an object.
    """
    if data["election"] not in ELECTIONS or data["merge"] not in MERGES:
        raise ValueError(data["election"])
    return Selection(
        thresholds={
            task: {
                name: Threshold(int(lower), int(kept), tuple(map(int, equal)))
                for name, (lower, kept, equal) in mine.items()
            }
            for task, mine in data["thresholds"].items()
        },
        ceilings={
            task: {name: int(bits) for name, bits in mine.items()}
            for task, mine in data["ceilings"].items()
        },
        densities={task: float(value) for task, value in data["densities"].items()},
        rescale={task: float(value) for task, value in data["rescale"].items()},
        election=str(data["election"]),
        merge=str(data["merge"]),
        seed=int(data["seed"]),
    )


def mask_key(seed: int, task: str, tensor: str) -> int:
    """What the mask of one task in one tensor is drawn from, 64 bits."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{task}\0{tensor}".encode())


def bound(probability: float) -> int:
    """Below which an element is kept, in [0, 2^32]; the probability is rounded to 2^-32.

    >>> bound(0.0), bound(0.5), bound(1.0)
    (0, 2147483648, 4294967296)
    """
    return round(probability * 2**32)
