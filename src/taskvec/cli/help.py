"""`taskvec help [VERB]`: the help of a verb, or the reference page of all."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from taskvec.cli.commands import Argument, Arguments, Option, Verb, make_group, misuse
from taskvec.cli.verbs import VERBS
from taskvec.errors import nearest


def run(args: Arguments) -> int:
    """Run this verb."""
    if args.markdown:
        from taskvec.cli.reference import reference_page

        print(reference_page(), end="")
        return 0
    top = click.get_current_context().find_root()
    if args.verb is None:
        print(top.get_help())
        return 0
    if args.verb not in VERBS:
        misuse(f"unknown verb {args.verb!r}; {nearest(args.verb, list(VERBS))}")
    verb = make_group().get_command(top, args.verb)
    assert verb is not None
    print(verb.get_help(click.Context(verb, info_name=args.verb, parent=top)))
    return 0


def _complete(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str | CompletionItem]:
    return [verb for verb in VERBS if verb.startswith(incomplete)]


VERB = Verb(
    "help", run, [
        Argument("verb", required=False, type=str, metavar="[VERB]", shell_complete=_complete,
                 help="this verb; all of them if none is given"),
        Option("--markdown", is_flag=True, help="print the reference page of all verbs"),
    ],
)  # fmt: skip
