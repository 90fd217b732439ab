"""The disentanglement error on a grid against working out both sides of every cell anew.

    python -m benchmarks.disentanglement [--points 5] [--images 16] [--runs 3] [--threads 2]
                                         [--tiny]

The model is a ViT-S/14 at 84 px with random weights and two vectors that change its attention
matrices alone. Both ways switch weights in the same way, and must give the same errors. Prints one
JSON object: seconds of every run, and of some switches. `benchmarks.run` makes ratios of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from taskvec.disentanglement import ModelTask, classification, coefficients, disentanglement_error
from taskvec.disentanglement.error import distances, outcomes
from taskvec.disentanglement.weights import points

TASKS = ("one", "two")
CLASSES = 10
SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
}


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def model(size: str) -> Any:
    torch.manual_seed(0)
    wide = SIZES[size]
    config = transformers.ViTConfig(
        **wide,
        intermediate_size=4 * wide["hidden_size"],
        image_size=84,
        patch_size=14,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config).eval()


def fine_tune(module: Any, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=draw)
        if "attention" in name and value.ndim == 2
        else value.clone()
        for name, value in module.state_dict().items()
    }


def anew(
    module: Any,
    vectors: Mapping[str, Any],
    tasks: Mapping[str, ModelTask],
    alphas: tuple[float, ...],
) -> np.ndarray[Any, Any]:
    """Σ_t of each cell, with both sides worked out in it."""
    found = np.zeros((len(alphas), len(alphas)))
    with points(module, vectors) as space:
        for i, a in enumerate(alphas):
            for j, b in enumerate(alphas):
                alone = {}
                for task, alpha in zip(TASKS, (a, b), strict=True):
                    space.at({task: alpha})
                    alone[task] = outcomes(tasks[task], module, "prediction")[0]
                space.at(dict(zip(TASKS, (a, b), strict=True)))
                for task in TASKS:
                    both = outcomes(tasks[task], module, "prediction")[0]
                    found[i, j] += distances(alone[task], both, "prediction").mean()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disentanglement")
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = model("tiny" if options.tiny else "small")
    vectors = {name: fine_tune(module, seed) for seed, name in enumerate(TASKS, start=1)}
    alphas = coefficients(options.points)
    tasks = {
        name: classification(name, [(torch.randn(options.images, 3, 84, 84), None)])
        for name in TASKS
    }
    found: dict[str, list[float]] = {"grid": [], "anew": [], "switch": []}
    with points(module, vectors) as space:
        space.at(dict.fromkeys(TASKS, 1.0))
        for scale in (0.25, 0.5, 0.75):
            both = dict.fromkeys(TASKS, scale)
            found["switch"].append(timed(partial(space.at, both)))
    for _ in range(options.runs):
        values: list[Any] = []

        def grid(values: list[Any] = values) -> None:
            measured = disentanglement_error(module, vectors, tasks, alphas=alphas)
            values.append(measured.values)

        def cells(values: list[Any] = values) -> None:
            values.append(anew(module, vectors, tasks, alphas))

        found["grid"].append(timed(grid))
        found["anew"].append(timed(cells))
        np.testing.assert_allclose(*values)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
