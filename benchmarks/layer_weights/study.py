"""The stages of the study. What a stage found is a line in a file, and is not found again.

members   fine-tunes alone, and the target, on test data
methods   each way to weight layers at its own best λ, chosen on validation data; then test data
fit       weights fitted to prompts, by granularity and number of prompts; test data
probe     one block, or one kind of tensor, of a task vector kept only, or left out

The λ of a method are those of plain task arithmetic times the factor that makes its weighted
vectors as long as plain ones, so that every method is tried at the same lengths: plain at all of
them, others from plain's best in both directions for as long as scores rise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import taskvec as tv
from benchmarks.layer_weights import rivals
from benchmarks.layer_weights.bench import Bench, Records, to_json, value
from taskvec.coefficients.fit.api import fit
from taskvec.coefficients.fit.fitted import Fitted
from taskvec.methods.table import Table
from taskvec.statistics.scan import Scan, layer_statistics

Array = np.ndarray[Any, Any]

ROUNDS = 2  # of the search that moves one λ at a time
MOVES = (0.7, 1.4)
TIES_SCALES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # times those of plain


def told(bench: Bench, stage: str, **more: Any) -> dict[str, Any]:
    return {"family": bench.name, "seed": bench.seed, "stage": stage, **more}


def members(bench: Bench, records: Records) -> None:
    """The target on everything, and each fine-tune on its own task."""
    tasks = list(bench.family.tasks)
    for name in ("target", *tasks):
        scales = {task: float(task == name) for task in tasks}
        asked = [name] if name in bench.goal else None

        def make(scales: Any = scales, asked: Any = asked) -> dict[str, Any]:
            found = bench.answers(None, scales, "test", names=asked)
            return {"test": to_json(found), "values": {n: value(a) for n, a in found.items()}}

        records.once(told(bench, "members", method=name), make)


def methods(
    bench: Bench, records: Records, chosen: Mapping[str, rivals.Variant], *, tested: int | None
) -> None:
    """Every table at its own best λ.

    Args:
        bench: The family.
        records: Where results go.
        chosen: Variants.
        tested: How many of LATA's forms are asked on test data, those with the best validation
            scores and the default, and the best of LiNeS; None: all.
    """
    scan = tv.scan(bench.family)
    tables = rivals.tables(scan, chosen)
    is_short = len(chosen) == 1
    if is_short:
        tables = {name: tables[name] for name in ("plain", *chosen)}
    reach = rivals.length(scan, tables["plain"].weights)
    best: dict[str, tuple[float, float]] = {}
    start = None
    for name, table in tables.items():
        own = rivals.length(scan, table.weights)
        if not own:
            continue
        grid = [bench.sign * scale * reach / own for scale in bench.scales]
        best[name] = _chosen(bench, records, name, table, grid, start=start)
        start = grid.index(best[name][0]) if name == "plain" else start
    forms = sorted((n for n in best if n.startswith("lata")), key=lambda n: -best[n][1])
    kept = set(forms[:tested]) | {rivals.Variant().name}
    rising = sorted((n for n in best if n.startswith("LiNeS")), key=lambda n: -best[n][1])
    kept |= set(rising[: None if tested is None else 1])
    for name, (scale, score) in best.items():
        if name.startswith(("lata", "LiNeS")) and name not in kept:
            continue

        def ask(scale: float, table: Table = tables[name]) -> dict[str, Any]:
            return bench.answers(table, scale, "test")

        _tested(bench, records, name, scale, score, ask)
    if is_short:
        return
    _ties(bench, records)
    _search(bench, records, tables["plain"], best["plain"][0])


def _chosen(
    bench: Bench, records: Records, name: str, table: Table | None, grid: Sequence[float],
    method: Any = "task_arithmetic", start: int | None = None,
) -> tuple[float, float]:  # fmt: skip
    def score(at: int) -> float:
        return bench.score(bench.answers(table, grid[at], "validation", method))

    def make() -> dict[str, Any]:
        if start is None:
            known = {at: score(at) for at in range(len(grid))}
        else:
            known = {start: score(start)}
            for way in (-1, 1):
                at = start + way
                while 0 <= at < len(grid):
                    known[at] = score(at)
                    if known[at] < known[at - way]:
                        break
                    at += way
        return {
            "grid": [grid[at] for at in sorted(known)],
            "scores": [known[at] for at in sorted(known)],
        }

    row = records.once(told(bench, "choose", method=name), make)
    at = int(np.argmax(row["scores"]))
    return row["grid"][at], row["scores"][at]


def _tested(
    bench: Bench, records: Records, name: str, scale: Any, score: float,
    ask: Callable[[Any], Any],
) -> None:  # fmt: skip
    def make() -> dict[str, Any]:
        found = ask(scale)
        values = {n: value(a) for n, a in found.items()}
        return {
            "scale": scale, "validation": score, "values": values, "score": bench.score(found),
            "test": to_json(found),
        }  # fmt: skip

    row = records.once(told(bench, "test", method=name), make)
    shown = ", ".join(f"{n} {v:.3f}" for n, v in row["values"].items())
    print(f"{bench.name} {bench.seed} {name}: {row['score']:.4f}; {shown}", flush=True)


def _ties(bench: Bench, records: Records) -> None:
    if len(bench.family.tasks) < 2:
        return
    grid = sorted({round(s * t, 3) for s in bench.scales[2:5] for t in TIES_SCALES})[::2]
    scale, score = _chosen(bench, records, "TIES", None, grid, "ties")
    _tested(bench, records, "TIES", scale, score, lambda s: bench.answers(None, s, "test", "ties"))


def _search(bench: Bench, records: Records, table: Table, start: float) -> None:
    """One λ for each task: from the best common one, one λ is moved at a time."""
    tasks = list(bench.family.tasks)
    if len(tasks) < 2:
        return

    def make() -> dict[str, Any]:
        scales = dict.fromkeys(tasks, start)
        best = bench.score(bench.answers(table, scales, "validation"))
        for _ in range(ROUNDS):
            for task in tasks:
                for move in MOVES:
                    tried = scales | {task: scales[task] * move}
                    score = bench.score(bench.answers(table, tried, "validation"))
                    if score > best:
                        best, scales = score, tried
        return {"scales": scales, "score": best}

    row = records.once(told(bench, "search", method="λ by task, searched"), make)
    _tested(
        bench, records, "λ by task, searched", row["scales"], row["score"],
        lambda s: bench.answers(table, s, "test"),
    )  # fmt: skip


def fits(
    bench: Bench, records: Records, cells: Iterable[tuple[str, int]], seeds: Sequence[int],
    **settings: Any,
) -> None:  # fmt: skip
    """Weights fitted to prompts.

    Args:
        bench: The family.
        records: Where results go.
        cells: Granularity and prompts a task.
        seeds: Of the prompts, and of the descent.
        settings: Of `fit`, besides.
    """
    for granularity, n in cells:
        for seed in seeds:
            about = {"granularity": granularity, "prompts": n, "fit_seed": seed, **settings}
            known = told(bench, "fit", **about)

            def make(
                granularity: str = granularity, n: int = n, seed: int = seed
            ) -> dict[str, Any]:
                return _fit_once(bench, granularity, n, seed, settings)

            row = records.once(known, make)
            for kind, values in row["values"].items():
                shown = ", ".join(f"{name} {v:.3f}" for name, v in values.items())
                print(
                    f"{bench.name} {bench.seed} fit {granularity} {n} {seed} {settings} {kind}: "
                    f"{row['scores'][kind]:.4f}; {shown}",
                    flush=True,
                )


def _fit_once(
    bench: Bench, granularity: str, n: int, seed: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    bench.close()
    given = bench.fit_with(n, seed)
    context = given.pop("context", None)
    options = {"granularity": granularity, "seed": seed, "seeds": 1}
    options |= {**given.pop("settings", {}), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if context is None:
            found: Fitted = fit(settings=options, **given)
        else:
            with context():
                found = fit(settings=options, **given)
    result: dict[str, Any] = {"values": {}, "scores": {}, "test": {}, "chosen": found.chosen}
    for kind, table in {"written": found.table, "layers": next(iter(found.seeds), None)}.items():
        if table is None or (kind == "layers" and found.chosen != "one weight"):
            continue
        answers = bench.answers(table, 1.0, "test")
        result["values"][kind] = {name: value(a) for name, a in answers.items()}
        result["scores"][kind] = bench.score(answers)
        result["test"][kind] = to_json(answers)
    told = found.to_json()
    result["fit"] = {name: told.get(name) for name in ("held_out", "explanation", "warnings")}
    tensors = next(iter(found.seeds), found.table)
    result["weights"] = {task: tensors.of(task) for task in tensors.tasks}
    return result


def probe(bench: Bench, records: Records, merged: float, *, part: str = "test") -> None:
    """Groups of tensors of each task vector kept only, or left out.

    Args:
        bench: The family.
        records: Where results go.
        merged: λ of the merge of all tasks that a group is left out of.
        part: What is asked.
    """
    scan = tv.scan(bench.family)
    statistics(bench, records, scan)
    for task in bench.family.tasks:
        for kind, group in groups(scan).items():
            inside = np.array([name in group for name in scan.names])

            def make(task: str = task, inside: Array = inside) -> dict[str, Any]:
                return {"values": _probed(bench, scan, task, inside, merged, part)}

            records.once(told(bench, "probe", task=task, group=kind), make)
    for name in ("alone", "merged"):
        for task in bench.family.tasks:
            own = {t: merged if name == "merged" else float(t == task) for t in bench.family.tasks}
            asked = [task] if name == "alone" else list(bench.goal)

            def whole(
                own: Mapping[str, float] = own, asked: Sequence[str] = tuple(asked)
            ) -> dict[str, Any]:
                found = bench.answers(None, own, part, names=asked)
                return {"values": {n: value(a) for n, a in found.items()}}

            records.once(told(bench, "probe", task=task, group=name), whole)
    print(f"{bench.name} {bench.seed} probed", flush=True)


def statistics(bench: Bench, records: Records, scan: Scan) -> None:
    """What a scan says of each block, for the correlations of the report."""
    for task in bench.family.tasks:

        def make(task: str = task) -> dict[str, Any]:
            known = layer_statistics(scan, task, "block")
            block = {
                key.at("block", name): key.block
                for name, key in zip(scan.names, scan.keys, strict=True)
                if key.block is not None
            }
            rows = {
                f"block {block[layer]}": {
                    "dissimilarity": float(1 - known.similarity[i]),
                    "norm_ratio": float(known.norm_ratio[i]),
                    "task_norm": float(known.task_norm[i]),
                    "depth": block[layer],
                }
                for i, layer in enumerate(known.layers)
                if layer in block
            }
            return {"blocks": rows}

        records.once(told(bench, "statistics", task=task), make)


def _probed(
    bench: Bench, scan: Scan, task: str, inside: Array, merged: float, part: str
) -> dict[str, Any]:
    row = list(scan.tasks).index(task)
    only, without = np.zeros((2, len(scan.tasks), len(scan.names)))
    only[row, inside] = 1
    without[row, ~inside] = 1
    left_out = np.full_like(only, merged)
    left_out[row, inside] = 0
    found = {}
    for name, weights, asked in (
        ("only", only, [task]), ("without", without, [task]), ("merged", left_out, None),
    ):  # fmt: skip
        answers = bench.answers(
            rivals.table_of(scan, weights, name), 1.0, part, names=asked or list(bench.goal)
        )
        found[name] = {n: value(a) for n, a in answers.items()}
    return found


def groups(scan: Scan) -> dict[str, set[str]]:
    """Tensors by block, and by kind of tensor within the blocks; those outside are one group."""
    found: dict[str, set[str]] = {}
    for name, key in zip(scan.names, scan.keys, strict=True):
        if key.block is None:
            found.setdefault("outside", set()).add(name)
            continue
        found.setdefault(f"block {key.block}", set()).add(name)
        kind = key.module if key.projection is None else f"{key.module} {key.projection}"
        found.setdefault(f"kind {kind}", set()).add(name)
    return found


def with_tasks(family: tv.Family, tasks: Sequence[str]) -> tv.Family:
    """The family of some of the tasks."""
    return replace(family, tasks={task: family.tasks[task] for task in tasks})
