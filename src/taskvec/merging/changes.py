"""What a merge changes in its target: an edit for every tensor that may differ, as a difference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from taskvec.checkpoints.source import Source, widened
from taskvec.checkpoints.views import size
from taskvec.dtypes import DTYPES
from taskvec.merging.arithmetic import Array, result_of
from taskvec.merging.edits import Edit
from taskvec.streaming import RunOptions, Stretch, Unit, stream

_ROUNDINGS = 4  # of a method that works out the whole tensor, where it changes nothing


def changes(edits: Iterable[Edit], target: Source, precision: str) -> list[Edit]:
    """The edits of a merge that change a tensor, each as the difference that it makes.

    A sum of task vectors leaves out the target. Any other edit is as it was, and `less_target`
    takes the target off its result.
    """
    found = []
    for edit in edits:
        if not edit.dtype.is_float or not (edit.terms or edit.target_factor != 1):
            continue
        views = {"target": target.view(edit.name), **edit.views}
        is_wide = precision == "float64" or any(v.dtype.itemsize == 8 for v in views.values())
        edit = replace(edit, dtype=DTYPES["F64" if is_wide else "F32"], views=views)
        if edit.target_factor == 1 and is_difference(replace(edit, target_factor=0.0)):
            edit = replace(edit, target_factor=0.0)
        found.append(edit)
    return found


def is_difference(edit: Edit) -> bool:
    """Whether the result is a sum of task vectors."""
    is_sum = edit.election is None and edit.combination is None and edit.target_factor == 0
    has_anchor = "anchor" in edit.views
    return is_sum and all(has_anchor or edit.views[role].is_difference for role in edit.terms)


def less_target(edit: Edit, result: Array, target: Array | None) -> Array:
    """A difference, from what was worked out for an edit of `changes`.

    Args:
        edit: The edit.
        result: Stored elements of its result.
        target: Stored elements of the target, for an edit that is no difference. Elements that are
            the target's but for rounding are zero.
    """
    found = widened(result, edit.dtype)
    if is_difference(edit) or target is None:
        return found
    wide = widened(target, edit.views["target"].dtype).astype(found.dtype)
    less: Array = found - wide
    less[np.abs(less) <= _ROUNDINGS * np.finfo(found.dtype).eps * np.abs(wide)] = 0
    return less


def differing(edits: Sequence[Edit], options: RunOptions) -> set[str]:
    """Names of the edits whose difference has an element other than zero.

    A tensor is left at its first block that does.
    """

    def work(unit: Unit) -> list[tuple[int, bool]]:
        return [(s.tensor, _differs(edits[s.tensor], options)) for s in unit]

    units = ([Stretch(i, 0, size(edit.like))] for i, edit in enumerate(edits))
    found = set()
    with options.progress("compare", sum(edit.read_bytes for edit in edits)) as advance:
        for results in stream(units, lambda: work, options.workers):
            for i, differs in results:
                advance(edits[i].read_bytes)
                if differs:
                    found.add(edits[i].name)
    return found


def _differs(edit: Edit, options: RunOptions) -> bool:
    """Whether the difference of one tensor, as it would be stored, has an element besides zero."""
    count = size(edit.like)
    step = max(options.block - options.block % edit.step, edit.step)
    for start in range(0, count, step):
        stop = min(start + step, count)
        blocks: Mapping[str, Array] = {r: view.read(start, stop) for r, view in edit.views.items()}
        result = result_of(edit, blocks, start, options.precision)
        if less_target(edit, result, blocks.get("target")).any():
            return True
    return False
