"""`taskvec merge RECIPE OUT`: write a model with the skills of several fine-tunes."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.recipes.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.usage = "%(prog)s [RECIPE] OUT [options]"
    parser.add_argument(
        "paths", metavar="[RECIPE] OUT", nargs="+", help="recipe or manifest, and folder to write"
    )
    common.add_family(parser)
    common.add_output(parser)
    common.add_running(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def split_paths(paths: list[str]) -> tuple[str | None, Path]:
    """Recipe (if one is given) and output.

    Raises:
        UsageError: more than two paths.
    """
    if len(paths) > 2:
        raise UsageError(
            f"expected [RECIPE] OUT; got {len(paths)} paths, the third is {paths[2]!r}"
        )
    return (paths[0] if len(paths) == 2 else None), Path(paths[-1])


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    recipe_path, out = split_paths(args.paths)
    return execute(args, common.recipe_from(args, recipe_path), out)


def execute(args: argparse.Namespace, recipe: Recipe, out: Path) -> int:
    """Merge and print what was done."""
    from taskvec.methods.table import load_table
    from taskvec.outputs import run as engine

    if args.table is not None:
        recipe = replace(recipe, table=load_table(args.table))
    started = time.monotonic()
    merged = engine.run(recipe, out, common.options_from(args))
    common.warn(merged.warnings)
    result: dict[str, Any] = {
        "path": str(merged.path),
        "fingerprint": merged.fingerprint,
        "decided_by": merged.table.origin,
        "scale": {name: task.scale_to_dict() for name, task in recipe.tasks.items()},
        "kept_layers": {
            task: float((row != 0).mean())
            for task, row in zip(merged.table.tasks, merged.table.weights, strict=True)
        },
        "seconds": round(time.monotonic() - started, 3),
        "warnings": list(merged.warnings),
    }
    if args.json:
        print(json.dumps(result))
        return 0
    rows = [
        (task, _shown(recipe, task), f"{share:.0%}", float(row.mean()))
        for (task, share), row in zip(
            result["kept_layers"].items(), merged.table.weights, strict=True
        )
    ]
    if rows:
        common.show(rows, ("task", "scale", "tensors touched", "mean weight"))
        print()
    print(f"{merged.path}  ({merged.table.origin}; {result['seconds']:.1f} s)")
    print(f"fingerprint {merged.fingerprint}")
    return 0


def _shown(recipe: Recipe, task: str) -> float | str:
    """λ of a task for a cell of a table."""
    return "by layer" if task in recipe.profiles else recipe.scales[task]
