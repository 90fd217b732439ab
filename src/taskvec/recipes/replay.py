"""Replaying: the recipe and the table of a manifest, which repeat a merge bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.errors import CheckpointError, MissingExtraError
from taskvec.methods import METHODS, plugins
from taskvec.methods.table import Table, table_from_json
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import Recipe

MANIFEST_FILE = "taskvec-manifest.json"
FORMAT = 1
OF_METHOD = "method "  # begins the version of a method that another distribution brings


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest from its file, or from the folder that it describes.

    Raises:
        CheckpointError: it is missing, or has another format.
    """
    file = path / MANIFEST_FILE if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(f"{path}: holds no {MANIFEST_FILE}; it was not written by taskvec")
    data = documents.read_object(file, documents.MEASURED)
    parts = ("recipe", "table", "members", "output", "versions")
    whole = data.get("format") == FORMAT and all(isinstance(data.get(p), dict) for p in parts)
    if not whole or not all(map(_is_model, [data["output"], *data["members"].values()])):
        raise CheckpointError(f"{file}: is not a manifest of format {FORMAT}")
    if not all(isinstance(member.get("path"), str) for member in data["members"].values()):
        raise CheckpointError(f"{file}: lacks the paths of the members")
    return data


def _is_model(entry: object) -> bool:
    """Whether an entry of a manifest identifies a model."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("fingerprint"), str)
        and isinstance(entry.get("digests"), dict)
        and all(isinstance(digest, str) for digest in entry["digests"].values())
    )


def recipe_of(manifest: Mapping[str, Any], source: str) -> Recipe:
    """The recipe of a manifest, with its tables; they carry the digests that members must have.

    Raises:
        RecipeError, UsageError: the manifest was edited into something that is not a recipe.
        MissingExtraError: a method is not installed.
    """
    _check_methods(manifest["versions"], source)
    recipe = read_recipe(Document(manifest["recipe"], source), Path("/"))
    stages = manifest.get("stages", {})
    if not isinstance(stages, dict) or stages.keys() != recipe.stages.keys():
        raise CheckpointError(f"{source}: tables of stages are not those of its recipe")

    def final(data: Mapping[str, Any], **known: Any) -> Table:
        return replace(table_from_json(data, source), is_final=True, **known)

    tables = {name: final(data) for name, data in stages.items()}
    return replace(
        recipe,
        table=final(
            manifest["table"],
            digests={role: dict(mine["digests"]) for role, mine in manifest["members"].items()},
            origin=str(manifest.get("decided_by", "table")),
        ),
        stages={name: replace(recipe.stages[name], table=table) for name, table in tables.items()},
    )


def _check_methods(known: Mapping[str, Any], source: str) -> None:
    """Raise `MissingExtraError` if a method of others is not there any more."""
    for key, provider in known.items():
        name = key.removeprefix(OF_METHOD)
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
