"""Weight disentanglement: its error, task addition and negation, where linearity sits.

`tasks` says what models are asked, `weights` puts them at points of weight space, `intervals` and
`records` serve all measurements.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.disentanglement.error import (
        Disentanglement,
        coefficients,
        disentanglement_error,
    )
    from taskvec.disentanglement.tasks import Task, classification

_HOMES = {
    "Disentanglement": "error",
    "Task": "tasks",
    "classification": "tasks",
    "coefficients": "error",
    "disentanglement_error": "error",
}

__all__ = [
    "Disentanglement",
    "Task",
    "classification",
    "coefficients",
    "disentanglement_error",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taskvec.disentanglement' has no attribute {name!r}")
    return getattr(import_module(f"taskvec.disentanglement.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
