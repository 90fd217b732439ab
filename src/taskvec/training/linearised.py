"""Models linearized around their initial weights.

```text
f_lin(x; τ) = f(x; θ0) + J(x; θ0) τ,    τ = θ − θ0,    J = ∂f/∂θ at θ0
```

Source: Task Arithmetic in the Tangent Space, arXiv:2305.12827, equation 4. Any part of the
parameters may have a τ (the attention modules alone, rows of a fused projection); the rest stays at
θ0.

J τ is one Jacobian-vector product in forward mode, which gives f(x; θ0) on the way, and the
gradient with respect to τ is its transpose in reverse mode. Fused attention has no rule for forward
mode, so that attention is computed by plain matrix products here.

What trains is τ, not θ: it starts at exactly zero, small steps lose no digits against large
weights, and weight decay pulls towards θ0, so that it penalises ‖τ‖ as in the ridge regression that
training a linear model is. The paper's code keeps θ, which decay pulls towards zero: with it every
task vector gets the same small share of −θ0.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from taskvec.errors import FamilyError, ParameterError, UsageError, nearest

if TYPE_CHECKING:
    from taskvec.training.rows import RowRanges

Vector = Mapping[str, Tensor]  # what is added to parameters, by their names


class Linearised(nn.Module):
    """A module to first order in its parameters, around their present values.

    Called like the module, it returns what the module does, every tensor of it linear in τ. The
    module is held, not copied, and is changed in two ways: its parameters no longer ask for
    gradients, and it is in evaluation mode and stays there, so that the derivative is that of one
    function, without the noise of dropout.

    Attributes:
        module: With θ0 as its parameters.
        names: Of the parameters that have a τ.
        tau: In the order of `names`, zero at first; where rows are given, only those.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        *,
        rows: Mapping[str, RowRanges] | None = None,
    ) -> None:
        """Linearise.

        Args:
            module: In any dtype; τ has the same.
            names: Of parameters, as `named_parameters` has them.
            rows: The rows that a parameter is trained in, if not in all.

        Raises:
            ParameterError: a name is not a parameter or is given twice, or no name is given.
        """
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        self.names = tuple(names)
        theta0 = _chosen(module, self.names)
        tau = []
        self._restricted = {}
        for place, (name, parameter) in enumerate(theta0.items()):
            within = (rows or {}).get(name)
            start = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            if within is not None:
                index = torch.cat([torch.arange(a, b) for a, b in within.ranges])
                buffer = f"rows_{place}"
                self.register_buffer(buffer, index.to(parameter.device), persistent=False)
                self._restricted[name] = (within.axis, buffer)
                start = start.index_select(within.axis, self.get_buffer(buffer))
            tau.append(nn.Parameter(start))
        self.tau = nn.ParameterList(tau)

    def train(self, mode: bool = True) -> Linearised:
        """As for any module, but the inner module stays in evaluation mode."""
        super().train(mode)
        self.module.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f(x; θ0) + J(x; θ0) τ."""
        value, change = derivative(self.module, self.vector(), *args, **kwargs)
        return pytree.tree_map(_sum, value, change)

    def vector(self) -> dict[str, Tensor]:
        """τ by name, in the shapes of the parameters; gradients flow back into `tau`."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        found = dict(zip(self.names, self.tau, strict=True))
        for name, (axis, buffer) in self._restricted.items():
            zero = torch.zeros_like(parameters[name])
            found[name] = zero.index_copy(axis, self.get_buffer(buffer), found[name])
        return found

    @torch.no_grad()
    def put(self, vector: Vector) -> None:
        """Set τ; parameters that the vector does not have get zero.

        Raises:
            FamilyError: it has a parameter, a shape or a row that has no τ here.
        """
        _check_fits(vector, self.vector())
        for name, tau in zip(self.names, self.tau, strict=True):
            if name not in vector:
                tau.zero_()
                continue
            given = vector[name].to(tau.device)
            if name in self._restricted:
                axis, buffer = self._restricted[name]
                index = self.get_buffer(buffer)
                if given.index_fill(axis, index, 0).any():
                    raise FamilyError(
                        f"vector: {name!r} is not zero outside the {len(index)} rows that are "
                        "linearised; linearise the whole parameter"
                    )
                given = given.index_select(axis, index)
            tau.copy_(given)


