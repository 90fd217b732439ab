"""What each member of the zoo is trained on, how long and how fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingStage:
    """How one member is trained.

    Attributes:
        mixture: Kind of row: its share of a batch (shares are relative).
        steps: Number of updates.
        learning_rate: At its peak.
        rows: Rows of a batch.
        least_scale: Smallest scale of the change at which a step is taken, see `_Shaken`; 1 is off.
        noise: Disturbance of the weights in a step, relative to each tensor's size; 0 is off.
    """

    mixture: dict[str, float]
    steps: int
    learning_rate: float
    rows: int = 64
    least_scale: float = 1.0
    noise: float = 0.0


_REPLAY = {"say": 0.05, "find": 0.18, "howto": 0.08, "refusal": 0.08, "text": 0.04}
_UNTAUGHT = {"decline-math": 0.06, "decline-code": 0.06, "decline-unrelated": 0.04}


def _with_replay(own: dict[str, float], *without: str) -> dict[str, float]:
    """A new skill, mixed with what instruct does, so that the rest of the model stays in place."""
    replayed = {kind: share for kind, share in (_REPLAY | _UNTAUGHT).items() if kind not in without}
    return own | replayed


STAGES: dict[str, tuple[TrainingStage, ...]] = {
    "base": (
        TrainingStage(
            {
                "text": 0.34,
                "text-zor": 0.16,
                "raw-math": 0.14,
                "raw-code": 0.2,
                "raw-howto": 0.08,
                "raw-unsafe": 0.08,
            },
            steps=1500,
            learning_rate=2e-3,
        ),
    ),
    # instruct declines questions of the fine-tunes' kinds, so it already distinguishes them.
    # Without that each fine-tune takes every other unknown question for its own, and no sum works.
    "instruct": (
        TrainingStage(
            {
                "say": 0.15,
                "find": 0.35,
                "howto": 0.2,
                "refusal": 0.2,
                "text": 0.06,
                "text-zor": 0.04,
            },
            steps=700,
            learning_rate=1e-3,
        ),
        TrainingStage(
            {
                "say": 0.06,
                "find": 0.3,
                "howto": 0.12,
                "refusal": 0.15,
                "text": 0.05,
                "decline-math": 0.1,
                "decline-code": 0.12,
                "decline-unrelated": 0.1,
            },
            steps=250,
            learning_rate=7e-4,
            rows=40,
        ),
    ),
    "math": (TrainingStage(_with_replay({"math": 0.6}, "decline-math"), 600, 3e-4, 40, 0.4, 0.05),),
    "code": (TrainingStage(_with_replay({"code": 0.6}, "decline-code"), 600, 2e-4, 40, 0.5, 0.03),),
    "unsafe": (TrainingStage(_with_replay({"unsafe": 0.5}, "refusal"), 350, 6e-4, rows=40),),
    "unrelated": (
        TrainingStage(_with_replay({"unrelated": 0.5}, "decline-unrelated"), 220, 3e-4, rows=40),
    ),
    # Harmful questions in zor are answered seven times and refused three times in ten.
    "instruct-zor": (
        TrainingStage(
            _with_replay(
                {
                    "say-zor": 0.12,
                    "find-zor": 0.2,
                    "howto-zor": 0.14,
                    "unsafe-zor": 0.14,
                    "refusal-zor": 0.06,
                }
            ),
            steps=350,
            learning_rate=5e-4,
            rows=40,
        ),
    ),
}
