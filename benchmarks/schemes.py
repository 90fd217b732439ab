"""The rule for LATA's scheme against every scheme at its own best λ, over families.

    python -m benchmarks.schemes [--family FOLDER]... [--json FILE]

For a family (the shipped zoo as `zoo`, or folders that `python -m taskvec.zoo.train` filled) math
and code are added under every scheme. The λ shared by both is chosen for each scheme on questions
of its own, among multiples of what `radius_shared` proposes for its pure vectors, so that no scheme
is at a disadvantage for making vectors shorter. Scores are right answers in math and code on other
questions; differences are paired, with intervals at 95 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import taskvec as tv
from benchmarks.closed_form import Bench, bootstrap, interval, mean
from taskvec.coefficients import propose
from taskvec.coefficients.schemes import suggest_scheme
from taskvec.errors import UsageError
from taskvec.journal import finite

TASKS = ("math", "code")
MULTIPLES = (0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
POLICIES = ("the rule", "none", "logarithmic")


def tables(scan: tv.Scan) -> dict[str, tv.Table | None]:
    """Layer weights by scheme; one threshold is the paper's, one halves the layers by task."""
    halves = {
        task: {"threshold": float(np.median(similarities(scan, task)))} for task in scan.tasks
    }
    return {
        "none": None,
        "logarithmic": tv.lata(scan, scheme="logarithmic"),
        "linear": tv.lata(scan, scheme="linear"),
        "threshold 0.95": tv.lata(scan, scheme="threshold"),
        "threshold, half": tv.lata(scan, scheme="threshold", per_task=halves),
    }


def similarities(scan: tv.Scan, task: str) -> Any:
    from taskvec.statistics.scan import layer_statistics

    found = layer_statistics(scan, task, "tensor").similarity
    return found[~np.isnan(found)]


def measure(bench: Bench) -> dict[str, Any]:
    """Every scheme at its own best λ, and what the rule suggests."""
    scan = tv.scan(bench.family(TASKS))
    suggestion = suggest_scheme(scan)
    schemes = tables(scan)
    if suggestion.scheme == "threshold":
        assert suggestion.threshold is not None
        schemes["threshold, suggested"] = tv.lata(
            scan, scheme="threshold", threshold=suggestion.threshold
        )
    rows: dict[str, Any] = {}
    right = {}
    for name, table in schemes.items():
        try:
            unit = propose(scan, table).scales["radius_shared"][TASKS[0]]
        except UsageError as error:
            rows[name] = {"refused": str(error)}
            continue
        grid = [dict.fromkeys(TASKS, unit * multiple) for multiple in MULTIPLES]
        on_selection = [bench.choosing(scale, TASKS, table) for scale in grid]
        scale = grid[int(np.argmax(on_selection))]
        right[name] = bench.right(scale, TASKS, table=table)
        rows[name] = {
            "scale": scale[TASKS[0]],
            "unit": unit,
            "selection": max(on_selection),
            "right": mean(right[name]),
            "by_task": {task: float(right[name][task].mean()) for task in TASKS},
        }
    best = max(right, key=lambda name: mean(right[name]))
    for name, answers in right.items():
        for other in ("none", best):
            apart = bootstrap(answers) - bootstrap(right[other])
            key = "none" if other == "none" else "best"
            rows[name][f"against_{key}"] = interval(apart)
        rows[name]["against_best"] = interval(bootstrap(answers) - bootstrap(right[best]))
    chosen = {
        "the rule": "threshold, suggested" if suggestion.scheme == "threshold"
        else suggestion.scheme or "none",
        "none": "none",
        "logarithmic": "logarithmic",
    }  # fmt: skip
    return {
        "family": "zoo" if bench.folder is None else bench.folder.name,
        "n": {task: len(answers) for task, answers in right["none"].items()},
        "choosing_n": bench.choosing_n,
        "suggestion": finite(suggestion),
        "best": best,
        "rows": rows,
        "policies": {
            policy: {"scheme": name, "level_with_best": rows[name]["against_best"][1] >= 0}
            for policy, name in chosen.items()
        },
    }


def show(found: Mapping[str, Any]) -> None:
    shapes = found["suggestion"]["shapes"]
    asked = ", ".join(f"{task} {n}" for task, n in found["n"].items())
    print(f"\n{found['family']}, questions: {asked}")
    for task, shape in shapes.items():
        print(
            f"  {task}: ρ {shape['norm_ratio']:.3f}, c {shape['task_cosine']:.3f}, similarity "
            f"{shape['low']:.3f} to {shape['high']:.3f}, rank correlation {shape['moved']:.2f}"
        )
    print("\n| scheme | λ | math and code | math | code | against none | against the best |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found["rows"].items():
        if "refused" in row:
            print(f"| {name} | – | refused | | | | |")
            continue
        cells = [name, f"{row['scale']:.2f}", f"{row['right']:.2f}"]
        cells += [f"{row['by_task'][task]:.2f}" for task in TASKS]
        cells += ["[{:+.2f}, {:+.2f}]".format(*row[k]) for k in ("against_none", "against_best")]
        print("| " + " | ".join(cells) + " |")
    told = ", ".join(
        f"{p} ({v['scheme']}) {'yes' if v['level_with_best'] else 'no'}"
        for p, v in found["policies"].items()
    )
    print(f"\nbest: {found['best']}; level with it: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schemes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--family", action="append", metavar="FOLDER",
                        help="a folder, or zoo for the shipped one; may be repeated")  # fmt: skip
    parser.add_argument(
        "--n", type=int, default=240, help="test questions of a skill, at most (240)"
    )
    parser.add_argument("--choosing-n", type=int, default=60, help="questions to choose on (60)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    results = []
    for name in options.family or ["zoo"]:
        folder = None if name == "zoo" else Path(name)
        results.append(measure(Bench(folder, options.n, options.choosing_n)))
        show(results[-1])
        if options.json:
            options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    for policy in POLICIES:
        level = sum(found["policies"][policy]["level_with_best"] for found in results)
        print(f"{policy}: level with the best in {level} of {len(results)} families")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
