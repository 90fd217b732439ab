"""Declarations of verbs and options on top of Click: lazy verbs, grouped help, hints.

An option is declared once. Its flags, the Python keyword it becomes (`Option.name`), its help and
its line on the reference page all come from that declaration.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from keyword import iskeyword
from types import SimpleNamespace
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from taskvec.cli.streams import say
from taskvec.cli.verbs import VERBS
from taskvec.errors import MissingExtraError, UsageError, nearest

Arguments = SimpleNamespace  # values of a command line, by the names of its options

COMPLETE = "_TASKVEC_COMPLETE"  # set by the completion scripts
GENERAL = "General"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class WholeNumber(click.IntRange):
    """A whole number within bounds; Click would call it an "integer range" in messages."""

    name = "whole number"


class Option(click.Option):
    """A flag with the heading it is listed under.

    Attributes:
        heading: In the help of a verb; a group that several verbs share has its own in the page.
        words: Values that shells complete and the help lists; what reads the value checks it.
        more: Markdown after the help text in the page, such as a link.
        shown: The default as the help shows it; where no value is given, Python's default holds.
    """

    def __init__(
        self, *flags: str, heading: str = "Options", words: Sequence[str] = (), more: str = "",
        **attributes: Any,
    ) -> None:  # fmt: skip
        self.heading, self.words, self.more = heading, tuple(words), more
        self.shown = default = attributes.pop("show_default", None) or attributes.get("default")
        if isinstance(attributes.get("type"), click.Choice):
            words = attributes["type"].choices
        if words:
            attributes["help"] += f": {' | '.join(words)}"
            attributes.setdefault("metavar", "WORD")
        if default is not None:
            attributes["help"] += f"; default: {default}"
        super().__init__(flags, show_default=False, **attributes)

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Nothing behind the help text, except that an option is required."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete one of the words, or what the type of the value knows."""
        if self.words:
            return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]
        return super().shell_complete(ctx, incomplete)


class Argument(click.Argument):
    """A positional argument with a help text."""

    def __init__(self, name: str, *, help: str, **attributes: Any) -> None:
        attributes.setdefault("type", click.Path())
        super().__init__([name], **attributes)
        self.text = help


