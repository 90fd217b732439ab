"""Apply: stream the members through the edits, block by block, into a sink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from taskvec.checkpoints.fingerprint import chunk_digests, tensor_digest
from taskvec.checkpoints.views import View, size
from taskvec.errors import StaleError
from taskvec.merging.arithmetic import Array, result_of
from taskvec.merging.edits import Edit
from taskvec.merging.steps import Decided
from taskvec.streaming import RunOptions, Stretch, gather

Record = dict[str, str]  # digest of one tensor in each role that was read, and in "output"


class Sink(Protocol):
    """Takes the result: a folder, a file, a model in memory, or nothing but digests."""

    def write(self, tensor: int, start: int, block: Array) -> None:
        """Elements from `start` on of the tensor with this index; called from several threads."""

    def complete(self, tensor: int, record: Record) -> None:
        """Every element of the tensor was given to `write`; called from one thread."""


class Nowhere:
    """A sink that drops everything, where only digests are wanted."""

    def write(self, tensor: int, start: int, block: Array) -> None:
        """Drop the block."""

    def complete(self, tensor: int, record: Record) -> None:
        """Nothing to do."""


class InMemory:
    """A sink of arrays of stored elements, one for each edit."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.arrays = [np.empty(size(e.like), e.dtype.storage) for e in edits]

    def write(self, tensor: int, start: int, block: Array) -> None:
        """See `Sink`."""
        self.arrays[tensor][start : start + len(block)] = block

    def complete(self, tensor: int, record: Record) -> None:
        """Nothing to do."""


class _Part(NamedTuple):
    digests: dict[str, bytes]
    output: bytes


def apply(
    decided: Decided,
    sink: Sink,
    *,
    skip: Mapping[str, Record] | None = None,
    label: str = "merge",
) -> dict[str, Record]:
    """Work out every tensor of a merge and hand it to the sink.

    Args:
        decided: What was decided; tensors are numbered in the order of its edits.
        sink: Where blocks go.
        skip: Records of tensors that the sink already has.
        label: What this is called in progress.

    Returns:
        Digests by tensor name, then by role; "output" is the result's.

    Raises:
        CheckpointError: NaN or infinite weights.
        FamilyError: integer tensors differ.
        OutputError: a result is too large for its dtype.
        StaleError: a weight is not what it was when its digest was taken, or a file changed.
    """
    with decided.prepared.members.at_rest():
        edits = list(decided.edits.values())
        return apply_edits(edits, sink, decided.prepared.options, skip=skip, label=label)


def apply_edits(
    edits: Sequence[Edit],
    sink: Sink,
    options: RunOptions,
    *,
    skip: Mapping[str, Record] | None = None,
    label: str = "merge",
) -> dict[str, Record]:
    """As `apply`, for single tensors."""
    records = dict(skip or {})
    todo = [i for i, edit in enumerate(edits) if edit.name not in records]
    wanted = [edits[i] for i in todo]

    def work(stretch: Stretch) -> _Part:
        place, start, stop = stretch
        edit = wanted[place]
        blocks, digests = _read(edit, start, stop)
        out = result_of(edit, blocks, start, options.precision)
        sink.write(todo[place], start, out)
        return _Part(digests, chunk_digests(out))

    sizes, steps = [size(edit.like) for edit in wanted], [edit.step for edit in wanted]
    with options.progress(label, sum([edit.read_bytes for edit in wanted])) as advance:
        for place, parts in gather(sizes, lambda: work, options, steps):
            edit = wanted[place]
            records[edit.name] = _record(edit, parts)
            sink.complete(todo[place], records[edit.name])
            advance(edit.read_bytes)
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


def _read(edit: Edit, start: int, stop: int) -> tuple[dict[str, Array], dict[str, bytes]]:
    blocks: dict[str, Array] = {}
    digests: dict[str, bytes] = {}
    first: dict[View, str] = {}
    for role, view in edit.views.items():
        same = first.setdefault(view, role)
        blocks[role] = view.read(start, stop) if same == role else blocks[same]
        digests[role] = chunk_digests(blocks[role]) if same == role else digests[same]
    return blocks, digests
