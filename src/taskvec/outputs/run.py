"""Running a recipe: plan, collect, decide, apply, publish."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from taskvec.checkpoints.companions import companions
from taskvec.checkpoints.source import Source
from taskvec.checkpoints.vectors import Vector
from taskvec.dtypes import FLOATS
from taskvec.errors import UsageError
from taskvec.family.loads import check_loads
from taskvec.family.members import Members
from taskvec.family.tokens import tokenizer_source
from taskvec.merging.apply import Record, apply
from taskvec.merging.deciding import Options, decided, settle
from taskvec.merging.edits import edits_of
from taskvec.merging.plan import Plan, make_plan
from taskvec.methods.table import Table
from taskvec.outputs.card import model_card
from taskvec.outputs.manifest import MANIFEST_FILE, RECIPE_FILE, make_manifest
from taskvec.outputs.place import check_output
from taskvec.outputs.staging import Staging, staged
from taskvec.recipes.recipe import Recipe
from taskvec.recipes.stack import Stack
from taskvec.statistics.collect import describe

_RECIPE_HEAD = f"""\
# What this folder was made from. A table that was given, from Python or by --table, is not in here.
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
    """

    path: Path | None
    fingerprint: str
    table: Table
    warnings: tuple[str, ...]


def run(
    recipe: Recipe, out: Path, *, table: Table | None = None, options: Options = Options()
) -> Merged:
    """Merge by a recipe and publish the folder.

    Args:
        recipe: Checked recipe.
        out: Folder to appear.
        table: Layer weights that take the place of the method's own.
        options: How to run.

    Raises:
        TaskvecError: anything foreseen; no output is left, and an output that was there is
            untouched.
    """
    check_scales(recipe)
    plan = make_plan(recipe, threads=options.threads)
    check_output(plan, out, force=options.force)
    out = Path(os.path.realpath(out))
    files, left_out = companions(
        plan.members.target,
        FLOATS.get(recipe.out.dtype or ""),
        tokenizer=tokenizer_source(plan.members.sources, recipe.out.tokenizer),
        chat_template=recipe.out.chat_template,
    )
    code = sorted(name for name in files if name.endswith(".py"))
    if not options.copy_code:
        files = {name: content for name, content in files.items() if name not in code}
    about_code = code_warnings(files, code if options.copy_code else ())
    _check_stacks(plan)
    stage_tables = settle(plan.stages, options)
    table = decided(plan, table, options)
    edits = edits_of(plan, table)
    with staged(out, plan.shards, _job(plan, table), force=options.force) as staging:
        left_out += _add_companions(staging, plan, table, files, about_code)
        del files
        with plan.members.at_rest():
            records = apply(
                [edits[t.name] for t in staging.tensors],
                staging,
                skip=staging.verified(options.progress),
                precision=recipe.out.precision,
                threads=options.threads,
                block=options.block,
                progress=options.progress,
            )
        manifest = make_manifest(plan, table, stage_tables, records)
        staging.add(MANIFEST_FILE, json.dumps(manifest).encode() + b"\n")
        staging.publish()
    warnings = [*plan.members.warnings, *table.warnings, *left_out, *about_code]
    warnings += identical(records, plan.members)
    warnings += other_anchors(plan.members, manifest["members"])
    return Merged(out, manifest["output"]["fingerprint"], table, tuple(dict.fromkeys(warnings)))


def _check_stacks(plan: Plan) -> None:
    """Raise `FamilyError` if the result is a stack that transformers, if installed, cannot load."""
    if isinstance(plan.recipe.family.edited, Stack):
        target = plan.members.target
        check_loads(target, _first_of(target))
    for stage in plan.stages.values():
        _check_stacks(stage.plan)


def _first_of(source: Source) -> Source:
    """The model that a source was made of, to begin with."""
    return _first_of(source.parts[0]) if source.parts else source


def other_anchors(members: Members, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tasks that are vectors taken from another model than the anchor, as far as that is known."""
    digests = known["anchor"]["digests"] if "anchor" in known else {}
    vectors = {task: members.sources[f"task:{task}"] for task in members.tasks}
    return [
        f"task {task!r} is a vector that was taken from another model than the anchor "
        f"({vector.metadata.get('anchor', 'unknown')})"
        for task, vector in vectors.items()
        if isinstance(vector, Vector)
        and not vector.starts_from(digests, members.sources["anchor"].tensors)
    ]


def check_scales(recipe: Recipe) -> None:
    """Raise `UsageError` if a task has no λ."""
    missing = sorted(recipe.tasks.keys() - recipe.scales.keys())
    if missing:
        raise UsageError(
            f"scale of task {missing[0]!r} is missing; {recipe.method.name} has no default λ"
        )


def _job(plan: Plan, table: Table) -> str:
    """Identity of a job: recipe, table, inputs as they look, layout of the output."""
    parts: list[Any] = [
        plan.recipe.to_dict(),
        table.to_json(),
        [(role, source.identity) for role, source in plan.members.sources.items()],
        [shard.header for shard in plan.shards],
    ]
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def _add_companions(
    staging: Staging,
    plan: Plan,
    table: Table,
    files: Mapping[str, bytes],
    about_code: Sequence[str],
) -> list[str]:
    """Write all but weights and manifest, before the first weight; warnings."""
    recipe, members = plan.recipe, plan.members
    card, warnings = model_card(
        staging.out.name,
        {describe(role): source for role, source in members.sources.items()},
        method=recipe.method.name,
        formula=f"{recipe.method.formula} ({table.origin})",
        scales={name: task.scale_to_dict() for name, task in recipe.tasks.items()},
    )
    card += "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in about_code).encode()
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    own = {"README.md": card, RECIPE_FILE: f"{_RECIPE_HEAD}{text}".encode()}
    for name, content in {**files, **own}.items():
        staging.add(name, content)
    return warnings


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
    """Files of its own folder that the `auto_map` of a config names."""
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


def identical(records: Mapping[str, Record], members: Members) -> list[str]:
    """Tasks whose every tensor that was read is the anchor's."""
    anchor = members.sources.get("anchor")
    found = []
    for task in members.tasks:
        if members.sources[f"task:{task}"] is anchor:
            continue  # known, and told, before anything was read
        pairs = [
            (record["anchor"], record[f"task:{task}"])
            for record in records.values()
            if "anchor" in record and f"task:{task}" in record
        ]
        if pairs and all(a == b for a, b in pairs):
            found.append(f"task {task!r} is identical to the anchor: its task vector is zero")
    return found
