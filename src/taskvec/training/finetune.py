"""`finetune`: a model, data and what trains, to a task vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.extras import require
from taskvec.training.loop import Examples, Objective, Settings
from taskvec.training.objectives import classifying
from taskvec.training.run import Job, Output, Record, run_training
from taskvec.training.selection import Selection, freeze_rest, select


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What came out.

    Attributes:
        vector: θ − θ0 of what trained, by name; on the CPU.
        selection: What trained.
        records: A record per step and per validation.
        path: File of the vector; None: none was written.
    """

    vector: Mapping[str, Any]
    selection: Selection
    records: Sequence[Record]
    path: Path | None = None


def finetune_module(
    module: Any,
    data: Any,
    *,
    train: str | Sequence[str] = "attention",
    objective: Objective | None = None,
    validation: Any = None,
    settings: Settings = Settings(),
    output: Output = Output(),
    told: Mapping[str, Any] | None = None,
) -> Finetuned:
    """Fine-tune any torch module, in place.

    Args:
        module: With its weights θ0 (also where a run goes on from its folder).
        data: `Examples`, or a sequence (such as a data set of torch) of items that torch's
            `default_collate` puts together.
        train: What trains; see `taskvec.training.selection`.
        objective: From module and batch to the mean loss, or to an `Outcome`; None: cross-entropy
            over classes, where items are (input, label).
        validation: As `data`.
        settings: How to train.
        output: What is written.
        told: What else the result depends on, for the record; JSON types.
    """
    selection = select(module, train)
    required = {name: p.requires_grad for name, p in module.named_parameters()}
    freeze_rest(module, selection)
    parameters = dict(module.named_parameters())
    trained = {name: parameters[name] for name in selection.names}
    start = {name: p.detach().cpu().clone() for name, p in trained.items()}
    job = Job(
        module,
        selection,
        classifying() if objective is None else objective,
        as_examples(data),
        None if validation is None else as_examples(validation),
        {"train": train if isinstance(train, str) else ",".join(train), **(told or {})},
    )
    try:
        records = run_training(job, settings, output)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
            parameter.grad = None
    vector = {name: trained[name].detach().cpu() - start[name] for name in selection.names}
    return Finetuned(vector, selection, records)


def as_examples(data: Any) -> Examples:
    """A sequence as examples, by torch's way of putting items together."""
    if isinstance(data, Examples):
        return data
    collate = require("torch.utils.data", "train").default_collate
    return Examples(data, collate, _first_size)


def _first_size(batch: Any) -> int:
    while not hasattr(batch, "shape"):
        batch = next(iter(batch.values() if hasattr(batch, "values") else batch))
    return int(batch.shape[0])
