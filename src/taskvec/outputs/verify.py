"""Checking an output folder against its manifest: its weights, its inputs, the merge done again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.checkpoints.adapters import Adapter
from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.folder import open_checkpoint
from taskvec.checkpoints.source import Source
from taskvec.errors import CheckpointError, TaskvecError
from taskvec.family.opening import open_model
from taskvec.merging.apply import Edit, Nowhere, apply
from taskvec.merging.deciding import settle
from taskvec.merging.edits import edits_of
from taskvec.merging.plan import make_plan
from taskvec.methods.table import check_table
from taskvec.outputs.manifest import read_manifest, recipe_of
from taskvec.streaming import Progress, silent


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: `output`, `replay` or the role of a member.
        outcome: `same`, `different` or `absent`.
        detail: What was compared, or what differs.
    """

    what: str
    outcome: str
    detail: str


def verify(
    folder: str | os.PathLike[str],
    *,
    inputs: bool = True,
    replay: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> list[Check]:
    """Check a folder that taskvec wrote.

    Args:
        folder: With a manifest.
        inputs: Whether to read the members too.
        replay: Whether to work out the merge again (nothing is written) and compare.
        threads: Default: the processors there are, at most 8.
        progress: Told the bytes read.

    Raises:
        CheckpointError: no manifest, or the folder cannot be read at all.
    """
    path = Path(folder)
    manifest = read_manifest(path)

    allow_pickle = manifest["recipe"].get("allow_pickle") is True

    def compare(what: str, checkpoint: Source, expected: Mapping[str, Any]) -> Check:
        return _compare(what, checkpoint, expected, threads, progress)

    output = open_checkpoint(path)
    checks = [compare("output", output, manifest["output"])]
    extra = sorted(output.tensors.keys() - manifest["output"]["digests"].keys())
    if extra:
        checks = [
            Check("output", "different", f"has {extra[0]!r}, which the manifest does not know")
        ]
    members = manifest["members"] if inputs else {}
    family = _family(manifest, str(path)) if any(m.get("derived") for m in members.values()) else {}
    for role, member in members.items():
        source: Source | Adapter | str | None = None
        if member.get("derived"):
            source = family if isinstance(family, str) else family.get(role)
        else:
            try:
                source = open_model(member["path"], allow_pickle=allow_pickle)
            except TaskvecError as error:
                source = str(error)
        if isinstance(source, (str, Adapter)) or source is None:
            detail = source if isinstance(source, str) else f"{member['path']}: is something else"
            checks.append(Check(role, "absent", detail))
        else:
            checks.append(compare(role, source, member))
    if replay:
        checks.append(_replay(manifest, path, threads, progress))
    return checks


def _family(manifest: Mapping[str, Any], path: str) -> Mapping[str, Source] | str:
    """Sources by role, made as the recipe says; a text if that cannot be done.

    A member that was made of others (an adapter on its model, a stage, rows of a vocabulary) cannot
    be told from the files of one of them.
    """
    try:
        recipe, _ = recipe_of(manifest, path)
        plan = make_plan(recipe)
        settle(plan.stages)
    except TaskvecError as error:
        return str(error)
    return plan.members.sources


def _compare(
    what: str,
    checkpoint: Source,
    expected: Mapping[str, Any],
    threads: int | None,
    progress: Progress,
) -> Check:
    """Digests of a folder's tensors, and their dtypes and shapes, against what a manifest says."""
    digests, tensors = expected["digests"], checkpoint.tensors
    missing = sorted(digests.keys() - tensors.keys())
    if missing:
        return Check(what, "different", f"lacks {missing[0]!r} ({len(missing)} tensors missing)")
    views = {name: checkpoint.view(name) for name in digests}
    edits = [Edit(name, view.dtype, {"target": view}) for name, view in views.items()]
    try:
        records = apply(edits, Nowhere(), threads=threads, progress=progress)
    except CheckpointError as error:  # NaN or infinite: not what was read or written
        return Check(what, "different", str(error).removeprefix("target: "))
    got = {name: record["output"] for name, record in records.items()}
    described = {name: (tensors[name].dtype.name, tensors[name].shape) for name in digests}
    if got == digests and fingerprint(got, described) != expected["fingerprint"]:
        return Check(what, "different", "dtypes or shapes of tensors")
    return _compared(what, got, digests)


def _replay(
    manifest: Mapping[str, Any], path: Path, threads: int | None, progress: Progress
) -> Check:
    recipe, table = recipe_of(manifest, str(path))
    try:
        plan = make_plan(recipe)
        check_table(table, plan.members.tasks, plan.members.merged, str(path))
        settle(plan.stages)
        edits = list(edits_of(plan, table).values())
        got = apply(
            edits, Nowhere(), precision=recipe.out.precision, threads=threads, progress=progress
        )
    except TaskvecError as error:
        return Check("replay", "absent", str(error))
    return _compared(
        "replay", {n: r["output"] for n, r in got.items()}, manifest["output"]["digests"]
    )


def _compared(what: str, got: Mapping[str, str], expected: Mapping[str, str]) -> Check:
    wrong = sorted(name for name in expected if got.get(name) != expected[name])
    if wrong:
        return Check(
            what, "different", f"tensor {wrong[0]!r} ({len(wrong)} of {len(expected)} differ)"
        )
    return Check(what, "same", f"{len(expected)} tensors")
