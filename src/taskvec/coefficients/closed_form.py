"""λ from a scan alone: proposals in closed form, without data.

What they rest on are inner products of the pure vectors τ'_t = w_t τ_t with each other and with the
task vectors τ_t. The share of task t that a merge with displacement δ = Σ_s λ_s τ'_s keeps is

    share_t = ⟨δ, τ_t⟩ / ‖τ_t‖² = Σ_s P_ts λ_s        P_ts = ⟨τ'_s, τ_t⟩ / ‖τ_t‖²

Our own proposal, `radius`: each task keeps about the same share, and the merged model lies as far
from the anchor as a fine-tune does. With q_t = 1 / Σ_s max(0, P_ts),

    λ_t = min(κ q_t, ‖τ_t‖ / ‖τ'_t‖)        κ = √(mean_t ‖τ_t‖²) / ‖Σ_t q_t τ'_t‖

For T task vectors of weight 1 that is 1/√T where they are orthogonal, 1/T where they are equal, and
at most 1. The derivation, with what it assumes, is in docs/concepts/coefficients.md; how far each
proposal is from the best λ found is in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.errors import UsageError
from taskvec.journal import fields_to_json, finite
from taskvec.methods.table import Table, check_table
from taskvec.statistics.scan import Scan

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Vectors:
    """Lengths and overlaps of K task vectors and of their pure vectors, over the whole model.

    Attributes:
        tasks: Task names, sorted.
        norm: ‖τ_t‖, shape (K,), above 0.
        gram: ⟨τ'_s, τ'_t⟩, shape (K, K).
        overlap: P_ts = ⟨τ'_s, τ_t⟩ / ‖τ_t‖², shape (K, K).
        conflict: Share of the elements that both pure vectors change in which their signs differ,
            shape (K, K); NaN where there are none.
    """

    tasks: tuple[str, ...]
    norm: Array
    gram: Array
    overlap: Array
    conflict: Array

    @property
    def pure_norm(self) -> Array:
        """‖τ'_t‖, shape (K,), above 0."""
        norms: Array = np.sqrt(np.diag(self.gram))
        return norms

    @property
    def cosine(self) -> Array:
        """cos(τ'_s, τ'_t), shape (K, K)."""
        cosines: Array = self.gram / np.outer(self.pure_norm, self.pure_norm)
        return cosines


def vectors_of(scan: Scan, table: Table | None = None) -> Vectors:
    """The vectors of a scan, weighted by a table.

    Args:
        scan: Statistics of a family.
        table: Layer weights w_t; None for 1 everywhere.

    Raises:
        UsageError: the table does not fit, or a task or pure vector is zero, so that no λ follows.
    """
    k = len(scan.tasks)
    weights = np.ones((k, len(scan.names)))
    if table is not None:
        check_table(table, scan.tasks, scan.names, table.origin)
        tasks = [table.tasks.index(task) for task in scan.tasks]
        order = {name: i for i, name in enumerate(table.names)}
        weights = table.weights[np.ix_(tasks, [order[name] for name in scan.names])]
    tau = scan.gram[:, 2:, 2:]
    norms = np.sqrt(np.einsum("ntt->t", tau))
    gram = np.einsum("sn,tn,nst->st", weights, weights, tau)
    for task, norm in zip(scan.tasks, norms, strict=True):
        if not norm:
            raise UsageError(
                f"task {task!r} is identical to the anchor, so no λ can be proposed; remove it"
            )
    overlap = np.einsum("sn,nst->ts", weights, tau) / np.square(norms)[:, None]
    for task, own in zip(scan.tasks, np.diag(overlap), strict=True):
        if table is not None and own <= 0:
            raise UsageError(
                f"{table.origin}: the weights remove or reverse task {task!r} "
                f"(share {own:g}), so no λ can be proposed; give another scheme, threshold or table"
            )
    return Vectors(scan.tasks, norms, gram, overlap, _conflict(scan, weights))


