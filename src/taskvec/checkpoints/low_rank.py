"""What an adapter makes of one tensor, as views: products of two thin matrices, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from taskvec.checkpoints.joined import Section, joined
from taskvec.checkpoints.source import Sum, widened
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DTYPES, DType

Array = np.ndarray[Any, Any]


def _wide(*views: View) -> DType:
    """What views are worked with in: float32, or float64 if one of them is that."""
    return DTYPES["F64" if any(view.dtype.itemsize == 8 for view in views) else "F32"]


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The difference s · B A, or s · (B A)ᵀ for a weight that is stored as (in, out).

    Attributes:
        a: Shape (rank, in, …).
        b: Shape (out, rank, …).
        shape: Of the weight.
        scaling: s.
        transposed: Whether the weight is stored as (in, out).
        is_embedding: Whether PEFT calls the factors those of an embedding.
    """

    a: View
    b: View
    shape: tuple[int, ...]
    scaling: float
    transposed: bool
    is_embedding: bool = False
    is_difference: ClassVar[bool] = True

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return _wide(self.a, self.b)

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        from taskvec.kernels.low_rank import low_rank, low_rank_scratch

        dtype = np.dtype(self.dtype.storage).type
        out = np.empty(stop - start, dtype)
        if not out.size:
            return out
        rank, rows = self.a.shape[0], self.shape[0]
        columns = size(self) // rows
        top, bottom = start // columns, -(-stop // columns)
        if self.transposed:  # rows of the result are columns of A
            parts = [self.a.read(k * rows + top, k * rows + bottom) for k in range(rank)]
            a, b = np.concatenate(parts), self.b.read(0, size(self.b))
        else:
            a, b = self.a.read(0, size(self.a)), self.b.read(top * rank, bottom * rank)
        low_rank(
            (self.a.dtype.code, a.ctypes.data),
            (self.b.dtype.code, b.ctypes.data),
            (rank, bottom - top, columns),
            self.transposed,
            dtype(self.scaling),
            start - top * columns,
            out,
            low_rank_scratch(rank, columns, dtype),
        )
        return out


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The columns of B that belong to one expert, as a matrix (out, rank).

    B has shape (out, rank · experts), column k · experts + e for k of expert e. It is small beside
    the weights, and read once for all experts.

    Attributes:
        b: B.
        shape: See `View`.
        expert: e.
        held: The columns of all experts by expert, once they were read.
        lock: For `held`.
    """

    b: View
    shape: tuple[int, ...]
    expert: int
    held: list[Array]
    lock: Lock
    is_difference: ClassVar[bool] = True

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return self.b.dtype

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        with self.lock:
            if not self.held:
                whole = self.b.read(0, size(self.b)).reshape(*self.shape, -1)
                self.held.append(np.ascontiguousarray(np.moveaxis(whole, -1, 0)))
        mine: Array = self.held[0][self.expert].reshape(-1)[start:stop]
        return mine


def expert_changes(
    a: View, b: View, shape: tuple[int, ...], scaling: float, *, transposed: bool
) -> View:
    """The change of the experts of a block in one tensor, each a product of its own.

    Args:
        a: Shape (experts · rank, in), expert by expert.
        b: Shape (out, rank · experts), see `_Columns`.
        shape: Of the tensor, (experts, out, in), or (experts, in, out) if transposed.
        scaling: s.
        transposed: Whether each expert is stored as (in, out).
    """
    experts = shape[0]
    rank = a.shape[0] // experts
    held: list[Array] = []
    lock = Lock()
    return joined(
        [
            LowRank(
                Section(a, e * rank * a.shape[1], (rank, a.shape[1])),
                _Columns(b, (b.shape[0], rank), e, held, lock),
                shape[1:],
                scaling,
                transposed,
            )
            for e in range(experts)
        ],
        shape,
    )


@dataclass(frozen=True, slots=True, eq=False)
class ScaledChange:
    """The difference s · b of an adapter with a bias to the bias of a layer."""

    change: View
    scaling: float
    is_difference: ClassVar[bool] = True

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return _wide(self.change)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.change.shape

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        dtype = np.dtype(self.dtype.storage).type
        change = widened(self.change.read(start, stop), self.change.dtype).astype(dtype)
        change *= dtype(self.scaling)
        return change


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """A difference to weights that the adapter brings along, as one to the weights it is over.

    Where both are the same, as they are unless rows of tokens were added, this is the difference
    itself, exactly.
    """

    change: View
    brought: View
    weights: View
    is_difference: ClassVar[bool] = True

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return _wide(self.change, self.brought, self.weights)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.weights.shape

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        moved = widened(self.brought.read(start, stop), self.brought.dtype).astype(
            self.dtype.storage
        )
        moved -= widened(self.weights.read(start, stop), self.weights.dtype)
        moved += self.change.read(start, stop)
        return moved


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """The weight that DoRA makes: rows of V = W + s · B A, each with its length m.

    W'[i] = m[i] · V[i] / ‖V[i]‖. A length is of a whole row, so that the rows at both ends of a
    block are computed whole.

    Source: DoRA, arXiv:2402.09353, equation 5.
    """

    weights: View
    change: LowRank
    magnitude: View
    is_difference: ClassVar[bool] = False

    @property
    def dtype(self) -> DType:
        """See `View`."""
        return _wide(self.weights, self.change, self.magnitude)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.weights.shape

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        columns = self.shape[1]
        top, bottom = start // columns, -(-stop // columns)
        rows = Sum(self.weights, self.change).read(top * columns, bottom * columns)
        rows = rows.reshape(-1, columns).astype(self.dtype.storage, copy=False)
        lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(1))
        wanted = widened(self.magnitude.read(top, bottom), self.magnitude.dtype)
        with np.errstate(divide="ignore", invalid="ignore"):  # refused where it is used
            rows *= (wanted / lengths).astype(rows.dtype)[:, np.newaxis]
        return rows.reshape(-1)[start - top * columns : stop - top * columns]


@dataclass(frozen=True, slots=True, eq=False)
class Replaced:
    """Weights of which some rows (tokens that were trained) are others.

    Attributes:
        weights: Shape (rows, columns).
        rows: The rows that take their place, shape (n, columns).
        which: Their numbers, shape (n,), int64, ascending.
        order: Where each of them is in `rows`, shape (n,).
    """

    weights: View
    rows: View
    which: Array
    order: Array
    is_difference: ClassVar[bool] = False

    @property
    def dtype(self) -> DType:
        """See `View`."""
        same = self.weights.dtype == self.rows.dtype
        return self.weights.dtype if same else _wide(self.weights, self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `View`."""
        return self.weights.shape

    def read(self, start: int, stop: int) -> Array:
        """See `View`."""
        out = self._stored(self.weights, start, stop)
        columns = self.shape[1]
        first, last = np.searchsorted(self.which, [start // columns, -(-stop // columns)])
        for row, place in zip(self.which[first:last], self.order[first:last], strict=True):
            begin, end = max(start, row * columns), min(stop, (row + 1) * columns)
            shift = place * columns - row * columns
            new = self._stored(self.rows, int(begin + shift), int(end + shift))
            out[begin - start : end - start] = new
        return out

    def _stored(self, view: View, start: int, stop: int) -> Array:
        """A copy of a block in the dtype that this view has."""
        block = view.read(start, stop)
        if view.dtype != self.dtype:
            block = widened(block, view.dtype)
        return block.astype(self.dtype.storage)
