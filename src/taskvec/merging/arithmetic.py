"""The arithmetic of one block: from the blocks that an edit reads to the merged block, rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from taskvec.dtypes import DTYPES, DType
from taskvec.errors import FamilyError, OutputError
from taskvec.merging.edits import Edit
from taskvec.methods.method import Block
from taskvec.statistics.collect import address, refuse_non_finite

Array = np.ndarray[Any, Any]


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
    """Blocks as kernels take them: target, anchor, tasks; 0 if absent."""

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
    combination, scratch = edit.combination, _scratch(edit, precision, 3)
    # Rows: anchor, tasks, target.
    rows = np.zeros((2 + len(combination.weights), len(out)), scratch.dtype)

    def place(role: str) -> tuple[int, int]:
        return address(blocks[role]), edit.views[role].dtype.code

    anchor = place("anchor") if "anchor" in blocks else None
    for row, (task, weight) in enumerate(combination.weights.items(), start=1):
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
        scales = np.array(list(combination.scales.values()), scratch.dtype)
    if not np.isfinite(scales).all() or any(probe(row, len(out)) for row in rows[1:] if len(row)):
        return False
    shape = edit.like.shape
    if combination.alignment != "tensor":
        shape = (-1,) if combination.alignment == "element" else (-1, max((1, *shape[-1:])))
    block = Block(
        name=edit.name,
        target=target.reshape(shape),
        vectors=vectors.reshape(len(vectors), *target.reshape(shape).shape),
        tasks=tuple(combination.weights),
        scales=scales,
        parameters=combination.parameters,
        seed=combination.seed,
        start=start,
        has_anchor=anchor is not None,
        selection=combination.selection,
    )
    merged = np.ascontiguousarray(combination.combine(block), scratch.dtype).reshape(-1)
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
