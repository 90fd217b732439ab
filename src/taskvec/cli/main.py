"""`taskvec VERB …`: finds the verb, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 a known failure, 2 usage or recipe, 3 finished but incomplete, 130
interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Any

from taskvec.cli.stopping import Stop
from taskvec.errors import TaskvecError

VERBS = {
    "demo": "two skills merged and one removed, on tiny models that ship with taskvec",
    "scan": "read the weights of a family once; show every layer's similarity and weights",
    "plan": "say what a merge would read, write and need, from headers alone",
    "merge": "write a model with the skills of several fine-tunes",
    "forget": "write a model without the skills of some fine-tunes",
    "extract": "write a task vector as a file that is a task again, or as a LoRA adapter",
    "inspect": "say what a checkpoint, an adapter or a vector holds",
    "import": "turn a mergekit configuration into a recipe; say what differs",
    "eval": "measure what models can do, side by side, with intervals",
    "search": "find the coefficients whose merge scores best, on data",
    "verify": "check a merged folder against its manifest",
    "methods": "list the methods and their parameters",
    "zoo": "the tiny models that ship with taskvec: list, copy",
}

_STREAMING = ("scan", "plan", "merge", "forget", "extract", "verify")


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="taskvec",
        description="Task arithmetic for real checkpoints: add or remove skills without training.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, text in VERBS.items():
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == verb:
            module = import_module(f"taskvec.cli.{name}{'_' * iskeyword(name)}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        print(version("taskvec"))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in arguments if not a.startswith("-")), None)
    resumes = verb in ("merge", "forget", "search")
    stop = Stop("; the same command goes on from where it was" if resumes else "")
    try:
        stop.install()
        args = _parser(verb).parse_args(arguments)
        if verb in _STREAMING:
            # Headers and digests are many small objects without cycles; with 20,000 tensors,
            # looking for cycles among them took a third of the time of a merge.
            gc.disable()
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except TaskvecError as error:
        print(f"taskvec: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return stop.tell()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _drop_output()
        return 0
    except OSError as error:
        # Whoever knew what it was about has said so already, in an error of ours.
        where = error.filename or "standard output or a temporary file"
        print(f"taskvec: error: {where}: {error.strerror or error}", file=sys.stderr)
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
