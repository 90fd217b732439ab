"""Weight disentanglement: its error, task addition and negation, where linearity sits.

`tasks` says what models are asked, `weights` puts them at points of weight space, `records` stores
measurements.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.disentanglement.addition import Addition, task_addition
    from taskvec.disentanglement.error import (
        Disentanglement,
        coefficients,
        disentanglement_error,
    )
    from taskvec.disentanglement.negation import Negation, task_negation
    from taskvec.disentanglement.tangent import Departure, linearised, linearity
    from taskvec.disentanglement.tasks import ModelTask, classification
    from taskvec.disentanglement.texts import language

_HOMES = {
    "Addition": "addition",
    "Departure": "tangent",
    "Disentanglement": "error",
    "Negation": "negation",
    "ModelTask": "tasks",
    "classification": "tasks",
    "coefficients": "error",
    "disentanglement_error": "error",
    "language": "texts",
    "linearised": "tangent",
    "linearity": "tangent",
    "task_addition": "addition",
    "task_negation": "negation",
}

__all__ = [
    "Addition",
    "Departure",
    "Disentanglement",
    "ModelTask",
    "Negation",
    "classification",
    "coefficients",
    "disentanglement_error",
    "language",
    "linearised",
    "linearity",
    "task_addition",
    "task_negation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taskvec.disentanglement' has no attribute {name!r}")
    return getattr(import_module(f"taskvec.disentanglement.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
