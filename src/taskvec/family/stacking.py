"""Layers stacked from several models: a source whose blocks are blocks of others.

Embeddings come from the first piece, the final norm and heads from the last, everything else
outside the blocks from the first; so do other towers (the vision tower of a model that stacks its
language model). With a scale s, what each block of a piece adds to the residual
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
from taskvec.family.stack_config import COUNTS, stacked_config
from taskvec.layers import LayerKey, classify, renumber
from taskvec.recipes.stack import Piece

# Towers beside a language model, whose blocks are not stacked.
_BESIDE = re.compile(r"(vision|audio).*")


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
            shapes of embeddings differ, or a norm after the block would undo a scale.
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
            if piece.scale != 1:
                _check_scale(source, name, key)
            if piece.first <= key.block < piece.stop:
                index = block + key.block - piece.first
                factor = piece.scale if key.projection in ("o", "down", "shared_down") else 1.0
                places[renumber(name, index)] = (source, name, factor)
        block += piece.stop - piece.first
    _check_widths(places)
    places |= _outside(sources, towers[0][0])
    return derived(
        sources[0],
        repr([(p.first, p.stop, p.scale) for p in pieces]),
        parts=tuple(sources[1:]),
        tensors={
            new: TensorInfo(new, (info := source.tensors[old]).dtype, info.shape, 0)
            for new, (source, old, _) in places.items()
        },
        make_view=lambda name: _view(*places[name]),
        config=stacked_config(pieces, sources, [count for _, count in towers]),
        where="stack of " + " + ".join(dict.fromkeys(display_name(source) for source in sources)),
    )


def _check_scale(source: Source, name: str, key: LayerKey) -> None:
    """Refuse a scale where it is not known, or undone, what a block adds."""
    if "post_feedforward_layernorm" in name:
        raise FamilyError(
            f"stack: scale of {source.where} would have no effect: {name!r} normalizes what a "
            "block adds; remove scale"
        )
    is_matrix = len(source.tensors[name].shape) > 1
    if is_matrix and key.projection is None and key.module != "norm":
        raise FamilyError(
            f"stack: scale of {source.where}: {name!r} is unknown and may be what a block adds; "
            "remove scale"
        )


def _tower(source: Source) -> tuple[str, int]:
    """The tower of blocks that is stacked, and how many it has."""
    counts: dict[str, int] = {}
    for name in source.tensors:
        key = classify(name)
        if key.block is not None:
            counts[key.tower] = max(counts.get(key.tower, 0), key.block + 1)
    language = {tower: n for tower, n in counts.items() if not _BESIDE.fullmatch(tower)}
    found = language or counts
    if len(found) != 1:
        names = ", ".join(sorted(found)) or "none"
        raise FamilyError(f"stack: {source.where} must have one tower of blocks; found {names}")
    tower, count = next(iter(found.items()))
    declared = _declared_blocks(source.config)
    if declared is not None and declared < count:
        raise FamilyError(
            f"stack: {source.where} has blocks up to {count - 1}, but its config names {declared}; "
            "the others (for predicting further tokens) cannot be stacked: give a copy without them"
        )
    return tower, count


def _declared_blocks(config: Mapping[str, Any]) -> int | None:
    """How many blocks a config says that the language model has."""
    text = config.get("text_config")
    for place in (text if isinstance(text, dict) else {}, config):
        for key in COUNTS:
            if isinstance(place.get(key), int):
                return int(place[key])
    return None


def _outside(sources: Sequence[Source], tower: str) -> dict[str, tuple[Source, str, float]]:
    """Tensors outside the blocks."""
    first, last = sources[0], sources[-1]
    found = {}
    for source in (first, last):
        for name in source.tensors:
            key = classify(name)
            is_end = key.module in ("final_norm", "head") and not _BESIDE.fullmatch(key.tower)
            is_stacked = key.block is not None and key.tower == tower
            if not is_stacked and source is (last if is_end else first):
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
