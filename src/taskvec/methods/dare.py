"""DARE: drop entries at random, rescale the remaining ones, and add them.

    θ = θ_target + Σ_t λ_t (m_t ⊙ τ'_t) / d      m_t ~ Bernoulli(d), d = `density` = 1 − drop rate

Source: Language Models are Super Mario, arXiv:2311.03099, section 3.2, equation 2: the expectation
of every entry is preserved. The mask depends only on seed, task, tensor and entry. `rescale: none`
leaves out the division. `rescale: l1` is mergekit's rescaling, not the paper's: it multiplies by
‖τ'_t‖₁ / ‖m_t ⊙ τ'_t‖₁ of each tensor instead, which preserves its sum of magnitudes. For that, the
masks are drawn one more time before the merge.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from taskvec.methods.method import Inputs, Method, Need
from taskvec.methods.parameters import Parameter, tensorwise
from taskvec.methods.selection import Selection
from taskvec.methods.table import Table
from taskvec.statistics.masked_sums import Sums

DENSITY = "share of entries kept, drawn at random"
RESCALES = ("density", "l1", "none")

PARAMETERS = (
    Parameter("density", 0.1, DENSITY, low=1e-6, high=1, by_layer=True),
    Parameter("rescale", "density", "what the rescaling preserves", choices=RESCALES),
)


def to_collect(inputs: Inputs, table: Table) -> Need | None:
    """The pass that `rescale: l1` needs; None if no pass is needed, or if it is done."""
    chosen = {task: inputs.parameters[task] for task in inputs.tasks}
    densities = {t: p["density"] for t, p in chosen.items() if p["rescale"] == "l1"}
    return Need("masked_sums", table, densities) if densities and not inputs.passes else None


def selection_of(inputs: Inputs, election: str, merge: str) -> Selection:
    """Random masks of every task, and how tasks are combined."""
    chosen = {task: inputs.parameters[task] for task in inputs.tasks}
    sums = cast(Sums, inputs.passes[0]) if inputs.passes else {}
    divided = {t: p["density"] for t, p in chosen.items() if p["rescale"] == "density"}
    return Selection(
        densities={task: p["density"] for task, p in chosen.items()},
        rescale={task: tensorwise(lambda d: 1 / d, density) for task, density in divided.items()},
        factors=quotients(sums),
        election=election,
        merge=merge,
        seed=inputs.seed,
    )


def quotients(sums: Sums) -> dict[str, dict[str, float]]:
    """Factors that restore the L1 norm of each tensor, by task; 1 where no entry is kept."""
    return {
        task: {name: total / kept if kept > 0 else 1.0 for name, (total, kept) in mine.items()}
        for task, mine in sums.items()
    }


def decide(inputs: Inputs) -> Table | Need:
    """The layer weights, with random masks."""
    table = inputs.layer_weights()
    if need := to_collect(inputs, table):
        return need
    selection = selection_of(inputs, "none", "sum")
    return replace(table, selection=selection, origin=table.used_by("dare"))


METHOD = Method(
    name="dare",
    summary="drop entries at random, rescale the rest, add",
    source="arXiv:2311.03099",
    formula="θ = θ_target + Σ_t λ_t m_t ⊙ τ'_t / density",
    decide=decide,
    parameters=PARAMETERS,
    sparsifies=True,
)
