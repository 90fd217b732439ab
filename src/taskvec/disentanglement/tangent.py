"""Departure of a model from its tangent, along task vectors and parts of them.

With f_lin(x; θ0 + α τ) = f(x; θ0) + α J(x; θ0) τ, the departure from linearity on a task's data is

    ‖f(θ0 + α τ) − f_lin(θ0 + α τ)‖ / ‖f(θ0 + α τ) − f(θ0)‖

with norms over all rows and classes. It is 0 where the model is linear along τ (kernel behaviour),
and near 1 if the tangent hardly predicts the change of the output. τ is taken whole, or restricted
to the tensors of one part of the model, such as its attention modules: then all other weights stay
at θ0. A head on top of the module is applied to the linearised outputs, as it is.

Source of the linearisation: arXiv:2305.12827, equation 4; that attention modules show kernel
behaviour: arXiv:2407.07089, section 4. The ratio is this project's measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from taskvec.disentanglement.error import check_tasks, coefficients
from taskvec.disentanglement.records import key_of, open_records
from taskvec.disentanglement.tasks import ModelTask, by_example, rows_of
from taskvec.disentanglement.weights import Points, points
from taskvec.errors import UsageError
from taskvec.evaluation.intervals import Bootstrap, Figure, percentiles, ratio
from taskvec.extras import require
from taskvec.journal import finite
from taskvec.layers import MODULES
from taskvec.recipes.recipe import Model
from taskvec.streaming import Progress, silent

if TYPE_CHECKING:
    from taskvec.training.linearised import Linearised

Array = np.ndarray[Any, Any]
Vector = Mapping[str, Any]  # tensors by name

PARTS = ("whole", "module", "block")
WHOLE = "whole"
VERSION = 1  # of stored measurements; other versions are measured again


@dataclass(frozen=True, slots=True)
class Departure:
    """Departure from linearity at one coefficient.

    Attributes:
        task: Whose vector and data.
        part: `whole`, or the part of the model that the vector is restricted to.
        share: Of ‖τ‖² of the whole vector that the part has.
        alpha: α.
        departure: ‖f − f_lin‖ / ‖f − f0‖.
        change: Root mean square over rows of ‖f − f0‖.
        accuracy: Of f on the task's labels; None where they are not known.
        linear_accuracy: Of f_lin; see above.
        agreement: Share of rows in which both have the same most likely class.
    """

    task: str
    part: str
    share: float
    alpha: float
    departure: Figure
    change: float
    accuracy: Figure | None
    linear_accuracy: Figure | None
    agreement: Figure

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is not finite is None."""
        data: dict[str, Any] = {n: getattr(self, n) for n in ("task", "part", "share", "alpha")}
        data |= {"change": self.change}
        for name in ("departure", "accuracy", "linear_accuracy", "agreement"):
            figure = getattr(self, name)
            data[name] = None if figure is None else figure.to_json()
        return dict(finite(data))


def linearity(
    module: Any,
    vectors: Mapping[str, Model],
    tasks: Mapping[str, ModelTask],
    *,
    alphas: Sequence[float] = coefficients(8, 0.25, 2.0),
    parts: str = "module",
    out: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Departure]:
    """Measure how far a model is from its tangent along each task vector.

    Args:
        module: The pre-trained model, θ0, which is the same bit for bit afterwards.
        vectors: Task vectors by name; see `disentanglement_error`.
        tasks: Data by task; each vector is measured on its own.
        alphas: Coefficients, not 0, where there is nothing to measure.
        parts: What τ is restricted to beside `whole`: `module` (attention, MLP, norms … of all
            blocks together, by the layer table), `block` (each block), or nothing.
        out: Folder for measurements as they are made; the same call resumes from it.
        seed: Of intervals.
        progress: Told the measurements done.

    Returns:
        By task, part and coefficient. Parts in which a vector changes nothing are left out.

    Raises:
        UsageError: the arguments are contradictory or incomplete, or the module does what has no
            derivative in forward mode.
        TaskvecError: anything else foreseen; the module is what it was.
    """
    check_tasks(vectors, tasks)
    if parts not in PARTS:
        raise UsageError(f"parts must be in {' | '.join(PARTS)}; got {parts!r}")
    if not len(alphas) or not all(np.isfinite(alpha) and alpha != 0 for alpha in alphas):
        raise UsageError(f"alphas must be finite numbers other than 0; got {list(alphas)}")
    with points(module, vectors) as space:
        key = key_of([VERSION, space.identity(), {t: tasks[t].identity for t in tasks}, seed])
        records = open_records(None if out is None else Path(out), "linearity", key)
        todo = []
        for task in vectors:
            tau = space.vector(task)
            whole = _square(tau)
            for part, names in _parts(space, parts).items():
                own = {name: tau[name] for name in names if name in tau}
                if own:
                    todo += [(task, part, _square(own) / whole, float(a), own) for a in alphas]
        with progress("linearity", len(todo)) as advance:
            for task, part, _, alpha, own in todo:
                name = f"{task!r} {part!r} {alpha!r}"
                if name not in records.known:
                    records.add(name, _measure(module, tasks[task], own, alpha, seed))
                advance(1)
    return [
        _departure(task, part, share, alpha, records.known[f"{task!r} {part!r} {alpha!r}"])
        for task, part, share, alpha, _ in todo
    ]


