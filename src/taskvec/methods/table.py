"""The table: one weight for every task and tensor, the result of a method's `decide`.

A table can be printed, saved as CSV or JSON, edited by hand and given to any method that takes
layer weights.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from taskvec import documents
from taskvec.errors import UsageError, nearest
from taskvec.files import write_whole
from taskvec.layers import classify, model_order
from taskvec.methods.selection import Selection
from taskvec.tables import frame, html_table

Array = np.ndarray[Any, Any]
_LIMITS = replace(documents.MEASURED, names_files=False, non_finite=True)


@dataclass(frozen=True)
class Table:
    """Layer weights of K tasks for N tensors.

    Attributes:
        tasks: Task names, sorted.
        names: Tensor names, sorted.
        weights: w_t of each tensor, shape (K, N), float64; a merge multiplies them by λ_t.
        target: Factor of the target's own tensor, shape (N,), float64; None for 1 everywhere.
        digests: By role and tensor, the digests of the weights from which the table was computed;
            empty if no weights were read. A merge compares them with what it reads.
        warnings: What a user should know before relying on this table.
        origin: How it was made, in words for cards and manifests; empty for weights of 1.
        selection: Kept entries of each pure vector, and how tasks are combined; None: all entries
            are kept and tasks are added.
        is_final: Whether the table is used as it is, such as one from a manifest; if not, a method
            that sparsifies or combines uses it as layer weights.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    weights: Array
    target: Array | None = None
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    origin: str = "table"
    selection: Selection | None = None
    is_final: bool = False

    def of(self, task: str) -> dict[str, float]:
        """Weight by tensor name of one task."""
        return dict(zip(self.names, self.weights[self.tasks.index(task)].tolist(), strict=True))

    def used_by(self, method: str) -> str:
        """Origin of the table that a method makes of these layer weights."""
        return f"{method} of {self.origin}" if self.origin else method

    def __repr__(self) -> str:
        return f"<Table of {', '.join(self.tasks)}: {len(self.names)} tensors, {self.origin}>"

    def rows(self) -> list[dict[str, Any]]:
        """One row for each task and tensor."""
        return [
            {"task": task, "tensor": name, "weight": weight}
            for task in self.tasks
            for name, weight in self.of(task).items()
        ]

    def to_pandas(self) -> Any:
        """Weights as a DataFrame; one row for each task and tensor.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return frame(self.rows())

    def _repr_html_(self) -> str:
        return html_table(self.rows(), repr(self))

    def scale_adapter(self, model: Any, scale: float = 1.0, *, task: str | None = None) -> None:
        """Multiply the LoRA adapter of a loaded PEFT model by λ and the layer weights, in place.

        B of every layer becomes λ w_t B, so the adapter is λ τ'_t, also when it is saved.

        Args:
            model: A model with one active LoRA adapter.
            scale: λ.
            task: The task whose weights are used; optional if the table has one task.

        Raises:
            UsageError: the table has several tasks or no weight for a layer; the model has no LoRA
                adapter, or one that is not a sum of matrices (DoRA).
        """
        if task is None and len(self.tasks) > 1:
            raise UsageError(f"the table has tasks {', '.join(self.tasks)}; give task")
        if task is not None and task not in self.tasks:
            raise UsageError(f"unknown task {task!r}; {nearest(task, self.tasks)}")
        weights, todo = self.of(task or self.tasks[0]), []
        for path, module in model.named_modules():
            factors = {**getattr(module, "lora_B", {}), **getattr(module, "lora_embedding_B", {})}
            name = f"{path.removeprefix('base_model.model.')}.weight"
            for adapter in getattr(module, "active_adapters", ()) if factors else ():
                if getattr(module, "use_dora", {}).get(adapter):
                    raise UsageError(f"{path}: is a DoRA layer, which a weight cannot scale")
                if name not in weights:
                    raise UsageError(f"the table has no weight for {name!r}")
                factor = factors[adapter]
                todo.append((getattr(factor, "weight", factor), scale * weights[name]))
        if not todo:
            raise UsageError("the model has no active LoRA adapter; load one with PEFT first")
        for factor, share in todo:
            factor.data.mul_(share)

    def to_json(self) -> dict[str, Any]:
        """A JSON object: task → tensor → weight, and the target's factors if there are any."""
        out: dict[str, Any] = {"weights": {task: self.of(task) for task in self.tasks}}
        if self.target is not None:
            out["target"] = dict(zip(self.names, self.target.tolist(), strict=True))
        if self.selection is not None:
            out["selection"] = self.selection.to_json()
        return out

    def save(self, path: str | Path) -> None:
        """Write as CSV (`tensor`, one column per task), or as JSON if the name ends in `.json`."""
        path = Path(path)
        if path.suffix == ".json":
            write_whole(path, json.dumps(self.to_json(), indent=1).encode() + b"\n")
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [self.weights] if self.target is None else [self.weights, self.target[None]]
        writer.writerow(["tensor", *self.tasks, *(["(target)"] if self.target is not None else [])])
        rows = zip(self.names, np.concatenate(columns).T.tolist(), strict=True)
        for name, row in sorted(rows, key=lambda item: _place(item[0])):
            writer.writerow([name, *row])
        write_whole(path, text.getvalue().encode())


