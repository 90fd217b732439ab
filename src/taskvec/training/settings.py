"""How to train: settings, and the learning rate of every step.

The learning rate of step s = 0 … S − 1, with W steps of warm-up and peak η, is η (s + 1) / W in the
warm-up and η (1 + cos(π (s − W) / (S − W))) / 2 after it: the schedule, like the other defaults, of
the code published with arXiv 2305.12827 and 2407.07089.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from taskvec.errors import UsageError

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train. The defaults are those published for CLIP (see the module).

    Attributes:
        steps: Updates.
        batch_size: Examples of a step, over all devices.
        micro_batch: Examples that a device works on at once; None: all of its share. Smaller needs
            less memory and gives the same mean gradient.
        learning_rate: The peak.
        weight_decay: Of AdamW, on everything that trains.
        warmup_steps: None: 500, but at most a quarter of the steps.
        clip: Largest norm of the gradient of everything that trains; longer ones are shortened.
        seed: Of the order of the examples, and of dropout.
        precision: `bfloat16` (weights stay float32, most arithmetic is bfloat16), `float32`, or
            `auto`: bfloat16 on an accelerator that has it.
        device: Such as `cpu` or `cuda:1`; `auto`: the accelerator, if there is one.
    """

    steps: int = 2000
    batch_size: int = 128
    micro_batch: int | None = None
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup_steps: int | None = None
    clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return min(500, self.steps // 4) if self.warmup_steps is None else self.warmup_steps


def check_settings(settings: TrainingSettings) -> None:
    """Check that the settings are valid together.

    Raises:
        UsageError: a value is out of its range.
    """
    least: dict[str, tuple[float, bool]] = {  # and whether it may be that
        "steps": (0, False),
        "batch_size": (0, False),
        "micro_batch": (0, False),
        "learning_rate": (0, False),
        "weight_decay": (0, True),
        "warmup_steps": (0, True),
        "clip": (0, False),
    }
    for name, (low, reached) in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < low or (value == low and not reached):
            wanted = f"at least {low}" if reached else f"above {low}"
            raise UsageError(f"{name} must be {wanted}; got {value}")
    if settings.warmup >= settings.steps:
        raise UsageError(
            f"warmup_steps must be less than the {settings.steps} steps; got {settings.warmup}"
        )
    if settings.precision not in PRECISIONS:
        raise UsageError(
            f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}; "
            f"got {settings.precision!r}"
        )


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, counted from 0; see the module.

    >>> settings = TrainingSettings(steps=10, warmup_steps=4, learning_rate=1.0)
    >>> [round(learning_rate_at(step, settings), 3) for step in (0, 3, 4, 7, 9)]
    [0.25, 1.0, 1.0, 0.5, 0.067]
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    share = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
