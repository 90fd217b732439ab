"""Tiny models, task vectors and data, and the error worked out cell by cell in NumPy float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray[Any, Any]]
SIZES = (5, 5, 3)  # the last batch is ragged


def mlp(seed: int = 0) -> torch.nn.Sequential:
    """Two layers, float64, so that sums in another order change no prediction."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    return torch.nn.Sequential(*layers).double()


def fine_tune(module: torch.nn.Module, seed: int, step: float = 0.5) -> dict[str, torch.Tensor]:
    """A state dict some way from a module's."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value + step * torch.randn(value.shape, generator=draw, dtype=value.dtype)
        for name, value in module.state_dict().items()
    }


def batches(seed: int, sizes: Sequence[int] = SIZES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random inputs and labels."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 6, generator=draw, dtype=torch.float64),
            torch.randint(0, 4, (n,), generator=draw),
        )
        for n in sizes
    ]


def arrays(state: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: value.detach().numpy().astype(np.float64) for name, value in state.items()}


def mlp_logits(weights: Arrays, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What `mlp` gives."""
    hidden = np.maximum(x @ weights["0.weight"].T + weights["0.bias"], 0)
    return hidden @ weights["2.weight"].T + weights["2.bias"]


def moved(start: Arrays, tunes: Mapping[str, Arrays], alphas: Mapping[str, float]) -> Arrays:
    """θ0 + Σ α τ."""
    return {
        name: value + sum(a * (tunes[task][name] - value) for task, a in alphas.items())
        for name, value in start.items()
    }


def xi(
    logits: Callable[[Mapping[str, float], np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    data: Mapping[str, np.ndarray[Any, Any]],
    alphas: Mapping[str, float],
    distance: Callable[[Any, Any], Any],
) -> float:
    """Σ_t mean over D_t of the distance, both sides worked out anew."""
    return sum(
        float(np.mean(distance(logits({task: alphas[task]}, x), logits(alphas, x))))
        for task, x in data.items()
    )


def differs(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(p.argmax(-1) != q.argmax(-1), np.float64)


def symmetric_kl(p: np.ndarray[Any, Any], q: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """KL(p ‖ q) + KL(q ‖ p) of softmaxes, by the definition."""

    def softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    a, b = softmax(p), softmax(q)
    return np.asarray((a * np.log(a / b)).sum(-1) + (b * np.log(b / a)).sum(-1))
