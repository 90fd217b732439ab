"""A scan as data of a report: what the page needs to compute weights from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from taskvec.checkpoints.folder import open_checkpoint
from taskvec.errors import TaskvecError
from taskvec.layers import GRANULARITIES, LayerKey, model_order
from taskvec.reporting.document import FamilyData, MemberData
from taskvec.statistics.plausibility import role_warnings
from taskvec.statistics.scan import Scan

Array = np.ndarray[Any, Any]


def family_data(scan: Scan, path: str) -> FamilyData:
    """The data of a scan.

    Args:
        scan: Any scan.
        path: Where it is from.
    """
    upper = np.triu_indices(2 + len(scan.tasks))
    pairs = np.triu_indices(len(scan.tasks))
    places = [
        (model_order(key.tower, key.block, key.module, name), i)
        for i, (key, name) in enumerate(zip(scan.keys, scan.names, strict=True))
    ]
    return FamilyData(
        path=path,
        tasks=list(scan.tasks),
        has_base=scan.has_base,
        names=list(scan.names),
        sizes=scan.sizes.tolist(),
        towers=[key.tower for key in scan.keys],
        blocks=[key.block for key in scan.keys],
        kinds=[kind_of(key) for key in scan.keys],
        modules=[key.module for key in scan.keys],
        layers={g: _layers(scan, g) for g in GRANULARITIES},
        order=[i for _, i in sorted(places)],
        gram=scan.gram[:, upper[0], upper[1]].tolist(),
        agree=scan.agree[:, pairs[0], pairs[1]].tolist(),
        support=scan.support[:, pairs[0], pairs[1]].tolist(),
        members=_members(scan),
        warnings=[*role_warnings(scan), *scan.warnings],
    )


def kind_of(key: LayerKey) -> str:
    """What a tensor is in its block: its projection, or its module.

    >>> from taskvec.layers import classify
    >>> kind_of(classify("model.layers.3.self_attn.q_proj.weight"))
    'q'
    """
    if key.projection is None:
        return key.module
    return (
        key.projection if key.module in ("attention", "mlp") else f"{key.projection} {key.module}"
    )


def _layers(scan: Scan, granularity: str) -> list[int]:
    index: dict[str, int] = {}
    return [
        index.setdefault(key.at(granularity, name), len(index))
        for key, name in zip(scan.keys, scan.names, strict=True)
    ]


def _members(scan: Scan) -> dict[str, MemberData]:
    described = {role: _described(member.path) for role, member in scan.members.items()}
    dtypes = {role: about[0] for role, about in described.items()}
    return {
        role: MemberData(
            path=member.path,
            fingerprint=member.fingerprint,
            dtypes=dtypes[role],
            parameters=described[role][1],
            differs=_differs(scan, role, dtypes),
        )
        for role, member in scan.members.items()
    }


def _described(path: str) -> tuple[dict[str, int] | None, int | None]:
    """Tensors by dtype and parameters of a local model, from its headers."""
    if not Path(path).exists():
        return None, None
    try:
        tensors = open_checkpoint(path).tensors.values()
    except (TaskvecError, OSError):
        return None, None
    dtypes: dict[str, int] = {}
    for info in tensors:
        dtypes[info.dtype.name] = dtypes.get(info.dtype.name, 0) + 1
    return dtypes, sum(int(np.prod(info.shape, dtype=np.int64)) for info in tensors)


def _differs(scan: Scan, role: str, dtypes: dict[str, dict[str, int] | None]) -> list[str]:
    column = 1 if role == "base" else None
    if role.startswith("task:"):
        column = 2 + scan.task_index(role.removeprefix("task:"))
    if column is None:
        return []
    changed = int((scan.gram[:, column, column] > 0).sum())
    words = [f"{changed:,} of {len(scan.names):,} tensors"]
    mine, anchor = dtypes[role], dtypes.get("anchor")
    if mine is not None and anchor is not None and set(mine) != set(anchor):
        words.append(f"stored as {', '.join(sorted(mine))}")
    return words


def scan_of(family: FamilyData) -> Scan:
    """The scan that the data are of, as far as statistics of tensors need it."""
    k = len(family.tasks)

    def symmetric(values: list[list[Any]], size: int) -> Array:
        stored = np.array(values)
        out = np.zeros((len(values), size, size), stored.dtype)
        rows, columns = np.triu_indices(size)
        out[:, rows, columns] = stored
        out[:, columns, rows] = stored
        return out

    places = zip(family.towers, family.blocks, family.modules, strict=True)
    return Scan(
        tasks=tuple(family.tasks),
        names=tuple(family.names),
        shapes=tuple((size,) for size in family.sizes),
        keys=tuple(LayerKey(tower, block, module, None, None) for tower, block, module in places),
        has_base=family.has_base,
        gram=symmetric(family.gram, 2 + k),
        agree=symmetric(family.agree, k),
        support=symmetric(family.support, k),
        members={},
    )
