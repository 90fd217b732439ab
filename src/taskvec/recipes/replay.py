"""Replaying: the recipe and the table of a manifest, which repeat a merge bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from taskvec import documents
from taskvec.errors import CheckpointError, MissingExtraError
from taskvec.methods import METHODS, plugins
from taskvec.methods.table import Table, table_from_json
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.recipe import Recipe
from taskvec.validation import Foreign, read_as

MANIFEST_FILE = "taskvec-manifest.json"
FORMAT: Final = 1
OF_METHOD: Final = "method "  # begins the version of a method that another distribution brings


class ModelRecord(Foreign):
    """A model in a manifest: what identifies it."""

    fingerprint: str
    digests: dict[str, str]


class MemberRecord(ModelRecord):
    """A member in a manifest."""

    path: str
    derived: bool = False


class OutputRecord(ModelRecord):
    """The result in a manifest; files beside the weights with their digests."""

    files: dict[str, str] | None = None


class Manifest(Foreign):
    """A manifest, as far as it is used; its recipe and tables are checked where they are read."""

    format: Literal[FORMAT]  # type: ignore[valid-type]
    versions: dict[str, str]
    recipe: dict[str, Any]
    decided_by: str = "table"
    table: dict[str, Any]
    stages: dict[str, dict[str, Any]] = Field(default={})
    members: dict[str, MemberRecord]
    output: OutputRecord


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest from its file, or from the folder that it describes.

    Raises:
        CheckpointError: it is missing, or has another format.
    """
    file = path / MANIFEST_FILE if path.is_dir() else path
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; give a folder that taskvec wrote")
    if not file.exists():
        raise CheckpointError(f"{path}: holds no {MANIFEST_FILE}; it was not written by taskvec")
    data = documents.read_object(file, documents.MEASURED)
    read_as(Manifest, data, str(file), f"expected a manifest of format {FORMAT}; merge again")
    return data


def recipe_of(manifest: Mapping[str, Any], source: str) -> Recipe:
    """The recipe of a manifest, with its tables; they carry the digests that members must have.

    Raises:
        RecipeError, UsageError: the manifest was edited into something that is not a recipe.
        MissingExtraError: a method is not installed.
    """
    _check_methods(manifest["versions"], source)
    recipe = read_recipe(Document(manifest["recipe"], source), Path("/"))
    stages = manifest.get("stages", {})
    if stages.keys() != recipe.stages.keys():
        raise CheckpointError(f"{source}: tables of stages are not those of its recipe")

    def final(data: Mapping[str, Any], **known: Any) -> Table:
        return replace(table_from_json(data, source), is_final=True, **known)

    tables = {name: final(data) for name, data in stages.items()}
    return replace(
        recipe,
        table=final(
            manifest["table"],
            digests={role: dict(mine["digests"]) for role, mine in manifest["members"].items()},
            origin=manifest.get("decided_by", "table"),
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
