"""`taskvec import CONFIG`: a mergekit configuration as a recipe, and what differs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb
from taskvec.cli.options import FAITHFUL
from taskvec.cli.printing import answer
from taskvec.cli.recipe import show_differences


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec.recipes.located import parse_yaml
    from taskvec.recipes.mergekit.convert import convert, relocated
    from taskvec.recipes.reading import read_text
    from taskvec.recipes.writing import write_recipe

    document = parse_yaml(read_text(args.config), args.config)
    imported = convert(document, Path.cwd(), faithful=args.faithful)
    if args.out is not None:
        folder = Path(args.out).absolute().parent
        imported = relocated(imported, Path.cwd(), folder)
        write_recipe(Path(args.out), imported.text)
    if args.json:
        notes = [asdict(note) for note in imported.notes]
        answer({"recipe": imported.recipe, "notes": notes, "faithful": args.faithful})
        return 0
    if not args.quiet:
        show_differences(args.config, imported.notes)
    if args.out is None:
        print(imported.text, end="")
    return 0


VERB = Verb(
    "import", run, [
        Argument("config", metavar="CONFIG", help="mergekit configuration (YAML)"),
        Option("-o", "--out", "--output", "out", type=click.Path(), metavar="RECIPE",
               show_default="standard output", help="recipe to write"),
        FAITHFUL, JSON,
    ],
    page="""\
Prints on standard error what differs; [how](../how-to/from-mergekit.md). `merge` and the other
verbs that take a recipe take a configuration as well; its relative paths are then relative to the
current folder. `--json` has recipe, notes (line, theirs, ours, switch) and faithful.""",
)  # fmt: skip
