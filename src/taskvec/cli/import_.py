"""`taskvec import CONFIG`: a mergekit configuration as a recipe, and what differs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from taskvec.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument("config", metavar="CONFIG", help="mergekit configuration, YAML")
    parser.add_argument(
        "-o", "--output", metavar="RECIPE", help="file to write; default: standard output"
    )
    parser.add_argument(
        "--faithful",
        action="store_true",
        help="give what mergekit gives, traps included; random masks have other bits",
    )
    parser.add_argument("--json", action="store_true", help="recipe and differences as JSON")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    from taskvec.recipes.located import parse_yaml
    from taskvec.recipes.mergekit.convert import convert, relocated
    from taskvec.recipes.reading import read_text
    from taskvec.recipes.writing import write_recipe

    document = parse_yaml(read_text(args.config), args.config)
    imported = convert(document, Path.cwd(), faithful=args.faithful)
    if args.output is not None:
        folder = Path(args.output).absolute().parent
        imported = relocated(imported, Path.cwd(), folder)
        with common.writing(args.output):
            write_recipe(Path(args.output), imported.text)
    if args.json:
        notes = [asdict(note) for note in imported.notes]
        print(json.dumps({"recipe": imported.recipe, "notes": notes, "faithful": args.faithful}))
        return 0
    common.tell(args.config, imported.notes)
    if args.output is None:
        print(imported.text, end="")
    return 0
