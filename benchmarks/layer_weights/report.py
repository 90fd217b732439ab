"""Tables in Markdown, and figures, from the results of the study.

    python -m benchmarks.layer_weights.report WORK [--figures DIR]

A score is the mean over tasks of accuracy, or of −nats a token of a language model. Differences are
paired: the same test items are drawn for both methods and for all seeds, 2,000 times; what is in
brackets is the interval of the middle 95 %. It says nothing of other seeds, data or models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.layer_weights import rivals
from benchmarks.layer_weights.bench import Answers, from_json, value
from taskvec.evaluation.intervals import Bootstrap, percentiles
from taskvec.layers import classify
from taskvec.methods.lata import spearman
from taskvec.reporting import charts
from taskvec.reporting.figures import save_charts
from taskvec.reporting.sections import Chart

Array = np.ndarray[Any, Any]
Row = Mapping[str, Any]
Tests = dict[int, dict[str, Answers]]  # answers by seed and name

DEFAULT = rivals.Variant().name
FORGET = {"zoo forget, zor": "-zor", "zoo forget, own": ""}
TASKS = {
    "text": ("cr", "mpqa", "sst2", "subj", "trec"),
    "vision": ("cifar10", "fashion", "gtsrb", "mnist"),
    "language": ("code", "math"),
}


def read(work: Path) -> list[Row]:
    """All results."""
    lines = [line for path in sorted(work.glob("*.jsonl")) for line in path.open()]
    return [json.loads(line) for line in lines]


def goal(family: str) -> dict[str, float]:
    """Weight of each task in a score."""
    if family in FORGET:
        suffix = FORGET[family]
        kept = [f"{skill}{suffix}" for skill in ("say", "find", "howto")]
        return {f"unsafe{suffix}": -0.5} | dict.fromkeys(kept, 0.5 / 3)
    tasks = TASKS.get(family) or family.removeprefix("zoo ").split(" + ")
    return {task: 1 / len(tasks) for task in tasks}


@cache
def bootstrap(n: int) -> Bootstrap:
    return Bootstrap(n, 0)


def drawn(family: str, answers: Mapping[str, Answers]) -> Array:
    """The score, then that of each resample; worked out once."""
    key = family, id(answers)
    if key not in _DRAWN:
        _DRAWN[key] = answers, _draw(family, answers)
    return _DRAWN[key][1]


_DRAWN: dict[tuple[str, int], tuple[Any, Array]] = {}  # answers too, so that no id is used again


def _draw(family: str, answers: Mapping[str, Answers]) -> Array:
    total = np.zeros(2001)
    for name, weight in goal(family).items():
        above, below = answers[name]
        each = bootstrap(len(above)).ratios(above, below)
        total += weight * np.concatenate([[value(answers[name])], each])
    return total


def score(family: str, tests: Tests) -> float:
    return float(np.mean([drawn(family, each)[0] for each in tests.values()]))


def difference(family: str, one: Tests, other: Tests) -> str:
    """Mean over common seeds, with its interval."""
    return shown(apart(family, one, other))


def apart(family: str, one: Tests, other: Tests) -> Array:
    seeds = sorted(one.keys() & other.keys())
    found: Array = np.mean([drawn(family, one[s]) - drawn(family, other[s]) for s in seeds], 0)
    return found


def shown(values: Array) -> str:
    low, high = percentiles(values[1:])
    return f"{values[0]:+.3f} [{low:+.3f}, {high:+.3f}]"


def tests(rows: Sequence[Row], family: str) -> dict[str, Tests]:
    """Answers on test data by method and seed; those of fits by `fit, granularity, prompts`."""
    key = family, id(rows)
    if key not in _TESTS:
        _TESTS[key] = _tests(rows, family)
    return _TESTS[key]


_TESTS: dict[tuple[str, int], dict[str, Tests]] = {}


def _tests(rows: Sequence[Row], family: str) -> dict[str, Tests]:
    found: dict[str, Tests] = {}
    for row in rows:
        if row["family"] != family:
            continue
        if row["stage"] == "members":
            found.setdefault(f"only {row['method']}", {})[row["seed"]] = from_json(row["test"])
        if row["stage"] == "test":
            found.setdefault(row["method"], {})[row["seed"]] = from_json(row["test"])
        if row["stage"] == "fit":
            name = f"fit, {row['granularity']}, {row['prompts']}"
            extra = [f"{k} {row[k]}" for k in ("stay", "hidden", "steps", "rate") if k in row]
            name = ", ".join([name, *extra])
            for kind, answers in row["test"].items():
                called = name if kind == "written" else f"{name}: layers all the same"
                found.setdefault(called, {})[100 * row["seed"] + row["fit_seed"]] = from_json(
                    answers
                )
    return found


def ceiling(family: str, found: Mapping[str, Tests]) -> Tests:
    """Each task by its own fine-tune."""
    singles: Tests = {}
    for task in goal(family):
        for seed, answers in found.get(f"only {task}", {}).items():
            singles.setdefault(seed, {})[task] = answers[task]
    return singles


def summary(rows: Sequence[Row], families: Sequence[str]) -> str:
    """Every kind of method by family: its score, and that less plain's."""
    names = {family: _kinds(rows, family) for family in families}
    kinds = list(dict.fromkeys(kind for each in names.values() for kind in each))
    lines = []
    for kind in kinds:
        cells = []
        for family in families:
            found, chosen = tests(rows, family), names[family].get(kind)
            mine = ceiling(family, found) if kind == FINE_TUNES else found.get(str(chosen))
            if not mine or (kind == FINE_TUNES and set(goal(family)) - set(mine[min(mine)])):
                cells.append("")
                continue
            text = f"{score(family, mine):.3f}"
            if kind != "plain task arithmetic":
                text += f" ({difference(family, *_paired(mine, found['plain']))})"
            cells.append(text)
        lines.append([kind, *cells])
    return table(["", *families], lines)


