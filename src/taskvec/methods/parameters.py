"""Parameters of methods, declared as data, so that every wrong value is told in the same words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.errors import ParameterError, nearest


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: a choice among words, or a number in a closed range.

    Attributes:
        name: As in the recipe.
        default: Value where the recipe says nothing.
        help: One line for the reader.
        choices: Words allowed; empty for a number.
        low: Smallest number allowed.
        high: Largest number allowed.
    """

    name: str
    default: str | float
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    @property
    def range(self) -> str:
        """The values allowed, as text."""
        return " | ".join(self.choices) if self.choices else f"[{self.low:g}, {self.high:g}]"

    def check(self, value: object, owner: str) -> str | float:
        """The value, if it is allowed.

        Raises:
            ParameterError: it is not; the message names parameter, owner, range and value.
        """
        if self.choices:
            if value in self.choices:
                return str(value)
            hint = nearest(value, self.choices) if isinstance(value, str) else ""
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if self.low <= value <= self.high and math.isfinite(value):
                return float(value)
            hint = ""
        else:
            hint = ""
        tail = f"; {hint}" if hint.startswith("did") else ""
        raise ParameterError(f"{self.name} of {owner} must be in {self.range}; got {value!r}{tail}")


def resolve(
    parameters: Sequence[Parameter], given: Mapping[str, object], owner: str
) -> dict[str, str | float]:
    """Every declared parameter with its value.

    Raises:
        ParameterError: an unknown name, or a value outside its range.
    """
    known = {p.name: p for p in parameters}
    for name in given:
        if name not in known:
            hint = nearest(name, tuple(known)) if known else "it takes none"
            raise ParameterError(f"{owner} has no parameter {name!r}; {hint}")
    return {n: p.check(given.get(n, p.default), owner) for n, p in known.items()}


Resolved = Mapping[str, Any]
