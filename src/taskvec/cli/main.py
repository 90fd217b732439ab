"""`taskvec VERB …`: runs a verb, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 a known failure, 2 usage or recipe, 3 finished but incomplete, 130
interrupted, 143 terminated. Click comes in only after the signal handlers are in place, and a verb
only when it is called, so that `--help` is fast and Ctrl-C is one line at any moment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from taskvec.cli.stopping import Stop
from taskvec.cli.streams import prepare_streams, say
from taskvec.errors import TaskvecError

_RESUMING = {
    "merge", "forget", "eval", "search", "sweep", "pairs", "fit", "finetune", "disentangle",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    stop = Stop("; the same command continues where it stopped" if verb in _RESUMING else "")
    try:
        return _run(arguments, stop, ends=argv is None)
    except KeyboardInterrupt:  # while the signals were given back
        return stop.tell()


def _run(arguments: list[str], stop: Stop, *, ends: bool) -> int:
    """Run one command while signals are taken over."""
    try:
        stop.install()
        prepare_streams()
        from taskvec.cli.commands import run

        code = run(arguments)
        sys.stdout.flush()
        return code
    except TaskvecError as error:
        say(f"error: {error}", "red")
        return error.exit_code
    except KeyboardInterrupt:
        return stop.tell()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _drop_output()
        return 0
    except OSError as error:
        # Code that knows the cause raises an error of ours instead.
        where = error.filename or "standard output or a temporary file"
        say(f"error: {where}: {error.strerror or error}", "red")
        _drop_output()
        return 1
    finally:
        stop.restore(ends=ends)


def _drop_output() -> None:
    """Let nothing that could not be written be tried again when the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
