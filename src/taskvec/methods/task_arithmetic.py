"""Task arithmetic: θ = θ_target + Σ_t λ_t τ_t.

Source: Editing Models with Task Arithmetic, arXiv:2212.04089, section 2.
"""

from __future__ import annotations

import numpy as np

from taskvec.methods.method import Inputs, Method
from taskvec.methods.table import Table


def decide(inputs: Inputs) -> Table:
    """Weight 1 for every task and tensor."""
    weights = np.ones((len(inputs.tasks), len(inputs.names)))
    return Table(inputs.tasks, inputs.names, weights, origin="task_arithmetic")


METHOD = Method(
    name="task_arithmetic",
    summary="add or subtract whole task vectors",
    source="arXiv:2212.04089",
    formula="θ = θ_target + Σ_t λ_t τ_t",
    decide=decide,
)
