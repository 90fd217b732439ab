"""Coefficients: which λ, σ, scheme and granularity; proposed without data, or searched with it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.coefficients.api import Found, search

_HOMES = {
    "Found": "taskvec.coefficients.api",
    "search": "taskvec.coefficients.api",
}

__all__ = ["Found", "search"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taskvec.coefficients' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
