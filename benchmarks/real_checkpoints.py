"""Every verb on real checkpoints: language models, a sentence encoder, a vision model, a LoRA.

    python -m benchmarks.real_checkpoints WORK_DIR MODEL_DIR... [--steps N] [--seed 0]

For each model folder it makes a family by short fine-tunes of all parameters (`base` as it is,
`instruct` from it, `task` from `instruct`; language models also `lora`, a LoRA that PEFT trains on
`instruct`), stored in the model's own element type. Then it runs scan, merge, forget, extract,
inspect and verify by the command line, and checks what must hold whatever the model is:

- adding a task at λ = 1 gives the fine-tune, and taking it away again `instruct`: shares of equal
  elements, the rest being off by rounding;
- a merge with an extracted vector is a merge with the fine-tune, byte for byte;
- every result loads in transformers without a warning.

The fine-tunes are not meant to be good at anything: the data are random tokens and random pictures.
It prints a table and exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from taskvec.checkpoints.folder import open_checkpoint

LEARNING_RATE, BATCH, TOKENS = 2e-5, 4, 64
RANK = 8
TIMED = ("scan", "merge", "lora", "extract", "as-lora")


def load(folder: Path) -> Any:
    """The model in float32, by the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cls = getattr(transformers, config.architectures[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cls.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def objective(model: Any, rng: np.random.Generator) -> Callable[[], torch.Tensor]:
    """A loss on a fixed random batch: next tokens, or features pushed towards random directions."""
    config = model.config
    if hasattr(config, "image_size"):
        pictures = rng.normal(size=(BATCH, 3, 224, 224)).astype(np.float32)
        inputs = {"pixel_values": torch.tensor(pictures)}
    else:
        vocabulary = config.get_text_config().vocab_size
        inputs = {"input_ids": torch.tensor(rng.integers(5, vocabulary, (BATCH, TOKENS)))}
    if type(model).__name__.endswith("ForCausalLM"):
        return lambda: model(**inputs, labels=inputs["input_ids"]).loss
    wanted = torch.tensor(rng.normal(size=(BATCH, config.hidden_size)), dtype=torch.float32)
    return lambda: functional.mse_loss(model(**inputs).last_hidden_state.mean(1), wanted)


def fine_tune(start: Path, out: Path, steps: int, seed: int, dtype: torch.dtype) -> None:
    """A few steps of AdamW on all parameters."""
    torch.manual_seed(seed)
    model = load(start).train()
    loss_of = objective(model, np.random.default_rng(seed))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of().backward()
        optimiser.step()
    model.to(dtype).save_pretrained(out)


def lora(start: Path, out: Path, steps: int, seed: int) -> None:
    """A LoRA on every linear layer of the blocks, trained by PEFT."""
    import peft

    torch.manual_seed(seed)
    model = load(start)
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted = peft.get_peft_model(model, settings).train()
    loss_of = objective(adapted.get_base_model(), np.random.default_rng(seed))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of().backward()
        optimiser.step()
    adapted.save_pretrained(out)


class Family:
    """One model's family on disk, the commands run on it and what they took."""

    def __init__(self, model: Path, work: Path) -> None:
        self.name, self.folder = model.name, work / model.name
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def run(self, what: str, *arguments: str) -> Any:
        """One command; its standard output as JSON."""
        started = time.monotonic()
        verb, *rest = arguments
        cache = [] if verb in ("verify", "inspect") else ["--no-cache"]
        done = subprocess.run(
            [str(Path(sys.executable).with_name("taskvec")), verb, *rest, *cache, "--json"],
            cwd=self.folder, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.seconds[what] = time.monotonic() - started
        if done.returncode:
            sys.exit(f"{self.name}: taskvec {' '.join(arguments)} exited with {done.returncode}")
        return json.loads(done.stdout)

    def check(self, what: str, holds: bool) -> None:
        if not holds:
            self.failed.append(what)

    def equal(self, left: str, right: str) -> float:
        """Share of stored elements that are equal in two folders."""
        a, b = (open_checkpoint(self.folder / name) for name in (left, right))
        same = total = 0
        for name, info in a.tensors.items():
            same += int((a.view(name).read(0, info.size) == b.view(name).read(0, info.size)).sum())
            total += info.size
        return same / total


def study(model: Path, work: Path, steps: int, seed: int) -> tuple[Family, dict[str, Any]]:
    """Everything for one model."""
    found = Family(model, work)
    folder = found.folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder / "base")
    stored = (
        transformers.AutoConfig.from_pretrained(folder / "base", trust_remote_code=False).dtype
        or torch.float32
    )
    fine_tune(folder / "base", folder / "instruct", steps, seed, stored)
    fine_tune(folder / "instruct", folder / "task", steps, seed + 1, stored)
    roles = ["--base", "base", "--instruct", "instruct"]
    scan = found.run("scan", "scan", *roles, "--task", "task=task")
    lata = [*roles, "--method", "lata", "--task", "task=task:0.5"]
    found.run("merge", "merge", "merged", *lata)
    whole = ["--anchor", "instruct", "--method", "task_arithmetic", "--task"]
    found.run("add", "merge", "added", *whole, "task=task:1")
    found.run("forget", "forget", "forgotten", "--target", "task", *whole, "task=task:1")
    found.run("extract", "extract", "task.safetensors", *whole, "task=task")
    found.run("again", "merge", "again", *whole, "task=task.safetensors:0.5")
    found.run("plain", "merge", "plain", *whole, "task=task:0.5")
    seen = found.run("inspect", "inspect", "merged", "--norms")
    replayed = found.run("verify", "verify", "merged", "--replay")
    found.check("verify", all(c["outcome"] == "same" for c in replayed))
    found.check("the vector is as good as the fine-tune", found.equal("again", "plain") == 1)
    outputs = ["merged", "added", "forgotten", "again"]
    if type(load(folder / "base")).__name__.endswith("ForCausalLM"):
        lora(folder / "instruct", folder / "lora", steps, seed + 2)
        found.run("lora", "merge", "with-lora", *lata, "--task", "lora=lora:0.5")
        replayed = found.run("verify", "verify", "with-lora", "--replay")
        found.check("verify with LoRA", all(c["outcome"] == "same" for c in replayed))
        small = ["--form", "lora", "--rank", str(RANK), "--rest", "drop"]
        found.run("as-lora", "extract", "as-lora", *whole, "task=task", *small)
        outputs.append("with-lora")
    for name in outputs:
        load(folder / name)
    return found, {
        "parameters": seen["parameters"],
        "dtype": str(stored).removeprefix("torch."),
        "tensors": len(scan["layers"]),
        "other": len(scan["other"]),
        "added = task": found.equal("added", "task"),
        "forgotten = instruct": found.equal("forgotten", "instruct"),
        **{f"{what} (s)": found.seconds.get(what) for what in TIMED},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, metavar="WORK_DIR")
    parser.add_argument("models", type=Path, metavar="MODEL_DIR", nargs="+")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed = False
    columns: dict[str, dict[str, Any]] = {}
    for model in given.models:
        found, columns[model.name] = study(model, given.work, given.steps, given.seed)
        for what in found.failed:
            print(f"FAILED: {model.name}: {what}", file=sys.stderr)
            failed = True
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(_cell(column[row]) for column in columns.values())} |")
    return int(failed)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