def derivative(module: nn.Module, vector: Vector, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The output of a module and its derivative along a vector of parameters.

    Both come from one pass. Outputs at any multiple of the vector follow from them, and outputs for
    any sum of vectors from one derivative each.

    Args:
        module: In evaluation mode; its parameters are θ0.
        vector: τ, by name.
        *args: What the module is called with.
        **kwargs: The same.

    Returns:
        f(x; θ0) and J(x; θ0) τ, each as the module returns its output; where that holds integers
        or values that are not tensors, are the same in both.

    Raises:
        ParameterError: a name of the vector is no parameter.
        UsageError: the module is in training mode, is asked for its own loss or cache, or does what
            has no forward derivative.
    """
    if any(part.training for part in module.modules()):
        raise UsageError(
            f"{type(module).__name__} is in training mode, where dropout makes its derivative "
            "noise; call eval() on it"
        )
    kwargs = _call_of(module, kwargs)
    theta0 = _chosen(module, vector)
    made: list[Any] = []  # the output, for its form

    def outputs(chosen: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        made[:] = [functional_call(module, chosen, args, kwargs)]
        leaves = pytree.tree_leaves(made[0])
        return [x for x in leaves if _is_float(x)], [x for x in leaves if _is_integer(x)]

    tangents = {name: vector[name].to(value) for name, value in theta0.items()}
    with _differentiable(module):
        values, changes, integers = jvp(outputs, (theta0,), (tangents,), has_aux=True)  # type: ignore[misc]

    def form(floats: list[Tensor]) -> Any:
        rest, others = iter(floats), iter(integers)

        def fill(leaf: Any) -> Any:
            return next(rest) if _is_float(leaf) else next(others) if _is_integer(leaf) else leaf

        return pytree.tree_map(fill, made[0])

    return form(values), form(changes)


def call_at(module: nn.Module, vector: Vector, *args: Any, **kwargs: Any) -> Any:
    """f(x; θ0 + τ): the output of the module itself with a vector; the module is not changed.

    This is the post hoc use of a vector that was trained linearly.

    Raises:
        ParameterError: a name of the vector is no parameter.
    """
    theta0 = _chosen(module, vector)
    theta = {name: value + vector[name].to(value) for name, value in theta0.items()}
    return functional_call(module, theta, args, kwargs)


def combine(vectors: Sequence[Vector], scales: Sequence[float]) -> dict[str, Tensor]:
    """Σ_t λ_t τ_t, over the names of all vectors.

    In a linearised model this gives f0 + Σ_t λ_t J τ_t by one derivative.
    """
    total: dict[str, Tensor] = {}
    for vector, scale in zip(vectors, scales, strict=True):
        for name, value in vector.items():
            total[name] = total[name] + scale * value if name in total else scale * value
    return total


def _chosen(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters by name, each once."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    chosen: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name in names:
        if name not in parameters:
            raise ParameterError(
                f"names: {name!r} is not a parameter of {type(module).__name__}; "
                f"{nearest(name, list(parameters))}"
            )
        if name in chosen:
            raise ParameterError(f"names: {name!r} is given twice")
        other = first.setdefault(id(parameters[name]), name)
        if other != name:
            raise ParameterError(f"names: {name!r} and {other!r} are one parameter; give one")
        chosen[name] = parameters[name].detach()
    if not chosen:
        raise ParameterError("names: none is given, so nothing would be linearised")
    return chosen


def _check_fits(vector: Vector, own: Vector) -> None:
    for name, value in vector.items():
        if name not in own:
            raise FamilyError(
                f"vector: {name!r} is not linearised here; {nearest(name, list(own))}"
            )
        if value.shape != own[name].shape:
            raise FamilyError(
                f"vector: {name!r} has shape {list(value.shape)}, the parameter has "
                f"{list(own[name].shape)}; give a vector of this model"
            )


def _call_of(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without those that would add nonlinear outputs."""
    if kwargs.get("labels") is not None:
        raise UsageError(
            "labels: the loss of a linearised model is not the linearised loss; leave labels out "
            "and compute the loss from the outputs"
        )
    if getattr(getattr(module, "config", None), "use_cache", False):
        if kwargs.get("use_cache"):
            raise UsageError("use_cache: a linearised model keeps no cache; leave it out")
        return {**kwargs, "use_cache": False}
    return dict(kwargs)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _is_integer(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_floating_point()


def _sum(value: Any, change: Any) -> Any:
    return value + change if _is_float(value) else value


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Plain attention, linear layers without idle products, and a clear error without a rule."""
    _load_rules()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), _Linear():
            yield
    except (NotImplementedError, RuntimeError) as error:
        found = _NO_RULE.search(str(error))
        if found is None:
            raise
        raise UsageError(
            f"{_where(module, error)}: {found['op'] or 'an autograd.Function'} has no derivative "
            "in forward mode, so that the model cannot be linearised as it is; load it with "
            "attn_implementation='sdpa' or 'eager' if this is its attention; otherwise use plain "
            "operations there, or give the autograd.Function setup_context and jvp"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Linear(TorchFunctionMode):
    """Tangents of linear layers: ẏ = W ẋ + Ẇ x + ḃ, of which only what is not zero.

    torch's own rule multiplies by zeros where x or W has no tangent, such as, where only attention
    is linearised, in every MLP.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.linear or len(args) != 3 or kwargs:
            return func(*args, **(kwargs or {}))
        (x, dx), (w, dw), (b, db) = map(_dual, args)
        y = functional.linear(x, w, b)
        change = None if dx is None else functional.linear(dx, w)
        if dw is not None:
            more = functional.linear(x, dw, db)
            change = more if change is None else change + more
        elif db is not None:
            change = db.to(y.dtype).expand_as(y) if change is None else change + db
        return y if change is None else forward_ad.make_dual(y, change)  # type: ignore[no-untyped-call]


def _dual(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Value and tangent."""
    if value is None:
        return None, None
    primal, tangent = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return primal, tangent


@cache
def _load_rules() -> None:
    """Load torch's rules for forward mode, at whose first use it warns of a change in itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


def _where(module: nn.Module, error: BaseException) -> str:
    """The innermost module in which an error was raised."""
    names = {id(part): name for name, part in module.named_modules()}
    inner, frame = "", error.__traceback__
    while frame is not None:
        inner = names.get(id(frame.tb_frame.f_locals.get("self")), inner)
        frame = frame.tb_next
    return f"{type(module).__name__}, {inner}" if inner else type(module).__name__


_NO_RULE = re.compile(
    r"Trying to use forward AD with (?P<op>\S+) that does not support it"
    r"|must override the setup_context staticmethod"
    r"|must implement the jvp function for custom autograd.Function"
)
