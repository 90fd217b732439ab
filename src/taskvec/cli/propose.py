"""`taskvec propose RECIPE`: λ and a scheme from the scan alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskvec.cli.commands import JSON, Arguments, Option, Verb
from taskvec.cli.options import FAMILY, RECIPE, RUNNING
from taskvec.cli.printing import answer, show
from taskvec.cli.recipe import recipe_only, running
from taskvec.cli.streams import warn
from taskvec.errors import UsageError, nearest
from taskvec.journal import finite

if TYPE_CHECKING:
    from taskvec.coefficients.closed_form import Proposals
    from taskvec.coefficients.schemes import Suggestion
    from taskvec.family.members import Members
    from taskvec.methods.table import Table
    from taskvec.recipes.recipe import Recipe
    from taskvec.statistics.scan import Scan

# Their merges are sums of weighted vectors; others keep, rescale or elect entries, which no scan
# tells of.
SUMS = ("lata", "task_arithmetic")


def run(args: Arguments) -> int:
    """Run this verb: λ that the recipe has are not looked at, except for their sign."""
    recipe = recipe_only(args, args.recipe, needs_scales=False)

    from taskvec.coefficients.closed_form import FORMULAS, propose
    from taskvec.coefficients.schemes import suggest_scheme
    from taskvec.merging.prepare import open_with_base
    from taskvec.merging.scans import scan_members

    if args.proposal not in FORMULAS:
        raise UsageError(f"--proposal: {nearest(args.proposal, list(FORMULAS))}")
    _check(recipe)
    options = running(args)
    members = open_with_base(recipe, options)
    scan = scan_members(members, options)
    weights = _decide(recipe, members, scan)
    proposals = propose(scan, weights)
    granularity = next(iter(recipe.parameters.values())).get("granularity", "tensor")
    suggestion = suggest_scheme(scan, granularity)
    warn([*members.warnings, *weights.warnings])
    if args.json:
        record = {"weights": weights.origin} | proposals.to_json() | {"scheme": finite(suggestion)}
        answer(record)
    else:
        _print(proposals, suggestion, weights, list(recipe.family.tasks))
    if args.out is not None:
        _write(recipe, proposals.scales[args.proposal], Path(args.out))
    return 0


def _decide(recipe: Recipe, members: Members, scan: Scan) -> Table:
    """The method's own table; λ = 1 stands for what is not decided yet."""
    from taskvec.merging.decide import inputs_of
    from taskvec.methods.table import Table

    scaled = recipe.with_scales(dict.fromkeys(scan.tasks, 1.0))
    table = recipe.method.decide(inputs_of(scaled, members, scan=scan))
    assert isinstance(table, Table)
    return table


def _check(recipe: Recipe) -> None:
    if recipe.method.name not in SUMS:
        raise UsageError(
            f"method {recipe.method.name}: λ can be proposed from a scan for {' and '.join(SUMS)} "
            "only, which add weighted vectors; use `taskvec search` instead"
        )
    for task, scale in recipe.scales.items():
        if scale < 0:
            raise UsageError(
                f"task {task!r} has scale {scale:g}: λ can be proposed only for addition; "
                "remove it, or use `taskvec search`"
            )
    if recipe.profiles:
        task = next(iter(recipe.profiles))
        raise UsageError(f"scale of task {task!r} differs by layer; give one number, or none")


def _print(
    proposals: Proposals, suggestion: Suggestion, table: Table, tasks: Sequence[str]
) -> None:
    from taskvec.coefficients.closed_form import FORMULAS

    v = proposals.vectors
    at = [v.tasks.index(task) for task in tasks]
    print(f"λ by proposal, and the share of its task vector that a task keeps ({table.origin})")
    show(
        [
            (
                name,
                *(x for t in tasks for x in (scales[t], proposals.shares[name][t])),
                FORMULAS[name].summary,
                FORMULAS[name].source,
            )
            for name, scales in proposals.scales.items()
        ],
        ("proposal", *(x for t in tasks for x in (t, "share")), "what it does", "source"),
    )
    print("\nlengths, and cosines of pure vectors")
    show(
        [
            (t, float(v.norm[i]), float(v.pure_norm[i]), *v.cosine[i][at].tolist())
            for t, i in zip(tasks, at, strict=True)
        ],
        ("task", "‖τ‖", "‖τ'‖", *tasks),
    )
    print()
    for (i, a), (j, b) in combinations(zip(at, tasks, strict=True), 2):
        print(f"sign conflict {a}, {b}: {v.conflict[i, j]:.1%} of the elements that both change")
    record = "none (task_arithmetic)" if suggestion.scheme is None else suggestion.scheme
    print(f"scheme: {record}")
    for reason in suggestion.reasons:
        print(f"  {reason}")


def _write(recipe: Recipe, scales: Mapping[str, float], path: Path) -> None:
    """The recipe with these λ, to four decimals."""
    from taskvec.recipes.writing import recipe_text, write_recipe

    rounded = {task: round(scale, 4) for task, scale in scales.items()}
    data = recipe.with_scales(rounded).to_dict()
    write_recipe(path, recipe_text(data, "λ in closed form, by taskvec propose"))


VERB = Verb(
    "propose", run, [
        RECIPE,
        Option("--proposal", default="radius_shared",
               words=("radius", "radius_shared", "metagpt", "nan", "average", "constant_0.3",
                      "constant_0.5"),
               help="which λ the written recipe takes"),
        Option("-o", "--out", "--write-recipe", "out", type=click.Path(), metavar="FILE",
               help="write the recipe with these λ, ready to merge"),
        *FAMILY, *RUNNING, JSON,
    ],
    streams=True,
    page="""\
λ in closed form and a scheme, from the weights alone; nothing is scored
([derivation](../concepts/coefficients.md)).""",
)  # fmt: skip
