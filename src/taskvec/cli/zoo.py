"""`taskvec zoo`: the tiny models that ship with taskvec."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from taskvec.cli import common
from taskvec.errors import OutputError, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument("action", choices=("list", "path", "copy"), help="what to do")
    parser.add_argument("names", metavar="NAME", nargs="*", help="members (copy: default all)")
    parser.add_argument("--to", metavar="DIR", help="copy: folder that gets one folder a member")
    parser.add_argument("--json", action="store_true", help="list as JSON")


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    from taskvec import zoo

    names = args.names or list(zoo.MEMBERS)
    if args.action == "copy":
        return _copy(names, args.to)
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
        print(json.dumps(rows))
    else:
        common.show([(r["name"], r["parent"] or "–", r["summary"]) for r in rows],
                    ("member", "tuned from", ""))  # fmt: skip
    return 0


def _copy(names: list[str], to: str | None) -> int:
    from taskvec import zoo

    if to is None:
        raise UsageError("copy needs --to DIR")
    for name in names:
        target = Path(to) / name
        if target.exists():
            raise OutputError(f"{target}: exists already; remove it or copy elsewhere")
        draft = target.with_name(f".{name}.{os.getpid()}")
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
