"""`taskvec extract RECIPE OUT`: a task vector as a file, or as a LoRA adapter."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb, split_paths
from taskvec.cli.options import FAMILY, FORCE, OUT, OUT_DTYPE, PRECISION, RUNNING
from taskvec.cli.printing import answer, gigabytes, show_factored
from taskvec.cli.recipe import has_family, recipe_from, running
from taskvec.cli.streams import warn
from taskvec.errors import UsageError

if TYPE_CHECKING:
    from taskvec.vectors.vector_file import Extracted


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec.methods.table import load_table
    from taskvec.vectors.difference import Wanted
    from taskvec.vectors.extract import write_difference
    from taskvec.vectors.lora import shape_of

    path, out_path = split_paths(args.paths, args.out, has_family=has_family(args))
    out = Path(out_path)
    task = _chosen(args)
    if args.what == "instruction" and path is None and not args.task:
        args.task = (f"instruct={args.instruct or args.anchor}",)  # a family needs a task
    # Only a pure vector asks the method for weights.
    method = {"name": "lata" if args.what == "pure" else "task_arithmetic"}
    recipe = recipe_from(args, path, needs_scales=False, method=method)
    if args.table is not None:
        if args.what != "pure":
            raise UsageError(f"layer weights go with a pure vector; got {args.what}")
        recipe = replace(recipe, table=load_table(args.table))
    wanted = Wanted(args.what, task, args.scaled)
    seed = recipe.seed if args.form == "lora" else 0
    shape = shape_of(args.form, rank=args.rank, energy=args.energy, rest=args.rest, seed=seed)
    started = time.monotonic()
    options = running(args, out.name)
    extracted = write_difference(recipe, out, wanted, shape, options)
    warn(extracted.warnings)
    result = _result(extracted, time.monotonic() - started)
    if args.json:
        answer(result)
    else:
        _print(result)
    return 0


def _chosen(args: Arguments) -> str | None:
    """The task that `--task NAME` picks; `--task NAME=DIR` stays a member of the family."""
    names = [text for text in args.task if "=" not in text]
    args.task = tuple(text for text in args.task if "=" in text)
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
        show_factored(result["factored"], result["lost"])
    size = gigabytes(result["bytes"])
    print(f"{result['path']}  ({result['name']}; {size}; {result['seconds']:.1f} s)")
    left_out = result["left_out"]
    zero = f"; {len(left_out)} whose difference is zero are left out" if left_out else ""
    print(f"{result['tensors']:,} tensors{zero}")
    if result["fingerprint"] is not None:
        print(f"fingerprint {result['fingerprint']}")


ADAPTER_HEAD = "LoRA adapter"
VERB = Verb(
    "extract", run, [
        Argument("paths", nargs=-1, metavar="[RECIPE] OUT",
                 help="recipe, and the file (….safetensors) or adapter folder to write"),
        Option("--what", type=click.Choice(("task", "pure", "complex", "instruction")),
               default="task",
               help="θ_ft − θ_pre; layer weights × that; θ_ft − θ_base; θ_pre − θ_base"),
        Option("--scaled", is_flag=True, help="multiply a pure vector by its λ"),
        Option("--table", type=click.Path(), metavar="FILE",
               help="layer weights (CSV or JSON) of a pure vector instead of the method's"),
        Option("--form", type=click.Choice(("vector", "lora")), default="vector",
               heading=ADAPTER_HEAD,
               help="a file, or matrices of low rank for PEFT, which need memory for two to five "
               "copies of the largest matrix"),
        Option("--rank", type=int, metavar="R", heading=ADAPTER_HEAD, help="rank of every matrix"),
        Option("--energy", type=float, metavar="SHARE", heading=ADAPTER_HEAD,
               help="instead of a rank: share of each matrix's ‖τ‖² to keep, in (0, 1]"),
        Option("--rest", type=click.Choice(("refuse", "drop", "save")), default="refuse",
               heading=ADAPTER_HEAD,
               help="what to do with norms, biases, embeddings and experts that differ"),
        OUT, OUT_DTYPE, PRECISION, FORCE, *FAMILY, *RUNNING, JSON,
    ],
    streams=True,
    page="""\
Writes what a fine-tune changed; [how](../how-to/extract.md). `--task NAME` without a model picks
one of the recipe's tasks. Scales are not needed. Only `--what pure` uses the method's layer
weights. `--dtype` is `float32` by default, or `float64` where a model is. `--json` has path, name,
tensors, left_out, bytes, fingerprint, anchor_fingerprint, factored, lost, seconds and warnings.""",
)  # fmt: skip
