"""Apply: stream the members through the combining kernel, block by block, into a sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from taskvec.checkpoints.fingerprint import chunk_digests, tensor_digest
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DType
from taskvec.errors import FamilyError, OutputError, StaleError
from taskvec.statistics.collect import address, describe, refuse_non_finite
from taskvec.streaming import BLOCK, Progress, Unit, cut, default_threads, silent, stream

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Edit:
    """What becomes of one tensor.

    Attributes:
        name: Parameter name.
        dtype: Element type of the result.
        views: Everything that is read, by role. The result starts from `target`, if that is there.
        terms: c_t by role of a task, each to be multiplied with the task's (vector or) tensor;
            empty: unchanged.
        target_factor: c_target.
        must_equal: Whether all views must hold the same elements (integers).
        expected: Digest that each view must have, where one is known.
    """

    name: str
    dtype: DType
    views: Mapping[str, View]
    terms: Mapping[str, float] = field(default_factory=dict)
    target_factor: float = 1.0
    must_equal: bool = False
    expected: Mapping[str, str] = field(default_factory=dict)

    @property
    def like(self) -> View:
        """The view whose shape the result has."""
        return next(iter(self.views.values()))

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it; a view that two roles share counts once."""
        return size(self.like) * sum(view.dtype.itemsize for view in set(self.views.values()))


class Sink(Protocol):
    """Takes the result: a staged folder, or nothing but digests."""

    def write(self, tensor: int, start: int, block: Array) -> None:
        """Elements from `start` on of the tensor with this index; called from several threads."""

    def complete(self, tensor: int, record: Record) -> None:
        """Every element of the tensor was given to `write`; called from one thread."""


Record = dict[str, str]  # digest of one tensor in each role that was read, and in "output"


class _Part(NamedTuple):
    tensor: int
    start: int
    elements: int
    digests: dict[str, bytes]
    output: bytes


def apply(
    edits: Sequence[Edit],
    sink: Sink,
    *,
    skip: Mapping[str, Record] | None = None,
    precision: str = "float32",
    threads: int | None = None,
    block: int = BLOCK,
    progress: Progress = silent,
) -> dict[str, Record]:
    """Work out every tensor and hand it to the sink.

    Args:
        edits: One for each tensor of the output, in the sink's numbering.
        sink: Where blocks go.
        skip: Records of tensors that the sink already has.
        precision: `float32` or `float64`; float64 tensors are always worked out in float64.
        threads: Default: the processors there are, at most 8.
        block: Elements worked on at once; changes no bit of the result.
        progress: Told the bytes read.

    Returns:
        Digests by tensor name, then by role; "output" is the result's.

    Raises:
        CheckpointError: NaN or infinite weights.
        FamilyError: integer tensors differ.
        OutputError: a result is too large for its dtype.
        StaleError: a weight is not what it was when its digest was taken.
    """
    records = dict(skip or {})
    todo = [i for i, edit in enumerate(edits) if edit.name not in records]
    sizes = [size(edits[i].like) for i in todo]
    waiting: dict[int, list[_Part]] = {}
    with progress("merge", sum(edits[i].read_bytes for i in todo)) as advance:
        make_worker = _make_worker(edits, todo, sink, precision)
        for parts in stream(cut(sizes, block), make_worker, threads or default_threads()):
            for part in parts:
                held = waiting.setdefault(part.tensor, [])
                held.append(part)
                edit = edits[part.tensor]
                if sum([p.elements for p in held]) < size(edit.like):
                    continue
                held.sort(key=lambda p: p.start)
                records[edit.name] = _record(edit, held)
                sink.complete(part.tensor, records[edit.name])
                advance(edit.read_bytes)
                del waiting[part.tensor]
    return records


