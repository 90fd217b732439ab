"""`taskvec plan RECIPE`: what a merge would do, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli.commands import JSON, Arguments, Option, Verb
from taskvec.cli.options import (
    ADAPTER,
    FAITHFUL,
    FAMILY,
    OUT_DTYPE,
    PRECISION,
    RECIPE,
    SHARD_SIZE,
    THREADS,
)
from taskvec.cli.printing import answer, gigabytes, show, show_lines, some
from taskvec.cli.recipe import recipe_from, warn_of_scales
from taskvec.cli.streams import warn

if TYPE_CHECKING:
    from taskvec.layers import LayerKey
    from taskvec.recipes.recipe import Recipe


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec.checkpoints.source import nbytes
    from taskvec.layers import module_order
    from taskvec.merging.prepare import prepare
    from taskvec.outputs.adapter_merge import plan_adapter
    from taskvec.outputs.place import check_place
    from taskvec.outputs.staging import free_bytes
    from taskvec.statistics.collect import describe
    from taskvec.streaming import RunOptions

    recipe = recipe_from(args, args.recipe, needs_scales=False)
    warn_of_scales(recipe)
    plan = prepare(recipe, RunOptions(threads=args.threads))
    cost = plan.estimate
    adapter = plan_adapter(plan) if recipe.out.form == "lora" else None
    write_bytes = cost.write_bytes if adapter is None else adapter.nbytes
    if args.out is not None:
        check_place(plan.members, write_bytes, Path(args.out), force=True)
    members = plan.members
    decided, asks_for = _decide(plan) if len(recipe.scales) == len(members.tasks) else (None, None)
    modules = Counter(members.keys[name].module for name in members.merged)
    result: dict[str, Any] = {
        "inputs": {
            describe(role): {
                "path": source.where,
                "tensors": len(source.tensors),
                "bytes": nbytes(source),
            }
            for role, source in _order(members.sources, recipe)
        },
        "tensors": {
            "merged": len(members.merged),
            "copied": len(members.kept),
            "compared": len(members.equal),
        },
        "modules": {m: modules[m] for m in sorted(modules, key=partial(module_order, ""))},
        "other": _find_unrecognized(members.merged, members.keys),
        "method": {
            "name": recipe.method.name,
            "parameters": {name: task.parameters_to_dict() for name, task in recipe.tasks.items()},
        },
        "scale": {task: recipe.tasks[task].scale_to_dict() for task in recipe.scales},
        "decided": decided,
        "asks_for": asks_for,
        "shards": [
            {"file": s.file, "bytes": s.nbytes, "tensors": len(s.tensors)}
            for s in (plan.shards if adapter is None else ())
        ],
        "scan_bytes": cost.scan_bytes,
        "merge_bytes": cost.merge_bytes,
        "write_bytes": write_bytes,
        "free_bytes": free_bytes(Path(args.out or ".").absolute()),
        "peak_memory_bytes": cost.peak_bytes,
        "adapter": None if adapter is None else asdict(adapter),
        "notes": list(members.notes),
        "warnings": list(members.warnings),
    }
    warn(members.warnings)
    if args.json:
        answer(result)
    else:
        _print(result)
    return 0


def _order(sources: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, Any]]:
    """Members by role: roles first, then tasks in the order of the recipe."""
    tasks = [f"task:{task}" for task in recipe.family.tasks]
    return sorted(sources.items(), key=lambda m: tasks.index(m[0]) if m[0] in tasks else -1)


def _find_unrecognized(names: Sequence[str], keys: Mapping[str, LayerKey]) -> list[str]:
    """Tensors whose names say nothing, in the order of the model."""
    from taskvec.layers import model_order

    other = [name for name in names if keys[name].module == "other"]
    return sorted(other, key=lambda n: model_order(keys[n].tower, keys[n].block, "other", n))


def _decide(plan: Any) -> tuple[dict[str, float] | None, dict[str, Any] | None]:
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
    means = {t: float(c.mean()) for t, c in zip(outcome.tasks, coefficients, strict=True)}
    return {task: means[task] for task in plan.recipe.family.tasks if task in means}, None


def _print(result: dict[str, Any]) -> None:
    gb = gigabytes
    rows = [(role, m["tensors"], gb(m["bytes"]), m["path"]) for role, m in result["inputs"].items()]
    show(rows, ("input", "tensors", "size", "folder"))
    print()
    tensors, modules = result["tensors"], result["modules"].items()
    lines = [
        ("tensors", f"{tensors['merged']:,} merged, {tensors['copied']:,} copied from the target, "
         f"{tensors['compared']:,} compared"),
        ("", ", ".join(f"{module} {count:,}" for module, count in modules)),
        *([("other", some(result["other"]))] if result["other"] else []),
        *(("note", note) for note in result["notes"]),
        ("method", result["method"]["name"]),
    ]  # fmt: skip
    for task, parameters in result["method"]["parameters"].items():
        scale = _cell(result["scale"].get(task, "not given"))
        scale = f"{scale:g}" if isinstance(scale, float) else scale
        words = ", ".join(f"{name} {_cell(value)}" for name, value in parameters.items())
        lines.append(("", f"{task}: scale {scale}{'; ' + words if words else ''}"))
    asked = result["asks_for"]
    decided = "when every scale is given"
    if result["decided"] is not None:
        decided = ", ".join(f"{task} × {value:g}" for task, value in result["decided"].items())
    elif result["scan_bytes"] or asked:
        decided = "when the weights are read"
    scan, merge, write = (gb(result[key]) for key in ("scan_bytes", "merge_bytes", "write_bytes"))
    passes = f", {gb(asked['bytes'])} {asked['times']} for {asked['statistic']}" if asked else ""
    shards, adapter = len(result["shards"]), result["adapter"]
    disk = f"{gb(result['write_bytes'])} needed, {gb(result['free_bytes'])} free"
    written = [("write", f"{write} in {shards} file{'s' if shards > 1 else ''}")]
    lines += [
        *([("decided", decided)] if decided else []),
        ("read", f"{scan} to scan{passes}, at most {merge} to merge"),
        *(written if adapter is None else _lines_of_adapter(adapter)),
        ("disk", disk),
        ("memory", f"about {gb(result['peak_memory_bytes'])} besides the page cache"),
    ]
    show_lines(lines)


def _lines_of_adapter(adapter: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = adapter["lowest"], adapter["highest"]
    ranks = f"{high}" if low == high else f"{low} to {high}"
    size = f"{adapter['matrices']:,} weights, {gigabytes(adapter['nbytes'])}"
    lines = [("write", f"an adapter of at most rank {ranks} for {size}")]
    if adapter["whole"]:
        count, first = len(adapter["whole"]), adapter["whole"][0]
        lines.append(
            ("", f"{count:,} tensors, such as {first}, have no place in it if they differ")
        )
    return lines


def _cell(value: Any) -> Any:
    return "by layer" if isinstance(value, dict) else value


VERB = Verb(
    "plan", run, [
        RECIPE,
        Option("-o", "--out", type=click.Path(), metavar="DIR", heading="Output",
               show_default="the disk of the current folder",
               help="check this output folder and its disk too; it may be non-empty"),
        OUT_DTYPE, SHARD_SIZE, PRECISION, *ADAPTER, FAITHFUL, *FAMILY, THREADS, JSON,
    ],
    streams=True,
    page="Scales are not needed.",
)  # fmt: skip
