"""Apply: stream the members through the combining kernel, block by block, into a sink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from taskvec.checkpoints.fingerprint import chunk_digests, tensor_digest
from taskvec.checkpoints.views import View, size
from taskvec.dtypes import DTYPES, DType
from taskvec.errors import FamilyError, OutputError, StaleError
from taskvec.methods.method import Block
from taskvec.methods.parameters import Resolved
from taskvec.methods.selection import Selection
from taskvec.statistics.collect import address, describe, refuse_non_finite
from taskvec.statistics.trim import Threshold
from taskvec.streaming import (
    BLOCK,
    CHUNK,
    Progress,
    Unit,
    cut,
    default_threads,
    row_step,
    silent,
    stream,
)

Array = np.ndarray[Any, Any]


LARGEST = 0x7FFFFFFF  # bits of the largest magnitude
EVERYTHING = Threshold(0, 2**62)


@dataclass(frozen=True, slots=True)
class Voter:
    """One task in one tensor, where entries are selected.

    Attributes:
        weight: w_t.
        scale: λ_t · rescale_t.
        share: |λ_t|.
        threshold: Smallest magnitude that is kept.
        ceiling: Bits of the largest magnitude that is kept.
        bound: An entry is kept if its draw, in [0, 2^32), is below.
        key: What draws depend on besides the entry.
    """

    weight: float
    scale: float
    share: float
    threshold: Threshold
    ceiling: int
    bound: int
    key: int


@dataclass(frozen=True, slots=True)
class Election:
    """How the pure vectors of one tensor are sparsified and combined; see `kernels.elect`.

    Attributes:
        voters: In the order of the edit's terms.
        election: `none`, `mass` or `count`.
        merge: `sum`, `mean` or `weighted`.
    """

    voters: tuple[Voter, ...]
    election: str
    merge: str


@dataclass(frozen=True, slots=True)
class Combination:
    """A method's own way from blocks to the merged block, with what it is told besides them.

    Attributes:
        combine: See `Method`.
        alignment: See `Method`.
        weights: w_t by task, every task of the merge.
        scales: λ_t by task, in the same order.
        parameters: See `Block`.
        seed: See `Block`.
        selection: See `Block`.
    """

    combine: Callable[[Block], Array]
    alignment: str
    weights: Mapping[str, float]
    scales: Mapping[str, float]
    parameters: Mapping[str, Resolved]
    seed: int
    selection: Selection | None = None


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
        election: How entries are selected; None: `terms` are added as they are.
        combination: The method's own way; `terms` then only says which tasks are read.
        named: Members by role, for messages; those that are not in it go by their roles.
    """

    name: str
    dtype: DType
    views: Mapping[str, View]
    terms: Mapping[str, float] = field(default_factory=dict)
    target_factor: float = 1.0
    must_equal: bool = False
    expected: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    election: Election | None = None
    combination: Combination | None = None

    def who(self, role: str) -> str:
        """A member in words."""
        return self.named.get(role, describe(role))

    @property
    def like(self) -> View:
        """The view whose shape the result has."""
        return next(iter(self.views.values()))

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it; a view that two roles share counts once."""
        return size(self.like) * sum(view.dtype.itemsize for view in set(self.views.values()))

    @property
    def step(self) -> int:
        """What it may be cut at multiples of, in elements."""
        alignment = "element" if self.combination is None else self.combination.alignment
        if alignment == "element":
            return CHUNK
        if alignment == "row":
            return row_step(self.like.shape)
        return max(CHUNK, -(-size(self.like) // CHUNK) * CHUNK)


class Sink(Protocol):
    """Takes the result: a staged folder, or nothing but digests."""

    def write(self, tensor: int, start: int, block: Array) -> None:
        """Elements from `start` on of the tensor with this index; called from several threads."""

    def complete(self, tensor: int, record: Record) -> None:
        """Every element of the tensor was given to `write`; called from one thread."""


class Nowhere:
    """A sink that keeps nothing: digests are all that is wanted."""

    def write(self, tensor: int, start: int, block: Array) -> None:
        """Drop the block."""

    def complete(self, tensor: int, record: Record) -> None:
        """Nothing to do."""


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
        units = cut(sizes, block, [edits[i].step for i in todo])
        for parts in stream(units, make_worker, threads or default_threads()):
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
                f"{edit.who(role)}: weights of tensor {edit.name!r} are not those that were "
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


def result_of(
    edit: Edit,
    blocks: Mapping[str, Array],
    start: int,
    precision: str,
    into: tuple[Array, DType] | None = None,
) -> Array:
    """The merged block, rounded to the output's dtype, stored elements, shape (n,).

    Args:
        edit: What becomes of the tensor.
        blocks: The same elements of every view, by role.
        start: Which element is the first.
        precision: `float32` or `float64`.
        into: Where floating-point elements go, shape (n,), and the dtype that they are stored as;
            None: a new array, in the output's dtype.

    Raises:
        CheckpointError, FamilyError, OutputError: see `apply`.
    """
    if edit.must_equal:
        reference = edit.views["target"]
        for role, block in blocks.items():
            if not np.array_equal(block, blocks["target"]):
                raise FamilyError(
                    f"{edit.who(role)}: {reference.dtype.name} tensor {edit.name!r} differs from "
                    "the target's; what is not floating-point must be equal, or be excluded"
                )
    if not edit.dtype.is_float:
        return blocks["target"]
    if into is None:
        count = len(next(iter(blocks.values())))
        into = np.empty(count, edit.dtype.storage), edit.dtype
    work = _combine if edit.election is None else _elect
    if edit.combination is not None and edit.terms:
        work = _by_method
    if not work(edit, blocks, start, precision, into):
        for role, block in blocks.items():
            refuse_non_finite(edit.name, edit.who(role), edit.views[role], block, start)
        raise OutputError(
            f"tensor {edit.name!r} overflows {edit.dtype.config_name}; "
            "lower the scale or choose a wider out.dtype"
        )
    return into[0]


class _Operands(NamedTuple):
    """Blocks as kernels take them: target, anchor, tasks; 0 where there is none."""

    addresses: Array
    codes: Array
    differences: Array


def _operands(edit: Edit, blocks: Mapping[str, Array]) -> _Operands:
    count = 2 + len(edit.terms)
    found = _Operands(
        np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.bool_)
    )
    for row, role in enumerate(("target", "anchor", *edit.terms)):
        if role in blocks:
            found.addresses[row] = address(blocks[role])
            found.codes[row] = edit.views[role].dtype.code
            found.differences[row] = edit.views[role].is_difference
    return found


def _scratch(edit: Edit, precision: str, rows: int) -> Array:
    from taskvec.kernels.gram import STRETCH

    is_wide = precision == "float64" or any(v.dtype.itemsize == 8 for v in edit.views.values())
    return np.empty((rows, STRETCH), np.float64 if is_wide else np.float32)


def _combine(
    edit: Edit, blocks: Mapping[str, Array], start: int, precision: str, into: tuple[Array, DType]
) -> bool:
    """θ = c_target θ_target + Σ_t c_t τ_t; False if an element is not finite."""
    from taskvec.kernels.combine import TARGET, TASKS, combine

    scratch = _scratch(edit, precision, 3)
    coefficients = np.zeros(TASKS + len(edit.terms), scratch.dtype)
    coefficients[TARGET] = edit.target_factor
    coefficients[TASKS:] = list(edit.terms.values())
    out, dtype = into
    result = address(out), edit.dtype.code, dtype.code
    return combine(*_operands(edit, blocks), coefficients, len(out), scratch, *result)


def _by_method(
    edit: Edit, blocks: Mapping[str, Array], start: int, precision: str, into: tuple[Array, DType]
) -> bool:
    """The same by the method's own function."""
    from taskvec.kernels.combine import combine, probe
    from taskvec.kernels.convert import widen
    from taskvec.kernels.select import load_vector

    assert edit.combination is not None
    out, dtype = into
    told, scratch = edit.combination, _scratch(edit, precision, 3)
    rows = np.zeros((2 + len(told.weights), len(out)), scratch.dtype)  # anchor, tasks, target

    def place(role: str) -> tuple[int, int]:
        return address(blocks[role]), edit.views[role].dtype.code

    anchor = place("anchor") if "anchor" in blocks else None
    for row, (task, weight) in enumerate(told.weights.items(), start=1):
        role = f"task:{task}"
        if role not in edit.terms:
            continue
        is_whole = anchor is None or edit.views[role].is_difference
        addresses, codes = np.array([anchor or (0, 0), place(role)]).T.copy()
        scale = scratch.dtype.type(weight)
        load_vector(addresses, codes, is_whole, scale, 0, len(out), rows, row)
    start_address, code = place("target")
    widen(code, start_address, 0, len(out), rows[-1])
    vectors, target = rows[1:-1], rows[-1]
    with np.errstate(over="ignore"):
        scales = np.array(list(told.scales.values()), scratch.dtype)
    if not np.isfinite(scales).all() or any(probe(row, len(out)) for row in rows[1:] if len(row)):
        return False
    shape = edit.like.shape
    if told.alignment != "tensor":
        shape = (-1,) if told.alignment == "element" else (-1, max((1, *shape[-1:])))
    block = Block(
        name=edit.name,
        target=target.reshape(shape),
        vectors=vectors.reshape(len(vectors), *target.reshape(shape).shape),
        tasks=tuple(told.weights),
        scales=scales,
        parameters=told.parameters,
        seed=told.seed,
        start=start,
        has_anchor=anchor is not None,
        selection=told.selection,
    )
    merged = np.ascontiguousarray(told.combine(block), scratch.dtype).reshape(-1)
    assert len(merged) == len(out), f"combine gave {merged.shape} for {out.shape}"
    kind = DTYPES["F64" if scratch.dtype.itemsize == 8 else "F32"].code
    return combine(
        np.array([address(merged), 0]),
        np.array([kind, 0]),
        np.zeros(2, np.bool_),
        np.array([1, 0], scratch.dtype),
        len(out),
        scratch,
        address(out),
        edit.dtype.code,
        dtype.code,
    )


def _elect(
    edit: Edit, blocks: Mapping[str, Array], start: int, precision: str, into: tuple[Array, DType]
) -> bool:
    """The same where entries are selected and signs elected."""
    from taskvec.kernels import elect

    assert edit.election is not None
    out, dtype = into
    voters = edit.election.voters
    rows = _scratch(edit, precision, 3 + len(voters))
    kinds = {"none": elect.NONE, "mass": elect.MASS, "count": elect.COUNT}
    merges = {"sum": elect.SUM, "mean": elect.MEAN, "weighted": elect.WEIGHTED}
    is_weighted = edit.election.merge == "weighted"
    scales = [v.scale for v in voters] + [v.share for v in voters if is_weighted]
    return elect.elect(
        *_operands(edit, blocks),
        np.array([v.weight for v in voters], rows.dtype),
        np.array(scales, rows.dtype),
        np.array([(v.threshold.lower, v.ceiling, v.bound) for v in voters], np.uint64),
        np.array([v.threshold.left(start) for v in voters], np.int64),
        np.array([v.key for v in voters], np.uint64),
        kinds[edit.election.election],
        merges[edit.election.merge],
        start,
        len(out),
        rows,
        address(out),
        edit.dtype.code,
        dtype.code,
    )
