"""Decide: one file a method; this is the list of them.

`METHODS` is what ships with taskvec, and nothing else, whatever is installed: documentation and
tests go by it. What other distributions bring is never put in; `find_method` finds it by name, and
`plugins.every` lists it.
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
    """The method of that name: ours, or else one that is installed beside them.

    Capital letters and `-` for `_` make no difference.

    Raises:
        ParameterError: there is none, or it is one of others that cannot be used.
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
