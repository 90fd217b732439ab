"""Coefficients that make predictions sure of themselves, from inputs without labels.

    min_λ  mean over sources s of  mean_{x ∈ batch of s} H(softmax h_s(f(x; θ(λ))))
    θ^l(λ) = θ_target^l + Σ_t λ_t^l τ_t^l        H(p) = −Σ_c p_c ln p_c   (nats)

One λ for each task (task-wise) or for each task and layer (layer-wise). A source is a stream of
inputs with the head h_s that turns the module's output into logits. This is `fit` with the
objective `entropy`, for any module of torch: the same descent, in streams instead of prompts, so
that nothing is held out and the last step is taken.

Low entropy is a stand-in for low loss, not a measure of it: a model that is sure of one class
for any input has none. Look at the scores of the result.

Source: AdaMerging, arXiv:2310.02575, section 3.2; Adam at 0.001 from λ = 0.3 is the paper's. That λ
is held in [0, 1] by projection, and that sources count alike, is this project's reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskvec.coefficients.fit import losses
from taskvec.coefficients.fit.descent import Descended, Layers, descend
from taskvec.coefficients.fit.directions import (
    Pack,
    check_is_target,
    live_names,
    open_directions,
)
from taskvec.coefficients.fit.settings import MODEL, Descent, layer_of
from taskvec.coefficients.fit.steering import Steered
from taskvec.errors import UsageError, nearest
from taskvec.extras import require
from taskvec.layers import classify
from taskvec.methods.table import Table
from taskvec.recipes.recipe import Family

Array = np.ndarray[Any, Any]

Vectors = Mapping[str, Mapping[str, Any]]  # τ of each task by tensor name
Head = Callable[[Any], Any]  # output of the module to logits, classes last
ADAMERGING = Descent(MODEL, steps=500, rate=1e-3, low=0.0, high=1.0)


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
    start: float = 0.3,
    descent: Descent = ADAMERGING,
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
        start: λ at the beginning.
        descent: How it goes on.

    Raises:
        UsageError: vectors, batches or heads do not fit the module or each other.
        TaskvecError: the entropy is not finite at the start.
    """
    descent.check_start(start, start)
    streams, by_source = _sources(batches, heads)
    if isinstance(vectors, Family):
        directions = open_directions(vectors)
        own = live_names(directions, module)
        check_is_target(directions, module, own)
        tasks, own = list(directions.tasks), {name: own[name] for name in directions.names}
        packs = directions.packs(own, module)
    else:
        tasks, own = sorted(vectors), _own_names(module, vectors)
        packs = _packs(module, vectors, tasks, own)
    steered = Steered(module, packs, len(tasks))
    layer = _layers(sorted(packs), descent.granularity)
    columns = max(layer.values()) + 1
    layers = Layers(layer, np.ones((len(tasks), columns), bool))

    def entropy(step: int) -> float:
        each = []
        for source, stream in streams.items():
            args, keywords = _arguments(next(stream))
            each.append(mean_entropy(by_source[source](module(*args, **keywords))))
        total = sum(each[1:], each[0]) / len(each)
        total.backward()
        return float(total.detach())

    with ExitStack() as stack:
        stack.callback(steered.restore)
        stack.enter_context(steered.steering())
        begin = np.full((len(tasks), columns), start)
        found = descend(steered, layers, begin, entropy, descent)
    return _result(found, tasks, own, layer, descent)


def mean_entropy(logits: Any) -> Any:
    """Mean Shannon entropy of predictions, nats; a tensor of torch without dimensions.

    Args:
        logits: shape (…, classes).
    """
    return losses.entropy(logits).mean()


def _packs(
    module: Any, vectors: Vectors, tasks: list[str], own: Mapping[str, str]
) -> dict[str, Pack]:
    """Vectors in memory, by own name; of tied tensors the first."""
    torch = require("torch", "search")
    live = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    packs: dict[str, Pack] = {}
    for name, mine in own.items():
        if mine in packs:
            continue
        rows = tuple(i for i, task in enumerate(tasks) if name in vectors[task])
        whole = live[mine].detach()
        wide = torch.promote_types(whole.dtype, torch.float32)
        before = whole.reshape(-1).clone()
        taus = [vectors[tasks[i]][name].reshape(-1) for i in rows]
        packs[mine] = Pack(rows, before.numel(), _reader(before, whole, wide),
                           _readers(taus, whole, wide))  # fmt: skip
    return packs


def _reader(flat: Any, like: Any, wide: Any) -> Callable[[int, int], Any]:
    return lambda start, stop: flat[start:stop].to(like.device, wide)


def _readers(taus: list[Any], like: Any, wide: Any) -> Callable[[int, int], list[Any]]:
    return lambda start, stop: [tau[start:stop].to(like.device, wide) for tau in taus]


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
        for count, batch in enumerate(batches, start=1):  # noqa: B007 (looked at below)
            yield batch
        if not count:
            raise UsageError(
                f"the batches of {source!r} ended; give a list or a DataLoader, which can be gone "
                "through again"
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
        raise UsageError("vectors have no tensor; give at least one task vector")
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


def _layers(names: list[str], granularity: str) -> dict[str, int]:
    """Which λ each tensor has, counted from 0."""
    index: dict[str, int] = {}
    return {
        name: index.setdefault(layer_of(classify(name), name, granularity), len(index))
        for name in names
    }


def _result(
    found: Descended,
    tasks: list[str],
    own: Mapping[str, str],
    layer: Mapping[str, int],
    descent: Descent,
) -> Minimized:
    scales, entropy, warnings = found.last, tuple(found.losses), list(found.warnings)
    for task, row in zip(tasks, scales, strict=True):
        for bound in (descent.low, descent.high):
            if count := int((row == bound).sum()):
                warnings.append(
                    f"λ of {task!r} ended at {bound:g}, a bound of its range, in {count} of "
                    f"{len(row)} layers: less entropy may lie beyond, or nothing but sureness"
                )
    if descent.granularity == MODEL:
        scale = {task: float(row[0]) for task, row in zip(tasks, scales, strict=True)}
        return Minimized(scale, None, entropy, tuple(warnings))
    names = tuple(sorted(own))
    weights = scales[:, [layer[own[name]] for name in names]]
    table = Table(tuple(tasks), names, weights, origin=f"entropy by {descent.granularity}")
    return Minimized(dict.fromkeys(tasks, 1.0), table, entropy, tuple(warnings))
