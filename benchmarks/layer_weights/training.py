"""Short full fine-tunes: AdamW on float32 weights, products in bfloat16, warm-up, then cosine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from taskvec.training.settings import TrainingSettings, learning_rate_at


@dataclass(frozen=True)
class Schedule:
    """How a fine-tune runs."""

    steps: int
    batch: int
    rate: float


def computing() -> Any:
    """Products in bfloat16. No cache of converted weights: `fit` changes weights in place."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def train(
    module: Any, batches: Iterator[Any], loss: Callable[[Any], torch.Tensor], schedule: Schedule
) -> dict[str, float]:
    """Train every parameter of a module in place.

    Returns:
        Mean loss of the first and the last ten steps, and seconds.
    """
    begun = time.monotonic()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=schedule.rate, weight_decay=0.0, fused=True
    )
    settings = TrainingSettings(
        steps=schedule.steps, learning_rate=schedule.rate, warmup_steps=max(1, schedule.steps // 10)
    )
    module.train()
    losses = []
    for step in range(schedule.steps):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, settings)
        with computing():
            value = loss(next(batches))
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    module.eval()
    ends = {"first": losses[:10], "last": losses[-10:]}
    told = {name: round(sum(each) / len(each), 4) for name, each in ends.items()}
    return told | {"seconds": round(time.monotonic() - begun, 1)}


def shuffled(n: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of places: each once in a random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator).tolist()
        yield from (order[at : at + batch] for at in range(0, n - batch + 1, batch))
