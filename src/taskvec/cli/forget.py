"""`taskvec forget RECIPE OUT`: write a model without the skills of some fine-tunes."""

from __future__ import annotations

from pathlib import Path

from taskvec.cli import merge
from taskvec.cli.commands import Arguments, Verb, split_paths
from taskvec.cli.recipe import has_family, recipe_from


def run(args: Arguments) -> int:
    """Run this verb: a merge with scales negated; LATA by threshold where no method is named."""
    from taskvec.outputs.merge import negated

    path, out = split_paths(args.paths, args.out, has_family=has_family(args))
    recipe = recipe_from(args, path, method={"name": "lata", "scheme": "threshold"})
    return merge.execute(args, negated(recipe), Path(out), takes_zeros=args.force)


VERB = Verb(
    "forget", run, merge.PARAMS, streams=True,
    page="""\
As `merge`, with every scale negated; scales must be positive. The method is LATA with the scheme
`threshold` where none is named. Where every layer has weight 0, nothing is written unless `--force`
is given, and the exit code is 3.""",
)  # fmt: skip
