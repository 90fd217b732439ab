"""What a step of `fit` costs against a plain training step of the same batch; time and memory.

    python -m benchmarks.fit [--model smollm2-135m|DIR] [--tasks 2] [--stored bfloat16|float32]
                             [--runs 5] [--rows 4] [--tokens 128] [--read] [--json FILE]
    python -m benchmarks.fit --memory [--tasks 4] …

Random weights in the shapes of the model; the module is float32. Rounds run each of these once, in
turn, and ratios are of medians of processor time:

    plain    forward, loss, backward with gradients of all parameters, which are dropped
    fit      θ(w) put into the module, forward, loss, backward with K inner products a tensor, Adam

`--memory` prints peaks of anonymous memory instead, each in a process of its own: of forward and
backward passes alone with one gradient at a time, and of fit, in multiples of the parameters.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import taskvec as tv
from benchmarks.training import backbone
from taskvec.coefficients.fit.descent import Layers, descend
from taskvec.coefficients.fit.directions import TaskDirections, live_names, open_directions
from taskvec.coefficients.fit.settings import Descent
from taskvec.coefficients.fit.steering import Steered


def write_family(folder: Path, options: argparse.Namespace) -> None:
    """An anchor and its fine-tunes, in the stored type."""
    stored = getattr(torch, options.stored)
    module: Any = backbone(options.model, "sdpa").to(stored)
    module.save_pretrained(folder / "anchor")
    generator = torch.Generator().manual_seed(0)
    for task in range(options.tasks):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1e-3 * torch.randn(p.shape, generator=generator).to(stored))
        module.save_pretrained(folder / f"task{task}")


def directions(folder: Path, tasks: int) -> TaskDirections:
    return open_directions(
        tv.Family(
            anchor=folder / "anchor",
            tasks={f"task{i}": folder / f"task{i}" for i in range(tasks)},
        )
    )


def batch(options: argparse.Namespace, words: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, words, (options.rows, options.tokens), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def loss_of(module: Any, asked: dict[str, Any]) -> Any:
    logits = module(**asked).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), asked["input_ids"][:, 1:].flatten()
    )


def fit_step(module: Any, asked: dict[str, Any], it: TaskDirections, *, hold: bool | None) -> Any:
    """A function that goes down one step, and the module's context."""
    names = live_names(it, module)
    packs = it.packs(names, module, hold=hold)
    steered = Steered(module, packs, len(it.tasks))
    columns = {name: i for i, name in enumerate(packs)}
    layers = Layers(columns, np.ones((len(it.tasks), len(columns)), bool))
    start = np.full(layers.moves.shape, 0.5)

    def loss(step: int) -> float:
        value = loss_of(module, asked)
        value.backward()
        return float(value.detach())

    return steered, lambda: descend(steered, layers, start, loss, Descent(steps=1))


def plain_step(module: Any, asked: dict[str, Any]) -> Callable[[], None]:
    def step() -> None:
        loss_of(module, asked).backward()
        for p in module.parameters():
            p.grad = None

    return step


def times(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    module: Any = backbone(options.model, "sdpa").eval()
    asked = batch(options, module.config.vocab_size)
    it = directions(folder, options.tasks)
    steered, down = fit_step(module, asked, it, hold=False if options.read else None)
    plain = plain_step(module, asked)
    seconds: dict[str, list[float]] = {"plain": [], "fit": []}
    for _ in range(options.runs + 1):
        seconds["plain"].append(timed(plain))
        with steered.steering():
            seconds["fit"].append(timed(down))
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    return {
        "seconds": {name: [round(s, 3) for s in each[1:]] for name, each in seconds.items()},
        "ratio": medians["fit"] / medians["plain"],
    }


def timed(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


class Peak:
    """The highest anonymous memory of this process, sampled."""

    def __init__(self) -> None:
        self.bytes = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.ended.wait(0.005):
            self.bytes = max(self.bytes, anonymous())

    def __enter__(self) -> Peak:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def memory_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak of one process: `passes` alone, or `fit`."""
    module: Any = backbone(options.model, "sdpa").eval()
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    asked = batch(options, module.config.vocab_size)
    with Peak() as peak:
        if options.peak == "passes":
            for p in module.parameters():
                p.register_post_accumulate_grad_hook(drop)
            for _ in range(2):
                loss_of(module, asked).backward()
        else:
            it = directions(folder, options.tasks)
            steered, down = fit_step(module, asked, it, hold=False if options.read else None)
            with steered.steering():
                for _ in range(2):
                    down()
    return {"peak_bytes": peak.bytes, "parameter_bytes": parameters}


def drop(parameter: Any) -> None:
    parameter.grad = None


def memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for kind in ("passes", "fit"):
        command = [sys.executable, "-m", "benchmarks.fit", *sys.argv[1:],
                   "--peak", kind, "--folder", str(folder)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout)
    beyond = found["fit"]["peak_bytes"] - found["passes"]["peak_bytes"]
    return found | {"beyond_in_parameters": beyond / found["fit"]["parameter_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2-135m", help="or a folder")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--stored", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--read", action="store_true", help="read task vectors at every step")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", choices=("passes", "fit"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak is not None:
        print(json.dumps(memory_of(options.folder, options)))
        return
    with TemporaryDirectory() as folder:
        write_family(Path(folder), options)
        found = (memory if options.memory else times)(Path(folder), options)
    told = vars(options) | found
    told = {k: v for k, v in told.items() if k not in ("json", "folder", "peak")}
    print(json.dumps(told, indent=1))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
