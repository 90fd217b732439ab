"""Whether the roles of a family are plausible, from norms and angles of the whole model.

With a = ‖τ_instr‖², b = ‖τ_t‖², d = ⟨τ_instr, τ_t⟩ summed over all tensors, ρ = √(b/a) and
c = d/√(ab), the squared distance of a task from the base is a + 2d + b. So the task is nearer to
the base than to the anchor if a + 2d < 0, that is, if 2ρc < −1. If base and instruct are exchanged,
τ_t is about −τ_instr: ρ ≈ 1 and c ≈ −1. So they are for a task that is the base itself, whose
distance from the base is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from taskvec.statistics.scan import Scan

EXCHANGED_COSINE = -0.8  # c of every task at most this, and …
EXCHANGED_RATIO = 2.0  # … ρ within this factor of 1
# ‖τ_t‖/‖θ_pre‖: the zoo's fine-tunes have 0.05 to 0.09, two models trained apart about √2.
UNRELATED_RATIO = 0.7  # between both
SAME = 0.01  # distance from the base, in ‖τ_instr‖, up to which a task is the base


@dataclass(frozen=True, slots=True)
class Distances:
    """Norms and angles of one task over the whole model.

    Attributes:
        task: Its name.
        relative: ‖τ_t‖/‖θ_pre‖.
        norm_ratio: ρ; infinite where τ_instr = 0.
        task_cosine: c, in [−1, 1]; 0 where either vector is zero.
    """

    task: str
    relative: float
    norm_ratio: float
    task_cosine: float

    @property
    def base_distance(self) -> float:
        """‖θ_ft,t − θ_base‖/‖τ_instr‖; infinite where τ_instr = 0."""
        rho, c = self.norm_ratio, self.task_cosine
        return math.sqrt(max(0.0, 1 + 2 * rho * c + rho**2)) if math.isfinite(rho) else math.inf


def distances(scan: Scan) -> list[Distances]:
    """Norms and angles of every task, in the scan's order."""
    gram = scan.gram.sum(axis=0)
    found = []
    for task in scan.tasks:
        t = 2 + scan.task_index(task)
        anchor, a, b = (math.sqrt(gram[i, i]) for i in (0, 1, t))
        found.append(
            Distances(
                task,
                b / anchor if anchor > 0 else 0.0,
                b / a if a > 0 else math.inf,
                float(gram[1, t]) / a / b if a > 0 and b > 0 else 0.0,
            )
        )
    return found


def role_warnings(scan: Scan) -> list[str]:
    """Warnings about implausible roles of a family, with the figures.

    Args:
        scan: Statistics of a family, with or without a base.
    """
    found = distances(scan)
    warnings = [
        f"task {each.task!r} does not look like a fine-tune of the anchor: its task vector is "
        f"{each.relative:.2f} times as long as the anchor's weights; check which model it was "
        "tuned from"
        for each in found
        if each.relative >= UNRELATED_RATIO
    ]
    related = [each for each in found if each.relative < UNRELATED_RATIO]
    if not scan.has_base or not related:
        return warnings
    warnings += [
        f"task {each.task!r} is nearer to base than to instruct (ρ = {each.norm_ratio:.2f}, "
        f"c = {each.task_cosine:.2f}): its weights are those of base; give the fine-tune"
        for each in related
        if each.base_distance <= SAME
    ]
    related = [each for each in related if each.base_distance > SAME]
    if related and all(map(_is_reversed, related)):
        figures = ", ".join(
            f"{e.task}: ρ = {e.norm_ratio:.2f}, c = {e.task_cosine:.2f}" for e in related
        )
        return [
            *warnings,
            f"base and instruct look exchanged: task vectors point back along the instruction "
            f"vector ({figures}); if so, swap the two; if not, the tasks were tuned from base",
        ]
    return warnings + [
        f"task {each.task!r} is nearer to base than to instruct (ρ = {each.norm_ratio:.2f}, "
        f"c = {each.task_cosine:.2f}): it was probably tuned from base; if so, make base the "
        "anchor with a method that needs no base, such as task_arithmetic"
        for each in related
        if math.isfinite(each.norm_ratio) and 2 * each.norm_ratio * each.task_cosine < -1
    ]


def _is_reversed(each: Distances) -> bool:
    """Whether a task vector is about the reversed instruction vector."""
    return (
        each.task_cosine <= EXCHANGED_COSINE
        and 1 / EXCHANGED_RATIO <= each.norm_ratio <= EXCHANGED_RATIO
    )
