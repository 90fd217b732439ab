"""The manifest: what was read, decided and written, to check or repeat a merge bit for bit."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import xxhash

from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.source import Derived, Source
from taskvec.family.opening import FROM_HUB
from taskvec.merging.apply import Record
from taskvec.merging.scans import describe_tensors
from taskvec.merging.stages import StageSource
from taskvec.merging.steps import Decided
from taskvec.methods import METHODS, plugins
from taskvec.recipes.recipe import Recipe
from taskvec.recipes.replay import FORMAT, OF_METHOD

RECIPE_FILE = "taskvec.yaml"


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
        **{OF_METHOD + name: package for name, package in providers.items() if package is not None},
    }


def make_manifest(
    decided: Decided, records: Mapping[str, Record], files: Mapping[str, bytes]
) -> dict[str, Any]:
    """The manifest of a finished merge.

    Args:
        decided: What was decided.
        records: Digests of what was read and written, by tensor, then by role.
        files: Files written beside the weights, by name.
    """
    prepared, table = decided.prepared, decided.table
    recipe, members = prepared.recipe.to_dict(), prepared.members
    paths = {role: source.where for role, source in members.sources.items()}
    if "base" in recipe:  # a table given may rest on it although this merge does not read it
        base = recipe["base"]
        paths.setdefault("base", base["model"] if isinstance(base, dict) else base)
    known = {role: dict(digests) for role, digests in table.digests.items() if role in paths}
    for name, record in records.items():
        for role, digest in record.items():
            known.setdefault(role, {})[name] = digest
    output = known.pop("output")
    shapes = {t.name: (t.dtype.name, t.shape) for shard in prepared.shards for t in shard.tensors}
    return {
        "format": FORMAT,
        "versions": versions(prepared.recipe),
        "recipe": recipe,
        "decided_by": table.origin,
        "table": table.to_json(),
        "stages": {name: stage.to_json() for name, stage in decided.stages.items()},
        "members": {
            role: {
                "path": paths[role],
                "derived": _is_derived(members.sources.get(role)),
                "fingerprint": fingerprint(digests, describe_tensors(members, role, digests)),
                "digests": digests,
            }
            for role, digests in sorted(known.items())
        },
        "output": {
            "fingerprint": fingerprint(output, shapes),
            "digests": dict(sorted(output.items())),
            "files": {name: file_digest(files[name]) for name in sorted(files)},
        },
    }


def file_digest(content: bytes) -> str:
    """Identity of a small file by content."""
    return xxhash.xxh3_128_hexdigest(content)


def _is_derived(source: Source | None) -> bool:
    """Whether a member was made of others, so that its path alone does not give it back."""
    if isinstance(source, Derived):
        return source.how != FROM_HUB
    return isinstance(source, StageSource)
