"""Task arithmetic for real checkpoints: add or remove skills layer by layer, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskvec.extras import lazy_names

if TYPE_CHECKING:
    from taskvec.coefficients.fit.api import fit
    from taskvec.errors import TaskvecError, TaskvecWarning
    from taskvec.evaluation.api import evaluate
    from taskvec.evaluation.evaluate import Result, Results
    from taskvec.merging.preview import plan, scan
    from taskvec.merging.scans import load_scan
    from taskvec.merging.steps import Prepared
    from taskvec.methods.choice import MethodChoice, method
    from taskvec.methods.lata import lata
    from taskvec.methods.table import Table, load_table
    from taskvec.outputs.merge import forget, merge
    from taskvec.outputs.run import Merged
    from taskvec.outputs.verify import Check, verify
    from taskvec.recipes.reading import load_recipe
    from taskvec.recipes.recipe import Family, Recipe, TaskSpec
    from taskvec.reporting.api import Report, report
    from taskvec.statistics.scan import Scan
    from taskvec.vectors.extract import extract
    from taskvec.vectors.inspection import Inspection, inspect
    from taskvec.vectors.vector_file import Extracted

_HOMES = {
    "Check": "taskvec.outputs.verify",
    "Extracted": "taskvec.vectors.vector_file",
    "Family": "taskvec.recipes.recipe",
    "Inspection": "taskvec.vectors.inspection",
    "Merged": "taskvec.outputs.run",
    "MethodChoice": "taskvec.methods.choice",
    "Prepared": "taskvec.merging.steps",
    "Recipe": "taskvec.recipes.recipe",
    "Report": "taskvec.reporting.api",
    "Result": "taskvec.evaluation.evaluate",
    "Results": "taskvec.evaluation.evaluate",
    "Scan": "taskvec.statistics.scan",
    "Table": "taskvec.methods.table",
    "TaskSpec": "taskvec.recipes.recipe",
    "TaskvecError": "taskvec.errors",
    "TaskvecWarning": "taskvec.errors",
    "evaluate": "taskvec.evaluation.api",
    "extract": "taskvec.vectors.extract",
    "fit": "taskvec.coefficients.fit.api",
    "forget": "taskvec.outputs.merge",
    "inspect": "taskvec.vectors.inspection",
    "lata": "taskvec.methods.lata",
    "load_recipe": "taskvec.recipes.reading",
    "load_scan": "taskvec.merging.scans",
    "load_table": "taskvec.methods.table",
    "merge": "taskvec.outputs.merge",
    "method": "taskvec.methods.choice",
    "plan": "taskvec.merging.preview",
    "report": "taskvec.reporting.api",
    "scan": "taskvec.merging.preview",
    "verify": "taskvec.outputs.verify",
}

__all__ = [
    "Check",
    "Extracted",
    "Family",
    "Inspection",
    "Merged",
    "MethodChoice",
    "Prepared",
    "Recipe",
    "Report",
    "Result",
    "Results",
    "Scan",
    "Table",
    "TaskSpec",
    "TaskvecError",
    "TaskvecWarning",
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
    "method",
    "plan",
    "report",
    "scan",
    "verify",
]

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
