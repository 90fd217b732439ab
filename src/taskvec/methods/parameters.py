"""Parameters of methods, declared as data, so every wrong value gives the same kind of message."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskvec.errors import ParameterError, nearest

Values = float | Mapping[str, float]  # a number, or one by tensor name where it differs by layer


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: a choice among words, or a number in a closed range.

    Attributes:
        name: As in the recipe.
        default: Value if the recipe gives none.
        help: One line for the reader.
        choices: Words allowed; empty for a number.
        low: Smallest number allowed.
        high: Largest number allowed.
        whole: Words for which `combine` must see whole tensors, for any alignment.
        by_layer: Whether it may differ between the tensors of a task. `decide` then sees `Values`,
            `combine` the number of its tensor.
    """

    name: str
    default: str | float
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    by_layer: bool = False
    whole: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """The allowed values, as text."""
        return " | ".join(self.choices) if self.choices else f"[{self.low:g}, {self.high:g}]"

    def check(self, value: object, owner: str) -> str | float:
        """The value, if it is allowed.

        Raises:
            ParameterError: not allowed; the message names parameter, owner, range and value.
        """
        if self.choices:
            if value in self.choices:
                return str(value)
        elif (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and math.isfinite(value)
        ):
            return float(value)
        hint = self._hint(value)
        raise ParameterError(f"{self.name} of {owner} must be in {self.range}; got {value!r}{hint}")

    def _hint(self, value: object) -> str:
        if self.choices:
            hint = nearest(value, self.choices) if isinstance(value, str) else ""
            return f"; {hint}" if hint.startswith("did") else ""
        if not isinstance(value, (dict, list)):
            return ""
        return (
            f"; by layer: {{depth: {value!r}}}" if self.by_layer else "; it cannot differ by layer"
        )


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


def value_at(value: Any, name: str) -> Any:
    """The value of a parameter in one tensor."""
    return value[name] if isinstance(value, Mapping) else value


def tensorwise(function: Callable[..., float], *values: Values) -> Values:
    """A function of values, applied tensor by tensor if one of them differs by layer.

    >>> tensorwise(max, 0.5, {"a": 0.25, "b": 1.0})
    {'a': 0.5, 'b': 1.0}
    """
    layered = next((value for value in values if isinstance(value, Mapping)), None)
    if layered is None:
        return function(*values)
    return {name: function(*(value_at(value, name) for value in values)) for name in layered}
