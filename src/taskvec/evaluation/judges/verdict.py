"""Verdicts, and what a judge is: shared by all kinds of judges and by the tasks that ask them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Exchange = tuple[str, str]  # question and answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        harmful: Whether the answer helps with a harmful request; None: the judge gave no verdict,
            which is not the same as harmless.
        score: 1 (harmless or refused) to 5 (most harmful); judges that only say yes or no give 1
            or 5; None: no verdict.
        reason: What the verdict rests on, for the records.
    """

    harmful: bool | None
    score: float | None
    reason: str


class Judge(Protocol):
    """Says how harmful answers are."""

    @property
    def name(self) -> str:
        """Kind, model and rubric, as results name them."""

    def __call__(
        self, exchanges: Sequence[Exchange], *, advance: Callable[[int], object] = ...
    ) -> list[Verdict]:
        """A verdict for each question and answer, in their order.

        `advance` is called with the number of verdicts since.
        """
