"""NearSwap: move to the task's entry if it is near, otherwise by a fixed step toward it.

    θ = θ_target + Σ_t λ_t clip(τ'_t, −t, t)

Source: the model card of alchemonaut/QuartetAnemoi-70B-t0.0001 and mergekit's documentation:
weight = min(1, t / |θ_ft − θ|) of the fine-tune in every entry, which equals the clip above. The
default t is from that card. The source merges two models. Here each of several task vectors is
clipped, with its own t if given, and the results are added.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from taskvec.methods.method import Array, Block, Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

STEP = "largest change of an entry at λ = 1"
PARAMETERS = (Parameter("t", 0.0001, STEP, low=0, by_layer=True),)


def decide(inputs: Inputs) -> Table:
    """The layer weights."""
    table = inputs.layer_weights()
    return replace(table, origin=table.used_by("nearswap"))


def combine(block: Block) -> Array:
    """The merged entries."""
    merged = block.target.copy()
    for task, scale, vector in zip(block.tasks, block.scales, block.vectors, strict=True):
        step = block.parameters[task]["t"]
        merged += scale * np.clip(vector, -step, step)
    return merged


METHOD = Method(
    name="nearswap",
    summary="task vectors with every entry clipped to a largest change",
    source="alchemonaut/QuartetAnemoi-70B-t0.0001",
    formula="θ = θ_target + Σ_t λ_t clip(τ'_t, −t, t)",
    decide=decide,
    parameters=PARAMETERS,
    default_scale=1.0,
    combine=combine,
)
