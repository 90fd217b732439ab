"""A module that is put to θ(w), and the slopes of a loss along task vectors.

The gradient needs no graph through the sum: ∂L/∂w_{t,l} = ⟨∂L/∂θ_l, τ_{t,l}⟩. It is taken tensor by
tensor as the backward pass reaches it, and the gradient of that tensor is dropped at once. Weights
are always worked out from the target's, in float32 or wider, and rounded once: nothing adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from taskvec.coefficients.fit.directions import CHUNK, Pack
from taskvec.extras import require
from taskvec.running.model import preserve_modes

Array = np.ndarray[Any, Any]


class Steered:
    """A module with its task vectors.

    Attributes:
        module: Of torch.
        slopes: ⟨∂L/∂θ_l, τ_{t,l}⟩ of the backward passes since the last `put`, by own name; shape
            (tasks,), float64.
    """

    def __init__(self, module: Any, packs: Mapping[str, Pack], tasks: int) -> None:
        self.module = module
        self.tasks = tasks
        self._packs = packs
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        self._live = {name: parameters.get(name, buffers.get(name)) for name in packs}
        self._hooked = {name: parameters[name] for name in packs if name in parameters}
        self.slopes: dict[str, Array] = {}
        self._buffers: dict[Any, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Own names of the tensors with task vectors."""
        return tuple(self._packs)

    def put(self, weights: Mapping[str, Array]) -> None:
        """Put the module to θ(w).

        Args:
            weights: By own name; shape (tasks,).
        """
        torch = require("torch", "eval")
        self.slopes = {name: np.zeros(self.tasks) for name in self._packs}
        with torch.no_grad():
            for name, pack in self._packs.items():
                mine = weights[name].tolist()
                flat = _flat(self._live[name])
                for start, stop in _chunks(pack.size):
                    base, taus = pack.base(start, stop), pack.taus(start, stop)
                    part = flat[start:stop]
                    wide = _wider(torch, part, base, *taus)
                    total = part if part.dtype == wide else self._buffer("sum", part, wide)
                    total.copy_(base)
                    for row, tau in zip(pack.rows, taus, strict=True):
                        total.add_(self._as(wide, tau, "tau"), alpha=mine[row])
                    if total is not part:
                        part.copy_(total)
                _write_back(self._live[name], flat)

    def restore(self) -> None:
        """Put the module to the target's own weights, bit for bit."""
        torch = require("torch", "eval")
        with torch.no_grad():
            for name, pack in self._packs.items():
                flat = _flat(self._live[name])
                for start, stop in _chunks(pack.size):
                    flat[start:stop].copy_(pack.base(start, stop))
                _write_back(self._live[name], flat)

    def load(self, member: Callable[[str], Any], names: Mapping[str, str]) -> None:
        """Put the module to a member's own weights.

        Args:
            member: From a tensor's name to its elements; None where it has none.
            names: Own names by name.
        """
        torch = require("torch", "eval")
        live = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        with torch.no_grad():
            for name, own in names.items():
                read = member(name)
                if read is None:
                    continue
                flat = _flat(live[own])
                for start, stop in _chunks(flat.numel()):
                    flat[start:stop].copy_(read(start, stop))
                _write_back(live[own], flat)

    def _take(self, name: str, parameter: Any) -> None:
        """What a parameter's gradient says; it is dropped."""
        torch = require("torch", "eval")
        gradient = parameter.grad.view(-1) if parameter.grad.is_contiguous() else None
        gradient = parameter.grad.reshape(-1) if gradient is None else gradient
        parameter.grad = None
        pack, slopes = self._packs[name], self.slopes[name]
        with torch.no_grad():
            for start, stop in _chunks(pack.size):
                part, taus = gradient[start:stop], pack.taus(start, stop)
                wide = _wider(torch, part, *taus)
                part = self._as(wide, part, "gradient")
                for row, tau in zip(pack.rows, taus, strict=True):
                    slopes[row] += torch.dot(part, self._as(wide, tau, "tau")).item()

    def _as(self, wide: Any, part: Any, use: str) -> Any:
        """Elements in a wider type, in a buffer that the next of this use takes."""
        return part if part.dtype == wide else self._buffer(use, part, wide).copy_(part)

    def _buffer(self, use: str, like: Any, dtype: Any) -> Any:
        torch = require("torch", "eval")
        key = use, dtype, like.device
        if key not in self._buffers:
            self._buffers[key] = torch.empty(CHUNK, dtype=dtype, device=like.device)
        return self._buffers[key][: len(like)]

    @contextmanager
    def steering(self) -> Iterator[None]:
        """Evaluation mode, with hooks on what has a task vector and no gradient of anything else.

        Modes and gradients are as before at the end; weights are those that were put last.
        """
        required = {name: p.requires_grad for name, p in self.module.named_parameters()}
        hooks = []
        with preserve_modes(self.module):
            self.module.eval()
            try:
                for name, parameter in self.module.named_parameters():
                    parameter.requires_grad_(name in self._hooked)
                for name, parameter in self._hooked.items():
                    take = partial(self._take, name)
                    hooks.append(parameter.register_post_accumulate_grad_hook(take))
                yield
            finally:
                for hook in hooks:
                    hook.remove()
                for name, parameter in self.module.named_parameters():
                    parameter.requires_grad_(required[name])
                    parameter.grad = None


def _wider(torch: Any, *parts: Any) -> Any:
    """The type that arithmetic on some tensors is done in: float32 or wider."""
    wide = torch.float32
    for part in parts:
        wide = torch.promote_types(wide, part.dtype)
    return wide


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, CHUNK):
        yield start, min(size, start + CHUNK)


def _flat(tensor: Any) -> Any:
    """Elements in order: a view where that can be, or a copy that `_write_back` puts back."""
    tensor = tensor.detach()
    return tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)


def _write_back(tensor: Any, flat: Any) -> None:
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))
