"""The collecting pass: Gram matrices, sign counts and digests of a family in one reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from taskvec.checkpoints.fingerprint import chunk_digests, tensor_digest
from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import View, size
from taskvec.errors import CheckpointError
from taskvec.streaming import CHUNK, RunOptions, Stretch, gather

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """One floating-point tensor of a family, as each member has it.

    Attributes:
        name: Parameter name.
        views: By role: `anchor`, `base` if there is one, `task:NAME` for each task that may change
            the tensor. Without an anchor, the weights of the tasks are measured instead of their
            vectors.
    """

    name: str
    views: Mapping[str, View]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in all members."""
        views = self.views.values()
        return size(next(iter(views))) * sum([view.dtype.itemsize for view in views])


@dataclass(frozen=True, slots=True)
class Collected:
    """The result of one reading of a family; N tensors, K tasks, tasks in name order.

    Attributes:
        gram: ⟨v_i, v_j⟩ for v = (θ_pre, τ_instr, τ_1 … τ_K), shape (N, 2 + K, 2 + K), float64,
            symmetric.
        agree: Elements in which two task vectors have the same sign, shape (N, K, K), int64.
        support: Elements in which both are non-zero, shape (N, K, K), int64.
        digests: By role, then by tensor.
    """

    gram: Array
    agree: Array
    support: Array
    digests: dict[str, dict[str, str]]


class _Part(NamedTuple):
    products: Array  # of each chunk
    signs: Array  # of each chunk
    digests: dict[str, bytes]


def roles_of(tasks: Sequence[str], with_base: bool) -> list[str]:
    """Roles in the order of the statistics: anchor, base, tasks by name."""
    return ["anchor", *(["base"] if with_base else []), *(f"task:{t}" for t in sorted(tasks))]


def describe(role: str) -> str:
    """A role in words.

    >>> describe("task:math")
    "task 'math'"
    """
    return f"task {role[5:]!r}" if role.startswith("task:") else role


def collect(
    sources: Sequence[Sources],
    tasks: Sequence[str],
    *,
    with_base: bool,
    named: Mapping[str, str] | None = None,
    options: RunOptions = RunOptions(),
) -> Collected:
    """Read every tensor of every member once.

    Args:
        sources: Floating-point tensors.
        tasks: Task names.
        with_base: Whether the family has a base; without one τ_instr is zero.
        named: Members by role, for messages; default: the roles in words.
        options: How to run.

    Raises:
        CheckpointError: NaN or infinite weights; the tensor and the member are named.
    """
    roles = roles_of(tasks, with_base)
    k = len(tasks)
    gram = np.zeros((len(sources), 2 + k, 2 + k))
    signs = np.zeros((len(sources), k, k, 2), np.int64)
    digests: dict[str, dict[str, str]] = {role: {} for role in roles}
    sizes = [size(next(iter(s.views.values()))) for s in sources]
    with options.progress("scan", sum([source.nbytes for source in sources])) as advance:
        make_worker = _make_worker(sources, roles, k, named or {})
        for tensor, parts in gather(sizes, make_worker, options):
            source = sources[tensor]
            for part in parts:
                for products in part.products:  # one by one: the order of adding is fixed
                    gram[tensor] += products
                signs[tensor] += part.signs.sum(0)
            for role in source.views:
                digests[role][source.name] = tensor_digest([p.digests[role] for p in parts])
            advance(source.nbytes)
    gram += np.triu(gram, 1).transpose(0, 2, 1)
    signs += np.triu(signs.transpose(3, 0, 1, 2), 1).transpose(1, 3, 2, 0)
    return Collected(gram, signs[..., 0], signs[..., 1], digests)


def _make_worker(
    sources: Sequence[Sources], roles: Sequence[str], k: int, named: Mapping[str, str]
) -> Callable[[], Callable[[Stretch], _Part]]:
    from taskvec.kernels.gram import gram, gram_scratch

    rows = [0, *([1] if "base" in roles else []), *range(2, 2 + k)]
    row_of = dict(zip(roles, rows, strict=True))  # in the kernel

    def make() -> Callable[[Stretch], _Part]:
        single = gram_scratch(2 + k, np.float32)
        double = gram_scratch(2 + k, np.float64)

        def work(stretch: Stretch) -> _Part:
            tensor, start, stop = stretch
            source, chunks = sources[tensor], -(-(stop - start) // CHUNK)
            blocks = {role: view.read(start, stop) for role, view in source.views.items()}
            addresses = np.zeros(2 + k, np.int64)
            codes = np.zeros(2 + k, np.int64)
            differences = np.zeros(2 + k, np.bool_)
            for role, view in source.views.items():
                row = row_of[role]
                addresses[row] = address(blocks[role])
                codes[row] = view.dtype.code
                differences[row] = view.is_difference or "anchor" not in source.views
            if "anchor" not in source.views:  # the kernel reads some row in its place
                addresses[0], codes[0] = addresses[2], codes[2]
            wide = max([view.dtype.itemsize for view in source.views.values()]) == 8
            given = addresses, codes, differences, stop - start
            out = np.empty((chunks, 2 + k, 2 + k)), np.empty((chunks, k, k, 2), np.int64)
            gram(*given, double if wide else single, *out)
            overflow = ~np.isfinite(out[0]).all((1, 2))
            if overflow.any():
                for role, view in source.views.items():
                    who = named.get(role, describe(role))
                    refuse_non_finite(source.name, who, view, blocks[role], start)
                # The weights are finite; their squares overflow float32. Other chunks stay as they
                # are, so that no bit depends on what was read together.
                again = np.empty_like(out[0])
                gram(*given, double, again, out[1])
                out[0][overflow] = again[overflow]
                if not np.isfinite(again).all():
                    raise CheckpointError(
                        f"tensor {source.name!r} holds weights whose squares are too large for "
                        "float64; exclude the tensor"
                    )
            return _Part(*out, {role: chunk_digests(block) for role, block in blocks.items()})

        return work

    return make


def address(block: Array) -> int:
    """Where the elements of a contiguous array begin."""
    return block.__array_interface__["data"][0]  # type: ignore[no-any-return]


def refuse_non_finite(name: str, role: str, view: View, block: Array, start: int) -> None:
    """Raise `CheckpointError` if a block of stored elements holds NaN or infinity."""
    values = widened(block, view.dtype)
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(bad.argmax())
        raise CheckpointError(
            f"{role}: tensor {name!r} holds {values[first]} at element {start + first:,} "
            f"({int(bad.sum()):,} in this block); repair the checkpoint or exclude the tensor"
        )
