"""Tasks: data, how a model runs over them, and which outputs count.

A task yields rows of logits, batch by batch, in the same order every time. A row is one answer of
the model: an example that is classified, or a position of a text whose next token is predicted.
What an expectation over a task's data is taken over is rows; what intervals are taken over is
examples, since the positions of one text are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from taskvec.checkpoints.memory import stored
from taskvec.errors import DataError, UsageError
from taskvec.extras import require

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class LogitRows:
    """Outputs of a model for one batch.

    Attributes:
        logits: Torch tensor, shape (rows, classes); or features, shape (rows, dimensions).
        labels: Correct class, int64, shape (rows,); None if unknown.
        examples: Number of the example that each row belongs to, int64, shape (rows,).
    """

    logits: Any
    labels: Array | None
    examples: Array


@dataclass(frozen=True, slots=True, eq=False)
class ModelTask:
    """A task's data and how a module runs over them.

    Attributes:
        name: For messages.
        run: Runs a module over all data, as it is: without gradients, in evaluation mode, on its
            device. The same rows in the same order at every call.
        identity: Changes with the data and with the head on the module.
        has_many_rows: Whether an example has several rows, such as the positions of a text.
        is_exact: Whether an example is correct only if all its rows are; if not, rows count.
    """

    name: str
    run: Callable[[Any], Iterator[LogitRows]]
    identity: str
    has_many_rows: bool = False
    is_exact: bool = False


def classification(
    name: str,
    batches: Iterable[Any],
    *,
    head: Callable[[Any], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> ModelTask:
    """A task of classification, or of features.

    Args:
        name: For messages.
        batches: The same each time that it is gone through (a list, or a loader that does not
            shuffle): pairs of inputs and labels, mappings with `labels` among the module's keyword
            arguments, or inputs alone. Labels are int64, shape (rows,).
        head: From what `forward` gives to logits; None: those are the logits, or the features that
            are compared.
        forward: From module and inputs to a tensor of shape (rows, …); default: the module is
            called, and of an output with `logits` those are taken. What a function does is not part
            of the task's identity: after changing one, keep results in another folder.

    Raises:
        DataError: batches are missing.
        UsageError: `batches` can be gone through only once.
    """
    if isinstance(batches, Iterator):
        raise UsageError(
            f"data of task {name!r} can be gone through only once; give a list or a loader"
        )
    forward = forward or _call
    expected = _digest(inputs for inputs in batches)
    if expected is None:
        raise DataError(f"data of task {name!r} are empty; give at least one example")

    def run(module: Any) -> Iterator[LogitRows]:
        first, seen = 0, xxhash.xxh3_128()
        place = next(module.parameters()).device
        for batch in batches:
            _update(seen, batch)
            inputs, labels = _parts(batch)
            logits = forward(module, _to_device(inputs, place))
            logits = logits if head is None else head(logits)
            _check(name, logits, labels)
            yield LogitRows(logits, labels, np.arange(first, first + len(logits)))
            first += len(logits)
        if seen.hexdigest() != expected:
            raise DataError(
                f"data of task {name!r} came otherwise than before, by content or in order; "
                "give a loader that neither shuffles nor changes what it loads"
            )

    return ModelTask(name, run, expected + _head_digest(head))


def _call(module: Any, inputs: Any) -> Any:
    out = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    return getattr(out, "logits", out)


def _parts(batch: Any) -> tuple[Any, Array | None]:
    """Inputs and labels of a batch."""
    if isinstance(batch, Mapping):
        rest = {key: value for key, value in batch.items() if key != "labels"}
        return rest, _labels(batch.get("labels"))
    if isinstance(batch, (tuple, list)):
        inputs, labels = batch
        return inputs, _labels(labels)
    return batch, None


def _labels(given: Any) -> Array | None:
    if given is None:
        return None
    return np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)


def _to_device(inputs: Any, place: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _to_device(value, place) for key, value in inputs.items()}
    return inputs.to(place) if hasattr(inputs, "to") else inputs


def _check(name: str, logits: Any, labels: Array | None) -> None:
    """Refuse outputs that are not rows of logits, one for each label."""
    if getattr(logits, "ndim", None) != 2:
        shape = list(getattr(logits, "shape", ()))
        raise UsageError(
            f"task {name!r}: the model must give logits of shape (rows, classes); got "
            f"{type(logits).__name__} of shape {shape}; give a head, or forward="
        )
    if labels is None:
        return
    if labels.shape != (len(logits),):
        raise DataError(
            f"task {name!r}: {list(labels.shape)} labels for {len(logits)} rows of logits"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise DataError(
            f"task {name!r}: labels must be in 0 to {logits.shape[1] - 1}, as there are "
            f"{logits.shape[1]} logits; got {labels.min()} to {labels.max()}"
        )


def _digest(batches: Iterable[Any]) -> str | None:
    """Digest of all batches; None without batches."""
    seen, count = xxhash.xxh3_128(), 0
    for batch in batches:
        _update(seen, batch)
        count += 1
    return seen.hexdigest() if count else None


def _update(seen: Any, value: Any) -> None:
    """Feed a digest with arrays, tensors and what holds them."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            seen.update(str(key).encode())
            _update(seen, value[key])
    elif isinstance(value, (tuple, list)):
        for each in value:
            _update(seen, each)
    elif hasattr(value, "detach"):
        seen.update(np.ascontiguousarray(stored(value.detach().cpu())))
    elif isinstance(value, np.ndarray):
        seen.update(np.ascontiguousarray(value))
    else:
        seen.update(repr(value).encode())


def _head_digest(head: Any) -> str:
    """Digest of a head's weights; a function without weights has none."""
    if head is None or not hasattr(head, "state_dict"):
        return ""
    seen = xxhash.xxh3_128()
    _update(seen, dict(head.state_dict()))
    return str(seen.hexdigest())


def rows_of(task: ModelTask, module: Any) -> Iterator[LogitRows]:
    """The rows of a task, without gradients; the caller may stop at any row."""
    torch = require("torch", "train")
    rows = iter(task.run(module))
    while True:
        # Not around a yield: gradients would stay off where rows are not taken to the end.
        with torch.no_grad():
            each = next(rows, None)
        if each is None:
            return
        yield each


def by_example(task: ModelTask, right: Array, examples: Array) -> tuple[Array, Array]:
    """Number of correct rows of each example, and number of rows; both float64, shape (examples,).

    Of an exact task, whether all are, of one.

    Args:
        task: Which.
        right: Whether each row is right, shape (rows,).
        examples: Number of each row's example.
    """
    above, below = np.bincount(examples, right), np.bincount(examples).astype(np.float64)
    return (
        ((above == below).astype(np.float64), np.ones(len(above)))
        if task.is_exact
        else (above, below)
    )
