"""The files of a checkpoint: which tensors go into which, with headers and index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.checkpoints.folder import SINGLE
from taskvec.checkpoints.safetensors import write_header
from taskvec.dtypes import DType


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header, and the tensors behind it in order."""

    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def lay_out(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[Shard]:
    """Files for the tensors, independent of the shards of the inputs.

    Wide dtypes come first, so that every tensor is aligned; then names in order.

    Args:
        tensors: In any order.
        shard_bytes: Largest size of the tensors in one file; a larger tensor gets a file of its
            own.
    """
    groups: list[list[OutputTensor]] = [[]]
    held = 0
    for tensor in sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name)):
        if groups[-1] and held + tensor.nbytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    count = len(groups)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    return [
        Shard(name, write_header([(t.name, t.dtype, t.shape) for t in group]), tuple(group))
        for name, group in zip(names, groups, strict=True)
    ]


def index_of(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The index of several shards as transformers writes it; None for a single file."""
    if len(shards) == 1:
        return None
    return {
        "metadata": {"total_size": sum(t.nbytes for s in shards for t in s.tensors)},
        "weight_map": {t.name: s.file for s in shards for t in s.tensors},
    }
