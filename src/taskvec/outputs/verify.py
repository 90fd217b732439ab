"""Checking an output folder against its manifest: its weights, its inputs, the merge done again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from taskvec.checkpoints.adapters import Adapter, is_adapter, open_adapter
from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.folder import open_stored
from taskvec.checkpoints.source import Source
from taskvec.errors import CheckpointError, TaskvecError
from taskvec.family.opening import open_model
from taskvec.keywords import takes
from taskvec.merging.apply import Nowhere, apply, apply_edits
from taskvec.merging.decide import decide
from taskvec.merging.edits import Edit
from taskvec.merging.prepare import prepare
from taskvec.merging.steps import Decided
from taskvec.outputs.adapter_merge import replay_adapter
from taskvec.outputs.manifest import file_digest
from taskvec.recipes.coerce import RunKeywords, run_options
from taskvec.recipes.replay import read_manifest, recipe_of
from taskvec.streaming import RunOptions

# Files that change what a model does when one is put beside it.
_LOADED = ("chat_template.jinja", "chat_template.json", "generation_config.json",
           "tokenizer.json", "tokenizer_config.json")  # fmt: skip


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


@takes(RunKeywords)
def verify(
    folder: str | os.PathLike[str],
    *,
    inputs: bool = True,
    replay: bool = False,
    **options: Unpack[RunKeywords],
) -> list[Check]:
    """Check a folder that taskvec wrote.

    Args:
        folder: With a manifest.
        inputs: Whether to read the members too.
        replay: Whether to compute the merge again (nothing is written) and compare.
        {options}

    Returns:
        What was checked: the weights (`output`), the files beside them (`files`, where the manifest
        has their digests), each member, and the merge done again (`replay`).

    Raises:
        CheckpointError: no manifest, or the folder cannot be read at all.
    """
    path, how = Path(folder), run_options(options)
    manifest = read_manifest(path)
    expected = manifest["output"]
    output = open_adapter(path).stored if is_adapter(path) else open_stored(path)
    checks = [_compare("output", output, expected, how)]
    extra = sorted(output.tensors.keys() - expected["digests"].keys())
    if extra:
        checks = [
            Check("output", "different", f"has {extra[0]!r}, which the manifest does not know")
        ]
    if "files" in expected:
        checks.append(_compare_files(path, expected["files"]))
    if inputs:
        checks += _members(manifest, path, how)
    if replay:
        checks.append(_replay(manifest, path, how))
    return checks


def _compare_files(folder: Path, expected: Mapping[str, str]) -> Check:
    """Config, tokenizer and chat template against their digests."""
    missing = [name for name in expected if not (folder / name).is_file()]
    changed = [
        name
        for name in expected
        if name not in missing and file_digest((folder / name).read_bytes()) != expected[name]
    ]
    extra = [name for name in _LOADED if name not in expected and (folder / name).is_file()]
    for names, what in ((missing, "missing"), (changed, "changed"), (extra, "added")):
        if names:
            return Check("files", "different", f"{what}: {', '.join(names)}")
    return Check("files", "same", f"{len(expected)} files")


def _members(manifest: Mapping[str, Any], path: Path, options: RunOptions) -> list[Check]:
    """Every member that can be opened, against what the manifest says of it.

    Tasks are in the order of the recipe.
    """
    members = manifest["members"]
    allow_pickle = manifest["recipe"].get("allow_pickle") is True
    made: Mapping[str, Source] | str = {}
    if any(member.get("derived") for member in members.values()):
        made = _family(manifest, path)
    checks = []
    order = [f"task:{task}" for task in manifest["recipe"].get("tasks") or ()]
    roles = [role for role in members if role not in order]
    for role in [*roles, *(role for role in order if role in members)]:
        member = members[role]
        source: Source | Adapter | str | None = None
        if member.get("derived"):
            source = made if isinstance(made, str) else made.get(role)
        else:
            try:
                source = open_model(member["path"], allow_pickle=allow_pickle)
            except TaskvecError as error:
                source = str(error)
        if isinstance(source, (str, Adapter)) or source is None:
            detail = source if isinstance(source, str) else f"{member['path']}: is something else"
            checks.append(Check(role, "absent", detail))
        else:
            checks.append(_compare(role, source, member, options))
    return checks


def _family(manifest: Mapping[str, Any], path: Path) -> Mapping[str, Source] | str:
    """Sources by role, made as the recipe says; a text if that cannot be done.

    The files of a member that was made of others (an adapter on its model, a stage, rows of a
    vocabulary) do not say by themselves what it was.
    """
    try:
        return prepare(recipe_of(manifest, str(path))).members.sources
    except TaskvecError as error:
        return str(error)


def _compare(
    what: str, checkpoint: Source, expected: Mapping[str, Any], options: RunOptions
) -> Check:
    """Digests of a folder's tensors, and their dtypes and shapes, against what a manifest says."""
    digests, tensors = expected["digests"], checkpoint.tensors
    missing = sorted(digests.keys() - tensors.keys())
    if missing:
        return Check(what, "different", f"lacks {missing[0]!r} ({len(missing)} tensors missing)")
    try:
        views = {name: checkpoint.view(name) for name in digests}
        edits = [Edit(name, view.dtype, {"target": view}) for name, view in views.items()]
        records = apply_edits(edits, Nowhere(), options, label=what)
    except CheckpointError as error:  # NaN or infinite: not what was read or written
        return Check(what, "different", str(error).removeprefix("target: "))
    got = {name: record["output"] for name, record in records.items()}
    described = {name: (tensors[name].dtype.name, tensors[name].shape) for name in digests}
    if got == digests and fingerprint(got, described) != expected["fingerprint"]:
        return Check(what, "different", "dtypes or shapes of tensors")
    return _compared(what, got, digests)


def _replay(manifest: Mapping[str, Any], path: Path, options: RunOptions) -> Check:
    recipe = recipe_of(manifest, str(path))
    try:
        decided = decide(prepare(recipe, options))
        if recipe.out.form == "lora":
            return _replay_adapter(decided, path, manifest)
        records = apply(decided, Nowhere(), label="replay")
    except TaskvecError as error:
        return Check("replay", "absent", str(error))
    got = {name: record["output"] for name, record in records.items()}
    return _compared("replay", got, manifest["output"]["digests"])


def _replay_adapter(decided: Decided, path: Path, manifest: Mapping[str, Any]) -> Check:
    wrong = replay_adapter(decided, path, manifest)
    if wrong:
        return Check("replay", "different", f"tensor {wrong[0]!r} ({len(wrong)} differ)")
    return Check("replay", "same", f"{len(manifest['adapter']['tensors'])} tensors")


def _compared(what: str, got: Mapping[str, str], expected: Mapping[str, str]) -> Check:
    wrong = sorted(name for name in expected if got.get(name) != expected[name])
    if wrong:
        return Check(
            what, "different", f"tensor {wrong[0]!r} ({len(wrong)} of {len(expected)} differ)"
        )
    return Check(what, "same", f"{len(expected)} tensors")
