"""Extracting a task vector: what a fine-tune changed, as a file that can be used as a task."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.naming import display_name
from taskvec.checkpoints.rows import gather
from taskvec.checkpoints.safetensors import write_header
from taskvec.checkpoints.shards import OutputTensor, Shard
from taskvec.checkpoints.vectors import KIND, NEW_ROWS
from taskvec.errors import UsageError
from taskvec.family.vocabulary import token_metadata
from taskvec.merging.apply import Record, apply_edits
from taskvec.merging.edits import Edit
from taskvec.outputs.adapter import Factored
from taskvec.outputs.leftovers import notes_on_leftovers
from taskvec.outputs.place import check_place
from taskvec.outputs.staging import staged
from taskvec.recipes.recipe import Recipe
from taskvec.streaming import RunOptions
from taskvec.tables import frame
from taskvec.vectors.difference import Difference, Wanted, make_difference

_UNKNOWN = "0" * 32  # stands in a header until the fingerprint, of the same length, is known


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was written.

    Attributes:
        path: The file, or the folder of an adapter.
        name: What it is, in words.
        tensors: Names of the tensors that it changes.
        zero: Names of those that did not differ and were left out.
        bytes: Size of the weights on disk.
        fingerprint: Identity of the vector by content; None for an adapter.
        anchor_fingerprint: Identity of the tensors that it starts from.
        warnings: What a user should know.
        factored: Of an adapter, what became of each tensor, in the order of the model.
        lost: Of an adapter, the share of ‖τ‖² of the whole model that it lacks.
    """

    path: Path
    name: str
    tensors: tuple[str, ...]
    zero: tuple[str, ...]
    bytes: int
    fingerprint: str | None
    anchor_fingerprint: str
    warnings: tuple[str, ...]
    factored: tuple[Factored, ...] = ()
    lost: float = 0.0

    def __repr__(self) -> str:
        return f"<Extracted {self.path}: {self.name}, {len(self.tensors)} tensors>"

    def to_pandas(self) -> Any:
        """What became of each tensor in an adapter, as a DataFrame."""
        return frame([asdict(row) for row in self.factored])


def extract_vector(recipe: Recipe, out: Path, wanted: Wanted, options: RunOptions) -> Extracted:
    """Write the difference of two members as one safetensors file.

    Tensors that do not differ are left out. Elements are float32 unless `recipe.out.dtype` says
    otherwise (float64 where a member is that): the very numbers that a merge of the fine-tune works
    with, so that merging the vector gives the same bits. Nothing is held but blocks.

    Args:
        recipe: Family; for a pure vector also the method.
        out: File to appear; ends in `.safetensors`.
        wanted: Which difference.
        options: How to run.

    Raises:
        UsageError: the request is contradictory or incomplete.
        CheckpointError, FamilyError: the members are broken, do not fit or do not differ.
        OutputError: the file cannot be written there, or an element overflows the dtype.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: a vector is one file; give a name that ends in .safetensors")
    found = make_difference(recipe, wanted, options)
    edits = [*found.edits, *_new_rows(found)]
    edits.sort(key=lambda e: (-e.dtype.itemsize, e.name))  # every one is aligned
    tensors = tuple(OutputTensor(e.name, e.dtype, e.like.shape) for e in edits)
    shard = Shard(out.name, _header(tensors, found, _UNKNOWN), tensors)
    check_place(found.members, shard.nbytes, out, force=options.force, is_file=True)
    out = Path(os.path.realpath(out))
    precision = "float64" if recipe.out.dtype == "float64" else recipe.out.precision
    job = _job(found, shard, precision)
    with staged(out, [shard], job, force=options.force) as staging:
        with found.members.at_rest():
            how, done = replace(options, precision=precision), staging.verified(options.progress)
            records = apply_edits(edits, staging, how, skip=done, label="extract")
        start = start_fingerprint(found, records)
        staging.publish_file(_header(tensors, found, start))
    described = {t.name: (t.dtype.name, t.shape) for t in tensors}
    return Extracted(
        path=out,
        name=found.name,
        tensors=tuple(sorted(edit.name for edit in found.edits)),
        zero=found.zero,
        bytes=shard.nbytes,
        fingerprint=fingerprint({n: r["output"] for n, r in records.items()}, described),
        anchor_fingerprint=start,
        warnings=(*found.warnings, *notes_on_leftovers(out, None)),
    )


def _header(tensors: tuple[OutputTensor, ...], found: Difference, start: str) -> bytes:
    return write_header(
        [(t.name, t.dtype, t.shape) for t in tensors],
        {"taskvec": KIND, **about(found), "anchor_fingerprint": start},
    )


def _new_rows(found: Difference) -> Iterator[Edit]:
    """Rows of tokens that the fine-tune has and the anchor lacks: weights, as they are."""
    start = found.members.sources[found.start]
    for name, rows in token_metadata(start)[1].items():
        view = gather([start.view(name)], np.zeros(len(rows), np.int16), rows)
        yield Edit(NEW_ROWS + name, view.dtype, {"target": view})


def about(found: Difference) -> dict[str, str]:
    """What a file says about a difference; never where the models lay."""
    members = found.members
    model = "anchor" if found.what == "instruction" else f"task:{found.task}"
    metadata = {
        "taskvec_version": version("taskvec"),
        "what": found.what,
        "anchor": display_name(members.sources[found.start]),
        "model": display_name(members.sources[model]),
    }
    if found.task is not None:
        metadata["task"] = found.task
    if found.table is not None:
        metadata |= {"weights": found.table.origin, "scale": repr(found.scale)}
    return metadata | token_metadata(members.sources[found.start])[0]


def start_fingerprint(found: Difference, records: Mapping[str, Record]) -> str:
    """Fingerprint of the tensors that the difference starts from, of those that it changes."""
    tensors = found.members.sources[found.start].tensors
    digests = {n: record[found.start] for n, record in records.items() if found.start in record}
    described = {name: (tensors[name].dtype.name, tensors[name].shape) for name in digests}
    return fingerprint(digests, described)


def _job(found: Difference, shard: Shard, precision: str) -> str:
    """Identity of a job: coefficients, inputs as they look, layout of the output."""
    parts: list[Any] = [
        json.dumps([(e.name, dict(e.terms)) for e in found.edits]),
        [(role, source.identity) for role, source in found.members.sources.items()],
        shard.header,
        precision,
    ]
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())
