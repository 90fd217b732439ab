"""Ctrl-C and SIGTERM: the first lets the run clean up and print a line, the second ends it at once.

Ending at once is safe: what is written survives a kill at any moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stop:
    """What a process does about signals that ask it to stop, while it runs one command.

    Attributes:
        hint: Printed behind the word for what happened.
    """

    def __init__(self, hint: str) -> None:
        self.hint = hint
        self._number: int | None = None
        self._before: dict[int, Any] = {}
        self._report = sys.unraisablehook

    def install(self) -> None:
        """Take over the signals, unless the caller wants them ignored, as a shell's `&` does."""
        for number in _WORDS:
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                try:
                    signal.signal(number, self._handle)
                except ValueError:  # not in the main thread, where nothing of this is seen
                    return
                self._before[number] = handler
        sys.unraisablehook = self._send_again

    def restore(self, *, ends: bool) -> None:
        """Give the signals back, or ignore them if the process ends."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ends else handler)
        sys.unraisablehook = self._report

    def tell(self) -> int:
        """Say what happened; the exit code."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        print(self._line(), file=sys.stderr)
        return self._code()

    def _handle(self, number: int, frame: object) -> None:
        if self._number is None:
            self._number = number
            raise KeyboardInterrupt
        self._number = number
        shows_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
        os.write(2, f"{shows_cursor}{self._line()}\n".encode())
        os._exit(self._code())

    def _send_again(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send a signal again that came while Python cleaned up an object, where nothing raises."""
        if unraisable.exc_type is not KeyboardInterrupt or self._number is None:
            self._report(unraisable)
            return
        number, self._number = self._number, None
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    def _line(self) -> str:
        return f"taskvec: {_WORDS[signal.Signals(self._number or signal.SIGINT)]}{self.hint}"

    def _code(self) -> int:
        return 128 + (self._number or signal.SIGINT)