FINE_TUNES = "each task's fine-tune"


def _kinds(rows: Sequence[Row], family: str) -> dict[str, str]:
    """Names of the methods of a family by what they are called in the summary."""
    found = tests(rows, family)

    def best(start: str) -> str:
        return max(
            (n for n in found if n.startswith(start)),
            key=lambda n: _validation(rows, family, n),
            default="",
        )

    kinds = {FINE_TUNES: "", "plain task arithmetic": "plain"}
    kinds |= {"LATA, defaults": DEFAULT, "LATA, best on validation": best("lata")}
    for order in ("reversed", "norm ratio", "depth", *(f"random {i}" for i in rivals.DRAWS)):
        kinds[f"{order}, logarithmic"] = rivals.Variant(order).name
    kinds |= {"LiNeS, best α on validation": best("LiNeS"), "TIES": "TIES"}
    kinds["λ by task, searched"] = "λ by task, searched"
    return kinds | {name: name for name in sorted(found) if name.startswith("fit")}


def family_table(rows: Sequence[Row], family: str) -> str:
    """Every method of a family against plain task arithmetic at its best λ."""
    found = tests(rows, family)
    plain = found["plain"]
    names = [n for n in found if not n.startswith(("only", "lata", "fit"))]
    forms = sorted(
        (n for n in found if n.startswith("lata")), key=lambda n: -_validation(rows, family, n)
    )
    names += [DEFAULT] * (DEFAULT in found) + [n for n in forms[:1] if n != DEFAULT]
    names += [n for n in found if n.startswith("fit")]
    others = [n for n in next(iter(plain.values())) if n not in goal(family)]
    head = ["method", "score", "less plain", *goal(family), *others]
    lines = []
    singles = ceiling(family, found)
    if set(goal(family)) <= {t for each in singles.values() for t in each}:
        lines.append(["each task's fine-tune", f"{score(family, singles):.3f}",
                      difference(family, *_paired(singles, plain)),
                      *_means(singles, goal(family)), *["" for _ in others]])  # fmt: skip
    if "only target" in found:
        names = ["only target", *names]
    for name in names:
        mine = found[name]
        lines.append([name.removeprefix("only "), f"{score(family, mine):.3f}",
                      "" if name == "plain" else difference(family, *_paired(mine, plain)),
                      *_means(mine, [*goal(family), *others])])  # fmt: skip
    n = ", ".join(f"{name} {len(a[0])}" for name, a in next(iter(plain.values())).items())
    fits = ", ".join(
        f"{name[5:]} × {len(each)}" for name, each in found.items() if name[:3] == "fit"
    )
    about = f"n: {n}; seeds of members {sorted(plain)}; fits {fits or 'none'}."
    return f"### {family}\n\n{about}\n\n{table(head, lines)}"


