"""Regular expressions that a recipe or an adapter brings, matched within limits.

Python's `re` can take years for one name, for example with `(a+)+b`. An expression with at most two
repetitions, each of something fixed, is matched here; any other one in a child process with limits
on its processor time and memory.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import IO, Any

from taskvec.errors import TaskvecError

MAX_LENGTH = 4096
_LONGEST = 256  # characters of a name that is matched here
_SECONDS = 5  # of processor time, for all names; a million simple names take two
_MEMORY_BYTES = 2**29
_CHILD = """
import json, re, resource, sys
for kind, limit in ((resource.RLIMIT_CPU, sys.argv[2]), (resource.RLIMIT_AS, sys.argv[3])):
    try:
        resource.setrlimit(kind, (int(limit),) * 2)
    except (OSError, ValueError):
        pass  # a system without this limit
search = re.compile(sys.argv[1]).search
for line in sys.stdin:
    found = search(json.loads(line))
    print(json.dumps(None if found is None else found.groupdict()), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression in Python's syntax.

    Attributes:
        text: The expression.
        where: What messages call it.
        error: Class of the errors.

    Raises:
        TaskvecError: of class `error`: it is not valid, or too long.
    """

    text: str
    where: str
    error: type[TaskvecError]

    def __post_init__(self) -> None:
        if len(self.text) > MAX_LENGTH:
            raise self.error(
                f"{self.where}: pattern of {len(self.text):,} characters; at most "
                f"{MAX_LENGTH:,} are allowed"
            )
        try:
            _compiled(self.text)
        except (re.error, OverflowError, RecursionError) as problem:
            raise self.error(
                f"{self.where}: pattern is not a valid regular expression: {problem}"
            ) from problem

    @property
    def groups(self) -> frozenset[str]:
        """Names of its groups."""
        return frozenset(_compiled(self.text).groupindex)

    def search(self, name: str) -> dict[str, str | None] | None:
        """The named groups of the first place in `name` that matches; None without one.

        Raises:
            TaskvecError: of class `error`: matching exceeds the limits.
        """
        if len(name) <= _LONGEST and _is_simple(self.text):
            found = _compiled(self.text).search(name)
            return None if found is None else found.groupdict()
        try:
            if self.text not in _children:
                _children[self.text] = _Child(self.text)
            return _children[self.text].search(name)
        except (OSError, ValueError) as failure:
            raise self.error(
                f"{self.where}: pattern {self.text[:60]!r} takes more than {_SECONDS} s to match; "
                "remove repetitions within repetitions"
            ) from failure


_compiled = cache(re.compile)


@cache
def _is_simple(text: str) -> bool:
    """Whether matching takes at most quadratic time: two repetitions, each of one fixed thing."""
    repetitions = 0
    nodes: list[tuple[Any, bool]] = [(re._parser.parse(text), False)]  # type: ignore[attr-defined]
    while nodes:
        node, is_repeated = nodes.pop()
        kind = str(node[0]) if isinstance(node, tuple) else str(node)
        if kind in ("GROUPREF", "GROUPREF_EXISTS"):
            return False
        if kind.endswith("_REPEAT"):
            low, high, inner = node[1]
            if is_repeated and low != high:
                return False
            repetitions += high > 1
            nodes.append((inner, is_repeated or high > 1))
        elif kind == "BRANCH" and is_repeated:
            return False
        elif isinstance(node, (list, tuple, re._parser.SubPattern)):  # type: ignore[attr-defined]
            nodes += [(inner, is_repeated) for inner in node]
    return repetitions <= 2


class _Child:
    """A process that matches one expression."""

    def __init__(self, text: str) -> None:
        limits = [str(_SECONDS), str(_MEMORY_BYTES)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, text, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.lock = Lock()

    def search(self, name: str) -> dict[str, str | None] | None:
        to, back = _pipes(self.process)
        with self.lock:
            to.write(json.dumps(name) + "\n")
            to.flush()
            found: dict[str, str | None] | None = json.loads(back.readline())
        return found

    def close(self) -> None:
        for pipe in _pipes(self.process):
            with suppress(OSError):  # of a process that has ended
                pipe.close()
        self.process.wait()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise ValueError("a process without pipes")
    return process.stdin, process.stdout


_children: dict[str, _Child] = {}


@atexit.register
def _close_children() -> None:
    while _children:
        _children.popitem()[1].close()
