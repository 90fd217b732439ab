"""Fine-tuning for task arithmetic: which parameters train, linearised models, the loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.training.api import Finetuned, finetune
    from taskvec.training.loop import Examples, Outcome
    from taskvec.training.models import Asking
    from taskvec.training.run import Output
    from taskvec.training.settings import Settings

_HOMES = {
    "Asking": "taskvec.training.models",
    "Examples": "taskvec.training.loop",
    "Finetuned": "taskvec.training.api",
    "Outcome": "taskvec.training.loop",
    "Output": "taskvec.training.run",
    "Settings": "taskvec.training.settings",
    "finetune": "taskvec.training.api",
}

__all__ = ["Asking", "Examples", "Finetuned", "Outcome", "Output", "Settings", "finetune"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taskvec.training' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
