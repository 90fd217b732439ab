"""Task arithmetic for real checkpoints: add or remove skills layer by layer, without training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.coefficients.fit.api import fit
    from taskvec.errors import TaskvecError
    from taskvec.evaluation.api import evaluate
    from taskvec.merging.scans import load_scan
    from taskvec.methods.lata import lata
    from taskvec.methods.table import Table, load_table
    from taskvec.outputs.verify import verify
    from taskvec.recipes.reading import load_recipe
    from taskvec.recipes.recipe import Family
    from taskvec.statistics.scan import Scan
    from taskvec.vectors.api import extract, forget, merge, scan
    from taskvec.vectors.inspection import inspect

_HOMES = {
    "Family": "taskvec.recipes.recipe",
    "Scan": "taskvec.statistics.scan",
    "Table": "taskvec.methods.table",
    "TaskvecError": "taskvec.errors",
    "evaluate": "taskvec.evaluation.api",
    "extract": "taskvec.vectors.api",
    "fit": "taskvec.coefficients.fit.api",
    "forget": "taskvec.vectors.api",
    "inspect": "taskvec.vectors.inspection",
    "lata": "taskvec.methods.lata",
    "load_recipe": "taskvec.recipes.reading",
    "load_scan": "taskvec.merging.scans",
    "load_table": "taskvec.methods.table",
    "merge": "taskvec.vectors.api",
    "scan": "taskvec.vectors.api",
    "verify": "taskvec.outputs.verify",
}

__all__ = [
    "Family",
    "Scan",
    "Table",
    "TaskvecError",
    "evaluate",
    "extract",
    "fit",
    "forget",
    "inspect",
    "lata",
    "load_recipe",
    "load_scan",
    "load_table",
    "merge",
    "scan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taskvec' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
