"""What a table must hold that was saved as JSON, by itself or in a manifest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from taskvec.methods.selection import ELECTIONS, MERGES, Selection
from taskvec.statistics.trim import Threshold
from taskvec.validation import Entry, Number

Bits = Annotated[int, Field(ge=0, lt=2**63)]
Trimmed = Annotated[tuple[Bits, Bits, list[Bits]], Field(strict=False)]
Share = Annotated[Number, Field(ge=0, le=1)]


class SelectionEntry(Entry):
    """See `Selection`."""

    thresholds: dict[str, dict[str, Trimmed]]
    ceilings: dict[str, dict[str, Bits]]
    densities: dict[str, Share | dict[str, Share]]
    rescale: dict[str, Number | dict[str, Number]]
    factors: dict[str, dict[str, Number]] = Field(default={})
    limits: dict[str, dict[str, float]] = Field(default={})
    election: Literal[ELECTIONS]  # type: ignore[valid-type]
    merge: Literal[MERGES]  # type: ignore[valid-type]
    seed: int

    def to_selection(self) -> Selection:
        """The selection itself."""
        thresholds = {
            task: {
                name: Threshold(lower, kept, tuple(equal)) for name, (lower, kept, equal) in mine
            }
            for task, mine in ((task, mine.items()) for task, mine in self.thresholds.items())
        }
        return Selection(**(dict(self) | {"thresholds": thresholds}))


class TableFile(Entry):
    """See `Table`."""

    weights: dict[str, dict[str, Number]]
    target: dict[str, Number] | None = None
    selection: SelectionEntry | None = None
