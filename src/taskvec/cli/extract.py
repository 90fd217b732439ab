"""`taskvec extract RECIPE OUT`: a task vector as a file, or as a LoRA adapter."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.cli.merge import split_paths
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.vectors.vector_file import Extracted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.usage = "%(prog)s [RECIPE] OUT [options]"
    parser.add_argument(
        "paths",
        metavar="[RECIPE] OUT",
        nargs="+",
        help="recipe, and FILE.safetensors (or with --form lora the folder) to write; "
        "--task NAME picks one of a recipe's tasks",
    )
    group = parser.add_argument_group("what to extract")
    group.add_argument(
        "--what",
        choices=("task", "pure", "complex", "instruction"),
        default="task",
        help="θ_ft − θ_pre (default); layer weights × that; θ_ft − θ_base; θ_pre − θ_base",
    )
    group.add_argument("--scaled", action="store_true", help="multiply a pure vector with its λ")
    group.add_argument(
        "--table", metavar="FILE", help="layer weights (CSV or JSON) of a pure vector"
    )
    group.add_argument(
        "--dtype",
        help="bfloat16 | float16 | float32 | float64 (default: float32, exact for merges)",
    )
    group.add_argument("--precision", help="arithmetic: float32 (default) | float64")
    group.add_argument("--force", action="store_true", help="replace what is there")
    group = parser.add_argument_group("LoRA adapter")
    group.add_argument(
        "--form",
        choices=("vector", "lora"),
        default="vector",
        help="lora: matrices of low rank, for PEFT; needs memory for two to five copies of the "
        "largest matrix",
    )
    group.add_argument("--rank", type=int, metavar="R", help="rank of every matrix")
    group.add_argument(
        "--energy", type=float, metavar="SHARE", help="share of each matrix's ‖τ‖² to keep instead"
    )
    group.add_argument(
        "--rest",
        choices=("refuse", "drop", "save"),
        default="refuse",
        help="what becomes of norms, biases, embeddings, experts that differ",
    )
    group.add_argument("--seed", type=int, default=0, help="of the random projections (default 0)")
    common.add_family(parser)
    common.add_running(parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    from taskvec.methods.table import load_table
    from taskvec.vectors.difference import Wanted
    from taskvec.vectors.extract import write_difference
    from taskvec.vectors.lora import shape_of

    recipe_path, out = split_paths(args.paths)
    shape = shape_of(args.form, rank=args.rank, energy=args.energy, rest=args.rest, seed=args.seed)
    task = _chosen(args)
    if args.what == "instruction" and recipe_path is None and not args.task:
        args.task = [f"instruct={args.instruct or args.anchor}"]  # a family needs a task
    # Only a pure vector asks the method for weights.
    method = {"name": "lata" if args.what == "pure" else "task_arithmetic"}
    recipe = common.recipe_from(args, recipe_path, needs_scales=False, method=method)
    if args.table is not None:
        if args.what != "pure":
            raise UsageError(f"layer weights go with a pure vector; got {args.what}")
        recipe = replace(recipe, table=load_table(args.table))
    wanted = Wanted(args.what, task, args.scaled)
    started = time.monotonic()
    options = common.options_from(args)
    extracted = write_difference(recipe, out, wanted, shape, options)
    common.warn(extracted.warnings)
    result = _result(extracted, time.monotonic() - started)
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _chosen(args: argparse.Namespace) -> str | None:
    """The task that `--task NAME` picks; `--task NAME=DIR` stays a member of the family."""
    names = [text for text in args.task if "=" not in text]
    args.task = [text for text in args.task if "=" in text]
    return names[-1] if names else None


def _result(extracted: Extracted, seconds: float) -> dict[str, Any]:
    return {
        "path": str(extracted.path),
        "name": extracted.name,
        "tensors": len(extracted.tensors),
        "left_out": list(extracted.zero),
        "bytes": extracted.bytes,
        "fingerprint": extracted.fingerprint,
        "anchor_fingerprint": extracted.anchor_fingerprint,
        "factored": [asdict(row) for row in extracted.factored],
        "lost": extracted.lost,
        "seconds": round(seconds, 3),
        "warnings": list(extracted.warnings),
    }


def _print(result: dict[str, Any]) -> None:
    if result["factored"]:
        rows = [
            (row["name"], row["kept"], row["rank"], row["norm"], row["error"])
            for row in result["factored"]
        ]
        common.show(rows, ("tensor", "kept as", "rank", "‖τ‖", "error"))
        print(f"\n{result['lost']:.2%} of ‖τ‖² is not in the adapter")
    size = common.gigabytes(result["bytes"])
    print(f"{result['path']}  ({result['name']}; {size}; {result['seconds']:.1f} s)")
    left_out = result["left_out"]
    zero = f"; {len(left_out)} whose difference is zero are left out" if left_out else ""
    print(f"{result['tensors']:,} tensors{zero}")
    if result["fingerprint"] is not None:
        print(f"fingerprint {result['fingerprint']}")