def linearised(
    module: Any, vectors: Mapping[str, Model]
) -> tuple[Linearised, dict[str, dict[str, Any]]]:
    """A model's tangent at θ0, and task vectors as fine-tunes of it, for every function here.

    Args:
        module: θ0; it is held, stays in evaluation mode and asks for no gradients afterwards.
        vectors: Task vectors by name; see `disentanglement_error`.

    Returns:
        The linearised module, at θ0; a state dict of it at τ, by task.
    """
    from taskvec.training.linearised import Linearised

    with points(module, vectors) as space:
        taus = {task: space.vector(task) for task in vectors}
    order = {name: None for name, _ in module.named_parameters()}
    names = [name for name in order if any(name in tau for tau in taus.values())]
    tangent = Linearised(module, names)
    states = {}
    for task, tau in taus.items():
        tangent.put(tau)
        states[task] = {
            name: value.clone() if name.startswith("tau.") else value
            for name, value in tangent.state_dict().items()
        }
    tangent.put({})
    return tangent, states


def _parts(space: Points, parts: str) -> dict[str, list[str]]:
    """Names of the tensors of each part."""
    keys = space.bench.prepared.members.keys
    names = list(space.bench.prepared.members.merged)
    found: dict[tuple[int, str], list[str]] = {}
    for name in names:
        key = keys[name]
        if parts == "module":
            found.setdefault((MODULES.index(key.module), key.module), []).append(name)
        elif parts == "block" and key.block is not None:
            found.setdefault((key.block, key.at("block", name)), []).append(name)
    return {WHOLE: names} | {part: found[order, part] for order, part in sorted(found)}


def _square(vector: Vector) -> float:
    return float(sum(value.double().square().sum() for value in vector.values()))


def _measure(
    module: Any, task: ModelTask, vector: Vector, alpha: float, seed: int
) -> dict[str, Any]:
    """One measurement, as it is stored."""
    off, moves, own, tangents, same, examples = [], [], [], [], [], []
    for start, tangent, there in _together(module, task, vector, alpha):
        f0, linear, f = (rows.logits.double() for rows in (start, tangent, there))
        off.append((f - linear).square().sum(-1).cpu().numpy())
        moves.append((f - f0).square().sum(-1).cpu().numpy())
        same.append((f.argmax(-1) == linear.argmax(-1)).cpu().numpy())
        if there.labels is not None:
            own.append(f.argmax(-1).cpu().numpy() == there.labels)
            tangents.append(linear.argmax(-1).cpu().numpy() == there.labels)
        examples.append(there.examples)
    places = np.concatenate(examples)
    above, below = (np.bincount(places, np.concatenate(each)) for each in (off, moves))
    bootstrap = Bootstrap(len(above), seed)
    spread = percentiles(np.sqrt(bootstrap.ratios(above, below)))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(np.sqrt(np.divide(above.sum(), below.sum())))

    def share(right: Sequence[Array]) -> tuple[float, ...]:
        counts = by_example(task, np.concatenate(right), places)
        return astuple(ratio(*counts, None if (counts[1] == 1).all() else bootstrap))

    return {
        "departure": astuple(Figure(value, *spread, len(above))),
        "change": float(np.sqrt(below.sum() / len(places))),
        "accuracy": share(own) if own else None,
        "linear_accuracy": share(tangents) if own else None,
        "agreement": share(same),
    }


def _together(
    module: Any, task: ModelTask, vector: Vector, alpha: float
) -> Iterator[tuple[Any, Any, Any]]:
    """Rows of f(θ0), of f_lin(θ0 + α τ) and of f(θ0 + α τ), batch by batch."""
    from taskvec.training.linearised import call_at, derivative

    pytree = require("torch.utils._pytree", "train")
    scaled = {name: alpha * value for name, value in vector.items()}

    def linear(*args: Any, **kwargs: Any) -> Any:
        value, change = derivative(module, scaled, *args, **kwargs)
        return pytree.tree_map(_sum, value, change)

    def there(*args: Any, **kwargs: Any) -> Any:
        return call_at(module, scaled, *args, **kwargs)

    runs = (module, _instead(module, linear), _instead(module, there))
    return zip(*(rows_of(task, each) for each in runs), strict=True)


def _sum(value: Any, change: Any) -> Any:
    is_float = hasattr(value, "is_floating_point") and value.is_floating_point()
    return value + change if is_float else value


def _instead(module: Any, function: Callable[..., Any]) -> Any:
    """A module that calls a function, and is otherwise like another module."""
    nn = require("torch.nn", "train")

    class Instead(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.config = getattr(module, "config", None)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    return Instead()


def _departure(
    task: str, part: str, share: float, alpha: float, data: Mapping[str, Any]
) -> Departure:
    figures = {
        name: None if data[name] is None else Figure(*data[name])
        for name in ("accuracy", "linear_accuracy")
    }
    return Departure(
        task=task,
        part=part,
        share=share,
        alpha=alpha,
        departure=Figure(*data["departure"]),
        change=data["change"],
        **figures,
        agreement=Figure(*data["agreement"]),
    )
