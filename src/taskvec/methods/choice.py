"""A method together with its parameters, as a recipe names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from taskvec.methods import find_method
from taskvec.methods.method import Method
from taskvec.methods.parameters import resolve


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """A method and the parameters given for it; made by `method`.

    Attributes:
        method: The method, such as LATA.
        parameters: Given parameters by name; the others have their defaults.
    """

    method: Method
    parameters: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {"name": self.method.name, **self.parameters}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.method.name}({given})"


def method(name: str, **parameters: Any) -> MethodChoice:
    """A method with parameters.

    Args:
        name: Name as in a recipe; `taskvec methods` lists the names.
        parameters: Its parameters. One that differs by layer is a mapping, as in a recipe.

    Raises:
        ParameterError: an unknown method or parameter, or a value outside its range.

    >>> method("lata", scheme="linear")
    lata(scheme='linear')
    """
    found = find_method(name)
    defaults = {p.name: p.default for p in found.parameters}  # stand for what differs by layer
    resolve(
        found.parameters,
        {k: defaults.get(k) if isinstance(v, Mapping) else v for k, v in parameters.items()},
        found.name,
    )
    return MethodChoice(found, parameters)
