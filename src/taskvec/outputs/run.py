"""Merging into a folder: prepare, decide, apply, publish."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from taskvec.checkpoints.belongings import belongings
from taskvec.checkpoints.companions import companions, of_tokenizer
from taskvec.checkpoints.source import Source
from taskvec.checkpoints.vectors import Vector
from taskvec.dtypes import FLOATS
from taskvec.errors import NothingToDoError
from taskvec.family.loads import check_loads
from taskvec.family.members import Members
from taskvec.family.tokens import tokenizer_source
from taskvec.merging.apply import Record, apply
from taskvec.merging.decide import decide
from taskvec.merging.prepare import prepare
from taskvec.merging.stages import StageSource
from taskvec.merging.steps import Decided, Prepared
from taskvec.methods.table import Table
from taskvec.outputs.adapter import Factored, Written, tied_warning, write_adapter
from taskvec.outputs.adapter_merge import adapter_shape, change_of, plan_adapter
from taskvec.outputs.card import model_card
from taskvec.outputs.leftovers import notes_on_leftovers
from taskvec.outputs.manifest import RECIPE_FILE, make_manifest
from taskvec.outputs.place import check_place
from taskvec.outputs.staging import staged
from taskvec.recipes.recipe import Recipe
from taskvec.recipes.replay import MANIFEST_FILE
from taskvec.recipes.stack import Stack
from taskvec.statistics.collect import describe
from taskvec.streaming import RunOptions
from taskvec.tables import html_table

_RECIPE_HEAD = f"""\
# What this folder was made from. A table that was given, from Python or by --table, is not in here.
# Paths are relative to this folder.
# To repeat the merge bit for bit in any case: taskvec merge {MANIFEST_FILE} OUT
"""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        path: The folder; None for a model in memory that was written into.
        fingerprint: Identity of its weights by content.
        table: Weights that were used.
        warnings: What a user should know.
        factored: Of an adapter, what became of each tensor that differs, in the order of the model.
        lost: Of an adapter, the share of ‖τ‖² of the whole model that it lacks.
    """

    path: Path | None
    fingerprint: str
    table: Table
    warnings: tuple[str, ...]
    factored: tuple[Factored, ...] = ()
    lost: float = 0.0

    def __repr__(self) -> str:
        where = "a model in memory" if self.path is None else str(self.path)
        return f"<Merged {where}: {self.table.origin}, fingerprint {self.fingerprint[:8]}…>"

    def _repr_html_(self) -> str:
        rows = [
            {
                "task": task,
                "mean weight": float(row.mean()),
                "tensors touched": int((row != 0).sum()),
            }
            for task, row in zip(self.table.tasks, self.table.weights, strict=True)
        ]
        return html_table(rows, repr(self))


def run(
    recipe: Recipe,
    out: Path,
    options: RunOptions = RunOptions(),
    *,
    takes_zeros: bool = True,
) -> Merged:
    """Merge by a recipe and publish the folder.

    Args:
        recipe: Checked recipe.
        out: Folder to appear.
        options: How to run.
        takes_zeros: Whether a table of zeros, which changes nothing, is applied like any other.

    Raises:
        NothingToDoError: the table is zero everywhere, and `takes_zeros` is false.
        TaskvecError: anything foreseen; no output is left, and an output that was there is
            untouched.
    """
    prepared = prepare(recipe, options)
    if recipe.out.form == "lora":
        return _run_adapter(prepared, out, takes_zeros=takes_zeros)
    check_place(prepared.members, prepared.estimate.write_bytes, out, force=options.force)
    out = Path(os.path.realpath(out))
    files, warnings = _companions(prepared)
    _check_stacks(prepared.recipe, prepared.members, prepared.stages)
    decided = decide(prepared)
    if not takes_zeros:
        _refuse_zeros(decided, out)
    about, more = _about(decided, out, warnings)
    with staged(out, prepared.shards, _job(decided), force=options.force) as staging:
        for name, content in {**files, **about}.items():
            staging.add(name, content)
        records = apply(decided, staging, skip=staging.verified(options.progress))
        manifest = make_manifest(decided, records, files)
        staging.add(MANIFEST_FILE, json.dumps(manifest).encode() + b"\n")
        staging.publish()
    found = [*warnings_of(decided, records, manifest["members"]), *warnings, *more]
    found += notes_on_leftovers(out, staging.left)
    return Merged(
        out, manifest["output"]["fingerprint"], decided.table, tuple(dict.fromkeys(found))
    )


