"""The `Scan`: statistics of a family from one reading of its weights. A small JSON file.

From the Gram matrix of (θ_pre, τ_instr, τ_1 … τ_K) of a layer, with a = ⟨τ_instr, τ_instr⟩, b =
⟨τ_t, τ_t⟩ and d = ⟨τ_instr, τ_t⟩, and τ_comp,t = τ_instr + τ_t (LATA, arXiv:2502.20186, section 4):

    similarity = cos(τ_comp,t, τ_instr) = (a + d) / (√(a + 2d + b) √a) = (1 + ρc) / √(1 + 2ρc + ρ²)
    norm_ratio ρ = √(b/a)        task_cosine c = d / √(ab)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from taskvec import documents
from taskvec.errors import CheckpointError, UsageError
from taskvec.layers import LayerKey, model_order
from taskvec.tables import frame, html_table

FORMAT: Final = 1
MEASURED = ("similarity", "norm_ratio", "task_cosine", "task_norm", "instruction_norm",
            "anchor_norm")  # fmt: skip
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class ScannedModel:
    """One checkpoint of a family as it was read.

    Attributes:
        path: Where it was.
        fingerprint: Content identity of all its tensors.
        digests: Content identity of each tensor.
    """

    path: str
    fingerprint: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Scan:
    """Statistics of N floating-point tensors of a family with K tasks, in name order.

    Attributes:
        tasks: Task names, sorted.
        names: Tensor names, sorted.
        shapes: Shape of each tensor.
        keys: What each tensor is (`taskvec.layers`).
        has_base: Whether the family has a base; without one τ_instr is zero.
        gram: shape (N, 2 + K, 2 + K), float64.
        agree: shape (N, K, K), int64.
        support: shape (N, K, K), int64.
        members: By role.
        warnings: Warnings about the members; not part of a scan file.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    keys: tuple[LayerKey, ...]
    has_base: bool
    gram: Array
    agree: Array
    support: Array
    members: Mapping[str, ScannedModel]
    warnings: tuple[str, ...] = ()

    @cached_property
    def sizes(self) -> Array:
        """Elements of each tensor, shape (N,), int64."""
        return np.array([math.prod(shape) for shape in self.shapes], np.int64)

    def task_index(self, task: str) -> int:
        """Position of a task.

        Raises:
            UsageError: the task is unknown.
        """
        if task not in self.tasks:
            raise UsageError(f"no task {task!r} in this scan; it has {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def __repr__(self) -> str:
        base = "with" if self.has_base else "without"
        return f"<Scan of {', '.join(self.tasks)}, {base} base: {len(self.names)} tensors>"

    def to_pandas(self, granularity: str = "tensor") -> Any:
        """Similarity, ρ, c and norms as a DataFrame; one row for each task and layer.

        Args:
            granularity: `tensor`, `module` or `block`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return frame(layer_rows(self, granularity))

    def _repr_html_(self) -> str:
        return html_table(layer_rows(self, "block"), repr(self))

    def to_json(self) -> dict[str, Any]:
        """A JSON object for `from_json`; floats are stored exactly."""
        upper = np.triu_indices(2 + len(self.tasks))
        pairs = np.triu_indices(len(self.tasks))
        return {
            "format": FORMAT,
            "tasks": list(self.tasks),
            "has_base": self.has_base,
            "members": {
                role: {"path": m.path, "fingerprint": m.fingerprint, "digests": dict(m.digests)}
                for role, m in self.members.items()
            },
            "tensors": {
                name: {
                    "shape": list(shape),
                    "gram": gram[upper].tolist(),
                    "agree": agree[pairs].tolist(),
                    "support": support[pairs].tolist(),
                }
                for name, shape, gram, agree, support in zip(
                    self.names, self.shapes, self.gram, self.agree, self.support, strict=True
                )
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], keys: Sequence[LayerKey]) -> Scan:
        """The scan from `to_json`; layer keys are an argument, since a recipe may change them."""
        k = len(data["tasks"])
        tensors = data["tensors"]

        def symmetric(field: str, size: int, dtype: type) -> Array:
            out: Array = np.zeros((len(tensors), size, size), dtype)
            rows, columns = np.triu_indices(size)
            values: Array = np.array([t[field] for t in tensors.values()], dtype).reshape(
                len(tensors), -1
            )
            out[:, rows, columns] = values
            out[:, columns, rows] = values
            return out

        return cls(
            tasks=tuple(data["tasks"]),
            names=tuple(tensors),
            shapes=tuple(tuple(t["shape"]) for t in tensors.values()),
            keys=tuple(keys),
            has_base=data["has_base"],
            gram=symmetric("gram", 2 + k, np.float64),
            agree=symmetric("agree", k, np.int64),
            support=symmetric("support", k, np.int64),
            members={role: ScannedModel(**m) for role, m in data["members"].items()},
        )


def read_scan(path: Path) -> dict[str, Any]:
    """The JSON object of a scan file.

    Raises:
        CheckpointError: not a scan file, or one of another format.
    """
    from taskvec.statistics.scan_file import ScanFile
    from taskvec.validation import read_as

    remedy = "expected a scan file, see --save-scan"
    try:
        data: dict[str, Any] = documents.read_object(path, documents.MEASURED)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    read_as(ScanFile, data, str(path), f"{remedy}; scan again")
    return data


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the L layers of one task at one granularity, in order of first tensor.

    Attributes:
        layers: Layer identifiers.
        tensor_layer: Layer of each tensor, shape (N,), int64.
        sizes: Elements, shape (L,).
        similarity: cos(τ_comp, τ_instr), shape (L,), in [−1, 1]; 0 where τ_instr = 0, NaN where τ_t
            = 0.
        norm_ratio: ρ, shape (L,); infinite where τ_instr = 0.
        task_cosine: c, shape (L,); 0 where either vector is zero.
        task_norm: ‖τ_t‖, shape (L,).
        instruction_norm: ‖τ_instr‖, shape (L,).
        anchor_norm: ‖θ_pre‖, shape (L,).
    """

    layers: tuple[str, ...]
    tensor_layer: Array
    sizes: Array
    similarity: Array
    norm_ratio: Array
    task_cosine: Array
    task_norm: Array
    instruction_norm: Array
    anchor_norm: Array


def layer_statistics(scan: Scan, task: str, granularity: str) -> LayerStatistics:
    """Similarity, ρ, c and norms of every layer for one task.

    Args:
        scan: Statistics by tensor.
        task: Task name.
        granularity: `tensor`, `module` or `block`.
    """
    t = 2 + scan.task_index(task)
    index: dict[str, int] = {}
    places = [
        index.setdefault(key.at(granularity, name), len(index))
        for key, name in zip(scan.keys, scan.names, strict=True)
    ]
    tensor_layer = np.array(places, np.int64)
    gram = np.zeros((len(index), *scan.gram.shape[1:]))
    np.add.at(gram, tensor_layer, scan.gram)
    sizes = np.zeros(len(index), np.int64)
    np.add.at(sizes, tensor_layer, scan.sizes)
    a, b, d = gram[:, 1, 1], gram[:, t, t], gram[:, 1, t]
    with np.errstate(divide="ignore", invalid="ignore"):
        complex_norm = np.sqrt(np.maximum(a + 2 * d + b, 0))
        similarity = np.where(
            (a > 0) & (complex_norm > 0), (a + d) / (complex_norm * np.sqrt(a)), 0.0
        )
        cosine = np.where((a > 0) & (b > 0), d / (np.sqrt(a) * np.sqrt(b)), 0.0)
        ratio = np.where(a > 0, np.sqrt(b) / np.sqrt(a), np.where(b > 0, np.inf, 0.0))
    return LayerStatistics(
        layers=tuple(index),
        tensor_layer=tensor_layer,
        sizes=sizes,
        similarity=np.where(b > 0, np.clip(similarity, -1, 1), np.nan),
        norm_ratio=ratio,
        task_cosine=np.clip(cosine, -1, 1),
        task_norm=np.sqrt(b),
        instruction_norm=np.sqrt(a),
        anchor_norm=np.sqrt(gram[:, 0, 0]),
    )


def known_statistics(scan: Scan, task: str, granularity: str) -> LayerStatistics:
    """As `layer_statistics`; without a base, values that need one are NaN."""
    statistics = layer_statistics(scan, task, granularity)
    if scan.has_base:
        return statistics
    unknown = np.full(len(statistics.layers), np.nan)
    return replace(
        statistics,
        similarity=unknown,
        norm_ratio=unknown,
        task_cosine=unknown,
        instruction_norm=unknown,
    )


def layer_rows(scan: Scan, granularity: str) -> list[dict[str, Any]]:
    """One row for each task and layer.

    Args:
        scan: Statistics by tensor.
        granularity: `tensor`, `module` or `block`.

    Returns:
        Mappings with task, layer, tower, block, module, elements, similarity, norm_ratio,
        task_cosine, task_norm, instruction_norm, anchor_norm, by task in the order of the model.
        The similarity of a layer that the task did not change is None. Without a base, all values
        that need one are None.
    """
    rows = []
    for task in scan.tasks:
        statistics = known_statistics(scan, task, granularity)
        first = dict(reversed(list(zip(statistics.tensor_layer.tolist(), scan.keys, strict=True))))
        of_task = []
        for i, layer in enumerate(statistics.layers):
            key = first[i]
            row = {"task": task, "layer": layer, "tower": key.tower, "block": key.block}
            row["module"] = key.module if granularity != "block" or key.block is None else None
            row["elements"] = int(statistics.sizes[i])
            for name in MEASURED:
                value = float(getattr(statistics, name)[i])
                row[name] = value if math.isfinite(value) else None
            of_task.append(row)
        rows += sorted(
            of_task, key=lambda r: model_order(r["tower"], r["block"], r["module"], r["layer"])
        )
    return rows