def _conflict(scan: Scan, weights: Array) -> Array:
    """Where both weights are not zero; a negative weight turns signs round."""
    product = np.einsum("sn,tn->nst", weights, weights)
    agree = np.where(product < 0, scan.support - scan.agree, scan.agree)
    support = np.where(product != 0, scan.support, 0).sum(0)
    agreed = np.where(product != 0, agree, 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Array = np.where(support > 0, 1 - agreed / support, np.nan)
    return share


def radius(v: Vectors) -> Array:
    """λ by task: equal shares, within the distance at which fine-tunes lie; see the module."""
    return _to_radius(v, 1 / np.maximum(v.overlap, 0).sum(1))


def radius_shared(v: Vectors) -> Array:
    """The same with one λ for all tasks: q_t = 1."""
    scales = _to_radius(v, np.ones(len(v.tasks)))
    return np.full_like(scales, scales.min())


def _to_radius(v: Vectors, direction: Array) -> Array:
    """λ along a direction, as long as a fine-tune; no pure vector longer than its task vector."""
    limit = v.norm / v.pure_norm
    length = np.sqrt(np.maximum(direction @ v.gram @ direction, 0))
    wanted = np.sqrt(np.mean(np.square(v.norm)))
    with np.errstate(divide="ignore"):  # vectors that cancel are added up to the limit
        scales: Array = np.minimum(direction * (wanted / length), limit)
    return scales


def metagpt(v: Vectors) -> Array:
    """λ_t = ‖τ'_t‖² / Σ_s ‖τ'_s‖².

    Source: MetaGPT, arXiv:2406.11385, as we read it: it minimises the mean loss over tasks under
    local linearity and orthogonal task vectors. We take norms of the vectors that are merged.
    """
    squares = np.square(v.pure_norm)
    share: Array = squares / squares.sum()
    return share


def nan(v: Vectors) -> Array:
    """λ_t = (1 / ‖τ'_t‖) / Σ_s (1 / ‖τ'_s‖).

    Source: NAN, arXiv:2505.16148, as we read it: coefficients inversely proportional to the norm of
    the parameters. That these are those of the task vector, and that coefficients sum to 1, is our
    reading; a further scale that the paper may apply could not be verified.
    """
    inverse = 1 / v.pure_norm
    share: Array = inverse / inverse.sum()
    return share


@dataclass(frozen=True, slots=True)
class Formula:
    """A way to propose λ.

    Attributes:
        summary: One line.
        source: Paper, or whose idea it is.
        formula: λ of every task, shape (K,).
    """

    summary: str
    source: str
    formula: Callable[[Vectors], Array]


FORMULAS: Mapping[str, Formula] = {
    "radius": Formula("equal shares, as far as a fine-tune goes", "taskvec", radius),
    "radius_shared": Formula("the same, one λ for all tasks", "taskvec", radius_shared),
    "metagpt": Formula("in proportion to ‖τ'‖²", "arXiv:2406.11385, as we read it", metagpt),
    "nan": Formula("in inverse proportion to ‖τ'‖", "arXiv:2505.16148, as we read it", nan),
    "average": Formula("1/T", "reference", lambda v: np.full(len(v.tasks), 1 / len(v.tasks))),
    "constant_0.3": Formula("0.3", "reference", lambda v: np.full(len(v.tasks), 0.3)),
    "constant_0.5": Formula("0.5", "reference", lambda v: np.full(len(v.tasks), 0.5)),
}


@dataclass(frozen=True)
class Proposals:
    """λ by proposal and task, and what they rest on.

    Attributes:
        vectors: Lengths and overlaps.
        scales: λ by proposal, then by task.
        shares: Share of its task vector that each task keeps under them.
    """

    vectors: Vectors
    scales: Mapping[str, Mapping[str, float]]
    shares: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        v = self.vectors
        return {
            "proposals": {
                name: {
                    "scale": dict(scales),
                    "share": dict(self.shares[name]),
                    **fields_to_json(FORMULAS[name], without=("formula",)),
                }
                for name, scales in self.scales.items()
            },
            "vectors": {
                task: {
                    "norm": float(v.norm[t]),
                    "pure_norm": float(v.pure_norm[t]),
                    "cosine": finite(dict(zip(v.tasks, v.cosine[t], strict=True))),
                    "sign_conflict": finite(
                        {o: v.conflict[t, i] for i, o in enumerate(v.tasks) if o != task}
                    ),
                }
                for t, task in enumerate(v.tasks)
            },
        }


def propose(scan: Scan, table: Table | None = None) -> Proposals:
    """λ for adding all tasks of a scan, by every formula.

    Args:
        scan: Statistics of a family.
        table: Layer weights, such as `lata` gives; None for whole task vectors.

    Returns:
        λ by proposal and task; positive.

    Raises:
        UsageError: the table does not fit, or a task or pure vector is zero.
    """
    v = vectors_of(scan, table)
    scales, shares = {}, {}
    for name, formula in FORMULAS.items():
        found = formula.formula(v)
        scales[name] = dict(zip(v.tasks, found.tolist(), strict=True))
        shares[name] = dict(zip(v.tasks, (v.overlap @ found).tolist(), strict=True))
    return Proposals(v, scales, shares)
