"""Layers stacked from several models: a source whose blocks are blocks of others.

Embeddings come from the first piece, the final norm and heads from the last, whatever else is
outside the blocks from the first. With a scale s, what each block of a piece adds to the residual
stream is multiplied by s: its output projections (`o` of attention, `down` of the MLP; weights and
biases) are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.checkpoints.naming import display_name
from taskvec.checkpoints.safetensors import TensorInfo
from taskvec.checkpoints.source import Derived, Source, derived, widened
from taskvec.checkpoints.views import View
from taskvec.dtypes import DTYPES, DType
from taskvec.errors import FamilyError
from taskvec.layers import classify
from taskvec.recipes.stack import Piece

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A tensor times a number, in float32 (float64 if it is that)."""

    inner: View
    factor: float
    is_difference: bool = False

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return DTYPES["F64" if self.inner.dtype.itemsize == 8 else "F32"]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.inner.shape

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See `View`."""
        values = widened(self.inner.read(start, stop), self.inner.dtype)
        product: np.ndarray[Any, Any] = values * values.dtype.type(self.factor)
        return product


def stacked(pieces: Sequence[Piece], sources: Sequence[Source]) -> Derived:
    """The model whose blocks are those of the pieces, in order.

    Args:
        pieces: Which blocks.
        sources: The model of each piece.

    Raises:
        FamilyError: a range is outside its model, a model has no blocks or several towers of them,
            shapes of embeddings differ, or a scale would be undone by a norm after the block.
    """
    towers = [_tower(source) for source in sources]
    places: dict[str, tuple[Source, str, float]] = {}  # new name → where it is from
    block = 0
    for piece, source, (tower, count) in zip(pieces, sources, towers, strict=True):
        if not 0 <= piece.first < piece.stop <= count:
            raise FamilyError(
                f"stack: blocks [{piece.first}, {piece.stop}) of {source.where} are not among its "
                f"{count} (0 to {count - 1}; the second number is the block after the last)"
            )
        for name in source.tensors:
            key = classify(name)
            if key.tower != tower or key.block is None:
                continue
            if piece.scale != 1 and "post_feedforward_layernorm" in name:
                raise FamilyError(
                    f"stack: scale of {source.where} would be undone by {name!r}, which norms what "
                    "a block adds; leave scale out"
                )
            if piece.first <= key.block < piece.stop:
                index = block + key.block - piece.first
                factor = piece.scale if key.projection in ("o", "down", "shared_down") else 1.0
                places[_renumbered(name, key.block, index)] = (source, name, factor)
        block += piece.stop - piece.first
    places |= _outside(sources, towers[0][0])
    _check_widths(places)
    return derived(
        sources[0],
        repr([(p.first, p.stop, p.scale) for p in pieces]),
        parts=tuple(sources[1:]),
        tensors={
            new: TensorInfo(new, (info := source.tensors[old]).dtype, info.shape, 0)
            for new, (source, old, _) in places.items()
        },
        make_view=lambda name: _view(*places[name]),
        config=_config(pieces, sources, block),
        where="stack of " + " + ".join(dict.fromkeys(display_name(source) for source in sources)),
    )


def _tower(source: Source) -> tuple[str, int]:
    """The only tower with blocks, and how many it has."""
    counts: dict[str, int] = {}
    for name in source.tensors:
        key = classify(name)
        if key.block is not None:
            counts[key.tower] = max(counts.get(key.tower, 0), key.block + 1)
    if len(counts) != 1:
        found = ", ".join(sorted(counts)) or "none"
        raise FamilyError(f"stack: {source.where} must have one tower of blocks; found {found}")
    return next(iter(counts.items()))


def _renumbered(name: str, old: int, new: int) -> str:
    """The name with the index of its block replaced: the first number in it."""
    return re.sub(rf"(^|\.){old}(\.|$)", rf"\g<1>{new}\g<2>", name, count=1)


def _outside(sources: Sequence[Source], tower: str) -> dict[str, tuple[Source, str, float]]:
    """Tensors outside the blocks."""
    first, last = sources[0], sources[-1]
    found = {}
    for source in (first, last):
        for name in source.tensors:
            key = classify(name)
            is_end = key.module in ("final_norm", "head")
            if key.block is None and source is (last if is_end else first):
                found[name] = (source, name, 1.0)
    return found


def _check_widths(places: Mapping[str, tuple[Source, str, float]]) -> None:
    """Blocks must have the same shapes, as a config describes them all at once."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for new, (source, old, _) in places.items():
        alike = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", new)
        shape = source.tensors[old].shape
        name, expected = shapes.setdefault(alike, (new, shape))
        if shape != expected:
            raise FamilyError(
                f"stack: tensor {old!r} of {source.where} has shape {list(shape)}, {name!r} has "
                f"{list(expected)}; blocks of one model must be of one shape"
            )


def _view(source: Source, name: str, factor: float) -> View:
    view = source.view(name)
    return view if factor == 1 else Scaled(view, factor)


def _config(pieces: Sequence[Piece], sources: Sequence[Source], blocks: int) -> dict[str, Any]:
    """The first model's config with another number of blocks; lists over blocks are stacked too."""
    config = dict(sources[0].config)
    count = next((config[key] for key in _COUNTS if key in config), None)
    for key, value in config.items():
        if key in _COUNTS:
            config[key] = blocks
        elif isinstance(value, list) and len(value) == count and key.endswith("_types"):
            config[key] = [
                kind
                for piece, source in zip(pieces, sources, strict=True)
                for kind in source.config.get(key, value)[piece.first : piece.stop]
            ]
    return config
