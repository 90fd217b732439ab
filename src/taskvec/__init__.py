"""Task arithmetic for real checkpoints: add or remove skills layer by layer, without training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.engine.api import extract, forget, merge, scan
    from taskvec.engine.inspection import inspect
    from taskvec.engine.reading import load_recipe
    from taskvec.engine.recipe import Family
    from taskvec.engine.scans import load_scan
    from taskvec.engine.verify import verify
    from taskvec.errors import TaskvecError
    from taskvec.evaluation.api import evaluate
    from taskvec.methods.lata import lata
    from taskvec.methods.table import Table, load_table
    from taskvec.statistics.scan import Scan

_HOMES = {
    "Family": "taskvec.engine.recipe",
    "Scan": "taskvec.statistics.scan",
    "Table": "taskvec.methods.table",
    "TaskvecError": "taskvec.errors",
    "evaluate": "taskvec.evaluation.api",
    "extract": "taskvec.engine.api",
    "forget": "taskvec.engine.api",
    "inspect": "taskvec.engine.inspection",
    "lata": "taskvec.methods.lata",
    "load_recipe": "taskvec.engine.reading",
    "load_scan": "taskvec.engine.scans",
    "load_table": "taskvec.methods.table",
    "merge": "taskvec.engine.api",
    "scan": "taskvec.engine.api",
    "verify": "taskvec.engine.verify",
}

__all__ = [
    "Family",
    "Scan",
    "Table",
    "TaskvecError",
    "evaluate",
    "extract",
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
