"""All expected errors.

```text
TaskvecError                 exit code 1; an expected failure, reported in one line
├── CheckpointError          an input file or folder is broken, unsafe or of an unsupported kind
├── FamilyError              the members do not fit together
├── OutputError              the output cannot be written
├── NothingToDoError         exit code 3; the result would be the unchanged model
├── DataError                data for a measurement are missing or malformed
├── StaleError               something on disk has changed since it was measured
├── MissingExtraError        an optional dependency is not installed
└── UsageError               exit code 2; the request is contradictory or incomplete
    ├── RecipeError          the recipe (or the command line that stands for one) is wrong
    └── ParameterError       a value is outside its declared range
```

A message says what, where (model, tensor, file), got against expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class TaskvecError(Exception):
    """An expected failure; its text is one complete line for the user."""

    exit_code = 1


class CheckpointError(TaskvecError):
    """An input file or folder is broken, unsafe or of an unsupported kind."""


class FamilyError(TaskvecError):
    """The members of a family do not fit together."""


class OutputError(TaskvecError):
    """The output cannot be written."""


class NothingToDoError(TaskvecError):
    """The result would not differ from what is there; nothing was written."""

    exit_code = 3


class DataError(TaskvecError):
    """Data for a measurement are missing or malformed."""


class StaleError(TaskvecError):
    """Something on disk has changed since it was measured."""


class MissingExtraError(TaskvecError):
    """An optional dependency is not installed."""


class UsageError(TaskvecError):
    """The request is contradictory or incomplete."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe, or the command line that stands for one, is wrong."""


class ParameterError(UsageError):
    """A value is outside its declared range."""


class TaskvecWarning(UserWarning):
    """Something that a user should know about a result; results have it in `.warnings` as well."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint that names the closest of the known words, or lists them all when none is close.

    >>> nearest("shceme", ["scheme", "granularity"])
    "did you mean 'scheme'?"
    >>> nearest("x", ["scheme", "granularity"])
    'known: granularity, scheme'
    """
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(sorted(known))
