"""Progress on standard error: bars for a terminal, one line a step with `--verbose` elsewhere.

A bar shows what is worked on, bytes or items, rate and time left. It appears half a second after a
step began, whether or not the step has advanced: one large matrix may take minutes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from taskvec.cli.printing import gigabytes
from taskvec.cli.streams import is_terminal, say

if TYPE_CHECKING:
    from taskvec.cli.commands import Arguments

DELAY_S = 0.5


class Bars:
    """The bars of one command, a `Progress` for all that it calls.

    Args:
        args: With `quiet` and `verbose`.
        unit: What is counted: `B` for bytes, or a word.
        name: Of the model that is worked on, before what is done.
    """

    def __init__(self, args: Arguments, *, unit: str = "B", name: str = "") -> None:
        self.unit, self.name = unit, name
        self.is_logged = args.verbose and not args.quiet
        self.is_drawn = not args.quiet and is_terminal(sys.stderr)
        self._lock = threading.Lock()
        self._began: float | None = None
        self._display: Any = None
        self._steps: dict[int, _Step] = {}

    @contextmanager
    def __call__(self, label: str, total: int) -> Iterator[Callable[[int], object]]:
        """Begin a step; the context gives a function to call with what was done since."""
        step = _Step(f"{self.name}: {label}" if self.name else label, total)
        timer = None
        if self.is_drawn:
            self._began = self._began or time.monotonic()
            with self._lock:
                self._steps[id(step)] = step
            wait = max(0.0, self._began + DELAY_S - time.monotonic())
            timer = threading.Timer(wait, self._draw, [step])
            timer.daemon = True
            timer.start()
        try:
            yield lambda count=1, **about: self._advance(step, count)
        finally:
            if timer is not None:
                timer.cancel()
                self._end(step)
            if self.is_logged and not self.is_drawn and step.done:
                say(f"{step.label}: {self._amount(step.done)} in {step.seconds:.1f} s")

    def note(self, step_label: str) -> None:
        """Change what the running steps are called."""
        with self._lock:
            for step in self._steps.values():
                step.label = step_label
                if step.shown is not None:
                    self._display.update(step.shown, description=step_label)

    def _advance(self, step: _Step, count: int) -> None:
        with self._lock:
            step.done += count
            if step.shown is not None:
                self._display.update(step.shown, completed=step.done)

    def _draw(self, step: _Step) -> None:
        with self._lock:
            if id(step) not in self._steps:  # it ended meanwhile
                return
            if self._display is None:
                self._display = _display(self.unit)
                self._display.start()
            step.shown = self._display.add_task(step.label, total=step.total, completed=step.done)

    def _end(self, step: _Step) -> None:
        with self._lock:
            del self._steps[id(step)]
            if step.shown is not None:
                self._display.remove_task(step.shown)
            if self._display is not None and not self._steps:
                self._display.stop()
                self._display = None

    def _amount(self, count: int) -> str:
        return gigabytes(count) if self.unit == "B" else f"{count:,} × {self.unit}"


class Steps:
    """The bar of something that goes down a loss, step by step; a context."""

    def __init__(self, args: Arguments) -> None:
        self._bars, self._open = Bars(args, unit="steps"), ExitStack()
        self._label, self._done = "", 0
        self._advance: Callable[[int], object] = lambda count: None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def tell(self, label: str, done: int, steps: int, loss: float) -> None:
        """A step was done, of so many in all."""
        if label != self._label:
            self._open.close()
            self._label, self._done = label, 0
            self._advance = self._open.enter_context(self._bars(label, steps))
        self._bars.note(f"{label} (loss {loss:.4f})")
        self._advance(done - self._done)
        self._done = done
        if done == steps:
            self._open.close()


class _Step:
    """Something that is being done.

    Attributes:
        label: What is done.
        total: Bytes or items in all.
        done: Of them so far.
        shown: Its number in the display, where it is drawn.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.shown: int | None = None
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self._began


def _display(unit: str) -> Any:
    from rich import progress
    from rich.console import Console

    if unit == "B":
        amount: tuple[Any, ...] = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    else:
        amount = (progress.MofNCompleteColumn(), progress.TextColumn(unit))
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        *amount,
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
