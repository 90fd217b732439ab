"""Which LATA scheme suits a family, if any: a rule on spread and shape of similarities, ρ and c.

Without a base nothing is known of similarities: none. Otherwise the first of `RULES` that holds for
a task decides for it, and a scheme is suggested only if all tasks agree on it (and, for a
threshold, on a σ); plain task arithmetic if not.

The reasoning: LATA weights layers by how little they repeat instruction tuning. Similarity is
(1 + ρc) / √(1 + 2ρc + ρ²), so where c is near 0, or layers differ by ρ far more than by c, its
ranks say how far a layer moved for the task, and a scheme only takes away where the task changed
little. How the rule did over trained families is in docs/log.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.errors import UsageError
from taskvec.layers import GRANULARITIES
from taskvec.methods.lata import NARROW_SPREAD, spearman
from taskvec.statistics.scan import Scan, layer_statistics

Array = np.ndarray[Any, Any]

MOVED = 0.9  # rank correlation of similarity and −ρ from which ranks say how far layers moved
REPEATS = 0.1  # c of the whole model below which the task repeats little of instruction tuning
GAP = 0.3  # share of the spread that an empty stretch must have to part two groups of layers
SIDE = 0.1  # share of the layers that each of two groups must have


@dataclass(frozen=True, slots=True)
class SimilarityShape:
    """What the rule looks at: the similarities of the layers of one task.

    Attributes:
        layers: How many the task changed.
        low: Least similarity, in [−1, 1].
        high: Largest similarity.
        gap: Ends of the widest empty stretch with at least `SIDE` of the layers on both sides.
        moved: Rank correlation (Spearman) of similarity and −ρ, in [−1, 1]; 1 where there is none.
        norm_ratio: ρ of the whole model.
        task_cosine: c of the whole model.
    """

    layers: int
    low: float
    high: float
    gap: tuple[float, float]
    moved: float
    norm_ratio: float
    task_cosine: float

    @property
    def spread(self) -> float:
        """Largest less least similarity."""
        return self.high - self.low

    @property
    def gap_share(self) -> float:
        """Width of the gap as a share of the spread."""
        return (self.gap[1] - self.gap[0]) / self.spread if self.spread else 0.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the rule.

    Attributes:
        holds: Whether it decides for a task of this shape.
        scheme: What it suggests; None for plain task arithmetic.
        reason: Why, with fields of `SimilarityShape` in braces.
    """

    holds: Callable[[SimilarityShape], bool]
    scheme: str | None
    reason: str


RULES: tuple[Rule, ...] = (
    Rule(
        lambda s: s.spread < NARROW_SPREAD,
        None,
        f"similarities spread over {{s.spread:.4f}}, less than {NARROW_SPREAD:g}: "
        "ranks amplify noise",
    ),
    Rule(
        lambda s: s.moved >= MOVED,
        None,
        f"similarity orders layers as −ρ does (rank correlation {{s.moved:.2f}}, {MOVED:g} or "
        "more): it says how far a layer moved, not what it repeats",
    ),
    Rule(
        lambda s: s.task_cosine < REPEATS,
        None,
        f"c = {{s.task_cosine:.3f}}, less than {REPEATS:g}: little of the task vector repeats "
        "instruction tuning",
    ),
    Rule(
        lambda s: s.gap_share >= GAP,
        "threshold",
        "two groups of layers, with no similarity between {s.gap[0]:.3f} and {s.gap[1]:.3f}",
    ),
    Rule(
        lambda s: True,
        "logarithmic",
        "similarities are spread ({s.low:.3f} to {s.high:.3f}) and differ by more than ρ "
        "(c = {s.task_cosine:.3f})",
    ),
)


@dataclass(frozen=True)
class Suggestion:
    """A scheme for a family.

    Attributes:
        scheme: `logarithmic`, `threshold`, or None for plain task arithmetic.
        threshold: σ, for the scheme `threshold`.
        reasons: Why, a line each.
        shapes: What it rests on, by task; empty without a base.
    """

    scheme: str | None
    threshold: float | None
    reasons: tuple[str, ...]
    shapes: Mapping[str, SimilarityShape]


def suggest_scheme(scan: Scan, granularity: str = "tensor") -> Suggestion:
    """The scheme that suits a family by `RULES`.

    Args:
        scan: Statistics of a family.
        granularity: `tensor`, `module` or `block`.

    Raises:
        UsageError: no such granularity.
    """
    if granularity not in GRANULARITIES:
        raise UsageError(
            f"granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}"
        )
    if not scan.has_base:
        return Suggestion(None, None, ("no base: similarities cannot be known",), {})
    shapes = {
        task: shape_of(scan, task, granularity)
        for task in scan.tasks
        if scan.gram[:, 2 + scan.task_index(task), 2 + scan.task_index(task)].any()
    }
    decided = {task: _rule_for(shape) for task, shape in shapes.items()}
    reasons = [f"{t}: {rule.reason.format(s=shapes[t])}" for t, rule in decided.items()]
    schemes = {rule.scheme for rule in decided.values()}
    if len(schemes) > 1:
        record = ", ".join(f"{t} {rule.scheme or 'none'}" for t, rule in decided.items())
        return Suggestion(None, None, (*reasons, f"tasks disagree ({record})"), shapes)
    scheme = schemes.pop() if schemes else None
    if scheme != "threshold":
        return Suggestion(scheme, None, tuple(reasons), shapes)
    low = max(shape.gap[0] for shape in shapes.values())
    high = min(shape.gap[1] for shape in shapes.values())
    if low >= high:
        reasons.append("no σ lies between the groups of every task")
        return Suggestion(None, None, tuple(reasons), shapes)
    return Suggestion(scheme, (low + high) / 2, tuple(reasons), shapes)


def _rule_for(shape: SimilarityShape) -> Rule:
    return next(rule for rule in RULES if rule.holds(shape))


def shape_of(scan: Scan, task: str, granularity: str) -> SimilarityShape:
    """What the rule looks at, of a task that differs from the anchor in a family with a base."""
    statistics = layer_statistics(scan, task, granularity)
    ranked = ~np.isnan(statistics.similarity)
    similarity, ratio = statistics.similarity[ranked], statistics.norm_ratio[ranked]
    ordered = np.sort(similarity)
    length, side = len(ordered), max(1, int(np.ceil(SIDE * len(ordered))))
    lower, upper = ordered[side - 1 : length - side], ordered[side : length - side + 1]
    widest = int(np.argmax(upper - lower)) if len(lower) else None
    moved = spearman(similarity, -ratio)
    gram, t = scan.gram.sum(0), 2 + scan.task_index(task)
    instruction, own = np.sqrt(gram[1, 1]), np.sqrt(gram[t, t])
    return SimilarityShape(
        layers=length,
        low=float(ordered[0]),
        high=float(ordered[-1]),
        gap=(0.0, 0.0) if widest is None else (float(lower[widest]), float(upper[widest])),
        moved=1.0 if math.isnan(moved) else moved,
        norm_ratio=float(own / instruction) if instruction else math.inf,
        task_cosine=float(gram[1, t] / (own * instruction)) if instruction else 0.0,
    )
