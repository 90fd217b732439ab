"""Layers stacked from several models, as a recipe says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive blocks of one model.

    Attributes:
        model: Where they come from.
        first: First block, from 0.
        stop: The block after the last.
        scale: Factor of what each block adds to the residual stream.
    """

    model: Any
    first: int
    stop: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Stack:
    """A model made of pieces, in the order of its blocks."""

    pieces: tuple[Piece, ...]

    def to_dict(self, describe: Callable[[Any], Any]) -> dict[str, Any]:
        """As a recipe has it; `describe` names a model."""
        return {
            "stack": [
                {"model": describe(p.model), "blocks": [p.first, p.stop], "scale": p.scale}
                for p in self.pieces
            ]
        }
