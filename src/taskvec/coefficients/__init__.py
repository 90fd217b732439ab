"""Coefficients: which λ, σ, scheme and granularity; proposed without data, or searched with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskvec.extras import lazy_names

if TYPE_CHECKING:
    from taskvec.coefficients.api import SearchResult, search
    from taskvec.coefficients.closed_form import propose
    from taskvec.coefficients.entropy import minimize_entropy
    from taskvec.coefficients.fit.fitted import Fitted
    from taskvec.coefficients.fit.settings import Descent, FitSettings
    from taskvec.coefficients.pairs import measure_pairs
    from taskvec.coefficients.sensitivity import measure_sweep

_HOMES = {
    "Descent": "taskvec.coefficients.fit.settings",
    "FitSettings": "taskvec.coefficients.fit.settings",
    "Fitted": "taskvec.coefficients.fit.fitted",
    "SearchResult": "taskvec.coefficients.api",
    "measure_pairs": "taskvec.coefficients.pairs",
    "measure_sweep": "taskvec.coefficients.sensitivity",
    "minimize_entropy": "taskvec.coefficients.entropy",
    "propose": "taskvec.coefficients.closed_form",
    "search": "taskvec.coefficients.api",
}

__all__ = [
    "Descent",
    "FitSettings",
    "Fitted",
    "SearchResult",
    "measure_pairs",
    "measure_sweep",
    "minimize_entropy",
    "propose",
    "search",
]

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
