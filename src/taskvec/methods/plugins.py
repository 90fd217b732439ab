"""Methods of other distributions, from the entry point group `taskvec.methods`.

```toml
[project.entry-points."taskvec.methods"]
bounded = "taskvec_bounded:METHOD"
```

The entry point has the method's name. Plug-ins are searched only for a name that is not one of
taskvec's methods, and only the plug-in with that name is imported. If a plug-in cannot be used or
fails, the error is one line that names its distribution, and it affects only runs that use it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

import numpy as np

from taskvec.errors import ParameterError, TaskvecError
from taskvec.methods.method import Array, Block, Inputs, Method, Need
from taskvec.methods.parameters import Parameter
from taskvec.methods.table import Table

GROUP = "taskvec.methods"
# Keys of a recipe beside a method's parameters, for all tasks or for one.
RESERVED = ("name", "model", "scale", "over", "hub")
ALIGNMENTS = ("element", "row", "tensor")

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A method and its distribution.

    Attributes:
        method: The method.
        distribution: Name and version of the installed distribution.
    """

    method: Method
    distribution: str


def names() -> tuple[str, ...]:
    """Names of the methods of plug-ins, sorted; nothing is imported."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def provider(name: str) -> str | None:
    """Name and version of the distributions that provide a method; None without one."""
    points = entry_points(group=GROUP, name=name)
    return " and ".join(sorted({_distribution(point) for point in points})) or None


def load(name: str) -> Method | None:
    """The method of a plug-in with that name; None without one.

    Raises:
        ParameterError: there is one, but it cannot be used.
    """
    points = tuple(entry_points(group=GROUP, name=name))
    if not points:
        return None
    if len(points) > 1:
        raise ParameterError(f"method {name!r} is given by {provider(name)}; uninstall one of them")
    value, flaw = _load_point(points[0])
    flaw = flaw or flaw_of(value, name)
    if flaw is not None or not isinstance(value, Method):
        raise ParameterError(
            f"method {name!r} of {_distribution(points[0])} cannot be used: {flaw}; "
            "repair or uninstall it"
        )
    return guard(value, _distribution(points[0]))


def every(taken: Collection[str]) -> tuple[list[Plugin], list[str]]:
    """Every method of a plug-in, and why the others cannot be used.

    Args:
        taken: Names of taskvec's own methods, which a plug-in cannot replace.
    """
    found, wrong = [], []
    for name in names():
        owner = str(provider(name))
        if name in taken:
            wrong.append(
                f"method {name!r} of {owner} is not used: taskvec's own has that name; rename it"
            )
            continue
        try:
            method = load(name)
        except ParameterError as error:
            wrong.append(str(error))
        else:
            found += [Plugin(method, owner)] if method is not None else []
    return found, wrong


def flaw_of(value: object, name: str) -> str | None:
    """What is wrong with a declaration, in words; None if it is a method that recipes can name.

    Args:
        value: The object that should be a `Method`.
        name: The name that it should have.

    >>> flaw_of("lata", "lata")
    "it is 'lata', not a Method"
    """
    if not isinstance(value, Method):
        return f"it is {_one_line(repr(value))}, not a Method"
    if value.name != name:
        return f"its name is {value.name!r}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return "a name must be small letters, digits and _"
    if value.alignment not in ALIGNMENTS:
        return f"alignment must be in {' | '.join(ALIGNMENTS)}; got {value.alignment!r}"
    texts = (value.summary, value.source, value.formula)
    if not all(isinstance(text, str) and len(text.splitlines()) == 1 for text in texts):
        return "summary, source and formula must be texts of one line each"
    if not isinstance(value.parameters, tuple):
        return "parameters must be a tuple"
    if value.default_scale is not None and not _is_number(value.default_scale):
        return f"default_scale must be a finite number or None; got {value.default_scale!r}"
    if not callable(value.decide) or not (value.combine is None or callable(value.combine)):
        return "decide must be a function; combine must be a function or None"
    return _flaw_of_parameters(value)


def _flaw_of_parameters(method: Method) -> str | None:
    seen: set[str] = set()
    for parameter in method.parameters:
        if not isinstance(parameter, Parameter):
            return f"{_one_line(repr(parameter))} among its parameters is not a Parameter"
        if parameter.name in RESERVED:
            return f"its parameter {parameter.name!r} is already a key of recipes"
        if parameter.name in seen:
            return f"its parameter {parameter.name!r} is declared twice"
        if parameter.by_layer and parameter.choices:
            return f"its parameter {parameter.name!r} is a word, which cannot differ by layer"
        seen.add(parameter.name)
        try:
            parameter.check(parameter.default, method.name)
        except ParameterError as error:
            return f"the default is not allowed: {error}"
    return None


def guard(method: Method, distribution: str) -> Method:
    """The same method, whose functions report their failures as a `TaskvecError` of one line.

    taskvec's own errors are passed on.

    Args:
        method: Method of a plug-in.
        distribution: The distribution to name.
    """
    own = method.combine

    def check(work: Callable[[], R], flaw: Callable[[R], str | None], where: str) -> R:
        try:
            result = work()
            reason = flaw(result)
        except TaskvecError:
            raise
        except Exception as error:
            reason = _one_line(f"{type(error).__name__}: {error}")
            raise TaskvecError(_failure(method, distribution, where, reason)) from error
        if reason is not None:
            raise TaskvecError(_failure(method, distribution, where, reason))
        return result

    def decide(inputs: Inputs) -> Table | Need:
        return check(lambda: method.decide(inputs), lambda got: _flaw_of_table(got, inputs), "")

    def combine(block: Block) -> Array:
        assert own is not None
        where = f" in tensor {block.name!r}"
        return check(lambda: own(block), lambda got: _flaw_of_block(got, block), where)

    return replace(method, decide=decide, combine=None if own is None else combine)


def _failure(method: Method, distribution: str, where: str, reason: str) -> str:
    return (
        f"method {method.name!r} of {distribution} failed{where}: {reason}; "
        "report it to its authors"
    )


def _flaw_of_table(outcome: object, inputs: Inputs) -> str | None:
    if isinstance(outcome, Need):
        return None
    if not isinstance(outcome, Table):
        return f"decide gave {_one_line(repr(outcome))}, not a Table or Need"
    if outcome.tasks != inputs.tasks or outcome.names != inputs.names:
        return "the table has other tasks or tensors than the merge"
    shape, columns = (len(inputs.tasks), len(inputs.names)), outcome.target
    got = np.shape(outcome.weights)
    if got != shape or (columns is not None and np.shape(columns) != shape[1:]):
        return f"the table has weights of shape {got}, expected {shape}, or other target factors"
    if not np.isfinite(outcome.weights).all() or not (
        columns is None or np.isfinite(columns).all()
    ):
        return "a weight of the table is not finite"
    return None


def _flaw_of_block(merged: object, block: Block) -> str | None:
    # For tensors without dimensions, NumPy's sums are scalars, not arrays.
    if not isinstance(merged, (np.ndarray, np.generic)) or merged.dtype.kind != "f":
        return f"combine gave {type(merged).__name__}, not an array of floating-point numbers"
    if merged.shape != block.target.shape:
        return f"combine gave shape {merged.shape}, expected {block.target.shape}"
    return None


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _load_point(point: EntryPoint) -> tuple[object, str | None]:
    """The object of an entry point, or why it cannot be loaded."""
    try:
        return point.load(), None
    except (Exception, SystemExit) as error:  # the code of others may raise anything
        return None, _one_line(f"{type(error).__name__}: {error}")


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
