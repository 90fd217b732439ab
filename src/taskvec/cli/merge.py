"""`taskvec merge RECIPE OUT`: write a model with the skills of several fine-tunes."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli.commands import JSON, Arguments, Verb, split_paths
from taskvec.cli.options import FAMILY, OUTPUT, PATHS, RUNNING
from taskvec.cli.printing import answer, show, show_factored
from taskvec.cli.recipe import has_family, recipe_from, running, warn_of_scales
from taskvec.cli.streams import warn

if TYPE_CHECKING:
    from taskvec.recipes.recipe import Recipe

PARAMS = (PATHS, *OUTPUT, *FAMILY, *RUNNING, JSON)


def run(args: Arguments) -> int:
    """Run this verb."""
    path, out = split_paths(args.paths, args.out, has_family=has_family(args))
    return execute(args, recipe_from(args, path), Path(out))


def execute(args: Arguments, recipe: Recipe, out: Path, *, takes_zeros: bool = True) -> int:
    """Merge and print what was done."""
    from taskvec.methods.table import load_table
    from taskvec.outputs.run import run as merge

    if args.table is not None:
        recipe = replace(recipe, table=load_table(args.table))
    warn_of_scales(recipe)
    started = time.monotonic()
    merged = merge(recipe, out, running(args, out.name), takes_zeros=takes_zeros)
    warn(merged.warnings)
    weights = {
        task: merged.table.weights[merged.table.tasks.index(task)] for task in recipe.scales
        if task in merged.table.tasks
    }  # fmt: skip
    result: dict[str, Any] = {
        "path": str(merged.path),
        "fingerprint": merged.fingerprint,
        "decided_by": merged.table.origin,
        "scale": {name: task.scale_to_dict() for name, task in recipe.tasks.items()},
        "kept_layers": {task: float((row != 0).mean()) for task, row in weights.items()},
        "seconds": round(time.monotonic() - started, 3),
        "warnings": list(merged.warnings),
    }
    if recipe.out.form == "lora":
        result["factored"] = [asdict(row) for row in merged.factored]
        result["error"] = math.sqrt(merged.lost)
    if args.json:
        answer(result)
        return 0
    rows = [
        (task, _scale_text(recipe, task), f"{share:.0%}", float(weights[task].mean()))
        for task, share in result["kept_layers"].items()
    ]
    if rows:
        show(rows, ("task", "scale", "tensors touched", "mean weight"))
        print()
    if "factored" in result:
        show_factored(result["factored"], merged.lost)
    print(f"{merged.path}  ({merged.table.origin}; {result['seconds']:.1f} s)")
    print(f"fingerprint {merged.fingerprint}")
    return 0


def _scale_text(recipe: Recipe, task: str) -> float | str:
    """λ of a task for a cell of a table."""
    return "by layer" if task in recipe.profiles else recipe.scales[task]


VERB = Verb(
    "merge", run, PARAMS, streams=True,
    page="""\
Writes θ_target + Σ_t λ_t w_t τ_t, or what the method defines, to the folder OUT. RECIPE is a YAML
file, a mergekit configuration, or a `taskvec-manifest.json`, which is replayed as it is; without
one, give `--task` and roles.

`tensors touched` in the printed table is the share of tensors with a weight other than 0, `mean
weight` the plain mean over tensors. `--json` has path, fingerprint, decided_by, scale, kept_layers,
seconds and warnings; of an adapter also factored (by tensor) and error (‖τ − B A‖ / ‖τ‖ of the
whole model).""",
)  # fmt: skip
