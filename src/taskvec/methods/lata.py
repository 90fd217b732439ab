"""LATA: task vectors weighted layer by layer, less for layers that repeat instruction tuning.

With the similarity s_l = cos(τ_comp, τ_instr) of layer l and its rank r_l among L (1 most similar,
ties share the mean rank):

    linear       w_l = (r_l − 1) / (L − 1)
    logarithmic  w_l = ln r_l / ln L
    threshold    w_l = 1 if s_l ≤ σ else 0

    θ = θ_target + Σ_t λ_t w_t τ_t

Source: Layer-Aware Task Arithmetic, arXiv:2502.20186, section 4. The paper gives the ranking and
the behavior, not every constant: the end points (0 and 1) are this project's reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from taskvec.errors import ParameterError
from taskvec.layers import GRANULARITIES
from taskvec.methods.method import Inputs, Method
from taskvec.methods.parameters import Parameter, resolve
from taskvec.methods.table import Table
from taskvec.statistics.plausibility import role_warnings
from taskvec.statistics.scan import LayerStatistics, Scan, layer_statistics

Array = np.ndarray[Any, Any]

SCHEMES = ("linear", "logarithmic", "threshold")
NARROW_SPREAD = 0.01  # similarities closer together than this: ranks amplify noise

PARAMETERS = (
    Parameter("scheme", "logarithmic", "how weights depend on similarity", choices=SCHEMES),
    Parameter("granularity", "tensor", "tensors that share one weight", choices=GRANULARITIES),
    Parameter("threshold", 0.95, "σ: layers with higher similarity are dropped", low=-1, high=1),
    Parameter(
        "normalize_weights",
        "none",
        "mean: divide weights by their mean; norm: preserve the norm of the vector",
        choices=("none", "mean", "norm"),
    ),
)


def rank(similarity: Array) -> Array:
    """Rank of each layer, 1 for the most similar; ties share the mean of their ranks.

    Args:
        similarity: shape (layers,), float64, no NaN.

    Returns:
        Ranks, shape (layers,), float64, in [1, layers].

    >>> rank(np.array([0.5, 0.9, 0.5]))
    array([2.5, 1. , 2.5])
    """
    descending = np.sort(-similarity)
    below = np.searchsorted(descending, -similarity, side="left")
    up_to = np.searchsorted(descending, -similarity, side="right")
    return (below + up_to + 1) / 2


def spearman(one: Array, other: Array) -> float:
    """Rank correlation; NaN where either is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    1.0
    """
    a, b = rank(one), rank(other)
    a, b = a - a.mean(), b - b.mean()
    below = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / below if below > 0 else float("nan")


def linear(similarity: Array) -> Array:
    """Layer weights by Linear-Drop-by-Rank.

    Args:
        similarity: Cosine of complex and instruction vector per layer, shape (layers,), float64, in
            [−1, 1].

    Returns:
        Weight per layer, shape (layers,), in [0, 1]; 1 everywhere if all layers tie or there is
        only one.

    Source: arXiv:2502.20186, section 4; end points are this project's reading.
    """
    ranks = rank(similarity)
    if np.all(ranks == ranks[0]):
        return np.ones_like(ranks)
    return (ranks - 1) / (len(ranks) - 1)


def logarithmic(similarity: Array) -> Array:
    """Layer weights by Logarithmic-Drop-by-Rank; arguments and result as `linear`."""
    ranks = rank(similarity)
    if np.all(ranks == ranks[0]):
        return np.ones_like(ranks)
    weights: Array = np.log(ranks) / np.log(len(ranks))
    return weights


def drop_above(similarity: Array, threshold: float) -> Array:
    """Layer weights by Drop-with-Threshold: 1 where similarity ≤ σ, else 0."""
    return (similarity <= threshold).astype(np.float64)


def layer_weights(statistics: LayerStatistics, parameters: Mapping[str, Any], task: str) -> Array:
    """Weight of every layer for one task, normalized by the parameters.

    Layers that the task did not change (τ_t = 0) are left out of ranking and normalization and get
    weight 0.

    Args:
        statistics: Statistics of this task at the requested granularity.
        parameters: Resolved `PARAMETERS`.
        task: Name, for messages.

    Returns:
        shape (layers,), float64.

    Raises:
        ParameterError: every weight is zero, so they cannot be normalized.
    """
    ranked = ~np.isnan(statistics.similarity)
    weights = np.zeros(len(statistics.layers))
    if not ranked.any():
        return weights
    similarity = statistics.similarity[ranked]
    scheme = parameters["scheme"]
    if scheme == "threshold":
        chosen = drop_above(similarity, parameters["threshold"])
    else:
        chosen = (linear if scheme == "linear" else logarithmic)(similarity)
    kind = parameters["normalize_weights"]
    if kind != "none" and not chosen.any():
        raise ParameterError(
            f"normalize_weights of task {task!r} cannot be {kind}: "
            f"{scheme} weights are zero in every layer"
            + (f" (threshold {parameters['threshold']:g})" if scheme == "threshold" else "")
        )
    if kind == "mean":
        chosen = chosen / np.average(chosen, weights=statistics.sizes[ranked])
    elif kind == "norm":
        norms = statistics.task_norm[ranked]
        chosen = chosen * (np.linalg.norm(norms) / np.linalg.norm(chosen * norms))
    weights[ranked] = chosen
    return weights


def warnings_for(
    statistics: LayerStatistics, parameters: Mapping[str, Any], task: str
) -> list[str]:
    """What a user should know before relying on these weights."""
    similarity = statistics.similarity[~np.isnan(statistics.similarity)]
    if not len(similarity):
        return [f"task {task!r} is identical to the anchor: its task vector is zero"]
    spread = f"similarities of {task!r} lie in [{similarity.min():.4f}, {similarity.max():.4f}]"
    if parameters["scheme"] == "threshold":
        kept = int((similarity <= parameters["threshold"]).sum())
        if kept in (0, len(similarity)):
            outcome = "keeps every layer" if kept else "drops every layer"
            return [f"threshold {parameters['threshold']:g} {outcome}: {spread}"]
    elif similarity.max() - similarity.min() < NARROW_SPREAD and len(similarity) > 1:
        return [
            f"{spread}, closer than {NARROW_SPREAD:g}: ranks amplify noise; "
            "consider task_arithmetic"
        ]
    return []


def decide(inputs: Inputs) -> Table:
    """The table of LATA, each task by its own parameters."""
    assert inputs.scan is not None
    rows, warnings = [], role_warnings(inputs.scan)
    for task in inputs.tasks:
        parameters = inputs.parameters[task]
        statistics = layer_statistics(inputs.scan, task, parameters["granularity"])
        warnings += warnings_for(statistics, parameters, task)
        rows.append(layer_weights(statistics, parameters, task)[statistics.tensor_layer])
    digests = {role: member.digests for role, member in inputs.scan.members.items()}
    return Table(
        inputs.tasks,
        inputs.names,
        np.stack(rows),
        digests=digests,
        warnings=tuple(warnings),
        origin=f"lata: {_in_words(inputs)}",
    )


def _in_words(inputs: Inputs) -> str:
    """The parameters; by task only if tasks differ."""
    words = {
        task: ", ".join(
            f"{name} {value}"
            for name, value in inputs.parameters[task].items()
            if name != "threshold" or inputs.parameters[task]["scheme"] == "threshold"
        )
        for task in inputs.tasks
    }
    if len(set(words.values())) == 1:
        return words[inputs.tasks[0]]
    return "; ".join(f"{task}: {text}" for task, text in words.items())


def lata(
    scan: Scan,
    *,
    scheme: str = "logarithmic",
    granularity: str = "tensor",
    threshold: float = 0.95,
    normalize_weights: str = "none",
    per_task: Mapping[str, Mapping[str, object]] | None = None,
) -> Table:
    """Layer weights of every task by LATA.

    Args:
        scan: Statistics of a family with a base.
        scheme: `linear`, `logarithmic` or `threshold`.
        granularity: `tensor`, `module` or `block`.
        threshold: σ of the scheme `threshold`, in [−1, 1].
        normalize_weights: `none`; `mean`: parameter-weighted mean weight 1; `norm`: ‖τ'_t‖ = ‖τ_t‖.
        per_task: The same parameters for single tasks.

    Raises:
        ParameterError: a value outside its range, or a scan without a base.
        UsageError: `per_task` names a task that the scan does not have.

    Source: arXiv:2502.20186, section 4.
    """
    if not scan.has_base:
        raise ParameterError(
            "lata needs a scan with a base: instruction vectors are measured from it"
        )
    common: dict[str, object] = {
        "scheme": scheme,
        "granularity": granularity,
        "threshold": threshold,
        "normalize_weights": normalize_weights,
    }
    for task in per_task or {}:
        scan.task_index(task)
    parameters = {
        task: resolve(
            PARAMETERS, {**common, **(per_task or {}).get(task, {})}, f"lata (task {task!r})"
        )
        for task in scan.tasks
    }
    return decide(Inputs(scan.tasks, scan.names, {}, parameters, scan))


METHOD = Method(
    name="lata",
    summary="task vectors weighted by how little a layer repeats instruction tuning",
    source="arXiv:2502.20186",
    formula="θ = θ_target + Σ_t λ_t w_t τ_t",
    decide=decide,
    parameters=PARAMETERS,
    needs_scan=True,
    needs_base=True,
)
