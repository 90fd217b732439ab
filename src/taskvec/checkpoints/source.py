"""A source: one model as the engine sees it, wherever its tensors come from.

A folder of safetensors files is a source (`folder.Checkpoint`). Everything else is a `Derived` one,
made of other sources: a base with an adapter's differences on it, rows matched by vocabulary, a
head that is tied to the embedding, layers stacked from several models. Nothing after the sources
knows which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.views import View
from taskvec.dtypes import DTYPES, DType


class Source(Protocol):
    """A model whose tensors can be read block by block."""

    @property
    def where(self) -> str:
        """Path, hub name or description; for messages and manifests."""

    @property
    def folder(self) -> Path | None:
        """Where config and tokenizer lie; None for a model in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What it holds, in name order. A view may be wider than the dtype that this says."""

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json` that fits the tensors; empty without one."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Companion files (a tokenizer) that take the place of those in the folder."""

    @property
    def is_difference(self) -> bool:
        """Whether it holds only what a task changes; tensors that it lacks are left as they are."""

    @property
    def parts(self) -> tuple[Source, ...]:
        """What it is made of; nothing where it is stored as it is."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Folders and files that an output must not overlap."""

    @property
    def identity(self) -> object:
        """Something whose `repr` changes with the files, so that weights are read again."""

    def view(self, name: str) -> View:
        """The named tensor."""

    def check_unchanged(self) -> None:
        """Raise `StaleError` if a file is not what it was when it was opened."""


def nbytes(source: Source) -> int:
    """Bytes of all tensors."""
    return sum(info.nbytes for info in source.tensors.values())


@dataclass(slots=True, eq=False)
class Derived:
    """A source made of others.

    Attributes:
        parts: What it is made of; the first gives folder and, by default, config.
        how: What was done, with every parameter: part of the identity.
        tensors: See `Source`.
        make_view: The view of a tensor by name; called once for each.
        left_out: Names of tensors that a recipe excluded when it was made.
        notes: What looks odd and was dealt with, in words.
    """

    parts: tuple[Source, ...]
    how: str
    tensors: Mapping[str, TensorInfo]
    make_view: Callable[[str], View]
    config: Mapping[str, Any]
    where: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    is_difference: bool = False
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _views: dict[str, View] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """See `Source`."""
        return self.parts[0].folder

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See `Source`."""
        return tuple(path for part in self.parts for path in part.inputs)

    @property
    def identity(self) -> object:
        """See `Source`."""
        return (self.how, [part.identity for part in self.parts])

    def view(self, name: str) -> View:
        """See `Source`."""
        if name not in self._views:
            self._views[name] = self.make_view(name)
        return self._views[name]

    def check_unchanged(self) -> None:
        """See `Source`."""
        for part in self.parts:
            part.check_unchanged()


def derived(
    source: Source,
    how: str,
    *,
    parts: tuple[Source, ...] = (),
    tensors: Mapping[str, TensorInfo] | None = None,
    make_view: Callable[[str], View] | None = None,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    where: str | None = None,
) -> Derived:
    """`source` with something changed; what is not given stays as it is.

    Args:
        source: What it starts from.
        how: What was done, with every parameter.
        parts: Further sources that it reads.
        tensors: See `Source`; sorted here.
        make_view: The view of a tensor by name.
        config: See `Source`.
        files: Added to those of `source`.
        where: See `Source`.
    """
    tensors = source.tensors if tensors is None else tensors
    return Derived(
        parts=(source, *parts),
        how=how,
        tensors={name: tensors[name] for name in sorted(tensors)},
        make_view=make_view or source.view,
        config=source.config if config is None else config,
        where=source.where if where is None else where,
        files={**source.files, **(files or {})},
        is_difference=source.is_difference,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Weights with a difference added, in float32 (float64 if a part is), not rounded further."""

    weights: View
    change: View
    is_difference: bool = False

    @property
    def dtype(self) -> DType:
        """See `View`."""
        wide = 8 in (self.weights.dtype.itemsize, self.change.dtype.itemsize)
        return DTYPES["F64" if wide else "F32"]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.weights.shape

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `View`."""
        dtype = np.dtype(self.dtype.storage)
        total = widened(self.weights.read(start, stop), self.weights.dtype).astype(dtype)
        total += widened(self.change.read(start, stop), self.change.dtype)
        return total


def widened(block: np.ndarray[Any, Any], dtype: DType) -> np.ndarray[Any, Any]:
    """Stored elements as float32, or as float64 where they are that."""
    if dtype.name == "BF16":
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.view(np.float16).astype(np.float32) if dtype.name == "F16" else block


def added(weights: Source, difference: Source) -> Derived:
    """The whole model that a difference makes of the model that it was taken from.

    A tensor keeps the dtype that it has in `weights`, which says how a result is rounded; its view
    is not rounded.
    """

    def view(name: str) -> View:
        if name not in difference.tensors:
            return weights.view(name)
        change = difference.view(name)
        return Sum(weights.view(name), change) if change.is_difference else change

    shapes = {
        name: replace(info, shape=difference.tensors[name].shape)
        for name, info in weights.tensors.items()
        if name in difference.tensors and difference.tensors[name].shape != info.shape
    }
    return derived(
        weights,
        "added",
        parts=(difference,),
        tensors={**weights.tensors, **shapes} if shapes else None,
        make_view=view,
        where=difference.where,
        files=difference.files,
    )
