"""Members of several architectures, which are named before any tensor that does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from taskvec.checkpoints.source import Source
from taskvec.errors import FamilyError
from taskvec.statistics.collect import describe


@contextmanager
def told_first(sources: Mapping[str, Source]) -> Iterator[None]:
    """Where members do not fit together, name a member of another architecture first.

    Other names of architectures alone are no error: Mistral fits Llama.

    Raises:
        FamilyError: what was raised inside, after the architectures where those differ.
    """
    try:
        yield
    except FamilyError as error:
        target = sources["target"]
        expected = _architecture(target)
        for role, source in sources.items():
            got = _architecture(source)
            if got and expected and got != expected and not source.is_difference:
                what = str(error).partition("; ")[0]  # its remedy is for one architecture
                raise FamilyError(
                    f"{describe(role)} ({source.where}): is {got}, the target ({target.where}) is "
                    f"{expected}; use checkpoints of one architecture ({what})"
                ) from error
        raise


def _architecture(source: Source) -> str:
    """The class that a config names; empty if it names none."""
    return str((source.config.get("architectures") or [""])[0])
