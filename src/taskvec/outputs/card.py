"""The model card, and how models are named where others read it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.checkpoints.naming import display_name, hub_id
from taskvec.checkpoints.source import Source
from taskvec.errors import CheckpointError
from taskvec.files import write_text
from taskvec.recipes.recipe import Recipe
from taskvec.recipes.replay import MANIFEST_FILE

NOT_STATED = "not stated"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")  # as the hub's metadata name one
_SHOWN = 80  # characters of what a member says
# What is markup in a cell of a table, or becomes a link by itself.
_MARKUP = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")


def licence_of(model: Source) -> str:
    """The licence that the card of a model states; `NOT_STATED` if it states none.

    Raises:
        CheckpointError: the card cannot be read.
    """
    import yaml

    if model.folder is None or not os.path.lexists(path := model.folder / "README.md"):
        return NOT_STATED
    text = documents.read_text(path, documents.CARD, of=model.folder).replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return NOT_STATED
    front = text[4:].split("\n---", 1)[0]
    # Nothing but the licence becomes a value: a wrong date beside it does not matter.
    roots = documents.compose_yaml(front, documents.CARD, str(path))
    root = roots[0] if roots else None
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    entry = next((value for key, value in pairs if key.value == "license"), None)
    parts = entry.value if isinstance(entry, yaml.SequenceNode) else [entry]
    words = [part.value.strip() for part in parts if isinstance(part, yaml.ScalarNode)]
    licence = documents.plain(", ".join(word for word in words[:8] if word))
    if len(licence) > _SHOWN:
        licence = licence[: _SHOWN - 1] + "…"
    return licence or NOT_STATED


def _licences(members: Mapping[str, Source]) -> tuple[dict[str, str], list[str]]:
    """Licence by member, and warnings: a card is decoration, which no merge fails for."""
    found, warnings = {}, []
    for who, model in members.items():
        try:
            found[who] = licence_of(model)
        except CheckpointError as error:
            found[who] = NOT_STATED
            warnings.append(f"the licence of {who} is left out of the model card: {error}")
    return found, warnings


def model_card(
    name: str, members: Mapping[str, Source], recipe: Recipe, decided_by: str
) -> tuple[bytes, list[str]]:
    """README.md with the hub's metadata; and warnings about what is left out.

    A licence is given only where all members state the same one; otherwise they are listed.

    Args:
        name: Title.
        members: Model by role, in words.
        recipe: Whose names of local models on the hub the metadata has; it names no others.
        decided_by: Where the table is from, in words.
    """
    import yaml

    method, published, is_adapter = recipe.method, recipe.published, recipe.out.form == "lora"
    licences, warnings = _licences(members)
    agreed = set(licences.values())
    over = [members["target"]] if is_adapter else members.values()
    origins = set[str]().union(*(_origins(model, published) for model in over))
    metadata: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["task-arithmetic", "merge", "taskvec", method.name],
    }
    if origins := origins - {""}:
        metadata["base_model"] = sorted({documents.plain(name) for name in origins})
        metadata["base_model_relation"] = "adapter" if is_adapter else "merge"
    if len(agreed) == 1 and _LICENCE.fullmatch(licence := agreed.pop()):
        metadata["license"] = licence
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True, width=10_000).strip(),
        "---",
        f"# {escaped(name)}",
        "",
        f"Made by [taskvec](https://pypi.org/project/taskvec/) with `{method.name}`: "
        f"{documents.plain(method.formula)} ({documents.plain(decided_by)}).",
        "",
        *_table(
            ("member", "model", "licence"),
            [
                (who, display_name(model, published), licences[who])
                for who, model in members.items()
            ],
        ),
        "",
        *_table(
            ("task", "scale λ"),
            [
                (name, "by layer" if task.profile is not None else f"{task.scale:g}")
                for name, task in recipe.tasks.items()
            ],
        ),
        "",
        "`taskvec.yaml` is the recipe, `taskvec-manifest.json` what was read and written; "
        "`taskvec verify` checks this folder against it.",
        "",
    ]
    return "\n".join(lines).encode(), warnings


_SCORES = ("<!-- scores by taskvec eval -->", "<!-- end of scores -->")


def has_card(folder: Path) -> bool:
    """Whether a folder is an output of taskvec with its model card."""
    return (folder / MANIFEST_FILE).is_file() and (folder / "README.md").is_file()


def add_scores(folder: Path, scores: Sequence[Mapping[str, Any]]) -> None:
    """Write scores into the model card of an output: a table, and `model-index` for the hub.

    Scores that an earlier call wrote are replaced; all else on the card stays.

    Args:
        folder: That taskvec wrote.
        scores: With task, metric, value, low, high and n.

    Raises:
        CheckpointError: the card has no metadata, or cannot be read.
        OutputError: the card cannot be written.
    """
    import yaml

    path = folder / "README.md"
    text = documents.read_text(path, documents.CARD)
    match = re.fullmatch(r"---\n(.*?\n)---\n(.*)", text, re.DOTALL)
    try:
        documents.compose_yaml(match[1] if match else "", documents.CARD, str(path))  # its limits
        metadata = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path}: {documents.one_line(error)}; correct its head") from error
    if match is None or not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: does not begin with metadata; merge again")
    known = [each for each in scores if math.isfinite(each["value"])]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": task, "type": task},
            "metrics": [
                {"type": each["metric"], "value": each["value"]}
                for each in known
                if each["task"] == task
            ],
        }
        for task in dict.fromkeys(each["task"] for each in known)
    ]
    metadata["model-index"] = [{"name": folder.resolve().name, "results": results}]
    rows = [
        (each["task"], each["metric"], *(f"{each[k]:.4g}" for k in ("value", "low", "high")),
         f"{each['n']:,}")
        for each in scores
    ]  # fmt: skip
    head = ("task", "metric", "value", "95 % from", "to", "samples")
    table = "\n".join([_SCORES[0], "", *_table(head, rows), "", _SCORES[1]])
    old = re.compile(".*?".join(map(re.escape, _SCORES)), re.DOTALL)
    body = old.sub("", match[2]).rstrip()
    front = yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True, width=10_000)
    write_text(path, f"---\n{front}---\n{body}\n\n{table}\n")


def escaped(text: str) -> str:
    r"""Text of others as Markdown shows it: one line, without markup, links or ends of cells.

    >>> print(escaped("a|b <img> [x](y) snake_case"))
    a\|b \<img\> \[x\](y) snake_case
    """
    return _MARKUP.sub(r"\\\g<0>", documents.plain(text))


def _origins(model: Source, published: Mapping[str, str]) -> set[str]:
    """Models that one is made of, as metadata names them."""
    name = hub_id(model, published)
    if name or not model.parts:
        return {name}
    return set().union(*(_origins(part, published) for part in model.parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
