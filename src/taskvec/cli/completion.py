"""`taskvec completion SHELL`: a script that makes a shell complete verbs, options and words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from taskvec.cli.commands import COMPLETE, Argument, Arguments, Verb, make_group

SHELLS = ("bash", "zsh", "fish")


def run(args: Arguments) -> int:
    """Run this verb."""
    kind = get_completion_class(args.shell)
    assert kind is not None
    shell = kind(make_group(), {}, "taskvec", COMPLETE)
    print(shell.source_template % shell.source_vars())
    return 0


VERB = Verb(
    "completion", run,
    [Argument("shell", type=click.Choice(SHELLS), metavar="bash|zsh|fish", help="which shell")],
    page="In bash: `eval \"$(taskvec completion bash)\"` in `~/.bashrc`; in zsh the same with `zsh`"
    ";\nin fish: `taskvec completion fish > ~/.config/fish/completions/taskvec.fish`.",
)  # fmt: skip