def _refuse_zeros(decided: Decided, out: Path) -> None:
    """Raise `NothingToDoError` if a table is zero everywhere."""
    if decided.prepared.recipe.tasks and not decided.table.weights.any():
        raise NothingToDoError(
            f"{out}: not written: every layer has weight 0, so nothing would change; give a higher "
            "--threshold or another --scheme, or --force to write the unchanged model"
        )


def _run_adapter(prepared: Prepared, out: Path, *, takes_zeros: bool) -> Merged:
    """The same, where the result is an adapter over the target."""
    check_place(prepared.members, plan_adapter(prepared).nbytes, out, force=prepared.options.force)
    out = Path(os.path.realpath(out))
    decided = decide(prepared)
    if not takes_zeros:
        _refuse_zeros(decided, out)
    with prepared.members.at_rest():
        change = change_of(decided)
    about, warnings = _about(decided, out, ())
    found: list[dict[str, Any]] = []

    def more(written: Written) -> dict[str, bytes]:
        manifest = make_manifest(decided, written.records, written.files)
        manifest["output"] |= {"fingerprint": written.fingerprint, "digests": written.digests}
        manifest["adapter"] = written.to_json()
        found.append(manifest["members"])
        return {**about, MANIFEST_FILE: json.dumps(manifest).encode() + b"\n"}

    shape = adapter_shape(prepared.recipe)
    written = write_adapter(change, shape, out, prepared.options, more)
    known = [*warnings_of(decided, written.records, found[0]), *warnings]
    known += notes_on_leftovers(out, None)
    return Merged(
        out,
        written.fingerprint,
        decided.table,
        tuple(dict.fromkeys([*known, *tied_warning(change, written)])),
        written.rows,
        written.lost,
    )


def _check_stacks(recipe: Recipe, members: Members, stages: Mapping[str, StageSource]) -> None:
    """Raise `FamilyError` if the result is a stack that transformers, if installed, cannot load."""
    if isinstance(recipe.family.edited, Stack):
        check_loads(members.target, _first_of(members.target))
    for stage in stages.values():
        _check_stacks(stage.recipe, stage.members, {})


def _first_of(source: Source) -> Source:
    """The model that a source was made of, to begin with."""
    return _first_of(source.parts[0]) if source.parts else source


def _job(decided: Decided) -> str:
    """Identity of a job: recipe, table, inputs as they look, layout of the output."""
    prepared = decided.prepared
    parts: list[Any] = [
        prepared.recipe.to_dict(),
        decided.table.to_json(),
        [(role, source.identity) for role, source in prepared.members.sources.items()],
        [shard.header for shard in prepared.shards],
    ]
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def _companions(prepared: Prepared) -> tuple[dict[str, bytes], list[str]]:
    """Config, tokenizer and other files beside the weights, by name; warnings."""
    recipe, members = prepared.recipe, prepared.members
    files, warnings = companions(
        members.target,
        FLOATS.get(recipe.out.dtype or ""),
        tokenizer=tokenizer_source(members.sources, recipe.out.tokenizer),
        chat_template=recipe.out.chat_template,
    )
    code = sorted(name for name in files if name.endswith(".py"))
    if not prepared.options.copy_code:
        files = {name: content for name, content in files.items() if name not in code}
        code = []
    return files, [*warnings, *code_warnings(files, code), *_no_tokenizer(members, files)]


def _no_tokenizer(members: Members, files: Mapping[str, bytes]) -> list[str]:
    """Whether the output has no tokenizer although another member has one."""

    def has(names: Iterable[str]) -> bool:
        return any(of_tokenizer(n) and not n.startswith("chat_template") for n in names)

    if has(files):
        return []
    for role, source in members.sources.items():
        folder = source.folder
        there = belongings(folder)[0] if folder is not None and folder.is_dir() else []
        if has([*there, *source.files]):
            return [
                f"the target ({members.target.where}) has no tokenizer, so the output has none; "
                f"{describe(role)} ({source.where}) has one: copy it, or take that of a member "
                "with out: {tokenizer: NAME}"
            ]
    return []


def _about(
    decided: Decided, out: Path, warnings: Sequence[str]
) -> tuple[dict[str, bytes], list[str]]:
    """Model card and recipe, by name; warnings."""
    recipe, members = decided.prepared.recipe, decided.prepared.members
    data = _relative(recipe.to_dict(), out)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    tasks = [f"task:{name}" for name in recipe.tasks]
    roles = [*(role for role in members.sources if role not in tasks), *tasks]
    card, more = model_card(
        out.name,
        {describe(role): members.sources[role] for role in roles},
        recipe,
        decided.table.origin,
    )
    card += "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in warnings).encode()
    return {"README.md": card, RECIPE_FILE: f"{_RECIPE_HEAD}{text}".encode()}, more