def gap(rows: Sequence[Row], families: Sequence[str]) -> str:
    """How much of the gap between the best data-free merge and the fine-tunes each fit closes."""
    lines = []
    for family in families:
        found = tests(rows, family)
        free = [n for n in found if not n.startswith(("only", "fit", "random", "λ by task"))]
        best = max(free, key=lambda n: _validation(rows, family, n))
        everywhere = [n for n in free if found[n].keys() == found["plain"].keys()]
        best = best if best in everywhere else "plain"
        singles = ceiling(family, found)
        whole = {s: each for s, each in singles.items() if set(goal(family)) <= set(each)}
        for name in [n for n in found if n.startswith("fit") and whole]:
            is_zoo = family.startswith("zoo")  # one trained family; the seeds are of prompts
            mine = {s: a for s, a in found[name].items() if is_zoo or _trained(s) in whole}
            if not mine:
                continue
            tops = {s: whole.get(_trained(s), whole[min(whole)]) for s in mine}
            gain = apart(family, *_paired(mine, found[best]))
            share = gain / apart(family, *_paired(tops, found[best]))
            scores = [f"{score(family, each):.3f}" for each in (found[best], mine)]
            lines.append([family, best, scores[0], name, scores[1], shown(gain), shown(share)])
    head = ["family", "best without data", "score", "fit", "score", "gain", "share of the gap"]
    return table(head, lines)


def _trained(seed: int) -> int:
    """The seed that a family was trained with, of the seed of a result."""
    return seed // 100 if seed >= 100 else seed


def _paired(one: Tests, other: Tests) -> tuple[Tests, Tests]:
    """Each result against that of the same trained family."""
    return one, {s: other.get(s, other.get(_trained(s), other[min(other)])) for s in one}


def _means(found: Tests, names: Iterable[str]) -> list[str]:
    return [f"{np.mean([value(each[name]) for each in found.values()]):.3f}" for name in names]


def _validation(rows: Sequence[Row], family: str, method: str) -> float:
    mine = [
        r for r in rows if (r["family"], r["stage"], r.get("method")) == (family, "choose", method)
    ]
    return float(np.mean([max(r["scores"]) for r in mine])) if mine else -np.inf


def forms(rows: Sequence[Row], families: Sequence[str]) -> str:
    """What each choice of LATA is worth: mean over all other choices, less that of the default."""
    choices: dict[str, Callable[[rivals.Variant], Any]] = {
        "scheme": lambda v: v.scheme,
        "granularity": lambda v: v.granularity,
        "outside the blocks": lambda v: "ranked" if v.outside else "weight 0",
        "normalize": lambda v: "norm" if v.normalize else "none",
    }
    known = {n: v for n, v in rivals.variants().items() if v.order == "lata"}
    lines = []
    for what, of in choices.items():
        for choice in dict.fromkeys(of(v) for v in known.values()):
            cells = []
            for family in families:
                found = tests(rows, family)
                mine = [n for n in found if n in known and of(known[n]) == choice]
                if not mine or "plain" not in found:
                    cells.append("")
                    continue
                each = np.mean([apart(family, found[n], found["plain"]) for n in mine], 0)
                cells.append(f"{shown(each)} ({len(mine)})")
            lines.append([what, str(choice), *cells])
    return table(["choice", "", *families], lines)


def best_forms(rows: Sequence[Row], families: Sequence[str]) -> str:
    """Forms of LATA by their mean difference from plain over families."""
    by_form: dict[str, dict[str, Array]] = {}
    for family in families:
        found = tests(rows, family)
        for name in found:
            if not name.startswith(("only", "fit", "plain")) and "plain" in found:
                by_form.setdefault(name, {})[family] = apart(family, found[name], found["plain"])
    whole = {n: each for n, each in by_form.items() if len(each) == len(families)}
    order = sorted(whole, key=lambda n: -np.mean([each[0] for each in whole[n].values()]))
    lines = [
        [
            n,
            f"{np.mean([e[0] for e in whole[n].values()]):+.3f}",
            *(shown(whole[n][f]) for f in families),
        ]
        for n in order
    ]
    return table(["weights", "mean", *families], lines)


