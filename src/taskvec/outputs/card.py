"""The model card, and how models are named where others read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taskvec.checkpoints.hub import hub_name
from taskvec.checkpoints.naming import display_name, hub_id
from taskvec.checkpoints.source import Source


def _front_matter(model: Source) -> dict[str, Any]:
    """Metadata of a model card; empty if there is none that can be read."""
    import yaml

    if model.folder is None:
        return {}
    try:
        text = (model.folder / "README.md").read_text()
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        data = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def model_card(
    name: str,
    members: Mapping[str, Source],
    *,
    method: str,
    formula: str,
    scales: Mapping[str, float | Mapping[str, Any]],
) -> bytes:
    """README.md with the hub's metadata.

    A licence is given only where all members state the same one; otherwise they are listed.

    Args:
        name: Title.
        members: Model by role, in words.
        method: Name of the method.
        formula: The merged model in symbols.
        scales: λ by task; a mapping where it differs by layer.
    """
    import yaml

    licences = {
        who: str(_front_matter(model).get("license", "not stated"))
        for who, model in members.items()
    }
    agreed = set(licences.values()) if licences else set()
    metadata: dict[str, Any] = {
        "base_model": sorted(set().union(*map(_origins, members.values())) - {""}),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["task-arithmetic", "merge", "taskvec", method],
    }
    if len(agreed) == 1 and agreed != {"not stated"}:
        metadata["license"] = agreed.pop()
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True).strip(),
        "---",
        f"# {name}",
        "",
        f"Made by [taskvec](https://pypi.org/project/taskvec/) with `{method}`: {formula}.",
        "",
        *_table(
            ("member", "model", "licence"),
            [(who, display_name(model), licences[who]) for who, model in members.items()],
        ),
        "",
        *_table(
            ("task", "scale λ"),
            [
                (task, "by layer" if isinstance(scale, Mapping) else f"{scale:g}")
                for task, scale in sorted(scales.items())
            ],
        ),
        "",
        "`taskvec.yaml` is the recipe, `taskvec-manifest.json` what was read and written; "
        "`taskvec verify` checks this folder against it.",
        "",
    ]
    return "\n".join(lines).encode()


def _origins(model: Source) -> set[str]:
    """Models that one is made of, as metadata names them."""
    if not model.parts or hub_name(model.where) is not None:
        return {hub_id(model)}
    return set().union(*map(_origins, model.parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
