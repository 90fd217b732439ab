"""`taskvec zoo`: the tiny models that ship with taskvec."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from taskvec.cli.commands import JSON, Argument, Arguments, Option, Verb
from taskvec.cli.printing import answer, show
from taskvec.errors import OutputError, UsageError


def run(args: Arguments) -> int:
    """Run this verb."""
    from taskvec import zoo

    names = list(args.names or zoo.MEMBERS)
    if args.action == "copy":
        return _copy(names, args.out)
    if args.action == "path":
        for name in names:
            print(zoo.path(name))
        return 0
    paths = [str(zoo.path(name)) for name in names]
    rows = [
        {"name": name, "path": path, "parent": member.parent, "summary": member.summary}
        for name, path in zip(names, paths, strict=True)
        for member in [zoo.MEMBERS[name]]
    ]
    if args.json:
        answer(rows)
    else:
        show(
            [(r["name"], r["parent"] or "–", r["summary"]) for r in rows],
            ("member", "tuned from", ""),
        )
    return 0


def _copy(names: list[str], to: str | None) -> int:
    from taskvec import zoo

    if to is None:
        raise UsageError("copy needs --to DIR")
    for name in names:
        target = Path(to) / name
        if target.exists():
            raise OutputError(f"{target}: exists already; remove it or copy elsewhere")
        draft = target.with_name(f".{name}.taskvec-{os.getpid()}")
        try:
            shutil.copytree(zoo.path(name), draft)
            draft.rename(target)
        except OSError as error:
            why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
            raise OutputError(f"{target}: cannot be written: {why}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        print(target)
    return 0


VERB = Verb(
    "zoo", run, [
        Argument("action", type=click.Choice(("list", "path", "copy")), metavar="ACTION",
                 help="list, path (print the folders inside the package) or copy"),
        Argument("names", nargs=-1, type=str, metavar="[NAME]…", help="members; all by default"),
        Option("-o", "--out", "--to", "out", type=click.Path(), metavar="DIR",
               help="copy: folder that gets one folder a member; none of them may exist"),
        JSON,
    ],
)  # fmt: skip
