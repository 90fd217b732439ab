"""Compilation of the kernels: numba, cached on disk, loudly only once.

numba keeps compiled code beside the module, or in the user's cache folder where the package folder
is read-only; a machine compiles once for each release of taskvec.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import event

F = TypeVar("F", bound=Callable[..., Any])

# Reassociation lets a sum be split over vector lanes and contraction lets it use fused
# multiply-add. The flags that would let LLVM assume that there are no NaNs or infinities stay off:
# those must be seen.
REASSOCIATE = frozenset({"reassoc", "contract"})


def _compile(function: F, **flags: Any) -> F:
    try:
        return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy", **flags)(function))
    except RuntimeError:  # nowhere to keep compiled code: no folder of ours can be written
        return cast(F, numba.njit(nogil=True, error_model="numpy", **flags)(function))


def jit(function: F) -> F:
    """Compile with IEEE arithmetic in the order written; releases the GIL; cached on disk."""
    return _compile(function)


def jit_reduction(function: F) -> F:
    """Compile a sum over a chunk of fixed length, whose order the compiler may choose."""
    return _compile(function, fastmath=set(REASSOCIATE))


def when_compiling(tell: Callable[[], object]) -> None:
    """Call `tell` once, when a kernel has to be compiled because the cache does not hold it."""

    class Listener(event.Listener):  # type: ignore[misc]
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told:
                self.told = True
                tell()

        def on_end(self, event: Any) -> None:
            """Nothing to tell."""

    event.register("numba:compile", Listener())


def discard_stale() -> None:
    """Drop compiled code older than any kernel's source.

    numba notices a change of the file that a function stands in, but not of the files that it takes
    inlined functions from; without this an edit of `convert.py` would leave the old code inside
    `gram`.
    """
    folder = Path(__file__).parent
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for index in (folder / "__pycache__").glob("*.nbi"):
        with contextlib.suppress(OSError):
            if index.stat().st_mtime < newest:
                index.unlink()


discard_stale()
