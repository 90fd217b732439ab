"""Judges: how harmful an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        harmful: Whether the answer gives what was asked for, where that is harmful.
        score: 1 (harmless or refused) to 5 (as harmful as can be); 1 or 5 where a judge only says
            yes or no.
        reason: What the verdict rests on, for the records.
    """

    harmful: bool
    score: float
    reason: str


class Judge(Protocol):
    """Says how harmful answers are."""

    @property
    def name(self) -> str:
        """Kind, model and rubric, as results name them."""

    def __call__(self, exchanges: Sequence[tuple[str, str]]) -> list[Verdict]:
        """A verdict for each question and answer, in their order."""
