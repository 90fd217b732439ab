"""What may lie where a file is expected, and a limit on the time that a test may take."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sock(path: Path) -> None:
    """A name of a socket; too long a path is no name of one."""
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = {"pipe": pipe, "socket": sock, "device": device, "Is a directory": Path.mkdir}


@contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """A pipe that is waited for, or a bomb that is built, fails the test and does not hang it."""

    def stop(*_: object) -> None:
        pytest.fail(f"took longer than {seconds} s")  # not an error that could be caught

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
