"""Sums of low-rank changes as one low-rank change: their factors stacked, which loses nothing.

    Σ_i c_i s_i B_i A_i = [B_1 … B_n] [c_1 s_1 A_1; …; c_n s_n A_n]

The rank is the sum of the ranks. A change of a tensor that is made of others, one after the other
(q, k and v in one), is one of the whole whose B is zero in the rows of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from taskvec.checkpoints.joined import Joined, Section, Zeros
from taskvec.checkpoints.low_rank import LowRank, Moved
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import View, same_elements, size

Array = np.ndarray[Any, Any]


class _Piece(NamedTuple):
    """Rows [low, high) of a low-rank change, which begin at row `first` of a weight."""

    change: LowRank
    low: int
    high: int
    first: int


@dataclass(frozen=True, slots=True)
class FactorStack:
    """A sum of low-rank changes to one weight.

    Attributes:
        pieces: Changes with their coefficients.
        rank: Of all together.
        shape: Of the weight.
        is_transposed: Whether the weight is stored as (in, out).
        is_embedding: Whether PEFT calls it an embedding.
        moved: Changes to weights that adapters brought along.
    """

    pieces: tuple[tuple[_Piece, float], ...]
    rank: int
    shape: tuple[int, ...]
    is_transposed: bool
    is_embedding: bool
    moved: tuple[Moved, ...] = ()

    def is_exact(self) -> bool:
        """Whether the weights that adapters brought along are the model's; reads them."""
        return all(same_elements(each.brought, each.weights) for each in self.moved)

    def factors(self) -> tuple[Array, Array]:
        """B (out, rank) and A (rank, in) with all coefficients in A, float64."""
        outs = self.shape[-1] if self.is_transposed else self.shape[0]
        left, right, column = np.zeros((outs, self.rank)), [], 0
        for piece, coefficient in self.pieces:
            a, b = (_read(view) for view in (piece.change.a, piece.change.b))
            rows = slice(piece.first, piece.first + piece.high - piece.low)
            left[rows, column : column + len(a)] = b[piece.low : piece.high]
            right.append(coefficient * piece.change.scaling * a)
            column += len(a)
        return left, np.concatenate(right)


def stack(terms: Sequence[tuple[View, float]]) -> FactorStack | None:
    """Low-rank changes to one weight as one; None if a term is not such a change.

    Where adapters brought weights along, that holds if those are the model's: see `is_exact`.

    Args:
        terms: Changes, each with its coefficient; all of one shape.
    """
    pieces: list[tuple[_Piece, float]] = []
    for view, coefficient in terms:
        mine = _pieces(view.change if isinstance(view, Moved) else view)
        if mine is None:
            return None
        pieces += [(piece, coefficient) for piece in mine]
    kinds = {(p.change.transposed, p.change.is_embedding) for p, _ in pieces}
    if len(kinds) != 1:
        return None
    ((is_transposed, is_embedding),) = kinds
    rank = sum(piece.change.a.shape[0] for piece, _ in pieces)
    moved = tuple(view for view, _ in terms if isinstance(view, Moved))
    return FactorStack(tuple(pieces), rank, terms[0][0].shape, is_transposed, is_embedding, moved)


def _pieces(view: View) -> list[_Piece] | None:
    if isinstance(view, LowRank):
        return [_Piece(view, 0, view.b.shape[0], 0)]
    if isinstance(view, Zeros):
        return []
    if len(view.shape) != 2:
        return None
    found: list[_Piece] = []
    if isinstance(view, Section):
        first, rest = divmod(view.offset, view.shape[1])
        whole = _pieces(view.whole)
        if whole is None or rest or view.whole.shape[1:] != view.shape[1:]:
            return None
        for piece in whole:
            low = max(piece.first, first)
            high = min(piece.first + piece.high - piece.low, first + view.shape[0])
            if low < high:
                shift = piece.low - piece.first
                found.append(_Piece(piece.change, low + shift, high + shift, low - first))
    elif isinstance(view, Joined):
        begin = 0
        for part in view.parts:
            inside = _pieces(part)
            if inside is None:
                return None
            found += [piece._replace(first=piece.first + begin) for piece in inside]
            begin += part.shape[0]
    else:
        return None
    return None if any(piece.change.transposed for piece in found) else found


def _read(view: View) -> Array:
    """A factor as a matrix, float64."""
    block = widened(view.read(0, size(view)), view.dtype).astype(np.float64)
    return block.reshape(view.shape[0], -1)