def _record(edit: Edit, parts: Sequence[_Part]) -> Record:
    record = {role: tensor_digest([p.digests[role] for p in parts]) for role in edit.views}
    for role, digest in record.items():
        if edit.expected.get(role, digest) != digest:
            raise StaleError(
                f"{describe(role)}: weights of tensor {edit.name!r} are not those that were "
                "measured before; scan again (--rescan)"
            )
    return record | {"output": tensor_digest([p.output for p in parts])}


def _make_worker(
    edits: Sequence[Edit], todo: Sequence[int], sink: Sink, precision: str
) -> Callable[[], Callable[[Unit], list[_Part]]]:
    def make() -> Callable[[Unit], list[_Part]]:
        def work(unit: Unit) -> list[_Part]:
            parts = []
            for place, start, stop in unit:
                tensor = todo[place]
                edit = edits[tensor]
                blocks, digests = _read(edit, start, stop)
                out = result_of(edit, blocks, start, precision)
                sink.write(tensor, start, out)
                parts.append(_Part(tensor, start, stop - start, digests, chunk_digests(out)))
            return parts

        return work

    return make


def _read(edit: Edit, start: int, stop: int) -> tuple[dict[str, Array], dict[str, bytes]]:
    blocks: dict[str, Array] = {}
    digests: dict[str, bytes] = {}
    first: dict[View, str] = {}
    for role, view in edit.views.items():
        same = first.setdefault(view, role)
        blocks[role] = view.read(start, stop) if same == role else blocks[same]
        digests[role] = chunk_digests(blocks[role]) if same == role else digests[same]
    return blocks, digests


def result_of(edit: Edit, blocks: Mapping[str, Array], start: int, precision: str) -> Array:
    """The merged block, stored elements in the output's dtype, shape (n,).

    Args:
        edit: What becomes of the tensor.
        blocks: The same elements of every view, by role.
        start: Which element is the first.
        precision: `float32` or `float64`.

    Raises:
        CheckpointError, FamilyError, OutputError: see `apply`.
    """
    if edit.must_equal:
        reference = edit.views["target"]
        for role, block in blocks.items():
            if not np.array_equal(block, blocks["target"]):
                raise FamilyError(
                    f"{describe(role)}: {reference.dtype.name} tensor {edit.name!r} differs from "
                    "the target's; what is not floating-point must be equal, or be excluded"
                )
    if not edit.dtype.is_float:
        return blocks["target"]
    count = len(next(iter(blocks.values())))
    out = np.empty(count, edit.dtype.storage)
    if not _combine(edit, blocks, precision, out):
        for role, block in blocks.items():
            refuse_non_finite(edit.name, describe(role), edit.views[role], block, start)
        raise OutputError(
            f"tensor {edit.name!r} overflows {edit.dtype.config_name}; "
            "lower the scale or choose a wider out.dtype"
        )
    return out


def _combine(edit: Edit, blocks: Mapping[str, Array], precision: str, out: Array) -> bool:
    from taskvec.kernels.combine import ANCHOR, TARGET, TASKS, combine
    from taskvec.kernels.gram import STRETCH

    is_wide = precision == "float64" or any(v.dtype.itemsize == 8 for v in edit.views.values())
    scratch = np.empty((3, STRETCH), np.float64 if is_wide else np.float32)
    addresses = np.zeros(TASKS + len(edit.terms), np.int64)
    codes = np.zeros(len(addresses), np.int64)
    differences = np.zeros(len(addresses), np.bool_)
    coefficients = np.zeros(len(addresses), scratch.dtype)
    coefficients[TARGET] = edit.target_factor
    rows = {TARGET: "target", ANCHOR: "anchor"} | dict(enumerate(edit.terms, start=TASKS))
    for row, role in rows.items():
        if role in blocks:
            addresses[row] = address(blocks[role])
            codes[row] = edit.views[role].dtype.code
            differences[row] = edit.views[role].is_difference
    coefficients[TASKS:] = list(edit.terms.values())
    result = address(out), edit.dtype.code
    return combine(addresses, codes, differences, coefficients, len(out), scratch, *result)
