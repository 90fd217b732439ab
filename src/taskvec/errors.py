"""Every error that taskvec raises on purpose.

```text
TaskvecError                 exit code 1; a known failure, told in one line
├── CheckpointError          an input file or folder is broken, unsafe or of an unsupported kind
├── FamilyError              the members are fine one by one but do not fit together
├── OutputError              the output cannot be written where it was asked for
├── NothingToDoError         exit code 3; the result would be the unchanged model
├── DataError                data for a measurement are missing or malformed
├── StaleError               something on disk is not what was measured before
├── MissingExtraError        an optional dependency is not installed
└── UsageError               exit code 2; what was asked for cannot be meant
    ├── RecipeError          the recipe (or the command line that stands for one) is wrong
    └── ParameterError       a value is outside its declared range
```

A message says what, where (model, tensor, file), got against expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class TaskvecError(Exception):
    """A failure that taskvec foresaw; its text is one complete line for the user."""

    exit_code = 1


class CheckpointError(TaskvecError):
    """An input file or folder is broken, unsafe or of an unsupported kind."""


class FamilyError(TaskvecError):
    """The members of a family do not fit together."""


class OutputError(TaskvecError):
    """The output cannot be written where it was asked for."""


class NothingToDoError(TaskvecError):
    """The result would not differ from what is there; nothing was written."""

    exit_code = 3


class DataError(TaskvecError):
    """Data for a measurement are missing or malformed."""


class StaleError(TaskvecError):
    """Something on disk is not what was measured before."""


class MissingExtraError(TaskvecError):
    """An optional dependency is not installed."""


class UsageError(TaskvecError):
    """What was asked for cannot be meant."""

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
