"""DARE: drop entries at random, rescale what is left, add.

    θ = θ_target + Σ_t λ_t (m_t ⊙ τ'_t) / d      m_t ~ Bernoulli(d), d = `density` = 1 − drop rate

Source: Language Models are Super Mario, arXiv:2311.03099, section 3.2, equation 2: the expectation
of every entry stays what it was. Which entries are kept follows from seed, task, tensor and entry
alone. `rescale: none` leaves out the division.
"""

from __future__ import annotations

from dataclasses import replace

from taskvec.methods.method import Inputs, Method
from taskvec.methods.parameters import Parameter
from taskvec.methods.selection import Selection
from taskvec.methods.table import Table

PARAMETERS = (
    Parameter("density", 0.1, "share of entries that are kept, at random", low=1e-6, high=1),
    Parameter("rescale", "density", "what is kept is divided by", choices=("density", "none")),
)


def selection_of(inputs: Inputs, election: str, merge: str) -> Selection:
    """Random masks of every task, and how tasks are combined."""
    chosen = {task: inputs.parameters[task] for task in inputs.tasks}
    return Selection(
        densities={task: p["density"] for task, p in chosen.items()},
        rescale={t: 1 / p["density"] for t, p in chosen.items() if p["rescale"] == "density"},
        election=election,
        merge=merge,
        seed=inputs.seed,
    )


def decide(inputs: Inputs) -> Table:
    """The layer weights, with random masks."""
    table = inputs.layer_weights()
    selection = selection_of(inputs, "none", "sum")
    return replace(table, selection=selection, origin=f"dare of {table.origin}")


METHOD = Method(
    name="dare",
    summary="drop entries at random, rescale the rest, add",
    source="arXiv:2311.03099",
    formula="θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t / density",
    decide=decide,
    parameters=PARAMETERS,
    sparsifies=True,
)
