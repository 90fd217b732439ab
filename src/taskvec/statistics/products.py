"""Inner products of the vectors that a method combines, tensor by tensor.

They give angles, norms and any point in the span of the vectors, so methods on a sphere need no
weights in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskvec.statistics.collect import Sources, collect
from taskvec.statistics.scan import Scan
from taskvec.streaming import RunOptions

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Products:
    """The result of the pass `products`; N tensors in name order, K tasks in name order.

    Attributes:
        gram: ⟨v_s, v_t⟩, shape (N, K, K), float64, symmetric.
        of_vectors: Whether v_t is τ_t; if not, it is θ_ft,t.
        digests: By role, then by tensor, digests of the weights that were read.
    """

    gram: Array
    of_vectors: bool
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def products_of_vectors(scan: Scan) -> Products:
    """Products of task vectors, which a scan has."""
    digests = {role: member.digests for role, member in scan.members.items()}
    return Products(scan.gram[:, 2:, 2:], True, digests)


def products_of_models(
    sources: Sequence[Sources],
    tasks: Sequence[str],
    *,
    named: Mapping[str, str] | None = None,
    options: RunOptions = RunOptions(),
) -> Products:
    """Products of the task models themselves; reads every tensor of every task once.

    Args:
        sources: Floating-point tensors in name order, with a view for every task and no other.
        tasks: Task names.
        named: Members by role, for messages; default: the roles in words.
        options: How to run.

    Raises:
        CheckpointError: NaN or infinite weights; the tensor and the member are named.
    """
    collected = collect(sources, tasks, with_base=False, named=named, options=options)
    digests = {role: mine for role, mine in collected.digests.items() if role != "anchor"}
    return Products(collected.gram[:, 2:, 2:], False, digests)
