"""Compilation of the kernels with numba, cached on disk, with a note when it compiles.

numba stores compiled code beside the module, or in the user's cache folder if the package folder is
read-only. A machine compiles once for each release of taskvec.
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
    """Compile with IEEE arithmetic in the written order; releases the GIL; cached on disk."""
    return _compile(function)


def jit_reduction(function: F) -> F:
    """Compile a sum over a chunk of fixed length, whose order the compiler may choose."""
    return _compile(function, fastmath=set(REASSOCIATE))


def when_compiling(notify: Callable[[], object]) -> None:
    """Call `notify` once, when a kernel must be compiled because the cache does not have it."""

    class Listener(event.Listener):  # type: ignore[misc]
        was_notified = False

        def on_start(self, event: Any) -> None:
            if not self.was_notified:
                self.was_notified = True
                notify()

        def on_end(self, event: Any) -> None:
            """Not needed."""

    event.register("numba:compile", Listener())


def discard_stale() -> None:
    """Drop compiled code older than any kernel's source.

    numba detects a change of the file with the function, but not of the files of inlined functions.
    Without this, `gram` would still contain old code after an edit of `convert.py`.
    """
    folder = Path(__file__).parent
    newest = max(source.stat().st_mtime for source in folder.glob("*.py"))
    for index in (folder / "__pycache__").glob("*.nbi"):
        with contextlib.suppress(OSError):
            if index.stat().st_mtime < newest:
                index.unlink()


discard_stale()
