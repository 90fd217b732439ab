"""Fine-tuning for task arithmetic: which parameters train, linearised models, the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskvec.extras import lazy_names

if TYPE_CHECKING:
    from taskvec.training.api import Finetuned, finetune
    from taskvec.training.loop import BatchLoss, Examples
    from taskvec.training.models import HeadOptions
    from taskvec.training.run import RunOutput
    from taskvec.training.settings import TrainingSettings

_HOMES = {
    "HeadOptions": "taskvec.training.models",
    "Examples": "taskvec.training.loop",
    "Finetuned": "taskvec.training.api",
    "BatchLoss": "taskvec.training.loop",
    "RunOutput": "taskvec.training.run",
    "TrainingSettings": "taskvec.training.settings",
    "finetune": "taskvec.training.api",
}

__all__ = [
    "BatchLoss",
    "Examples",
    "Finetuned",
    "HeadOptions",
    "RunOutput",
    "TrainingSettings",
    "finetune",
]

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