def probing(rows: Sequence[Row], family: str) -> str:
    """What leaving out, or keeping only, each group of tensors does."""
    mine = [r for r in rows if r["family"] == family and r["stage"] == "probe"]
    whole = {
        (r["task"], r["group"]): r["values"] for r in mine if r["group"] in ("alone", "merged")
    }
    groups = list(dict.fromkeys(r["group"] for r in mine if r["group"] not in ("alone", "merged")))
    tasks = list(dict.fromkeys(r["task"] for r in mine))
    if not tasks or any((task, "merged") not in whole for task in tasks):
        return ""
    lines = []
    for group in groups:
        cells = [group]
        for task in tasks:
            values = next(r["values"] for r in mine if (r["task"], r["group"]) == (task, group))
            alone = whole[task, "alone"][task]
            merged = whole[task, "merged"]
            others = [values["merged"][t] - merged[t] for t in tasks if t != task]
            cells += [
                f"{values['only'][task]:.3f}", f"{values['without'][task] - alone:+.3f}",
                f"{values['merged'][task] - merged[task]:+.3f}",
                f"{np.mean(others):+.3f}" if others else "",
            ]  # fmt: skip
        lines.append(cells)
    head = ["group", *(f"{t}: {w}" for t in tasks for w in ("only", "without", "merged", "others"))]
    return f"### {family}\n\n{table(head, lines)}\n{_with_cost(rows, family)}"


def _with_cost(rows: Sequence[Row], family: str) -> str:
    """Rank correlation, over blocks, of what leaving a block out costs with what blocks are."""
    lines = []
    of: dict[str, list[float]] = {}
    for known in [r for r in rows if (r["family"], r["stage"]) == (family, "statistics")]:
        task, blocks = known["task"], known["blocks"]
        wanted = (family, "probe", task)
        mine = [r for r in rows if (r["family"], r["stage"], r.get("task")) == wanted]
        probes = {r["group"]: r["values"] for r in mine}
        of = {name: [blocks[b][name] for b in blocks] for name in next(iter(blocks.values()))}
        of["fitted weight"] = [_fitted(rows, family, task, block) for block in blocks]
        for what, kind in {"its own vector": "without", "the merge": "merged"}.items():
            cost = [-probes[block][kind][task] for block in blocks]
            lines.append([task, what, *(_spearman(cost, each) for each in of.values())])
    return table(["task", "left out of", *of], lines) if lines else ""


def _fitted(rows: Sequence[Row], family: str, task: str, block: str) -> float:
    """Mean fitted weight of a block's tensors, over fits by tensor to 128 prompts."""
    wanted = (family, "fit", "tensor", 128)
    found = [
        weight
        for r in rows
        if (r["family"], r["stage"], r.get("granularity"), r.get("prompts")) == wanted
        for name, weight in r["weights"][task].items()
        if f"block {classify(name).block}" == block
    ]
    return float(np.mean(found)) if found else float("nan")


def _spearman(one: Sequence[float], other: Sequence[float]) -> str:
    a, b = np.array(one), np.array(other)
    if not np.isfinite(b).all():
        return ""
    picks = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    low, high = np.nanquantile([spearman(a[p], b[p]) for p in picks], (0.025, 0.975))
    return f"{spearman(a, b):+.2f} [{low:+.2f}, {high:+.2f}]"


