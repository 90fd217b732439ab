"""What a scan file must hold."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from taskvec.validation import Entry, Finite, flaw

Count = Annotated[int, Field(ge=0, lt=2**63)]


class TensorEntry(Entry):
    """Statistics of one tensor; the upper triangles of its matrices, row by row."""

    shape: list[Count]
    gram: list[Finite]
    agree: list[Count]
    support: list[Count]


class ScannedEntry(Entry):
    """One member as it was read."""

    path: str
    fingerprint: str
    digests: dict[str, str]


class ScanFile(Entry):
    """Statistics of a family."""

    format: Literal[1]
    tasks: list[str]
    has_base: bool
    members: dict[str, ScannedEntry]
    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _check_sizes(self) -> ScanFile:
        k = len(self.tasks)
        sizes = {"gram": (k + 2) * (k + 3) // 2, "agree": k * (k + 1) // 2}
        sizes["support"] = sizes["agree"]
        for name, tensor in self.tensors.items():
            for field, size in sizes.items():
                if (got := len(getattr(tensor, field))) != size:
                    raise flaw(
                        f"{field} of {name!r} must have {size} values for {k} tasks; got {got}"
                    )
            if math.prod(tensor.shape) >= 2**63:
                raise flaw(f"shape of {name!r} must be that of a tensor; got {tensor.shape}")
        if len(set(self.tasks)) != k:
            raise flaw("tasks must differ")
        return self
