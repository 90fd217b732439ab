"""The reference page of the command line, written from the declarations of verbs and options."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import click

from taskvec.cli import evaluating, options
from taskvec.cli.commands import Argument, Option, Verb, make_group
from taskvec.cli.verbs import VERBS

_HEAD = """\
# Command line

<!-- Written by `taskvec help --markdown`; change the declarations in src/taskvec/cli instead. -->

```text
taskvec VERB [ARGUMENTS] [OPTIONS]
```

Options and positional arguments go in any order. Results go to standard output; progress, warnings
and errors to standard error. On a terminal, tables fit its width, and a bar shows what takes longer
than half a second; in a pipe or a file there are no bars and no colour, and a row is a line.
`taskvec VERB --help`, `-h` or `taskvec help VERB` lists the options of a verb, `taskvec --version`
prints the version.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a known failure, described in one line |
| 2 | the command line or the recipe is wrong |
| 3 | finished but incomplete: `verify` could not check something, no candidate of `search` keeps \
what must be kept, `forget` would change nothing |
| 130 | interrupted |
| 143 | terminated, by SIGTERM |

Every verb has `-q`, `--quiet` (no progress bars, no notes) and `-v`, `--verbose` (every step on
standard error, with bytes and time); every verb that gives a result has `--json`.

## Options that several verbs share
"""
_ABOUT = {
    options.FAMILY_HEAD: """\
They stand for a recipe, or change one: beside a recipe they replace what it has, key by key.
`--task` replaces the whole entry of that task, `--include` and `--exclude` the whole list. Another
`--method` drops the recipe's parameters of the old one. `--set` is checked as a recipe is; an error
about a flag names the flag. Paths are relative to the current folder. MODEL may be anything that is
[a model](../how-to/model-sources.md).""",
}
_TAIL = """\
## Environment

| variable | meaning |
|---|---|
| `TASKVEC_CACHE` | folder of cached scans; default `taskvec` in `$XDG_CACHE_HOME` or `~/.cache` |
| `NO_COLOR` | no colour, if set |
| `OPENAI_API_KEY` | key of an endpoint that judges; sent nowhere else and written \
nowhere. Other `OPENAI_*` variables have no effect |
| `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT` … | huggingface_hub's own, for [names on \
the hub](../how-to/model-sources.md#names-on-the-hub) |
| `NUMBA_CACHE_DIR` | numba's own: where compiled kernels are cached |
"""
_PIPE = ("|", "\\|")  # in a cell of a table
SHARED: dict[str, Sequence[Option]] = {
    options.FAMILY_HEAD: options.FAMILY,
    options.OUTPUT_HEAD: options.OUTPUT,
    options.RUNNING_HEAD: options.RUNNING,
    evaluating.DATA_HEAD: evaluating.DATA,
    evaluating.ASKING_HEAD: evaluating.ASKING,
    evaluating.SCORING_HEAD: evaluating.SCORING,
    options.DATA_HEAD: options.READING,
}


def reference_page() -> str:
    """`docs/reference/cli.md`."""
    group = make_group()
    context = click.Context(group, info_name="taskvec")
    verbs = {name: group.get_command(context, name) for name in VERBS}
    parts = [_HEAD]
    for heading, shared in SHARED.items():
        users = [name for name, verb in verbs.items() if verb and _shares(verb.params, shared)]
        names = ", ".join(f"`{name}`" for name in users)
        parts.append(f"### {heading}\n\nVerbs: {names}.\n")
        if heading in _ABOUT:
            parts.append(f"{_ABOUT[heading]}\n")
        parts.append(_table(shared))
    for name, verb in verbs.items():
        assert isinstance(verb, Verb)
        parts += _verb(name, verb, context)
    return "\n".join([*parts, _TAIL])


def _verb(name: str, verb: Verb, parent: click.Context) -> Iterator[str]:
    context = click.Context(verb, info_name=name, parent=parent)
    arguments = [p for p in verb.params if isinstance(p, Argument)]
    pieces = [argument.make_metavar(context) for argument in arguments]
    yield f"## `{' '.join(['taskvec', name, *pieces])}`\n"
    yield f"{verb.help}{_needs(verb)}\n"
    if verb.page:
        yield f"{verb.page}\n"
    own = [p for p in verb.params if isinstance(p, Option)]
    taken = []
    for heading, shared in SHARED.items():
        if _shares(own, shared):
            own = [option for option in own if option not in shared]
            taken.append(heading)
    own = [option for option in own if not {"--quiet", "--verbose"} & set(option.opts)]
    if taken:
        links = ", ".join(f"[{h.lower()}](#{h.lower().replace(' ', '-')})" for h in taken)
        yield textwrap.fill(f"Shared options: {links}.", 100) + "\n"
    if own:
        yield _table(own)


def _shares(own: Sequence[click.Parameter], shared: Sequence[Option]) -> bool:
    """Whether a verb has a group of options; it may give a meaning of its own to some flags."""
    lacking = [option for option in shared if option not in own]
    names = {option.name for option in own}
    return len(lacking) < len(shared) and all(option.name in names for option in lacking)


def _needs(verb: Verb) -> str:
    return f" Needs the extra `{verb.extra}`." if verb.extra else ""


def _table(shared: Sequence[Option]) -> str:
    rows = [f"| {_flags(option)} | {_meaning(option)} |" for option in shared]
    return "\n".join(["| option | meaning |", "|---|---|", *rows, ""])


def _flags(option: Option) -> str:
    value = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
    flags = sorted([*option.opts, *option.secondary_opts], key=len)
    return ", ".join(f"`{flag}{value}`" for flag in flags).replace(*_PIPE)


def _meaning(option: Option) -> str:
    return f"{option.help}{'; ' + option.more if option.more else ''}".replace(*_PIPE)
