"""Coefficients: which λ, σ, scheme and granularity; proposed without data, or searched with it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.coefficients.closed_form import propose

_HOMES = {
    "propose": "taskvec.coefficients.closed_form",
}

__all__ = [
    "propose",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taskvec.coefficients' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
