"""Tables in Markdown, and figures, from what the stages kept.

    python -m benchmarks.attention_only.report OUT_DIR [--figures DIR]

Means are over seeds. What is in brackets is Student's 95 % interval over seeds, of one mode or of
paired differences between two; it says nothing of other data or other models.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from taskvec.reporting import charts
from taskvec.reporting.figures import save_charts
from taskvec.reporting.sections import Chart
from taskvec.reporting.studies import error_spec

MODES = ("full", "attention", "linearised")


def kept(out: Path, stage: str) -> dict[str, dict[int, dict[str, Any]]]:
    """What a stage kept, by mode and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for mode in MODES:
        for path in sorted(out.glob(f"{stage}-{mode}-*.json")):
            seed = int(path.stem.rpartition("-")[2])
            found.setdefault(mode, {})[seed] = json.loads(path.read_text())
    return found


def mean(values: Sequence[float], sign: str = "") -> str:
    """Mean and Student's interval.

    >>> mean([0.5, 0.5, 0.5]), mean([1.0])
    ('0.500 [0.500, 0.500]', '1.000')
    """
    x = np.array(values, float)
    if len(x) < 2:
        return f"{x.mean():{sign}.3f}"
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return f"{x.mean():{sign}.3f} [{x.mean() - half:{sign}.3f}, {x.mean() + half:{sign}.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def over_tasks(result: dict[str, Any], name: str) -> float:
    """Mean over tasks of a figure."""
    return float(np.mean([figure["value"] for figure in result[name].values()]))


def addition(out: Path) -> str:
    chosen, fixed = kept(out, "add"), kept(out, "fixed")
    columns: dict[str, Callable[[str, int], float]] = {
        "single-task": lambda mode, seed: over_tasks(chosen[mode][seed], "single"),
        "merged, λ chosen": lambda mode, seed: over_tasks(chosen[mode][seed], "accuracy"),
        "of the single-task models'": lambda mode, seed: over_tasks(
            chosen[mode][seed], "normalised"
        ),
        "merged, λ = 0.3": lambda mode, seed: over_tasks(fixed[mode][seed], "accuracy"),
    }
    rows = []
    for mode, by_seed in chosen.items():
        scales = [next(iter(found["scales"].values())) for found in by_seed.values()]
        rate = f"{next(iter(by_seed.values()))['rate']:g}"
        cells = [mean([of(mode, seed) for seed in by_seed]) for of in columns.values()]
        rows.append([mode, rate, *cells, ", ".join(f"{s:g}" for s in scales)])
    for one, other in (("attention", "full"), ("linearised", "full"), ("attention", "linearised")):
        seeds = sorted(chosen.get(one, {}).keys() & chosen.get(other, {}).keys())
        if seeds:
            cells = [
                mean([of(one, s) - of(other, s) for s in seeds], "+") for of in columns.values()
            ]
            rows.append([f"{one} − {other}", "", *cells, ""])
    start = next(found for by_seed in chosen.values() for found in by_seed.values())
    before = f"Pre-trained: {over_tasks(start, 'pretrained'):.3f}.\n\n"
    return before + table(["mode", "rate", *columns, "λ by seed"], rows)


def negation(out: Path) -> str:
    found = kept(out, "negate")
    rows = []
    for mode, by_seed in found.items():
        tasks = list(next(iter(by_seed.values()))["tasks"])
        for task in tasks:
            each = [by_seed[seed]["tasks"][task] for seed in by_seed]
            done = [e for e in each if e["target"] is not None]
            rows.append(
                [
                    mode,
                    task,
                    f"{each[0]['pretrained']['target']['value']:.3f}",
                    mean([e["target"]["value"] for e in done]) if done else "–",
                    mean([e["control_share"]["value"] for e in done]) if done else "–",
                    ", ".join("–" if e["scale"] is None else f"{e['scale']:g}" for e in each),
                ]
            )
    head = ["mode", "task", "before", "after", "control kept", "λ by seed"]
    return table(head, rows)


def errors(out: Path) -> str:
    rows = []
    for mode, by_seed in kept(out, "error").items():
        for seed, found in by_seed.items():
            cells = found["cells"]
            near = [c for c in cells if all(0 <= a <= 1 for a in c["alphas"].values())]
            rows.append(
                [
                    mode,
                    str(seed),
                    f"{np.mean([c['error']['value'] for c in cells]):.3f}",
                    f"{np.mean([c['error']['value'] for c in near]):.3f}",
                ]
            )
    return table(["mode", "seed", "mean ξ, [−2, 2]²", "mean ξ, [0, 1]²"], rows)


def curves(out: Path, path: Path) -> None:
    """Validation accuracy of the merge, normalised, against λ: a line a mode, a band of seeds."""
    rows, found = [], kept(out, "add")
    for mode, by_seed in found.items():
        scales = [next(iter(t["scales"].values())) for t in next(iter(by_seed.values()))["tried"]]
        values = np.array([[t["normalised"] for t in told["tried"]] for told in by_seed.values()])
        columns = zip(scales, values.mean(0), values.min(0), values.max(0), strict=True)
        rows += [
            {"name": mode, "x": x, "y": float(y), "low": float(low), "high": float(high)}
            for x, y, low, high in columns
        ]
    chart = charts.lines(
        rows, x="λ of all tasks", y="accuracy over the single-task models'", names=list(found)
    )
    save_charts([Chart("band: least to most of the seeds", charts.spec_of(chart))], path, 1)


def heat_maps(out: Path, path: Path) -> None:
    """The disentanglement error of the first seed, a map a mode."""
    found = {mode: next(iter(by_seed.values())) for mode, by_seed in kept(out, "error").items()}
    if found:
        panels = [Chart(mode, error_spec(told)) for mode, told in found.items()]
        save_charts(panels, path, len(panels))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_only.report")
    parser.add_argument("out", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for SVG files")
    options = parser.parse_args()
    print(f"## Addition\n\n{addition(options.out)}")
    print(f"## Negation\n\n{negation(options.out)}")
    print(f"## Disentanglement error\n\n{errors(options.out)}")
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        curves(options.out, options.figures / f"{options.out.name}-curves.svg")
        heat_maps(options.out, options.figures / f"{options.out.name}-error.svg")


if __name__ == "__main__":
    main()
