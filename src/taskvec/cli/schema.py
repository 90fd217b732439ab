"""`taskvec schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

import json
from pathlib import Path

import click

from taskvec.cli.commands import Arguments, Option, Verb
from taskvec.files import write_text


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec.recipes.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2)
    if args.out is None:
        print(text)
    else:
        write_text(Path(args.out), text + "\n")
    return 0


VERB = Verb(
    "schema", run, [
        Option("-o", "--out", type=click.Path(), metavar="FILE", show_default="standard output",
               help="file to write"),
    ],
    page="Editors that know JSON schema complete and check recipes with it:\n"
    "`taskvec schema > recipe.schema.json`, and as the first line of a recipe\n"
    "`# yaml-language-server: $schema=recipe.schema.json`.",
)  # fmt: skip
