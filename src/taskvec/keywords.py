"""Keywords that several verbs share: declared once, shown in every verb's signature and help."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from taskvec.errors import TaskvecWarning, nearest

Verb = TypeVar("Verb", bound=Callable[..., Any])


def takes(*declarations: type) -> Callable[[Verb], Verb]:
    """Spell out `**options: Unpack[…]` of a verb for `help`, editors and documentation.

    An unknown keyword is a `TypeError` that names the closest one; None means "not given". What the
    result has in `.warnings` is issued as `TaskvecWarning` to the caller as well.

    Args:
        declarations: `TypedDict`s, whose docstrings have a line for each key under `Attributes:`.
            They take the place of `{options}` in the docstring of the verb.
    """
    kinds = {name: kind for each in declarations for name, kind in each.__annotations__.items()}
    texts = [(each.__doc__ or "").partition("    Attributes:\n")[2] for each in declarations]
    lines = "".join(line + "\n" for text in texts for line in text.splitlines() if line.strip())

    def decorate(verb: Verb) -> Verb:
        signature = inspect.signature(verb)
        fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in kinds.items()
        ]
        known = [p.name for p in (*fixed, *shared)]

        @wraps(verb)
        def checked(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    raise TypeError(
                        f"{verb.__name__}() got an unexpected keyword argument {name!r}; "
                        f"{nearest(name, known)}"
                    )
            result = verb(*args, **{name: v for name, v in given.items() if v is not None})
            for text in getattr(result, "warnings", ()):
                warnings.warn(text, TaskvecWarning, stacklevel=2)
            return result

        spelled: Any = checked
        spelled.__signature__ = signature.replace(parameters=[*fixed, *shared])
        spelled.__doc__ = (verb.__doc__ or "").replace("        {options}\n", lines)
        return checked  # type: ignore[return-value]

    return decorate
