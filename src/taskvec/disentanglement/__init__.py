"""Weight disentanglement: its error, task addition and negation, departure from linearity.

`tasks` has the inputs and labels, `weights` puts them at points of weight space, `records` stores
measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskvec.extras import lazy_names

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
    "Addition": "taskvec.disentanglement.addition",
    "Departure": "taskvec.disentanglement.tangent",
    "Disentanglement": "taskvec.disentanglement.error",
    "Negation": "taskvec.disentanglement.negation",
    "ModelTask": "taskvec.disentanglement.tasks",
    "classification": "taskvec.disentanglement.tasks",
    "coefficients": "taskvec.disentanglement.error",
    "disentanglement_error": "taskvec.disentanglement.error",
    "language": "taskvec.disentanglement.texts",
    "linearised": "taskvec.disentanglement.tangent",
    "linearity": "taskvec.disentanglement.tangent",
    "task_addition": "taskvec.disentanglement.addition",
    "task_negation": "taskvec.disentanglement.negation",
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

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
