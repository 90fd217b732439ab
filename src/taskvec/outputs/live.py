"""Merging into a model that is in memory: a module, or a dict of torch tensors or NumPy arrays.

The result goes into the parameters, whose device and dtype stay the same. Nothing
is written before everything was computed once: names, shapes and dtypes fit, no weight is NaN, no
result overflows. Parameters that share memory are written once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.memory import (
    ArrayView,
    DeviceView,
    Held,
    Module,
    is_torch,
    view_of,
)
from taskvec.checkpoints.shards import OutputTensor, Shard
from taskvec.dtypes import DType
from taskvec.errors import UsageError
from taskvec.extras import require
from taskvec.family.members import is_cache
from taskvec.merging.apply import Nowhere, Record, apply, apply_edits
from taskvec.merging.arithmetic import Array
from taskvec.merging.decide import decide
from taskvec.merging.edits import Edit
from taskvec.merging.prepare import prepare
from taskvec.merging.steps import Decided, Prepared
from taskvec.outputs.run import Merged, warnings_of
from taskvec.recipes.recipe import Recipe
from taskvec.statistics.collect import describe
from taskvec.streaming import RunOptions


class Extent(NamedTuple):
    """The memory that a tensor spans."""

    device: str
    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def overlaps(self, other: Extent) -> bool:
        """Whether two tensors have a byte in common, or might have."""
        return self.device == other.device and self.start < other.stop and other.start < self.stop


class Parameters:
    """A sink that writes into tensors or arrays; see `Sink`."""

    def __init__(self, tensors: list[Any]) -> None:
        self.tensors = [tensor.detach() if is_torch(tensor) else tensor for tensor in tensors]
        self.gathered: dict[int, Any] = {}

    def write(self, tensor: int, start: int, block: Array) -> None:
        """See `Sink`."""
        into, stop = self.tensors[tensor], start + len(block)
        if not is_torch(into):
            flat = into.reshape(-1) if into.flags.c_contiguous else into.flat
            flat[start:stop] = block.view(into.dtype)
            return
        if not into.is_contiguous():  # torch cannot address a stretch of it: put in when whole
            torch = require("torch", "eval")
            whole = torch.empty(into.shape, dtype=into.dtype)
            into = self.gathered.setdefault(tensor, whole)
        into.view(-1)[start:stop].copy_(_as_torch(block, into.dtype))

    def complete(self, tensor: int, record: Record) -> None:
        """See `Sink`."""
        if tensor in self.gathered:
            self.tensors[tensor].copy_(self.gathered.pop(tensor))


def run_into(
    recipe: Recipe, into: Module | Mapping[str, Any], options: RunOptions = RunOptions()
) -> Merged:
    """Merge by a recipe into a model in memory.

    Everything is read twice: once to see that it can be done, once to do it.

    Args:
        recipe: Checked recipe.
        into: A module, or tensors or arrays by name; they keep dtype and device.
        options: How to run.

    Raises:
        UsageError: a dtype is asked for, or names, shapes or dtypes do not fit.
        TaskvecError: anything else foreseen; nothing was written then, unless a member changed
            between the two readings.
    """
    if recipe.out.form == "lora":
        raise UsageError("an adapter is a folder; give a path, or remove form")
    if recipe.out.dtype is not None:
        raise UsageError("dtype is for a folder; parameters in memory keep theirs: remove it")
    prepared = prepare(recipe, options)
    tensors = dict(sorted(parameters_of(into).items()))
    shard = Shard("", b"", tuple(_outputs(prepared, tensors)))
    extents = {name: _extent(tensor) for name, tensor in tensors.items()}
    first = _first_names(extents)
    decided = decide(replace(prepared, shards=[shard]))
    _check_reading(decided.edits, extents)
    _check_names(decided.edits, tensors, first)
    records = apply(decided, Nowhere(), label="check")
    for name, record in records.items():
        if record["output"] != records.get(first[name], record)["output"]:
            raise UsageError(
                f"out: {name!r} and {first[name]!r} share their memory, but the results differ; "
                "untie them first"
            )
    _write(decided, records, tensors, first)
    outputs = {t.name: (t.dtype.name, t.shape) for t in shard.tensors}
    identity = fingerprint({name: r["output"] for name, r in records.items()}, outputs)
    anchor = {name: record["anchor"] for name, record in records.items() if "anchor" in record}
    known = {"anchor": {"digests": {**decided.table.digests.get("anchor", {}), **anchor}}}
    return Merged(None, identity, decided.table, warnings_of(decided, records, known))


def _write(
    decided: Decided,
    records: Mapping[str, Record],
    tensors: Mapping[str, Any],
    first: Mapping[str, str],
) -> None:
    """Work out everything once more, into the parameters; each memory is written once."""
    edits = decided.edits
    todo = [
        replace(edit, expected={k: v for k, v in records[name].items() if k != "output"})
        for name, edit in edits.items()
        if first[name] == name or first[name] not in edits
    ]
    with decided.prepared.members.at_rest():
        sink = Parameters([tensors[edit.name] for edit in todo])
        apply_edits(todo, sink, decided.prepared.options)


def parameters_of(into: Module | Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and buffers of a model in memory, by name.

    Raises:
        UsageError: its state dict has what is neither.
    """
    if not isinstance(into, Module):
        return dict(into)
    module: Any = into
    live = dict(module.named_buffers(remove_duplicate=False))
    live |= dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for name in module.state_dict():
        if name not in live:  # a hook makes it up, so that writing it would change nothing
            raise UsageError(f"out: {name!r} of its state dict is not a parameter or buffer")
        found[name] = live[name]
    return found


