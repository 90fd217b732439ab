"""Task negation: how far a task can be removed from a model while a control holds.

θ0 − λ τ, or a merge with −λ by another method, is measured on data of the task and of a control.
The chosen λ has the lowest accuracy on the task among those whose accuracy on the control is at
least a share (95 %) of the pre-trained model's, on validation data; the smallest of several that
tie. Both accuracies are reported on test data, where the control may turn out lower.

Source: Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089, section 3;
Ortiz-Jimenez et al., arXiv:2305.12827, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taskvec.disentanglement.accuracy import PLAIN, Accuracies, Methods
from taskvec.disentanglement.error import coefficients
from taskvec.disentanglement.records import key_of, open_records
from taskvec.disentanglement.tasks import ModelTask
from taskvec.disentanglement.weights import points
from taskvec.errors import DataError, UsageError
from taskvec.evaluation.intervals import Figure
from taskvec.journal import finite
from taskvec.recipes.recipe import Model
from taskvec.streaming import Progress, silent

SPLITS = ("validation", "test")
ROLES = ("target", "control")
VERSION = 1  # of stored measurements; other versions are measured again


@dataclass(frozen=True, slots=True)
class TriedNegation:
    """A coefficient and its scores on validation data.

    Attributes:
        scale: λ, which is subtracted.
        target: Accuracy on the task.
        control: Accuracy on the control.
        is_allowed: Whether the control holds.
    """

    scale: float
    target: float
    control: float
    is_allowed: bool


@dataclass(frozen=True, slots=True)
class Negation:
    """Task negation by one method.

    Attributes:
        method: As given.
        keep: Required share of the pre-trained model's accuracy on the control.
        scale: The chosen λ; None if the control holds at no λ.
        tried: All that were tried.
        target: Accuracy on the task's test data; None without a λ.
        control: Accuracy on the control's test data; see above.
        control_share: That over the pre-trained model's, paired; see above.
        pretrained: Accuracy of θ0 on test data, of `target` and `control`.
        note: What a reader must know of the choice; empty if nothing.
    """

    method: str
    keep: float
    scale: float | None
    tried: tuple[TriedNegation, ...]
    target: Figure | None
    control: Figure | None
    control_share: Figure | None
    pretrained: Mapping[str, Figure]
    note: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is not finite is None."""
        data: dict[str, Any] = {"method": self.method, "keep": self.keep, "scale": self.scale}
        for name in ("target", "control", "control_share"):
            figure = getattr(self, name)
            data[name] = None if figure is None else figure.to_json()
        data["pretrained"] = {role: f.to_json() for role, f in self.pretrained.items()}
        data["note"] = self.note
        data["tried"] = [
            {
                "scale": each.scale,
                "target": each.target,
                "control": each.control,
                "is_allowed": each.is_allowed,
            }
            for each in self.tried
        ]
        return dict(finite(data))


