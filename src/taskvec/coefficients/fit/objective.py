"""The loss of all sources: Σ_s ω_s · mean over positions of what its loss says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from taskvec.coefficients.fit import losses
from taskvec.coefficients.fit.asking import Asker, Outputs
from taskvec.coefficients.fit.losses import Taught
from taskvec.coefficients.fit.prompts import Teacher
from taskvec.extras import require
from taskvec.training.loop import draw_examples
from taskvec.training.settings import TrainingSettings as Drawing

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class TaughtSource:
    """Prompts of one source as rows, and what is right.

    Attributes:
        weight: ω.
        loss: `kl`, `likelihood`, `entropy` or `distance`.
        train: Rows that are learned from.
        held_out: Rows that are measured.
        taught: By the number of the row in `train`, then in `held_out`; None where the loss needs
            no teacher.
        scale: What a squared distance of features is divided by.
    """

    weight: float
    loss: str
    teacher: Teacher
    train: Sequence[Any]
    held_out: Sequence[Any]
    taught: Sequence[Taught] | None = None
    scale: float = 1.0

    def taught_of(self, part: str, rows: Sequence[int]) -> Taught | None:
        """What is right for some rows of `train` or `held_out`."""
        if self.taught is None:
            return None
        first = 0 if part == "train" else len(self.train)
        return losses.join([self.taught[first + i] for i in rows])


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Loss of one source on its held-out prompts.

    Attributes:
        sums: Of each prompt over its positions, nats; shape (prompts,).
        counts: Positions of each, shape (prompts,).
    """

    sums: Array
    counts: Array

    @property
    def value(self) -> float:
        """Mean over positions."""
        return float(self.sums.sum() / max(self.counts.sum(), 1))


@dataclass(slots=True)
class FitLoss:
    """Losses and slopes of several sources.

    Attributes:
        asker: Asks the module.
        sources: By name.
        batch_size: Prompts of each source in a step.
        micro_batch: Most prompts at once; None: all of a step.
        hidden: Weight of the hidden states' distance.
    """

    asker: Asker
    sources: Mapping[str, TaughtSource]
    batch_size: int
    micro_batch: int | None = None
    hidden: float = 0.0

    def step(self, step: int, seed: int) -> float:
        """The loss of a step's batch; its backward pass leaves slopes in the module's hooks.

        Args:
            step: From 0.
            seed: Of the order of the prompts.
        """
        picked = {
            name: self._draw(name, source, step, seed) for name, source in self.sources.items()
        }
        positions = {
            name: max(1, sum(self.asker.count(self.sources[name].train[i]) for i in rows))
            for name, rows in picked.items()
        }
        total = 0.0
        for chunk in self._chunks(picked):
            loss = self._loss("train", chunk, positions)
            value = loss.item()
            total += value
            if not math.isfinite(value):
                return math.nan
            loss.backward()
        return total

    def _loss(self, part: str, rows: Mapping[str, list[int]], positions: Mapping[str, int]) -> Any:
        outputs = self.asker.ask(
            {n: [getattr(self.sources[n], part)[i] for i in each] for n, each in rows.items()},
            hidden=self.hidden > 0,
        )
        parts = [
            self._each(self.sources[name], outputs[name], part, each).sum()
            * (self.sources[name].weight / positions[name])
            for name, each in rows.items()
        ]
        return sum(parts[1:], parts[0])

    def _each(self, source: TaughtSource, outputs: Outputs, part: str, rows: Sequence[int]) -> Any:
        """Loss of each position, shape (P,)."""
        if source.loss == "entropy":
            found = losses.entropy(outputs.values)
        elif source.loss == "likelihood":
            found = losses.surprise(outputs.values, outputs.labels)
        else:
            taught = source.taught_of(part, rows)
            assert taught is not None
            if source.loss == "distance":
                return losses.distance(outputs.values, taught.features, source.scale)
            found = losses.divergence(outputs.values, taught)
            if self.hidden > 0:
                found = found + self.hidden * losses.hidden_distance(outputs.hidden, taught.hidden)
        return found

    def measure(self) -> dict[str, HeldOutLoss]:
        """Losses of the held-out prompts, by source."""
        torch = require("torch", "eval")
        found = {}
        for name, source in self.sources.items():
            rows = source.held_out
            sums = np.zeros(len(rows))
            counts = np.array([self.asker.count(row) for row in rows], np.float64)
            size = self.micro_batch or self.batch_size
            with torch.no_grad():
                for start in range(0, len(rows), size):
                    mine = list(range(start, min(start + size, len(rows))))
                    outputs = self.asker.ask(
                        {name: [rows[i] for i in mine]}, hidden=self.hidden > 0
                    )[name]
                    each = self._each(source, outputs, "held_out", mine).double()
                    by_row = torch.zeros(len(mine), dtype=torch.float64, device=each.device)
                    sums[mine] = by_row.index_add_(0, outputs.owner, each).cpu().numpy()
            found[name] = HeldOutLoss(sums, counts)
        return found

    def total(self, measured: Mapping[str, HeldOutLoss]) -> float:
        """Σ_s ω_s times the value of each."""
        return sum(source.weight * measured[name].value for name, source in self.sources.items())

    def _draw(self, name: str, source: TaughtSource, step: int, seed: int) -> list[int]:
        size = min(self.batch_size, len(source.train))
        drawing = Drawing(batch_size=size, seed=(seed << 32) + crc32(name.encode()))
        return draw_examples(step, len(source.train), drawing)

    def _chunks(self, picked: Mapping[str, list[int]]) -> list[dict[str, list[int]]]:
        """A step's rows, so many at once."""
        if self.micro_batch is None:
            return [dict(picked)]
        flat = [(name, i) for name, rows in picked.items() for i in rows]
        chunks = []
        for start in range(0, len(flat), self.micro_batch):
            chunk: dict[str, list[int]] = {}
            for name, i in flat[start : start + self.micro_batch]:
                chunk.setdefault(name, []).append(i)
            chunks.append(chunk)
        return chunks