def _place(name: str) -> tuple[object, ...]:
    key = classify(name)
    return model_order(key.tower, key.block, key.module, name)


def table_from_json(data: object, where: str) -> Table:
    """The table that `Table.to_json` returned.

    Raises:
        UsageError: not such an object, tensors differ between tasks, or a weight is not finite.
    """
    from taskvec.methods.table_file import TableFile
    from taskvec.validation import read_as

    remedy = "expected weights by task and tensor, as Table.save writes them"
    file = read_as(TableFile, data, where, remedy, UsageError)
    columns = dict(file.weights) | ({"(target)": file.target} if file.target is not None else {})
    if not columns:
        raise UsageError(f"{where}: has no weights; {remedy}")
    table = _build(columns, where)
    selection = file.selection.to_selection() if file.selection is not None else None
    return replace(table, selection=selection)


def load_table(path: str | Path) -> Table:
    """A table from a CSV or JSON file.

    Raises:
        UsageError: the file cannot be read, or is not a table of finite numbers.
    """
    path = Path(path)
    if path.suffix == ".json":
        data = documents.read_json(path, _LIMITS, UsageError)
        return replace(table_from_json(data, str(path)), origin=f"table {path.name}")
    text = documents.read_text(path, _LIMITS, UsageError)
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise UsageError(f"{path}: is not CSV ({error})") from error
    if not rows or rows[0][:1] != ["tensor"] or len(rows[0]) < 2:
        raise UsageError(f"{path}: is not a table; the first line must be: tensor,TASK,…")
    header = rows[0][1:]
    columns: dict[str, dict[str, object]] = {task: {} for task in header}
    if len(columns) != len(header):
        raise UsageError(f"{path}: a task occurs twice in the first line")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise UsageError(f"{path}:{number}: {len(row)} fields, expected {len(rows[0])}")
        if row[0] in columns[header[0]]:
            raise UsageError(f"{path}:{number}: tensor {row[0]!r} occurs twice")
        for task, value in zip(header, row[1:], strict=True):
            columns[task][row[0]] = value
    return replace(_build(columns, str(path)), origin=f"table {path.name}")


def _build(columns: Mapping[str, Mapping[str, object]], where: str) -> Table:
    names = tuple(sorted(next(iter(columns.values()))))
    tasks = tuple(sorted(c for c in columns if c != "(target)"))
    for task, column in columns.items():
        if set(column) != set(names):
            name = min(set(column) ^ set(names))
            raise UsageError(
                f"{where}: tensor {name!r} has no weight for every task (see {task!r})"
            )
    values = {
        column: np.array([_number(columns[column][n], where, column, n) for n in names])
        for column in columns
    }
    weights = np.array([values[t] for t in tasks]).reshape(len(tasks), len(names))
    return Table(tasks, names, weights, values.get("(target)"))


def _number(value: object, where: str, task: str, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"{where}: weight of {task!r} for {name!r} must be a finite number; got {value!r}"
        )
    return number


def check_table(table: Table, tasks: tuple[str, ...], names: tuple[str, ...], where: str) -> None:
    """Raise `UsageError` if a table does not fit the tasks and tensors of a merge."""
    if set(table.tasks) != set(tasks):
        raise UsageError(
            f"{where}: has tasks {', '.join(table.tasks)}; the merge has {', '.join(tasks)}"
        )
    extra = sorted(set(table.names) - set(names))
    if extra:
        hint = nearest(extra[0], names)
        hint = f"; {hint}" if hint.startswith("did") else ""
        raise UsageError(f"{where}: tensor {extra[0]!r} is not merged here{hint}")
    missing = sorted(set(names) - set(table.names))
    if missing:
        raise UsageError(
            f"{where}: no weight for tensor {missing[0]!r} ({len(missing)} missing); "
            "give 0 to leave it unchanged"
        )
