"""`taskvec search RECIPE --propose`: λ and a scheme from the scan alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from taskvec.cli import common
from taskvec.errors import UsageError

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this part of the verb."""
    group = parser.add_argument_group("without data")
    group.add_argument(
        "--propose",
        action="store_true",
        help="λ in closed form and a scheme, from the weights alone; nothing is scored",
    )
    group.add_argument(
        "--proposal",
        metavar="NAME",
        default="radius_shared",
        help="whose λ --write-recipe takes (radius_shared): radius | radius_shared | metagpt | "
        "nan | average | constant_0.3 | constant_0.5",
    )
    group.add_argument(
        "--write-recipe", metavar="FILE", help="write the recipe with these λ, ready to merge"
    )


def run(args: argparse.Namespace, recipe: Recipe) -> int:
    """Run this part of the verb.

    Args:
        args: With `json` and `quiet`, and what `add_arguments` adds.
        recipe: Of `lata` or `task_arithmetic`; its λ are not looked at, but for their sign.
    """
    from taskvec.coefficients.closed_form import FORMULAS, propose
    from taskvec.coefficients.schemes import suggest_scheme
    from taskvec.merging.prepare import open_with_base
    from taskvec.merging.scans import scan_members
    from taskvec.streaming import RunOptions

    if args.proposal not in FORMULAS:
        raise UsageError(f"--proposal must be one of {', '.join(FORMULAS)}; got {args.proposal!r}")
    _check(recipe)
    common.announce_compiling()
    options = RunOptions(progress=common.progress_for(args))
    members = open_with_base(recipe, options)
    scan = scan_members(members, options)
    weights = _decided(recipe, members, scan)
    proposals = propose(scan, weights)
    granularity = next(iter(recipe.parameters.values())).get("granularity", "tensor")
    suggestion = suggest_scheme(scan, granularity)
    common.warn([*members.warnings, *weights.warnings])
    if args.json:
        told = {"weights": weights.origin} | proposals.to_json() | {"scheme": suggestion.to_json()}
        print(json.dumps(told))
    else:
        _print(proposals, suggestion, weights)
    if args.write_recipe is not None:
        _write(recipe, proposals.scales[args.proposal], Path(args.write_recipe))
    return 0


def _decided(recipe: Recipe, members: Members, scan: Scan) -> Table:
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
            "alone, which add weighted vectors; score candidates instead, without --propose"
        )
    for task, scale in recipe.scales.items():
        if scale < 0:
            raise UsageError(
                f"task {task!r} has scale {scale:g}: λ can be proposed for adding alone; "
                "leave it out, or score candidates without --propose"
            )
    if recipe.profiles:
        task = next(iter(recipe.profiles))
        raise UsageError(
            f"scale of task {task!r} differs by layer; give one number, or none, for --propose"
        )


def _print(proposals: Proposals, suggestion: Suggestion, table: Table) -> None:
    from taskvec.coefficients.closed_form import FORMULAS

    v = proposals.vectors
    print(f"λ by proposal, and the share of its task vector that a task keeps ({table.origin})")
    common.show(
        [
            (
                name,
                *(x for t in v.tasks for x in (scales[t], proposals.shares[name][t])),
                FORMULAS[name].summary,
                FORMULAS[name].source,
            )
            for name, scales in proposals.scales.items()
        ],
        ("proposal", *(x for t in v.tasks for x in (t, "share")), "what it does", "source"),
    )
    print("\nlengths, and cosines of pure vectors")
    common.show(
        [
            (t, float(v.norm[i]), float(v.pure_norm[i]), *v.cosine[i].tolist())
            for i, t in enumerate(v.tasks)
        ],
        ("task", "‖τ‖", "‖τ'‖", *v.tasks),
    )
    print()
    for i, a in enumerate(v.tasks):
        for j, b in enumerate(v.tasks[:i]):
            print(
                f"sign conflict {b}, {a}: {v.conflict[j, i]:.1%} of the elements that both change"
            )
    told = "none (task_arithmetic)" if suggestion.scheme is None else suggestion.scheme
    print(f"scheme: {told}")
    for reason in suggestion.reasons:
        print(f"  {reason}")


def _write(recipe: Recipe, scales: Mapping[str, float], path: Path) -> None:
    """The recipe with these λ, to four decimals."""
    import yaml

    from taskvec.files import write_whole

    rounded = {task: round(scale, 4) for task, scale in scales.items()}
    text = yaml.safe_dump(
        recipe.with_scales(rounded).to_dict(), sort_keys=False, allow_unicode=True
    )
    with common.writing(path):
        write_whole(path, text.encode())
