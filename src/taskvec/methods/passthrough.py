"""A copy of the target: θ = θ_target.

For targets that are built from other models: layers stacked from several models, an adapter merged
into its base, the result of an earlier stage. It takes no tasks.
"""

from __future__ import annotations

import numpy as np

from taskvec.methods.method import Inputs, Method
from taskvec.methods.table import Table


def decide(inputs: Inputs) -> Table:
    """A table without tasks; the target's own factor is 1."""
    weights, target = np.zeros((0, len(inputs.names))), np.ones(len(inputs.names))
    return Table((), inputs.names, weights, target, origin="passthrough")


METHOD = Method(
    name="passthrough",
    summary="copy the target: stacked layers, an adapter on its base",
    source="taskvec",
    formula="θ = θ_target",
    decide=decide,
    needs_anchor=False,
    default_scale=1.0,
    takes_negative_scale=False,
    takes_tasks=False,
    takes_table=False,
)
