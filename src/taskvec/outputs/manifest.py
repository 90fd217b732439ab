"""The manifest: what was read, decided and written, to check or repeat a merge bit for bit."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.folder import read_json
from taskvec.checkpoints.source import Derived, Source
from taskvec.errors import CheckpointError, MissingExtraError
from taskvec.family.opening import FROM_HUB
from taskvec.merging.apply import Record
from taskvec.merging.plan import Plan
from taskvec.merging.scans import describe_tensors
from taskvec.merging.stages import Stage
from taskvec.methods import METHODS, plugins
from taskvec.methods.table import Table, table_from_json
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import Recipe

RECIPE_FILE = "taskvec.yaml"
MANIFEST_FILE = "taskvec-manifest.json"
FORMAT = 1


_OF_METHOD = "method "  # begins the entry of a method that another distribution brings


def versions(recipe: Recipe) -> dict[str, str]:
    """Versions of what a result depends on; methods of others with what brought them."""
    recipes = (recipe, *recipe.stages.values())
    used = {method.name for r in recipes for method in (r.method, r.weigher.method)}
    providers = {name: plugins.provider(name) for name in sorted(used - {*METHODS})}
    return {
        "taskvec": version("taskvec"),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{_OF_METHOD + name: told for name, told in providers.items() if told is not None},
    }


def make_manifest(
    plan: Plan,
    table: Table,
    stage_tables: Mapping[str, Table],
    records: Mapping[str, Record],
) -> dict[str, Any]:
    """The manifest of a finished merge.

    Args:
        plan: What was planned.
        table: What was decided.
        stage_tables: What was decided for the stages, by name.
        records: Digests of what was read and written, by tensor, then by role.
    """
    paths = {role: source.where for role, source in plan.members.sources.items()}
    base = plan.recipe.to_dict().get("base")
    if base is not None:  # a table given may rest on it although this merge does not read it
        paths.setdefault("base", base)
    known = {role: dict(digests) for role, digests in table.digests.items() if role in paths}
    for name, record in records.items():
        for role, digest in record.items():
            known.setdefault(role, {})[name] = digest
    output = known.pop("output")
    shapes = {t.name: (t.dtype.name, t.shape) for shard in plan.shards for t in shard.tensors}
    return {
        "format": FORMAT,
        "versions": versions(plan.recipe),
        "recipe": plan.recipe.to_dict(),
        "decided_by": table.origin,
        "table": table.to_json(),
        "stages": {name: stage.to_json() for name, stage in stage_tables.items()},
        "members": {
            role: {
                "path": paths[role],
                "derived": _is_derived(plan.members.sources.get(role)),
                "fingerprint": fingerprint(digests, describe_tensors(plan.members, role, digests)),
                "digests": digests,
            }
            for role, digests in sorted(known.items())
        },
        "output": {
            "fingerprint": fingerprint(output, shapes),
            "digests": dict(sorted(output.items())),
        },
    }


def _is_derived(source: Source | None) -> bool:
    """Whether a member was made of others, so that its path alone does not give it back."""
    if isinstance(source, Derived):
        return source.how != FROM_HUB
    return isinstance(source, Stage)


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest from its file, or from the folder that it describes.

    Raises:
        CheckpointError: there is none, or it is of another format.
    """
    file = path / MANIFEST_FILE if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(f"{path}: holds no {MANIFEST_FILE}; it was not written by taskvec")
    data = read_json(file)
    parts = ("recipe", "table", "members", "output", "versions")
    whole = data.get("format") == FORMAT and all(isinstance(data.get(p), dict) for p in parts)
    if not whole or not all(map(_is_model, [data["output"], *data["members"].values()])):
        raise CheckpointError(f"{file}: is not a manifest of format {FORMAT}")
    if not all(isinstance(member.get("path"), str) for member in data["members"].values()):
        raise CheckpointError(f"{file}: does not say where the members were")
    return data


def _is_model(entry: object) -> bool:
    """Whether an entry of a manifest identifies a model."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("fingerprint"), str)
        and isinstance(entry.get("digests"), dict)
        and all(isinstance(digest, str) for digest in entry["digests"].values())
    )


def recipe_of(manifest: Mapping[str, Any], source: str) -> tuple[Recipe, Table]:
    """Recipe and table of a manifest; the table carries the digests that the members must have.

    Raises:
        RecipeError, UsageError: the manifest was edited into something that is none.
        MissingExtraError: a method is not installed.
    """
    _check_methods(manifest["versions"], source)
    recipe = read_recipe(Document(manifest["recipe"], source), Path("/"))
    stages = manifest.get("stages", {})
    if not isinstance(stages, dict) or stages.keys() != recipe.stages.keys():
        raise CheckpointError(f"{source}: tables of stages are not those of its recipe")
    stages = {
        name: replace(recipe.stages[name], table=table_from_json(data, source))
        for name, data in stages.items()
    }
    recipe = replace(recipe, stages=stages)
    table = table_from_json(manifest["table"], source)
    digests = {role: dict(member["digests"]) for role, member in manifest["members"].items()}
    origin = str(manifest.get("decided_by", "table"))
    return recipe, replace(table, digests=digests, origin=origin)


def _check_methods(known: Mapping[str, Any], source: str) -> None:
    """Raise `MissingExtraError` if a method of others is not there any more."""
    for key, provider in known.items():
        name = key.removeprefix(_OF_METHOD)
        if name == key:
            continue
        if name in METHODS:
            raise MissingExtraError(
                f"{source}: method {name!r} was that of {provider}; taskvec's own has that name "
                "now; install the taskvec that it was merged with"
            )
        if plugins.provider(name) is None:
            distribution, _, version = str(provider).partition(" ")
            raise MissingExtraError(
                f"{source}: method {name!r} is that of {provider}, which is not installed; this "
                f"needs: pip install '{distribution}=={version}'"
            )