def _outputs(prepared: Prepared, tensors: Mapping[str, Any]) -> Iterator[OutputTensor]:
    """The tensors of the result, each in the dtype of the parameter that it goes to."""
    wanted = [tensor for shard in prepared.shards for tensor in shard.tensors]
    missing = sorted(t.name for t in wanted if t.name not in tensors)
    if missing:
        raise UsageError(
            f"out: lacks tensor {missing[0]!r} of the result ({len(missing)} missing); "
            "give a model of the same architecture"
        )
    for tensor in wanted:
        into = tensors[tensor.name]
        view = view_of(tensor.name, into, "out")
        if view.shape != tensor.shape:
            raise UsageError(
                f"out: tensor {tensor.name!r} has shape {list(view.shape)}, the result has "
                f"{list(tensor.shape)}; give a model of the same architecture"
            )
        if view.dtype != tensor.dtype and not (view.dtype.is_float and tensor.dtype.is_float):
            raise UsageError(
                f"out: tensor {tensor.name!r} is {view.dtype.name}, the result is "
                f"{tensor.dtype.name}; give a model of the same architecture"
            )
        if not is_torch(into) and not into.flags.writeable:
            raise UsageError(f"out: array {tensor.name!r} is read-only; give a copy of it")
        yield OutputTensor(tensor.name, view.dtype, tensor.shape)


def _check_names(
    edits: Mapping[str, Edit], tensors: Mapping[str, Any], first: Mapping[str, str]
) -> None:
    """Refuse parameters that the result says nothing of, unless they share what is written."""
    written = {first[name] for name in edits}
    extra = [n for n in tensors if n not in edits and first[n] not in written]
    held = Held("out", {n: view_of(n, tensors[n], "out") for n in tensors}, {}, None)
    extra = sorted(n for n in extra if not is_cache(held.tensors[n]))
    if extra:
        raise UsageError(
            f"out: has tensor {extra[0]!r}, which the result lacks ({len(extra)} extra); "
            "give a model of the same architecture"
        )


def _extent(tensor: Any) -> Extent:
    if is_torch(tensor):
        start, itemsize = tensor.data_ptr(), tensor.element_size()
        device, strides = str(tensor.device), tuple(step * itemsize for step in tensor.stride())
    else:
        start, itemsize = tensor.__array_interface__["data"][0], tensor.itemsize
        device, strides = "cpu", tensor.strides
    shape = tuple(tensor.shape)
    if 0 in shape:
        return Extent(device, start, start, shape, strides)
    reach = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
    low = start + sum(step for step in reach if step < 0)
    high = start + sum(step for step in reach if step > 0) + itemsize
    return Extent(device, low, high, shape, strides)


def _first_names(extents: Mapping[str, Extent]) -> dict[str, str]:
    """The first of the names that a parameter has, by name.

    Raises:
        UsageError: two parameters share a part of their memory.
    """
    first: dict[str, str] = {}
    before: tuple[str, Extent] | None = None
    reached = 0
    for name, extent in sorted(extents.items(), key=lambda item: (*item[1][:3], item[0])):
        if extent.start == extent.stop:
            first[name] = name
            continue
        same_device = before is not None and before[1].device == extent.device
        if before is not None and before[1] == extent:
            first[name] = before[0]
            continue
        if before is not None and same_device and extent.start < reached:
            raise UsageError(
                f"out: {name!r} and {before[0]!r} share part of their memory; give each its own"
            )
        first[name], before, reached = name, (name, extent), extent.stop
    return first


def _check_reading(edits: Mapping[str, Edit], extents: Mapping[str, Extent]) -> None:
    """Refuse to write what is read elsewhere: a parameter may be read only where it is written."""
    written = sorted(extent for extent in extents.values() if extent.start < extent.stop)
    for name, edit in edits.items():
        for role, view in edit.views.items():
            for leaf in _leaves(view):
                extent = _extent(leaf.array if isinstance(leaf, ArrayView) else leaf.flat)
                itself = leaf is view and extent[:3] == extents[name][:3]
                if not itself and _touches(extent, written):
                    raise UsageError(
                        f"out: tensor {name!r} of {describe(role)} is made of other tensors of "
                        "out, which are written over; give a copy as out"
                    )


def _leaves(value: object) -> Iterator[ArrayView | DeviceView]:
    """The tensors in memory that a view reads, directly or through others."""
    if isinstance(value, (ArrayView, DeviceView)):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    elif is_dataclass(value) and not isinstance(value, DType):
        for part in fields(value):
            yield from _leaves(getattr(value, part.name))


def _touches(extent: Extent, written: list[Extent]) -> bool:
    """Whether memory is written to; `written` is sorted and does not overlap."""
    if extent.start == extent.stop:
        return False
    place = bisect_left(written, extent)
    return any(extent.overlaps(other) for other in written[max(0, place - 1) : place + 1])


def _as_torch(block: Array, dtype: Any) -> Any:
    """Stored elements as a torch tensor of a dtype, sharing their memory."""
    torch = require("torch", "eval")
    block = block if block.flags.writeable else block.copy()  # torch warns of what is read-only
    if dtype == torch.bfloat16:
        return torch.from_numpy(block.view(np.int16)).view(dtype)
    return torch.from_numpy(block.view(str(dtype).removeprefix("torch.")))
