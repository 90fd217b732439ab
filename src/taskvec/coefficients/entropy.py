"""Coefficients that make predictions sure of themselves, from inputs without labels.

    min_λ  mean over sources s of  mean_{x ∈ batch of s} H(softmax h_s(f(x; θ(λ))))
    θ^l(λ) = θ_target^l + Σ_t λ_t^l τ_t^l        H(p) = −Σ_c p_c ln p_c   (nats)

by Adam, λ projected onto [low, high] after each step. One λ for each task (task-wise) or for each
task and layer (layer-wise). A source is a stream of inputs with the head h_s that turns the model's
output into logits.

The gradient needs no graph through the sum: ∂H/∂λ_t^l = ⟨∂H/∂θ^l, τ_t^l⟩. It is taken tensor by
tensor as the backward pass reaches it, and the gradient of that tensor is dropped at once. In
memory are the module, the merged parameters, the vectors, and one gradient of one tensor besides
what the passes need.

Low entropy is a stand-in for low loss, not a measure of it: a model that is sure of one class
everything that it sees has none. Look at the scores of the result.

Source: AdaMerging, arXiv:2310.02575, section 3.2; Adam at 0.001 from λ = 0.3 is the paper's. That λ
is held in [0, 1] by projection, and that sources count alike, is this project's reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from taskvec.checkpoints.source import widened
from taskvec.checkpoints.views import size
from taskvec.errors import TaskvecError, UsageError, nearest
from taskvec.extras import require
from taskvec.family.members import open_members
from taskvec.layers import GRANULARITIES, classify
from taskvec.methods.table import Table
from taskvec.outputs.candidates import candidates
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family, Recipe
from taskvec.running.model import preserve_modes

Array = np.ndarray[Any, Any]

MODEL = "model"
Vectors = Mapping[str, Mapping[str, Any]]  # τ of each task by tensor name
Head = Callable[[Any], Any]  # output of the module to logits, classes last


@dataclass(frozen=True, slots=True)
class Descent:
    """How λ is found.

    Attributes:
        granularity: What one λ of a task belongs to: the whole `model`, or a `tensor`, `module` or
            `block`.
        start: λ at the beginning.
        steps: How often λ is changed; each step takes the next batch of every source.
        rate: Learning rate of Adam.
        low: Smallest λ.
        high: Largest λ.
    """

    granularity: str = MODEL
    start: float = 0.3
    steps: int = 500
    rate: float = 1e-3
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        known = (MODEL, *GRANULARITIES)
        if self.granularity not in known:
            raise UsageError(
                f"granularity must be in {' | '.join(known)}; got {self.granularity!r}"
            )
        if not self.low <= self.start <= self.high or not self.low < self.high:
            raise UsageError(
                f"start must be in [low, high], and low below high; got start {self.start:g} in "
                f"[{self.low:g}, {self.high:g}]"
            )
        if self.steps < 1 or not self.rate > 0:
            raise UsageError(
                f"steps must be 1 or more and rate above 0; got {self.steps} and {self.rate:g}"
            )


@dataclass(frozen=True, slots=True)
class Minimized:
    """Coefficients of low entropy.

    Attributes:
        scale: λ by task; 1 for each where `table` has them.
        table: λ by task and tensor, as `merge` takes layer weights; None if each task has one λ.
        entropy: Mean entropy of the batches before each step, nats.
        warnings: What a user should know before relying on them.
    """

    scale: Mapping[str, float]
    table: Table | None
    entropy: tuple[float, ...]
    warnings: tuple[str, ...]


def minimize_entropy(
    module: Any,
    vectors: Vectors | Family,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    heads: Head | Mapping[str, Head] | None = None,
    descent: Descent = Descent(),
) -> Minimized:
    """Find λ without labels. The module is left as it was.

    Args:
        module: A `torch.nn.Module` with the target's weights; it is run in evaluation mode.
        vectors: τ by task and tensor name, tensors of torch on any device; or a family, of which
            the module must be the target.
        batches: Inputs, gone through again and again; or several such by source. An input is a
            tensor, a tuple of arguments, or a mapping of keyword arguments.
        heads: What gives logits, shape (…, classes), from the module's output; one by source where
            batches have several; None: the output itself.
        descent: How.

    Raises:
        UsageError: vectors, batches or heads do not fit the module or each other.
        TaskvecError: the entropy is not finite.
    """
    torch = require("torch", "search")
    with ExitStack() as stack:
        if isinstance(vectors, Family):
            stack.enter_context(candidates(_untouched(vectors), module))  # it is the target
            vectors = vectors_of(vectors)
        stack.enter_context(preserve_modes(module))
        module.eval()
        streams, by_source = _sources(batches, heads)
        own = _own_names(module, vectors)
        tasks = sorted(vectors)
        mine = {task: {own[name]: tau for name, tau in vectors[task].items()} for task in tasks}
        layer = _layers(sorted(own.values()), descent.granularity)
        scales = torch.full(
            (len(tasks), max(layer.values()) + 1), descent.start, dtype=torch.float64
        ).requires_grad_()
        adam = torch.optim.Adam([scales], lr=descent.rate)
        found = []
        for _ in range(descent.steps):
            inputs = {source: next(stream) for source, stream in streams.items()}
            rows = scales.detach().numpy()
            now = {task: {n: rows[i, layer[n]] for n in layer} for i, task in enumerate(tasks)}
            value, slopes = entropy_and_slopes(module, mine, now, inputs, by_source)
            found.append(value)
            scales.grad = torch.zeros_like(scales)
            for i, task in enumerate(tasks):
                for name, slope in slopes[task].items():
                    scales.grad[i, layer[name]] += slope
            adam.step()
            with torch.no_grad():
                scales.clamp_(descent.low, descent.high)
    return _minimized(scales.detach().numpy(), tasks, own, layer, descent, tuple(found))


def entropy_and_slopes(
    module: Any,
    vectors: Vectors,
    scales: Mapping[str, Mapping[str, float]],
    inputs: Mapping[str, Any],
    heads: Mapping[str, Head],
) -> tuple[float, dict[str, dict[str, float]]]:
    """Mean entropy of the merged model's predictions, and its slope along every τ_t^l.

    Args:
        module: With the target's weights.
        vectors: τ by task and by the module's own name of a parameter or buffer.
        scales: λ, by task or layer as well.
        inputs: One batch by source.
        heads: By source.

    Returns:
        The mean over the sources of the mean over their predictions, nats; and ∂/∂λ_t^l by task and
        name. What the output does not depend on, and buffers, have none.

    Raises:
        TaskvecError: the entropy is not finite.
    """
    torch = require("torch", "search")
    slopes: dict[str, dict[str, float]] = {task: {} for task in vectors}

    def take(name: str, leaf: Any) -> None:
        for task, mine in vectors.items():
            if name in mine:
                tau = mine[name].to(leaf.device, leaf.dtype)
                slope = float((leaf.grad * tau).sum(dtype=torch.float64))
                slopes[task][name] = slopes[task].get(name, 0.0) + slope
        leaf.grad = None

    merged, leaves = {}, []
    parameters = dict(module.named_parameters())
    for name, whole in {**parameters, **dict(module.named_buffers())}.items():
        if any(name in mine for mine in vectors.values()):
            merged[name] = _merged(torch, name, whole.detach(), vectors, scales)
            if name in parameters:
                leaf = merged[name].requires_grad_()
                leaf.register_post_accumulate_grad_hook(partial(take, name))
                leaves.append(leaf)
    total = 0.0
    for source, batch in inputs.items():
        args, keywords = _arguments(batch)
        output = torch.func.functional_call(module, merged, args, keywords)
        entropy = mean_entropy(heads[source](output)) / len(inputs)
        if not torch.isfinite(entropy):
            raise TaskvecError(
                f"the entropy of source {source!r} is {entropy.item()}: inputs, weights or the "
                "range of λ are not sound"
            )
        entropy.backward(inputs=leaves)
        total += entropy.item()
    return total, slopes


def _merged(
    torch: Any, name: str, whole: Any, vectors: Vectors, scales: Mapping[str, Mapping[str, float]]
) -> Any:
    """θ^l + Σ_t λ_t^l τ_t^l, worked out in float32 or wider, in the dtype of θ^l."""
    total = whole.to(torch.promote_types(whole.dtype, torch.float32), copy=True)
    for task, mine in vectors.items():
        if name in mine:
            total.add_(mine[name].to(total.device, total.dtype), alpha=scales[task][name])
    return total.to(whole.dtype)


def mean_entropy(logits: Any) -> Any:
    """Mean Shannon entropy of predictions, nats; a tensor of torch without dimensions.

    Args:
        logits: shape (…, classes).
    """
    torch = require("torch", "search")
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def vectors_of(family: Family) -> dict[str, dict[str, Any]]:
    """The task vectors of a family, in memory: τ by task and tensor name, float32 or float64.

    A tensor that a task leaves as it is has none.
    """
    torch = require("torch", "search")
    members = open_members(family, needs_base=False, needs_anchor=True)
    found: dict[str, dict[str, Any]] = {}
    for task in members.tasks:
        found[task] = {}
        for name in members.merged:
            views = members.views(name, ("anchor", f"task:{task}"))
            theirs = views.get(f"task:{task}")
            if theirs is None:
                continue
            tau = widened(theirs.read(0, size(theirs)), theirs.dtype)
            if not theirs.is_difference:
                start = views["anchor"]
                tau = tau - widened(start.read(0, size(start)), start.dtype)
            found[task][name] = torch.from_numpy(np.array(tau)).reshape(theirs.shape)
    return found


def _untouched(family: Family) -> Recipe:
    return as_recipe(family, {"method": "task_arithmetic", "scale": 0.0})


def _sources(
    batches: Iterable[Any] | Mapping[str, Iterable[Any]], heads: Head | Mapping[str, Head] | None
) -> tuple[dict[str, Iterator[Any]], dict[str, Head]]:
    """Endless batches and the head, by source."""
    by_source = dict(batches) if isinstance(batches, Mapping) else {"inputs": batches}
    if isinstance(heads, Mapping):
        if heads.keys() != by_source.keys():
            raise UsageError(
                f"heads must be given for the sources of the batches, {', '.join(by_source)}; got "
                f"{', '.join(heads)}"
            )
        chosen = dict(heads)
    else:
        chosen = dict.fromkeys(by_source, _logits if heads is None else heads)
    return {source: _endless(source, each) for source, each in by_source.items()}, chosen


def _endless(source: str, batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007 (told below)
            yield batch
        if not count:
            raise UsageError(
                f"the batches of {source!r} are at their end; give a list or a DataLoader, which "
                "can be gone through again"
            )


def _logits(output: Any) -> Any:
    """The output itself, or its logits where it is that of a transformers model."""
    return getattr(output, "logits", output)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch is given to the module."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {}


def _own_names(module: Any, vectors: Vectors) -> dict[str, str]:
    """Names in the vectors, and what the module itself calls them; they differ where tied."""
    if not any(vectors.values()):
        raise UsageError("vectors name no tensor; there is nothing to weigh")
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    first = {id(tensor): name for name, tensor in named.items()}
    every = {**module.state_dict(keep_vars=True), **named}
    own = {}
    for task, mine in vectors.items():
        for name, tau in mine.items():
            if name not in every:
                hint = nearest(name, list(every))
                raise UsageError(f"the module has no tensor {name!r} of task {task!r}; {hint}")
            if tau.shape != every[name].shape:
                raise UsageError(
                    f"tensor {name!r} of task {task!r} has shape {tuple(tau.shape)}; the module "
                    f"has {tuple(every[name].shape)}"
                )
            own[name] = first[id(every[name])]
    return own


def _layers(names: Sequence[str], granularity: str) -> dict[str, int]:
    """Which λ each tensor has, counted from 0."""
    if granularity == MODEL:
        return dict.fromkeys(names, 0)
    index: dict[str, int] = {}
    return {
        name: index.setdefault(classify(name).at(granularity, name), len(index)) for name in names
    }


def _minimized(
    scales: Array,
    tasks: list[str],
    own: Mapping[str, str],
    layer: Mapping[str, int],
    descent: Descent,
    entropy: tuple[float, ...],
) -> Minimized:
    warnings = []
    for task, row in zip(tasks, scales, strict=True):
        for bound in (descent.low, descent.high):
            if count := int((row == bound).sum()):
                warnings.append(
                    f"λ of {task!r} ended at {bound:g}, a bound of its range, in {count} of "
                    f"{len(row)} layers: less entropy may lie beyond, or nothing but sureness"
                )
    if descent.granularity == MODEL:
        return Minimized(
            {task: float(row[0]) for task, row in zip(tasks, scales, strict=True)},
            None,
            entropy,
            tuple(warnings),
        )
    names = tuple(sorted(own))
    weights = scales[:, [layer[own[name]] for name in names]]
    table = Table(tuple(tasks), names, weights, origin=f"entropy by {descent.granularity}")
    return Minimized(dict.fromkeys(tasks, 1.0), table, entropy, tuple(warnings))
