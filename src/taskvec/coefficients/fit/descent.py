"""Adam on the weights, held within bounds; a descent that is stopped goes on to the same bits.

What a step does depends on the weights, Adam's moments and the number of the step alone.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.coefficients.fit.settings import Descent
from taskvec.coefficients.fit.steering import Steered
from taskvec.errors import OutputError, TaskvecError
from taskvec.extras import require
from taskvec.files import write_whole

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Descended:
    """Where a descent got to.

    Attributes:
        weights: The best that were measured, or the last; shape (tasks, layers).
        last: The last.
        step: Of `weights`.
        losses: Of each step's batch, before its update.
        measured: Step and held-out loss.
        warnings: What a user should know.
    """

    weights: Array
    last: Array
    step: int = 0
    losses: list[float] = field(default_factory=list)
    measured: list[tuple[int, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Layers:
    """Which weight each tensor has.

    Attributes:
        of: Column of the weights by own name.
        moves: Whether a task changes anything in a layer; shape (tasks, layers).
    """

    of: Mapping[str, int]
    moves: Array

    def weights(self, w: Array) -> dict[str, Array]:
        """Weights by own name, shape (tasks,)."""
        return {name: w[:, column] for name, column in self.of.items()}

    def slopes(self, slopes: Mapping[str, Array]) -> Array:
        """Slopes of the weights, from those by own name."""
        found = np.zeros(self.moves.shape)
        for name, each in slopes.items():
            found[:, self.of[name]] += each
        return found


def descend(
    steered: Steered,
    layers: Layers,
    start: Array,
    loss: Callable[[int], float],
    how: Descent,
    *,
    measure: Callable[[], float] | None = None,
    every: int = 10,
    state: Path | None = None,
    tell: Callable[[int, float], object] = lambda step, loss: None,
) -> Descended:
    """Go down a loss from a start.

    Args:
        steered: The module, within `steering`.
        layers: Which weights there are.
        start: Shape (tasks, layers).
        loss: From the number of a step to the loss of its batch, after its backward pass.
        how: The descent.
        measure: What the best step is chosen by; None: the last is taken.
        every: Steps between two measurements.
        state: File that a stopped descent goes on from; None: none is written.
        tell: Called after each step with its number from 1 and its loss.

    Raises:
        TaskvecError: the loss is not finite at the first step.
    """
    torch = require("torch", "eval")
    w = torch.tensor(start, dtype=torch.float64).requires_grad_()
    adam = torch.optim.Adam([w], lr=how.rate)
    found = Descended(np.array(start), np.array(start))
    done = _load(state, w, adam, found) if state is not None else 0
    best = min((value for _, value in found.measured), default=math.inf)
    pull = how.stay / start.shape[1]

    def look(step: int) -> None:
        nonlocal best
        if measure is None or any(at == step for at, _ in found.measured):
            return
        steered.put(layers.weights(w.detach().numpy()))
        value = measure()
        found.measured.append((step, value))
        if value < best:
            best, found.step, found.weights = value, step, w.detach().numpy().copy()

    look(done)
    for step in range(done, how.steps):
        now = w.detach().numpy()
        steered.put(layers.weights(now))
        value = loss(step)
        slopes = layers.slopes(steered.slopes) + pull * (now - start)
        if not math.isfinite(value) or not np.isfinite(slopes).all():
            if step == 0:
                raise TaskvecError(
                    f"the loss is {value} at the start: look at the prompts, at the weights of the "
                    "members, and at the start"
                )
            found.warnings.append(
                f"the loss was not finite at step {step + 1}; the descent ended there, and the "
                "best weights before it are taken"
            )
            break
        w.grad = torch.tensor(np.where(layers.moves, slopes, 0.0))
        adam.step()
        with torch.no_grad():
            w.clamp_(how.low, how.high)
        found.losses.append(value)
        if (step + 1) % every == 0 or step + 1 == how.steps:
            look(step + 1)
            if state is not None:
                _save(state, w, adam, found)
        tell(step + 1, value)
    found.last = w.detach().numpy().copy()
    if measure is None:
        found.weights, found.step = found.last, len(found.losses)
    return found


def _save(path: Path, w: Any, adam: Any, found: Descended) -> None:
    moments = adam.state[w]
    record = {
        "step": found.step,
        "losses": found.losses,
        "measured": found.measured,
        "warnings": found.warnings,
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        w=w.detach().numpy(),
        first=moments["exp_avg"].numpy(),
        second=moments["exp_avg_sq"].numpy(),
        best=found.weights,
        record=np.frombuffer(json.dumps(record).encode(), np.uint8),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def _load(path: Path, w: Any, adam: Any, found: Descended) -> int:
    """Take up a state; returns the steps that it has behind it."""
    torch = require("torch", "eval")
    if not path.is_file():
        return 0
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as state:
            there = {name: state[name] for name in state.files}
        record = json.loads(there["record"].tobytes())
        losses: Sequence[float] = record["losses"]
        if there["w"].shape != tuple(w.shape):
            raise ValueError(f"weights of shape {there['w'].shape}")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); remove it to start again") from error
    with torch.no_grad():
        w.copy_(torch.from_numpy(there["w"]))
    adam.state[w] = {
        "step": torch.tensor(float(len(losses))),
        "exp_avg": torch.from_numpy(there["first"]),
        "exp_avg_sq": torch.from_numpy(there["second"]),
    }
    found.losses, found.step = list(losses), record["step"]
    found.measured = [(int(step), float(value)) for step, value in record["measured"]]
    found.warnings, found.weights = list(record["warnings"]), there["best"]
    return len(losses)
