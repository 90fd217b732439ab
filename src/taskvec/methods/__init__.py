"""Decide: one file for each method, and the list of them.

`METHODS` has only the methods that ship with taskvec; documentation and tests use it. Methods of
other distributions are not in it: `find_method` finds them by name, and `plugins.every` lists them.
"""

from __future__ import annotations

from taskvec.errors import ParameterError, nearest
from taskvec.methods import (
    arcee_fusion,
    average,
    breadcrumbs,
    consensus,
    dare,
    dare_ties,
    della,
    iso_c,
    iso_cts,
    karcher,
    lata,
    magnitude,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    pcb,
    plugins,
    ram,
    ram_plus,
    safety_arithmetic,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv,
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
        della,
        consensus,
        pcb,
        safety_arithmetic,
        sce,
        ram,
        ram_plus,
        arcee_fusion,
        nearswap,
        slerp,
        nuslerp,
        multislerp,
        karcher,
        model_stock,
        tsv,
        iso_c,
        iso_cts,
        average,
        passthrough,
    )
}


def find_method(name: object) -> Method:
    """The method with that name: one of taskvec's, or else one of an installed plug-in.

    Case is ignored, and `-` stands for `_`.

    Raises:
        ParameterError: the method is unknown, or its plug-in cannot be used.
    """
    plain = name.lower().replace("-", "_") if isinstance(name, str) else ""
    if plain in METHODS:
        return METHODS[plain]
    known = (*METHODS, *plugins.names())
    if not isinstance(name, str):
        raise ParameterError(f"unknown method {name!r}; known: {', '.join(known)}")
    method = plugins.load(name) or plugins.load(plain)
    if method is None:
        raise ParameterError(f"unknown method {name!r}; {nearest(plain, known)}")
    return method
