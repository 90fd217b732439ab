"""The flags that say how data of a task are read, of the verbs that train on them or measure."""

from __future__ import annotations

import argparse
from typing import Any

from taskvec.errors import UsageError


def add_reading(group: Any) -> None:
    """The flags about the form of data, for an argument group."""
    group.add_argument(
        "--format", metavar="KIND", help="text | chat | classes | lines | folder | npz | idx"
    )
    group.add_argument(
        "--fields",
        metavar="USE=NAME,…",
        help="names of fields: messages, prompt, response, text, image, label",
    )


def fields_from(args: argparse.Namespace) -> dict[str, str]:
    """Names of fields by use.

    Raises:
        UsageError: an entry is not USE=NAME.
    """
    return dict(_pair(text) for text in (args.fields or "").split(",") if text)


def _pair(text: str) -> tuple[str, str]:
    use, _, name = text.partition("=")
    if not use or not name:
        raise UsageError(f"--fields must be USE=NAME,…; got {text!r}")
    return use, name