def task_negation(
    module: Any,
    vector: Model,
    validation: Mapping[str, ModelTask],
    test: Mapping[str, ModelTask],
    *,
    methods: Methods = PLAIN,
    base: Model | None = None,
    keep: float = 0.95,
    scales: Sequence[float] = coefficients(21, 0.0, 1.0),
    out: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Negation]:
    """Choose λ on validation data and measure θ0 − λ τ on test data.

    Args:
        module: The pre-trained model, θ0, which is the same bit for bit afterwards.
        vector: τ; see `disentanglement_error`.
        validation: Data of `target` and of `control` that λ is chosen on.
        test: Data of both that are reported.
        methods: What is merged by, under the names that results have; they must take −λ.
        base: Model before instruction tuning, for methods that need it.
        keep: Share of the pre-trained model's accuracy on the control that must be left, in (0, 1].
        scales: The λ that are tried, not negative.
        out: Folder for measurements as they are made; the same call resumes from it.
        seed: Of intervals, and of methods that draw random numbers.
        progress: Told the merges tried.

    Returns:
        By the names of the methods.

    Raises:
        UsageError: the arguments are contradictory or incomplete.
        DataError: labels are missing, or θ0 has no correct answer on the control.
        TaskvecError: anything else foreseen; the module is what it was.
    """
    splits = dict(zip(SPLITS, (validation, test), strict=True))
    for split, by_role in splits.items():
        if set(by_role) != set(ROLES):
            raise UsageError(
                f"{split} must have data of {' and '.join(ROLES)}; got {', '.join(by_role) or '–'}"
            )
    if not 0 < keep <= 1:
        raise UsageError(f"keep must be in (0, 1]; got {keep:g}")
    if not len(scales) or not all(0 <= scale < np.inf for scale in scales):
        raise UsageError(f"scales are subtracted and must not be negative; got {list(scales)}")
    with points(module, {"target": vector}, base=base, seed=seed) as space:
        for method in methods.values():
            space.by(method)
        identities = {s: {t: task.identity for t, task in by.items()} for s, by in splits.items()}
        key = key_of([VERSION, space.identity(), identities, seed])
        records = open_records(None if out is None else Path(out), "negation", key)
        accuracies = Accuracies(space, splits, records, seed)
        tries = sorted({float(scale) for scale in scales})
        with progress("negation", len(methods) * len(tries)) as advance:
            return {
                name: _negate(accuracies, name, method, keep, tries, advance)
                for name, method in methods.items()
            }


def _negate(
    accuracies: Accuracies,
    name: str,
    method: str | Mapping[str, Any],
    keep: float,
    scales: Sequence[float],
    advance: Any,
) -> Negation:
    alone = {split: accuracies.of(split, method, {}) for split in SPLITS}
    for split, counts in alone.items():
        if not counts["control"].right.any():
            raise DataError(
                f"the pre-trained model has no correct answer on the control's {split} data; give "
                "another control"
            )
    start, before = alone["validation"]["control"].right.sum(), alone["test"]
    tried = []
    for scale in scales:
        counts = accuracies.of("validation", method, {"target": -scale})
        target, control = (counts[role].accuracy for role in ROLES)
        # Whole numbers, so that a share that is met exactly is met, independent of rounding.
        is_allowed = bool(counts["control"].right.sum() >= keep * start)
        tried.append(TriedNegation(scale, target, control, is_allowed))
        advance(1)
    allowed = [each for each in tried if each.is_allowed]
    best = min(allowed, key=lambda each: each.target) if allowed else None
    figures: dict[str, Figure | None] = dict.fromkeys((*ROLES, "control_share"))
    if best is not None:
        after = accuracies.of("test", method, {"target": -best.scale})
        figures = {role: accuracies.figure("test", role, after[role]) for role in ROLES}
        figures["control_share"] = accuracies.share(
            "test", "control", after["control"], before["control"]
        )
    return Negation(
        method=name,
        keep=keep,
        scale=None if best is None else best.scale,
        tried=tuple(tried),
        **figures,
        pretrained={role: accuracies.figure("test", role, before[role]) for role in ROLES},
        note=_note(best, tried, keep, figures["control_share"]),
    )


def _note(
    best: TriedNegation | None,
    tried: Sequence[TriedNegation],
    keep: float,
    share: Figure | None,
) -> str:
    """A note on the chosen λ, if it needs one."""
    if best is None:
        return f"no coefficient keeps {keep:.0%} of the control; the smallest is {tried[0].scale:g}"
    if best.scale == 0:
        if any(each.is_allowed and each.scale > 0 for each in tried):
            return "no coefficient that keeps the control lowers the target; nothing is subtracted"
        return f"no coefficient above 0 keeps {keep:.0%} of the control; nothing is subtracted"
    if share is not None and share.value < keep:
        return f"on test data the control keeps {share.value:.1%}, less than the {keep:.0%} asked"
    return ""
