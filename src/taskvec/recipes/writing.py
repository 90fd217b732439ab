"""Recipes as files that people go on to edit: with the schema that editors complete and check by.

The first line names the schema as a file beside the recipe, because that is what editors find
without a network and wherever the folder is moved to. The recipe in the folder of a merged model
is a record, not a start, and has no schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from taskvec.files import write_text

SCHEMA_FILE = "recipe.schema.json"
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"


class _Dumper(yaml.SafeDumper):
    """Lists of numbers and words on one line; nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flat = all(isinstance(v, (int, float, str)) for v in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


_Dumper.add_representer(list, _list)


def recipe_text(data: Mapping[str, Any], about: str) -> str:
    """A recipe as YAML.

    Args:
        data: As `read_recipe` takes it.
        about: Where it is from, one line.
    """
    body = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return f"{SCHEMA_LINE}# {about}\n{body}"


def write_recipe(path: Path, text: str) -> None:
    """Write the text of a recipe, and the schema beside it.

    Raises:
        OutputError: a file cannot be written.
    """
    from taskvec.recipes.schema import recipe_schema

    write_text(path, text)
    if path.is_file():  # not a pipe
        schema = json.dumps(recipe_schema(), separators=(",", ":"))
        write_text(path.parent / SCHEMA_FILE, schema + "\n")
