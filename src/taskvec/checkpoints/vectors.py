"""A task vector in a file: a source whose elements are τ, not weights.

`taskvec extract` writes such files, and marks them in their metadata, which distinguishes them from
weights. Tensors that the vector lacks are left as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from taskvec import documents
from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.folder import Checkpoint, open_stored
from taskvec.checkpoints.safetensors import TensorInfo, read_metadata
from taskvec.checkpoints.schema import NewTokens
from taskvec.checkpoints.tokenizers import Added
from taskvec.checkpoints.views import StoredTensor, View
from taskvec.dtypes import DType
from taskvec.errors import CheckpointError
from taskvec.validation import read_as

KIND = "task vector"  # what the metadata of such a file says under `taskvec`
# Tensors with rows of tokens that the anchor lacks: weights, not differences. Their names begin so.
NEW_ROWS = "taskvec.new_rows."


@dataclass(frozen=True, slots=True, eq=False)
class StoredDifference:
    """A tensor of a vector, as it lies in the file."""

    stored: StoredTensor
    is_difference: ClassVar[bool] = True

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.stored.shape

    def read(self, start: int, stop: int) -> Any:
        """See `View`."""
        return self.stored.read(start, stop)


@dataclass(eq=False)
class Vector:
    """An opened file; a `Source`.

    Attributes:
        stored: Its tensors, as if they were weights.
        metadata: What the file says about itself, such as `anchor_fingerprint`.
    """

    stored: Checkpoint
    metadata: Mapping[str, str]
    _views: dict[str, StoredDifference] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    parts: ClassVar[tuple[()]] = ()
    is_difference: ClassVar[bool] = True
    folder: ClassVar[Path | None] = None

    @cached_property
    def new_tokens(self) -> dict[str, Added] | None:
        """Tokens that it has besides the anchor's; None where it says nothing of tokens.

        Raises:
            CheckpointError: the metadata is damaged.
        """
        text = self.metadata.get("new_tokens")
        if text is None:
            return None
        where = f"{self.where}: new_tokens of its metadata"
        data = documents.parse_json(text, documents.CONFIG, where)
        listed = read_as(NewTokens, data, where, "extract it again").root
        return {text: Added(row, flags) for text, row, flags in listed}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `Source`."""
        if not self.new_tokens:
            return self.stored.tensors
        return {n: t for n, t in self.stored.tensors.items() if not n.startswith(NEW_ROWS)}

    def new_rows(self, name: str) -> View | None:
        """Rows of new tokens in a tensor, in the order in which the metadata lists the tokens."""
        stored = NEW_ROWS + name
        return self.stored.view(stored) if stored in self.stored.tensors else None

    @property
    def where(self) -> str:
        """See `Source`."""
        return self.stored.where

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See `Source`."""
        return self.stored.inputs

    @property
    def identity(self) -> object:
        """See `Source`."""
        return ("vector", self.stored.identity)

    def view(self, name: str) -> StoredDifference:
        """See `Source`."""
        if name not in self._views:
            self._views[name] = StoredDifference(self.stored.view(name))
        return self._views[name]

    def check_unchanged(self) -> None:
        """See `Source`."""
        self.stored.check_unchanged()

    def starts_from(self, digests: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether a model is the one that the vector was taken from, as far as that is known.

        Args:
            digests: Of the model's tensors.
            tensors: What the model holds.
        """
        recorded = self.metadata.get("anchor_fingerprint")
        if recorded is None or not self.tensors.keys() <= digests.keys() & tensors.keys():
            return True
        described = {n: (tensors[n].dtype.name, tensors[n].shape) for n in self.tensors}
        return fingerprint({n: digests[n] for n in self.tensors}, described) == recorded


def is_vector(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that says that it holds a task vector.

    Raises:
        CheckpointError: it ends in `.safetensors` and is not such a file.
    """
    file = Path(os.path.expanduser(path))  # noqa: PTH111 (unlike Path's, leaves ~nobody)
    is_file = file.suffix == ".safetensors" and file.is_file()
    return is_file and read_metadata(file).get("taskvec") == KIND


def open_vector(path: str | os.PathLike[str]) -> Vector:
    """Open a task vector and check everything that can be checked without reading its elements.

    Raises:
        CheckpointError: no such file, a broken one, one that does not say that it is a task vector,
            or one with tensors that are not floating-point.
    """
    stored = open_stored(path)
    metadata = read_metadata(stored.inputs[0])
    if metadata.get("taskvec") != KIND:
        raise CheckpointError(
            f"{path}: is not a task vector; expected a file that `taskvec extract` wrote"
        )
    for name, info in stored.tensors.items():
        if not info.dtype.is_float:
            raise CheckpointError(
                f"{path}: tensor {name!r} of a task vector is {info.dtype.name}, expected floating "
                "point; extract it again"
            )
    return Vector(stored, metadata)
