"""How weights are fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from taskvec.errors import UsageError, nearest
from taskvec.layers import GRANULARITIES, LayerKey

MODEL, PROJECTION = "model", "projection"
FIT_GRANULARITIES = (MODEL, *reversed(GRANULARITIES), PROJECTION)
OBJECTIVES = ("kl", "likelihood", "entropy")


@dataclass(frozen=True, slots=True)
class Descent:
    """How weights are found.

    Attributes:
        granularity: What one weight of a task belongs to: the whole `model`, a `block`, a `module`
            (attention, MLP or norm of a block), a `tensor`, or a `projection` (all tensors of one
            kind in one block). Tensors outside the blocks have weights of their own in all but
            `model`.
        steps: Updates.
        rate: Learning rate of Adam.
        low: Smallest weight.
        high: Largest weight.
        stay: Pull to the start: stay/2 · Σ_t mean_l (w_{t,l} − w⁰_{t,l})² is added to the loss.
    """

    granularity: str = "tensor"
    steps: int = 120
    rate: float = 0.05
    low: float = -2.0
    high: float = 2.0
    stay: float = 0.0

    def __post_init__(self) -> None:
        if self.granularity not in FIT_GRANULARITIES:
            raise UsageError(
                f"granularity must be in {' | '.join(FIT_GRANULARITIES)}; got {self.granularity!r}"
            )
        if not self.low < self.high:
            raise UsageError(f"low must be below high; got [{self.low:g}, {self.high:g}]")
        if self.steps < 1 or not self.rate > 0 or not math.isfinite(self.rate):
            raise UsageError(
                f"steps must be 1 or more and rate above 0; got {self.steps} and {self.rate:g}"
            )
        if not self.stay >= 0 or not math.isfinite(self.stay):
            raise UsageError(f"stay must be 0 or more; got {self.stay:g}")

    def check_start(self, lowest: float, highest: float) -> None:
        """Refuse a start outside the bounds.

        Raises:
            UsageError: it is.
        """
        for value in (lowest, highest):
            if not self.low <= value <= self.high:
                raise UsageError(
                    f"start must lie within the bounds [{self.low:g}, {self.high:g}]; got "
                    f"{value:g}; widen low and high, or start elsewhere"
                )


@dataclass(frozen=True, slots=True)
class FitSettings(Descent):
    """How `fit` runs.

    Attributes:
        batch_size: Prompts of each source in a step.
        micro_batch: Prompts that are worked on at once; None: the whole step. Smaller needs less
            memory and gives the same mean slope.
        held_out: Share of each source's prompts that chooses the step and is reported.
        measure_every: Steps between two measurements of the held-out prompts.
        seeds: Descents, which draw their batches by `seed`, `seed` + 1, …
        seed: Of the split, of the first descent, and of intervals.
        hidden: Weight of the hidden states' relative squared distance to the teacher's.
        max_new_tokens: Longest answer that a teacher generates.
        context: Most tokens of a prompt with its answer; None: what the model reads.
        checkpointing: Whether activations are computed anew in the backward pass.
        hold: Whether task vectors are held in memory; None: as many tensors as fit into half of
            the free memory, and into 2.5 times the parameters.
        device: Such as `cpu` or `cuda:1`; `auto`: the accelerator, if there is one.
        dtype: `auto` (as stored on an accelerator, float32 on the CPU), `float32`, `bfloat16`, or
            `float16`.
    """

    batch_size: int = 8
    micro_batch: int | None = None
    held_out: float = 0.25
    measure_every: int = 10
    seeds: int = 2
    seed: int = 0
    hidden: float = 0.0
    max_new_tokens: int = 128
    context: int | None = None
    checkpointing: bool = False
    hold: bool | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        Descent.__post_init__(self)
        for name in ("batch_size", "measure_every", "seeds", "max_new_tokens", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more; got {value}")
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out must be between 0 and 1; got {self.held_out:g}")
        if not self.hidden >= 0:
            raise UsageError(f"hidden must be 0 or more; got {self.hidden:g}")

    @property
    def one_weight(self) -> Descent:
        """The descent with one weight a task: few coordinates, so that half of the steps do."""
        return replace(self, granularity=MODEL, steps=max(1, self.steps // 2))


def settings_of(given: FitSettings | Mapping[str, Any] | None) -> FitSettings:
    """FitSettings, or the defaults with some changed.

    Raises:
        UsageError: a setting is unknown or out of its range.
    """
    if isinstance(given, FitSettings):
        return given
    known = list(asdict(FitSettings()))
    for name in given or {}:
        if name not in known:
            raise UsageError(f"settings: {name!r} is unknown; {nearest(name, known)}")
    return FitSettings(**(given or {}))


def layer_of(key: LayerKey, name: str, granularity: str) -> str:
    """The layer that a tensor's weight belongs to.

    >>> from taskvec.layers import classify
    >>> name = "model.layers.3.self_attn.q_proj.bias"
    >>> [layer_of(classify(name), name, each) for each in FIT_GRANULARITIES]
    ['model', 'model/3', 'model/3/attention', 'model.layers.3.self_attn.q_proj.bias', \
'model/3/attention/q']
    """
    if granularity == MODEL:
        return MODEL
    if granularity != PROJECTION:
        return key.at(granularity, name)
    if key.block is None or key.module == "other":
        return name
    module = key.at("module", name)
    return module if key.projection is None else f"{module}/{key.projection}"
