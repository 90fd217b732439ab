"""Files of every verb, made up: small, and with markup in names and texts if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCRIPT = "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked=2'>"


def figure(value: float, n: int = 60, half: float = 0.05) -> dict[str, Any]:
    return {"value": value, "interval": [value - half, value + half], "n": n}


def _write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_evaluation(folder: Path, mark: str = "", samples: int = 6) -> Path:
    """Three models and two tasks, with records; `mark` is added to names and replies."""
    models, task, text = ("instruct", "math", f"merged{mark}"), f"sums{mark}", "text"
    values = {"instruct": 0.25, "math": 0.95, models[2]: 0.75}
    rows = []
    for model, value in values.items():
        row: dict[str, Any] = {
            "task": task, "version": 1, "model": model, "main": "right", "higher_is_better": True,
            "figures": {"right": figure(value)}, "n": 60, "available": 90, "seed": 7,
            "difference": None if model == "instruct" else figure(value - 0.25),
            "share_of_single": value / 0.95,
        }  # fmt: skip
        rows.append(row)
    texts = [
        {"task": text, "version": 1, "model": model, "main": "perplexity",
         "higher_is_better": False, "figures": {"perplexity": figure(value)}, "n": 60,
         "available": 60, "seed": 7, "share_of_single": None,
         "difference": None if model == "instruct" else figure(value - 2.0, half=0.01)}
        for model, value in zip(models, (2.0, 2.0, 2.1), strict=True)
    ]  # fmt: skip
    finding = {"model": models[2], "task": task, "sign": "below_single",
               "text": f"{models[2]} is below math{mark}", "what": "", "cause": "", "advice": "",
               "figures": {}}  # fmt: skip
    told = {
        "reference": "instruct", "singles": {task: "math"}, "tasks": {task: rows, text: texts},
        "expected": {}, "findings": [finding], "versions": {"taskvec": "0"}, "machine": "x",
    }  # fmt: skip
    from taskvec.evaluation.evaluate import file_name

    for k, model in enumerate(models):
        lines: list[Any] = [{"task": task, "key": "k"}]
        for i in range(samples):
            right = float(i % 3 != k)
            lines.append({
                "id": str(i), "scores": {"right": right}, "notes": {},
                "replies": [{"text": f"{i} {model} says {mark}", "tokens": 2, "ended": "end"}],
                "requests": [{"text": f"Q{i}: {mark}", "max_new_tokens": 4}],
                "reference": {"answer": str(i)},
            })  # fmt: skip
        path = folder / file_name(model) / f"{file_name(task)}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, lines)))
    return _write(folder / "results.json", told)


def write_search(folder: Path, trials: int = 24) -> Path:
    """A trade-off between two goals over two λ."""
    made = []
    for i in range(trials):
        a, b = (i % 5) / 4, (i // 5) / 4
        made.append({
            "number": i, "point": {"scale.math": a, "scale.code": b},
            "values": {"sums": 1 - (a - 0.5) ** 2, "text": 2 + b}, "objectives": [a, -b],
            "violations": {}, "error": "", "same_as": None,
        })  # fmt: skip
    goals = [{"task": "sums", "way": "maximize", "metric": "", "single": None},
             {"task": "text", "way": "minimize", "metric": "", "single": None}]  # fmt: skip
    figures = {"sums": figure(0.8), "text": figure(2.5)}
    return _write(folder / "trials.json", {
        "axes": ["scale.math=0:1", "scale.code=0:1"], "trials": made, "tried": trials, "failed": 0,
        "goals": {"goals": goals, "aggregate": "mean", "trade_off": True},
        "metrics": {"sums": "right", "text": "perplexity"}, "sampler": "nsga2", "seed": 1,
        "samples": {"sums": {"select": {"n": 30}, "test": {"n": 60}}}, "winner": made[3],
        "front": [3, 4], "importance": {"scale.math": 0.8, "scale.code": 0.2},
        "test": {"figures": {"winner": figures, "target": figures}, "differences": figures,
                 "reference": "target", "kept": {}},
    })  # fmt: skip


def write_sweep(folder: Path) -> Path:
    points = [
        {"value": value, "kept": {"math": {"layers": value, "parameters": value, "energy": None}},
         "scores": {"sums": figure(value) | {"less_recipe": None}}, "safe": value > 0.4,
         "error": None}
        for value in (0.1, 0.5, 0.9)
    ]  # fmt: skip
    measure = {"task": "sums", "metric": "right", "wanted": "high", "recipe": figure(0.6),
               "n": 60, "available": 90, "seed": 3}  # fmt: skip
    return _write(folder / "sweep-threshold.json", {
        "sweep": "threshold", "values": [0.1, 0.5, 0.9], "measures": {"sums": measure},
        "safe_range": [0.5, 0.9], "safe_ranges": [[0.5, 0.9]], "points": points,
        "recipe": {"tasks": {"math": {"threshold": 0.7}, "code": {"threshold": 0.7}}},
    })  # fmt: skip


def write_pairs(folder: Path) -> Path:
    alone = {"measure": "sums", "metric": "right", "higher_is_better": True, "n": 60,
             "available": 90, "seed": 3}  # fmt: skip
    effect = {"merged": figure(0.5), "less_single": figure(-0.2), "less_tuned": figure(-0.3),
              "outcome": "interference"}  # fmt: skip
    return _write(folder / "pairs.json", {
        "tasks": {"math": alone, "code": alone | {"higher_is_better": False}},
        "pairs": [{"tasks": ["math", "code"], "cosine": 0.1, "pure_cosine": 0.1,
                   "sign_conflict": 0.5, "rank_correlation": 0.3,
                   "effects": {"math": effect, "code": effect}, "error": None}],
    })  # fmt: skip


def write_fit(folder: Path, table: Any) -> Path:
    table.save(_write(folder / "fit.json", {
        "origin": "fit", "chosen": "layers", "settings": {}, "sources": {}, "members": {},
        "held_out": {"layers": {"loss": figure(0.1), "gain": figure(0.02)}},
        "descents": [{"name": "seed 0", "losses": [1.0, 0.5], "measured": [[0, 1.0], [10, 0.5]],
                      "step": 10}],
        "correlation_of_seeds": {}, "warnings": [],
        "explanation": [{"task": "math", "against": "depth"} | figure(0.3)],
    }).with_name("table.csv"))  # fmt: skip
    return folder / "fit.json"


def write_disentanglement(folder: Path) -> Path:
    alphas = [0.0, 0.5, 1.0]
    cells = [
        {"alphas": {"math": a, "code": b}, "error": figure(a * b), "by_task": {}, "accuracy": {},
         "broken": False}
        for a in alphas for b in alphas
    ]  # fmt: skip
    error = {"tasks": ["math", "code"], "alphas": alphas, "distance": "prediction",
             "examples": {"math": 9, "code": 9}, "rows": {}, "cells": cells}  # fmt: skip
    added = {"method": "plain", "search": "shared", "scales": {"math": 0.5},
             "normalised": {"math": figure(0.9)}, "mean_normalised": figure(0.9)}  # fmt: skip
    tried = [{"scale": s, "target": 1 - s, "control": 1.0, "is_allowed": True} for s in alphas]
    negated = {"method": "plain", "keep": 0.95, "scale": 0.5, "note": "", "tried": tried}
    linear = [{"task": "math", "part": "attention", "alpha": a, "departure": figure(a)}
              for a in alphas]  # fmt: skip
    return _write(folder / "results.json", {
        "model": "instruct", "error": error, "addition": [added], "negation": {"math": [negated]},
        "linearity": linear,
    })  # fmt: skip


def write_training(folder: Path) -> Path:
    path = _write(folder / "run.json", {"settings": {"steps": 3, "seed": 0}})
    records: list[dict[str, float]] = [{"step": i, "loss": 1 / i, "lr": 0.1} for i in (1, 2, 3)]
    lines = map(json.dumps, [*records, {"step": 3, "validation_loss": 0.4}])
    path.with_name("metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def write_all(folder: Path, table: Any, mark: str = "") -> None:
    """A folder with a file of every verb, besides scans and merges."""
    write_evaluation(folder / "eval", mark)
    write_search(folder / "search")
    write_sweep(folder / "sweep")
    write_pairs(folder / "pairs")
    write_fit(folder / "fit", table)
    write_disentanglement(folder / "disentangle")
    write_training(folder / "tuned")
