"""The collecting pass: Gram matrices, sign counts and digests of a family in one reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from taskvec.checkpoints.fingerprint import chunk_digests, tensor_digest
from taskvec.checkpoints.views import View, size
from taskvec.errors import CheckpointError
from taskvec.streaming import BLOCK, CHUNK, Progress, Unit, cut, default_threads, silent, stream

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """One floating-point tensor of a family, as each member has it.

    Attributes:
        name: Parameter name.
        views: By role: `anchor`, `base` if there is one, `task:NAME` for each task.
    """

    name: str
    views: Mapping[str, View]


@dataclass(frozen=True, slots=True)
class Collected:
    """What one reading of a family leaves; N tensors, K tasks, tasks in name order.

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
    tensor: int
    chunk: int
    products: Array
    signs: Array
    digests: list[bytes]


def roles_of(tasks: Sequence[str], with_base: bool) -> list[str]:
    """Roles in the order in which statistics know them: anchor, base, tasks by name."""
    return ["anchor", *(["base"] if with_base else []), *(f"task:{t}" for t in sorted(tasks))]


def collect(
    sources: Sequence[Sources],
    tasks: Sequence[str],
    *,
    with_base: bool,
    threads: int | None = None,
    block: int = BLOCK,
    progress: Progress = silent,
) -> Collected:
    """Read every tensor of every member once.

    Args:
        sources: Floating-point tensors.
        tasks: Task names.
        with_base: Whether the family has a base; without one τ_instr is zero.
        threads: Default: the processors there are, at most 8.
        block: Elements worked on at once; changes no bit of the result.
        progress: Told the bytes read.

    Raises:
        CheckpointError: NaN or infinite weights; the tensor and the member are named.
    """
    roles = roles_of(tasks, with_base)
    k = len(tasks)
    gram = np.zeros((len(sources), 2 + k, 2 + k))
    signs = np.zeros((len(sources), k, k, 2), np.int64)
    digests: dict[str, dict[str, str]] = {role: {} for role in roles}
    sizes = [size(s.views["anchor"]) for s in sources]
    waiting: dict[int, list[_Part]] = {}
    total = sum(
        n * sum(s.views[r].dtype.itemsize for r in roles)
        for n, s in zip(sizes, sources, strict=True)
    )
    with progress("scan", total) as advance:
        worker = _make_worker(sources, roles, k)
        for parts in stream(cut(sizes, block), worker, threads or default_threads()):
            for part in parts:
                source = sources[part.tensor]
                held = waiting.setdefault(part.tensor, [])
                held.append(part)
                chunks = -(-sizes[part.tensor] // CHUNK)
                if sum(len(p.products) for p in held) < chunks:
                    continue
                held.sort(key=lambda p: p.chunk)
                for p in held:
                    for (
                        products
                    ) in p.products:  # one after the other, so that the order of adding is fixed
                        gram[part.tensor] += products
                    signs[part.tensor] += p.signs
                for r, role in enumerate(roles):
                    digests[role][source.name] = tensor_digest(p.digests[r] for p in held)
                advance(sizes[part.tensor] * sum(source.views[r].dtype.itemsize for r in roles))
                del waiting[part.tensor]
    gram += np.triu(gram, 1).transpose(0, 2, 1)
    signs += np.triu(signs.transpose(3, 0, 1, 2), 1).transpose(1, 3, 2, 0)
    return Collected(gram, signs[..., 0], signs[..., 1], digests)


def _make_worker(
    sources: Sequence[Sources], roles: Sequence[str], k: int
) -> Callable[[], Callable[[Unit], list[_Part]]]:
    from taskvec.kernels.gram import STRETCH, gram

    rows = [0 if role == "anchor" else 1 if role == "base" else None for role in roles]
    places = [row if row is not None else 2 + i - (len(roles) - k) for i, row in enumerate(rows)]

    def make() -> Callable[[Unit], list[_Part]]:
        scratch = np.zeros((2 + k, STRETCH), np.float32)
        wide = np.zeros((2 + k, STRETCH), np.float64)

        def part_of(tensor: int, start: int, stop: int) -> _Part:
            views = sources[tensor].views
            blocks = [views[role].read(start, stop) for role in roles]
            addresses = np.zeros(2 + k, np.int64)
            codes = np.zeros(2 + k, np.int64)
            for place, role, block in zip(places, roles, blocks, strict=True):
                addresses[place] = block.ctypes.data
                codes[place] = views[role].dtype.code
            chunks = -(-(stop - start) // CHUNK)
            products = np.empty((chunks, 2 + k, 2 + k))
            signs = np.empty((chunks, k, k, 2), np.int64)
            is_double = any(views[role].dtype.itemsize == 8 for role in roles)
            gram(addresses, codes, stop - start, wide if is_double else scratch, products, signs)
            if not np.isfinite(products.sum()):
                _check_finite(sources[tensor], roles, blocks, start)
                gram(
                    addresses, codes, stop - start, wide, products, signs
                )  # squares overflowed float32
            return _Part(
                tensor, start // CHUNK, products, signs.sum(0), [chunk_digests(b) for b in blocks]
            )

        return lambda unit: [part_of(*stretch) for stretch in unit]

    return make


def _check_finite(
    source: Sources, roles: Sequence[str], blocks: Sequence[Array], start: int
) -> None:
    for role, block in zip(roles, blocks, strict=True):
        refuse_non_finite(source.name, role, source.views[role], block, start)


def refuse_non_finite(name: str, role: str, view: View, block: Array, start: int) -> None:
    """Raise `CheckpointError` if a block of stored elements holds NaN or infinity."""
    if view.dtype.name == "BF16":
        values = (block.astype(np.uint32) << 16).view(np.float32)
    else:
        values = block.view(np.float16) if view.dtype.name == "F16" else block
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(bad.argmax())
        raise CheckpointError(
            f"{role}: tensor {name!r} holds {values[first]} at element {start + first:,} "
            f"({int(bad.sum()):,} in this block); repair the checkpoint or exclude the tensor"
        )