class Verb(click.Command):
    """A verb: its arguments, its options, and the function that runs it.

    Attributes:
        page: Markdown below the summary in the reference page.
        extra: The extra of taskvec that it needs.
        streams: Whether it makes many small objects without cycles. With 20,000 tensors, looking
            for cycles among them took a third of the time of a merge.
    """

    def __init__(
        self, name: str, run: Callable[[Arguments], int], params: Sequence[click.Parameter], *,
        page: str = "", extra: str | None = None, streams: bool = False,
    ) -> None:  # fmt: skip
        self.run, self.page, self.extra, self.streams = run, page, extra, streams
        summary = VERBS[name]
        super().__init__(
            name,
            context_settings=_SETTINGS,
            callback=self._call,
            params=[*params, *_GENERAL],
            help=f"{summary[0].upper()}{summary[1:]}.",
            options_metavar="[OPTIONS]",
        )

    def _call(self, **values: Any) -> int:
        if self.streams:
            gc.disable()
        try:
            return self.run(Arguments(**values))
        except ModuleNotFoundError as error:
            module = (error.name or "").split(".")[0]
            if self.extra is None or module in ("", "taskvec"):
                raise
            raise MissingExtraError(
                f"{module} is not installed; this needs: pip install 'taskvec[{self.extra}]'"
            ) from error

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """`-h`, `--help`."""
        return _HELP

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write arguments and options, each under its heading."""
        lines: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, Argument):
                lines.setdefault("Arguments", []).append((param.make_metavar(ctx), param.text))
            elif (record := param.get_help_record(ctx)) is not None:
                lines.setdefault(heading_of(param), []).append(record)
        lines[GENERAL] = lines.pop(GENERAL)  # last
        for heading, records in lines.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=28)


def given_of(args: Arguments, options: Sequence[Option]) -> dict[str, Any]:
    """The values of some options that were given, by name."""
    values = {option.name: getattr(args, str(option.name)) for option in options}
    return {str(name): value for name, value in values.items() if value is not None}


def heading_of(param: click.Parameter) -> str:
    """Where an option is listed."""
    return param.heading if isinstance(param, Option) else GENERAL


def _help(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print(ctx.get_help())  # click's echo would write UTF-8 to a stream of another encoding
        ctx.exit()


_HELP = Option(
    "-h", "--help", is_flag=True, is_eager=True, expose_value=False, callback=_help,
    heading=GENERAL, help="show this message and exit",
)  # fmt: skip
_GENERAL = (
    Option("-q", "--quiet", is_flag=True, heading=GENERAL, help="no progress bars, no notes"),
    Option(
        "-v", "--verbose", is_flag=True, heading=GENERAL,
        help="log every step to standard error, with bytes and time",
    ),
)  # fmt: skip
JSON = Option("--json", is_flag=True, heading=GENERAL, help="print the result as JSON")


class Verbs(click.Group):
    """All verbs; a verb's module is imported when the verb is called."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """`-h`, `--help`."""
        return _HELP

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of a name."""
        if cmd_name not in VERBS:
            return None
        module = import_module(f"taskvec.cli.{cmd_name}{'_' * iskeyword(cmd_name)}")
        command: Verb = module.VERB
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb of a command line, or the closest one in an error."""
        if not args[0].startswith("-") and args[0] not in VERBS:
            ctx.fail(f"unknown verb {args[0]!r}; {nearest(args[0], list(VERBS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a verb, without importing any."""
        return [CompletionItem(v, help=VERBS[v]) for v in VERBS if v.startswith(incomplete)]


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        print(f"taskvec {version('taskvec')}")
        ctx.exit()


def make_group() -> Verbs:
    """The command `taskvec`."""
    return Verbs(
        "taskvec",
        context_settings=_SETTINGS,
        help="Task arithmetic for real checkpoints: add or remove skills without training.",
        subcommand_metavar="VERB [ARGUMENTS]",
        options_metavar="",
        params=[
            click.Option(
                ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version,
                help="show name and version, then exit",
            )
        ],
    )  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the result is the exit code.

    Raises:
        TaskvecError: a verb failed as foreseen.
    """
    group = make_group()
    if COMPLETE in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(group, {}, "taskvec", COMPLETE, os.environ[COMPLETE])
    try:
        with group.make_context("taskvec", list(arguments)) as context:
            return int(group.invoke(context) or 0)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        say(f"error: {' '.join(error.format_message().split())}", "red")
        where = getattr(error, "ctx", None)
        if where is not None:
            say(f"usage: {' '.join(where.command.collect_usage_pieces(where))}".replace(
                "usage:", f"usage: {where.command_path}"))  # fmt: skip
        return error.exit_code


def misuse(text: str) -> NoReturn:
    """Fail with a line about the command line, and the usage of the verb.

    Raises:
        click.UsageError: always.
    """
    raise click.UsageError(text, click.get_current_context())


def pairs_of(texts: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """Right side by left side of texts of the form LEFT=RIGHT.

    Raises:
        UsageError: one is not of that form, or a left side is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        left, _, right = text.partition("=")
        if not left or not right:
            raise UsageError(f"{flag} takes {form}; got {text!r}")
        if left in found:
            raise UsageError(f"{flag} {left} is given twice; give each a name of its own")
        found[left] = right
    return found


def split_paths(
    paths: Sequence[str], out: str | None, *, has_family: bool
) -> tuple[str | None, str]:
    """Recipe (if one is given) and output, from positional arguments and `--out`.

    Args:
        paths: `[RECIPE] OUT`, or `[RECIPE]` where `--out` is given.
        out: Value of `--out`.
        has_family: Whether flags describe a family, so that no recipe is needed.

    Raises:
        click.UsageError: OUT is missing, or there is a path too many.
    """
    most = 2 if out is None else 1
    if len(paths) > most:
        wanted = "[RECIPE] OUT" if out is None else "[RECIPE] beside --out"
        misuse(f"expected {wanted}; got {len(paths)} paths: {', '.join(map(repr, paths))}")
    if out is not None:
        return (paths[0] if paths else None), out
    if len(paths) == 2:
        return paths[0], paths[1]
    if not paths:
        misuse("OUT is missing: give the path to write")
    if _is_recipe(paths[0]) or (not has_family and os.path.isfile(paths[0])):  # noqa: PTH113
        misuse(f"OUT is missing: {paths[0]} is a recipe; give the path to write after it")
    return None, paths[0]


def _is_recipe(path: str) -> bool:
    return path.endswith((".yaml", ".yml", ".json"))
