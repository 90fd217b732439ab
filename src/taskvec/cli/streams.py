"""Standard output and standard error: never a traceback for a letter, a closed file or no colour.

Results go to standard output; progress, warnings and errors to standard error.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Sequence

# What letters become where the encoding of a stream lacks them.
_PLAIN = {
    "λ": "lambda", "θ": "theta", "τ": "tau", "σ": "sigma", "ρ": "rho", "Σ": "sum", "Δ": "delta",
    "α": "alpha", "ξ": "xi", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "·": "*",
    "≤": "<=", "≥": ">=", "±": "+-", "∞": "inf", "‖": "||", "²": "^2", "→": "->", "∈": "in",
}  # fmt: skip
_COLOURS = {"red": "31;1", "yellow": "33", "dim": "2"}


def prepare_streams() -> None:
    """Make both streams writable in any shell and locale."""
    codecs.register_error("taskvec", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`; a file that is opened later must not take its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="taskvec")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    words = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in letters)
    return "".join(words), error.end


def say(text: str, colour: str = "") -> None:
    """Print one line for people to standard error."""
    print(coloured("taskvec:", colour), text, file=sys.stderr)


def warn(warnings: Sequence[str]) -> None:
    """Print warnings to standard error."""
    for text in warnings:
        say(f"warning: {text}", "yellow")


def coloured(text: str, colour: str) -> str:
    """The text in a colour where standard error is a terminal and NO_COLOR is not set."""
    if not colour or not is_terminal(sys.stderr) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def is_terminal(stream: object) -> bool:
    """Whether a person reads this stream."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty()) and os.environ.get("TERM") != "dumb"
