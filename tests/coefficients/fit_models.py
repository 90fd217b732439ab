"""Tiny families of language models in folders, with weights that are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.evaluation import tiny  # noqa: E402

PROMPTS = [f"{who} sees the {what}" for who in ("The fox", "The hen", "A gate", "Question: 7")
           for what in ("red gate", "old fox", "hen", "gate 3", "fox 5")]  # fmt: skip
TASKS = ("a", "b")


def weight(block: int) -> Callable[[str], float]:
    """1 in one block, 0 elsewhere."""
    return lambda name: float(f"layers.{block}." in name)


class Made:
    """A family: instruct, its fine-tunes, and models with weights that are known.

    Attributes:
        folder: Of everything.
        state: Weights of instruct.
        taus: Task vectors by task.
    """

    def __init__(self, folder: Path, dtype: Any = torch.float32, *, size: float = 0.6) -> None:
        self.folder, self.words, self.dtype = folder, tiny.tokenizer(), dtype
        module = tiny.llama(self.words, scale=0.3).to(dtype)
        self.module = module
        self.state = {name: p.detach().clone() for name, p in module.state_dict().items()}
        self.taus: dict[str, dict[str, Any]] = {}
        generator = torch.Generator().manual_seed(5)
        for task in TASKS:
            self.taus[task] = {
                name: size * p.float().std() * torch.randn(p.shape, generator=generator)
                for name, p in self.state.items()
                if "layers." in name and p.ndim == 2
            }
        self.instruct = self.save("instruct", {})
        for task in TASKS:
            self.save(task, {task: lambda name: 1.0})

    def save(self, name: str, weights: Mapping[str, Callable[[str], float]]) -> Path:
        """instruct + Σ_t w_t τ_t as a folder, w by tensor."""
        path = self.folder / name
        state = {key: p.clone() for key, p in self.state.items()}
        for task, of in weights.items():
            for key, tau in self.taus[task].items():
                state[key] = (state[key].float() + of(key) * tau).to(self.dtype)
        self.module.save_pretrained(path, state_dict=state)
        self.words.save_pretrained(path)
        return path

    def family(self, *tasks: str) -> Any:
        """Of some tasks; all without a name."""
        import taskvec as tv

        return tv.Family(
            instruct=self.instruct, tasks={task: self.folder / task for task in tasks or TASKS}
        )

    def lines(self, name: str, rows: list[Any]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