_PATHS = ("base", "instruct", "target", "model", "table")  # keys of a recipe that name a file


def _relative(data: Any, folder: Path) -> Any:
    """A recipe as a mapping, with paths relative to a folder."""
    if isinstance(data, list):
        return [_relative(each, folder) for each in data]
    if not isinstance(data, dict):
        return data
    return {
        key: os.path.relpath(value, folder)
        if key in _PATHS and isinstance(value, str) and os.path.isabs(value)  # noqa: PTH117
        else _relative(value, folder)
        for key, value in data.items()
    }


def warnings_of(
    decided: Decided, records: Mapping[str, Record], known: Mapping[str, Mapping[str, Any]]
) -> tuple[str, ...]:
    """What a user should know about a merge that was applied.

    Args:
        decided: What was decided.
        records: See `apply`.
        known: Digests of members by role, under `digests`.
    """
    members = decided.prepared.members
    found = [
        *members.warnings,
        *decided.table.warnings,
        *_identical(records, members),
        *_other_anchors(members, known),
        *_little(decided),
    ]
    return tuple(dict.fromkeys(found))


def _little(decided: Decided) -> list[str]:
    """Whether less than half of the parameters are edited."""
    recipe = decided.prepared.recipe
    if not recipe.tasks or (recipe.scales and not any(recipe.scales.values())):
        return []  # nothing was asked for
    sizes = {name: math.prod(edit.like.shape) for name, edit in decided.edits.items()}
    edited = sum(sizes[name] for name, edit in decided.edits.items() if edit.terms)
    share = edited / max(1, sum(sizes.values()))
    if share >= 0.5:
        return []
    return [
        f"{share:.1%} of the parameters are edited, the rest is the target's: check include, "
        "exclude and the weights of the layers (taskvec plan, taskvec scan)"
    ]


def _other_anchors(members: Members, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tasks that are vectors taken from another model than the anchor, as far as that is known."""
    digests = known["anchor"]["digests"] if "anchor" in known else {}
    vectors = {task: members.sources[f"task:{task}"] for task in members.tasks}
    return [
        f"task {task!r} is a vector from another model than the anchor "
        f"({vector.metadata.get('anchor', 'unknown')})"
        for task, vector in vectors.items()
        if isinstance(vector, Vector)
        and not vector.starts_from(digests, members.sources["anchor"].tensors)
    ]


def code_warnings(files: Mapping[str, bytes], copied: Sequence[str]) -> list[str]:
    """What to know about code that an output has, or that its configs name and it lacks.

    Args:
        files: Beside the weights, by name.
        copied: Those of them that are code.
    """
    warnings = []
    if copied:
        warnings.append(
            f"the output carries code of the target ({', '.join(map(repr, copied))}), which runs "
            "wherever the output is loaded with trust_remote_code=True"
        )
    for name in sorted(name for name in files if name.endswith(".json")):
        missing = sorted(file for file in _code_named(files[name]) if file not in files)
        if missing:
            warnings.append(
                f"{name} of the output needs code that was not copied "
                f"({', '.join(map(repr, missing))}); review it and merge with --copy-code "
                "(copy_code=True)"
            )
    return warnings


_CODE = re.compile(r"(?!.*--)[\w-]+(\.[\w-]+)+", re.ASCII)  # --: of another model


def _code_named(content: bytes) -> set[str]:
    """Files in the same folder that the `auto_map` of a config names."""
    try:
        named = json.loads(content)["auto_map"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return set()
    found, left = set(), [named]
    while left:
        value = left.pop()
        if isinstance(value, str) and _CODE.fullmatch(value):
            found.add(f"{value.rpartition('.')[0].replace('.', '/')}.py")
        elif isinstance(value, (dict, list)):
            left.extend(value.values() if isinstance(value, dict) else value)
    return found


def _identical(records: Mapping[str, Record], members: Members) -> list[str]:
    """Tasks whose every tensor that was read is the anchor's."""
    anchor = members.sources.get("anchor")
    found = []
    for task in members.tasks:
        if members.sources[f"task:{task}"] is anchor:
            continue  # known, and reported, before anything was read
        pairs = [
            (record["anchor"], record[f"task:{task}"])
            for record in records.values()
            if "anchor" in record and f"task:{task}" in record
        ]
        if pairs and all(a == b for a, b in pairs):
            found.append(f"task {task!r} is identical to the anchor: its task vector is zero")
    return found
