"""Scans of families whose vectors are made up, with every statistic written out in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.layers import classify
from taskvec.statistics.scan import Scan

Array = np.ndarray[Any, Any]


def scan_of(
    tasks: Mapping[str, Sequence[Array]], instruction: Sequence[Array] | None = None
) -> Scan:
    """A scan of tensors `model.layers.N.mlp.up_proj.weight` with these task vectors.

    Args:
        tasks: τ_t by task, one array a tensor.
        instruction: τ_instr, one array a tensor; None for a family without a base.
    """
    names = sorted(tasks)
    count = len(tasks[names[0]])
    tensors = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(count)]
    k = len(names)
    gram = np.zeros((count, 2 + k, 2 + k))
    agree = np.zeros((count, k, k), np.int64)
    support = np.zeros((count, k, k), np.int64)
    for i in range(count):
        tau = np.stack([np.ravel(tasks[name][i]) for name in names]).astype(float)
        instr = np.zeros_like(tau[0]) if instruction is None else np.ravel(instruction[i])
        rows = np.concatenate([np.ones_like(tau[:1]), instr[None], tau])
        gram[i] = rows @ rows.T
        both = (tau[:, None] != 0) & (tau[None] != 0)
        support[i] = both.sum(-1)
        agree[i] = (both & (np.sign(tau[:, None]) == np.sign(tau[None]))).sum(-1)
    return Scan(
        tasks=tuple(names),
        names=tuple(tensors),
        shapes=tuple(np.shape(tasks[names[0]][i]) for i in range(count)),
        keys=tuple(classify(name) for name in tensors),
        has_base=instruction is not None,
        gram=gram,
        agree=agree,
        support=support,
        members={},
    )
