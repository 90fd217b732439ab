"""A little language of string programs, and its interpreter.

A program is one or more steps joined by ``;``, applied from left to right to a short text:

| step | effect | example on ``abc`` |
|---|---|---|
| ``drop`` | removes the first letter | ``bc`` |
| ``chop`` | removes the last letter | ``ab`` |
| ``twin`` | repeats the last letter | ``abcc`` |
| ``head`` | repeats the first letter | ``aabc`` |
| ``rev`` | reverses the text | ``cba`` |
| ``add x`` | puts the letter x at the end | ``abcx`` |
| ``put x`` | puts the letter x at the front | ``xabc`` |

There are no loops and no names, every step changes the length by at most one, and both inputs are
bounded: a program always ends. For any text, the only error raised is `ProgramError`.
"""

from __future__ import annotations

from collections.abc import Callable

from taskvec.errors import TaskvecError

MAX_STEPS = 16
MAX_TEXT = 64

PLAIN_STEPS: dict[str, Callable[[str], str]] = {
    "drop": lambda text: text[1:],
    "chop": lambda text: text[:-1],
    "twin": lambda text: text + text[-1:],
    "head": lambda text: text[:1] + text,
    "rev": lambda text: text[::-1],
}
LETTER_STEPS: dict[str, Callable[[str, str], str]] = {
    "add": lambda text, letter: text + letter,
    "put": lambda text, letter: letter + text,
}


class ProgramError(TaskvecError):
    """A program that the language does not have, or one over its limits."""


def run(program: str, text: str) -> str:
    """The text that a program makes of a text.

    Args:
        program: Steps joined by ``;``, at most 16 of them; spaces around a step do not matter.
        text: What the first step gets, at most 64 characters of any kind.

    Returns:
        The text after the last step, at most 80 characters; empty where every letter was removed.

    Raises:
        ProgramError: the program is empty or too long, a step is unknown, its letter is missing,
            superfluous or not one of a to z; or the text is too long.

    >>> run("drop; add x", "abc")
    'bcx'
    >>> run("jump", "abc")
    Traceback (most recent call last):
    ...
    taskvec.zoo.interpreter.ProgramError: step 1 of 'jump': unknown step 'jump'
    """
    if len(text) > MAX_TEXT:
        raise ProgramError(f"text has {len(text)} characters, at most {MAX_TEXT} are allowed")
    steps = program.split(";")
    if len(steps) > MAX_STEPS:
        raise ProgramError(f"program has {len(steps)} steps, at most {MAX_STEPS} are allowed")
    for number, step in enumerate(steps, start=1):
        try:
            text = _apply(step.split(), text)
        except ProgramError as error:
            raise ProgramError(f"step {number} of {program!r}: {error}") from None
    return text


def _apply(words: list[str], text: str) -> str:
    if not words:
        raise ProgramError("it is empty")
    name, letters = words[0], words[1:]
    if name in PLAIN_STEPS:
        if letters:
            raise ProgramError(f"'{name}' takes no letter, got {' '.join(letters)!r}")
        return PLAIN_STEPS[name](text)
    if name in LETTER_STEPS:
        if len(letters) != 1 or len(letters[0]) != 1 or not "a" <= letters[0] <= "z":
            raise ProgramError(f"'{name}' takes one letter a to z, got {' '.join(letters)!r}")
        return LETTER_STEPS[name](text, letters[0])
    raise ProgramError(f"unknown step {name!r}")
