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

VERBS = {
    "demo": "merge two skills and forget one, on tiny models that ship with taskvec",
    "scan": "read the weights of a family once; show how every task relates to instruction tuning",
    "plan": "show what a merge would read, write and need, from headers alone",
    "merge": "write a model with the skills of several fine-tunes",
    "forget": "write a model without the skills of some fine-tunes",
    "extract": "write a task vector as a file that is a task again, or as a LoRA adapter",
    "inspect": "show what a checkpoint, an adapter or a vector contains",
    "verify": "check a merged folder against its manifest",
    "import": "convert a mergekit configuration to a recipe; list what differs",
    "eval": "measure models side by side, with confidence intervals",
    "search": "find the coefficients whose merge scores best on data",
    "sweep": "measure what one number of a recipe does, value by value",
    "pairs": "measure what each task of a recipe does to each other task in a merge",
    "propose": "propose λ and a scheme from the weights alone",
    "fit": "fit the weight of every layer to a few prompts",
    "finetune": "train part of a model; the change is a task vector",
    "disentangle": "measure how task vectors interact, add up and can be subtracted",
    "methods": "list the methods and their parameters",
    "zoo": "list or copy the tiny models that ship with taskvec",
    "schema": "print the JSON schema of recipes, for editors",
    "completion": "print the completion script of a shell",
    "help": "show the help of a verb",
}

_RESUMING = {
    "merge", "forget", "eval", "search", "sweep", "pairs", "fit", "finetune", "disentangle",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    stop = Stop("; the same command continues where it stopped" if verb in _RESUMING else "")
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
        # Whoever knew what it was about has said so already, in an error of ours.
        where = error.filename or "standard output or a temporary file"
        say(f"error: {where}: {error.strerror or error}", "red")
        _drop_output()
        return 1
    finally:
        stop.restore(ends=argv is None)


def _drop_output() -> None:
    """Let nothing that could not be written be tried again when the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
