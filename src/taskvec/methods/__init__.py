"""Decide: one file a method; this is the list of them."""

from __future__ import annotations

from taskvec.errors import ParameterError, nearest
from taskvec.methods import (
    average,
    breadcrumbs,
    dare,
    dare_ties,
    lata,
    magnitude,
    passthrough,
    task_arithmetic,
    ties,
)
from taskvec.methods.method import Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (
        lata,
        task_arithmetic,
        ties,
        dare,
        dare_ties,
        magnitude,
        breadcrumbs,
        average,
        passthrough,
    )
}


def find_method(name: object) -> Method:
    """The method of that name.

    Raises:
        ParameterError: there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        hint = (
            nearest(name, tuple(METHODS))
            if isinstance(name, str)
            else "known: " + ", ".join(METHODS)
        )
        raise ParameterError(f"unknown method {name!r}; {hint}")
    return METHODS[name]
