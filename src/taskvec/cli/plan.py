"""`taskvec plan RECIPE`: what a merge would do, from headers alone."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from taskvec.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="recipe; or give --task and roles"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="check this output folder too (default: the current one's disk)",
    )
    common.add_family(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--dtype", help="bfloat16 | float16 | float32 | float64 (default: the target's)"
    )
    group.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB")
    group.add_argument("--precision", help="arithmetic: float32 (default) | float64")
    parser.add_argument(
        "--threads", type=common._positive, metavar="N", help="default: the processors, at most 8"
    )
    parser.add_argument("--json", action="store_true", help="the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    from taskvec.checkpoints.source import nbytes
    from taskvec.merging.prepare import prepare
    from taskvec.outputs.place import check_place
    from taskvec.outputs.staging import free_bytes
    from taskvec.statistics.collect import describe
    from taskvec.streaming import RunOptions

    recipe = common.recipe_from(args, args.recipe, needs_scales=False)
    plan = prepare(recipe, RunOptions(threads=args.threads))
    cost = plan.estimate
    if args.out is not None:
        check_place(plan.members, cost.write_bytes, Path(args.out), force=True)
    members = plan.members
    decided, asks_for = _decided(plan) if len(recipe.scales) == len(members.tasks) else (None, None)
    modules = Counter(members.keys[name].module for name in members.merged)
    result: dict[str, Any] = {
        "inputs": {
            describe(role): {
                "path": source.where,
                "tensors": len(source.tensors),
                "bytes": nbytes(source),
            }
            for role, source in members.sources.items()
        },
        "tensors": {
            "merged": len(members.merged),
            "copied": len(members.kept),
            "compared": len(members.equal),
        },
        "modules": dict(sorted(modules.items())),
        "other": [name for name in members.merged if members.keys[name].module == "other"],
        "method": {
            "name": recipe.method.name,
            "parameters": {name: task.parameters_to_dict() for name, task in recipe.tasks.items()},
        },
        "scale": {task: recipe.tasks[task].scale_to_dict() for task in recipe.scales},
        "decided": decided,
        "asks_for": asks_for,
        "shards": [
            {"file": s.file, "bytes": s.nbytes, "tensors": len(s.tensors)} for s in plan.shards
        ],
        "scan_bytes": cost.scan_bytes,
        "merge_bytes": cost.merge_bytes,
        "write_bytes": cost.write_bytes,
        "free_bytes": free_bytes(Path(args.out or ".").absolute()),
        "peak_memory_bytes": cost.peak_bytes,
        "notes": list(members.notes),
        "warnings": list(members.warnings),
    }
    common.warn(members.warnings)
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _decided(plan: Any) -> tuple[dict[str, float] | None, dict[str, Any] | None]:
    """Coefficient of each task where no weights are needed to know it, or what is read for it."""
    from taskvec.merging.decide import decide_from_headers
    from taskvec.merging.edits import layer_scales
    from taskvec.merging.estimate import reading_bytes
    from taskvec.methods.method import READINGS, Need

    outcome = decide_from_headers(plan)
    if outcome is None:
        return None, None
    if isinstance(outcome, Need):
        times, nbytes = READINGS.get(outcome.statistic, ""), reading_bytes(plan, outcome)
        return None, {"statistic": outcome.statistic, "bytes": nbytes, "times": times}
    coefficients = layer_scales(plan.recipe, plan.members, outcome) * outcome.weights
    return {t: float(c.mean()) for t, c in zip(outcome.tasks, coefficients, strict=True)}, None


def _print(result: dict[str, Any]) -> None:
    gb = common.gigabytes
    rows = [(role, m["tensors"], gb(m["bytes"]), m["path"]) for role, m in result["inputs"].items()]
    common.show(rows, ("input", "tensors", "size", "folder"))
    tensors = result["tensors"]
    print(
        f"\ntensors   {tensors['merged']:,} merged, {tensors['copied']:,} copied from the target, "
        f"{tensors['compared']:,} compared"
    )
    print(
        "          "
        + ", ".join(f"{module} {count:,}" for module, count in result["modules"].items())
    )
    if result["other"]:
        print(
            f"other     {', '.join(result['other'][:5])}{' …' if len(result['other']) > 5 else ''}"
        )
    for note in result["notes"]:
        print(f"note      {note}")
    print(f"method    {result['method']['name']}")
    for task, parameters in result["method"]["parameters"].items():
        scale = _cell(result["scale"].get(task, "not given"))
        scale = f"{scale:g}" if isinstance(scale, float) else scale
        words = ", ".join(f"{name} {_cell(value)}" for name, value in parameters.items())
        print(f"          {task}: scale {scale}{'; ' + words if words else ''}")
    if result["decided"]:
        print(
            "decided   "
            + ", ".join(f"{task} × {value:g}" for task, value in result["decided"].items())
        )
    elif result["decided"] is None:
        print(
            "decided   when the weights are read"
            if result["scan_bytes"] or result["asks_for"]
            else "decided   when every scale is given"
        )
    scan, merge, write = (gb(result[key]) for key in ("scan_bytes", "merge_bytes", "write_bytes"))
    asked = result["asks_for"]
    passes = f", {gb(asked['bytes'])} {asked['times']} for {asked['statistic']}" if asked else ""
    print(f"read      {scan} to scan{passes}, at most {merge} to merge")
    shards = result["shards"]
    print(f"write     {write} in {len(shards)} file{'s' if len(shards) > 1 else ''}")
    print(f"disk      {gb(result['write_bytes'])} needed, {gb(result['free_bytes'])} free")
    print(f"memory    about {gb(result['peak_memory_bytes'])} besides the page cache")


def _cell(value: Any) -> Any:
    return "by layer" if isinstance(value, dict) else value