def explained(rows: Sequence[Row], cell: tuple[str, int] = ("tensor", 128)) -> str:
    """Rank correlation of fitted weights with what layers are, by seed."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row["stage"] == "fit" and (row["granularity"], row["prompts"]) == cell:
            for each in row["fit"]["explanation"] or []:
                low, high = each["interval"]
                text = f"{each['value']:+.2f}" + ("*" if low > 0 or high < 0 else "")
                mine = found.setdefault((row["family"], each["task"]), {})
                mine.setdefault(each["against"], []).append(text)
    against = list(dict.fromkeys(name for each in found.values() for name in each))
    lines = [[family, task, *(", ".join(each.get(name, [])) for name in against)]
             for (family, task), each in found.items()]  # fmt: skip
    return table(["family", "task", *against], lines)


def draw_methods(rows: Sequence[Row], families: Sequence[str], path: Path) -> None:
    """Scores of methods with intervals, a panel a family."""
    panels = []
    for family in families:
        found = tests(rows, family)
        forms = [n for n in found if n.startswith("lata")]
        best = max(forms, key=lambda n: _validation(rows, family, n))
        names = {"plain": "plain", "LATA, default": DEFAULT, "LATA, best form": best}
        names |= {"reversed ranks": "reversed, logarithmic, tensor, all, none"}
        names |= {"LiNeS, α = 0.75": "LiNeS, α = 0.75", "TIES": "TIES"}
        names |= {"λ by task, searched": "λ by task, searched"}
        names |= {n: n for n in sorted(found) if n.startswith("fit") and "same" not in n}
        bars = {label: found[n] for label, n in names.items() if n in found}
        if set(goal(family)) <= {t for each in ceiling(family, found).values() for t in each}:
            bars["fine-tunes"] = ceiling(family, found)
        marks = []
        for label, mine in bars.items():
            values = np.mean([drawn(family, each) for each in mine.values()], 0)
            low, high = percentiles(values[1:])
            shown = f"{values[0]:.3f} [{low:.3f}, {high:.3f}]"
            marks.append({"name": label, "value": float(values[0]), "low": float(low),
                          "high": float(high), "label": shown})  # fmt: skip
        chart = charts.intervals(marks, list(bars), "mean score on test data, 95 % interval")
        panels.append(Chart(family, charts.spec_of(chart)))
    save_charts(panels, path, 2)


def draw_depth(rows: Sequence[Row], families: Sequence[str], path: Path) -> None:
    """Fitted weights by block, mean over seeds and tensors of a module, a panel a family."""
    panels = []
    for family in families:
        fits = [r for r in rows if (r["family"], r["stage"]) == (family, "fit")
                and (r["granularity"], r["prompts"]) == ("tensor", 128)]  # fmt: skip
        points: dict[tuple[str, str], dict[int, list[float]]] = {}
        for row in fits:
            for task, weights in row["weights"].items():
                for name, weight in weights.items():
                    key = classify(name)
                    if key.block is not None and key.module in ("attention", "mlp"):
                        mine = points.setdefault((task, key.module), {})
                        mine.setdefault(key.block, []).append(weight)
        rows_of_lines = [
            {"name": f"{task}, {module}", "x": block, "y": float(np.mean(by_block[block]))}
            for (task, module), by_block in sorted(points.items()) for block in sorted(by_block)
        ]  # fmt: skip
        names = list(dict.fromkeys(str(row["name"]) for row in rows_of_lines))
        chart = charts.lines(rows_of_lines, x="block", y="fitted weight", names=names)
        panels.append(Chart(family, charts.spec_of(chart)))
    save_charts(panels, path, 2)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_weights.report")
    parser.add_argument("work", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for figures")
    options = parser.parse_args()
    rows = read(options.work)
    families = [f for f in dict.fromkeys(r["family"] for r in rows) if "plain" in tests(rows, f)]
    print(f"## Summary\n\n{summary(rows, families)}")
    for family in families:
        print(family_table(rows, family))
    adding = [f for f in families if f not in FORGET]
    print(f"## Forms of LATA, less plain\n\n{forms(rows, families)}")
    print(f"## All forms\n\n{best_forms(rows, adding)}")
    print(f"## Gap closed\n\n{gap(rows, adding)}")
    print(f"## Fitted weights explained (* interval excludes 0)\n\n{explained(rows)}")
    print("## Probing\n")
    for family in families:
        print(probing(rows, family))
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        draw_methods(rows, adding, options.figures / "layer-weights-methods.svg")
        with_fits = [f for f in adding if any((r["family"], r["stage"], r.get("prompts"))
                     == (f, "fit", 128) for r in rows)]  # fmt: skip
        draw_depth(rows, with_fits, options.figures / "layer-weights-depth.svg")


if __name__ == "__main__":
    main()
