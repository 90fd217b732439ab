"""`taskvec forget RECIPE OUT`: write a model without the skills of some fine-tunes."""

from __future__ import annotations

import argparse

from taskvec.cli import common, merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    merge.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run this verb: a merge with scales negated; LATA by threshold where no method is named."""
    from taskvec.outputs.merge import negated

    recipe_path, out = merge.split_paths(args.paths)
    method = {"name": "lata", "scheme": "threshold"}
    recipe = common.recipe_from(args, recipe_path, method=method)
    return merge.execute(args, negated(recipe), out)
