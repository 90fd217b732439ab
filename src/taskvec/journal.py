"""Journals: JSON lines that are added one by one, so that an interrupted run can continue.

A crash or a full disk can cut off the last line only. Lines that are not whole are left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.files import write_text, writing


@dataclass(frozen=True, slots=True)
class Journal:
    """A file of JSON objects, one per line."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """The entries; empty if the file does not exist."""
        try:
            with open(documents.open_regular(self.path), "rb") as file:  # noqa: PTH123
                lines = file.read().split(b"\n")
        except OSError:
            return []
        return [entry for line in lines if (entry := _parse(line)) is not None]

    def resume(self) -> list[dict[str, Any]]:
        """The entries, after a line that was cut off is removed, so that more can be added.

        Raises:
            OutputError: the file cannot be written.
        """
        with writing(self.path):
            cut_unfinished_line(self.path)
        return self.read()

    def begin(self, entries: Iterable[Mapping[str, Any]] = ()) -> None:
        """Replace the file with these entries; if that fails, the old one stays.

        Raises:
            OutputError: the file cannot be written.
        """
        write_text(self.path, "".join(map(_line, entries)))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry.

        Raises:
            OutputError: the file cannot be written.
        """
        with writing(self.path), self.path.open("ab") as file:
            file.write(_line(entry).encode())


def cut_unfinished_line(path: Path) -> None:
    """Remove the text after the last line feed of a file, if the file exists."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) in (b"", b"\n"):
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
    os.truncate(path, whole)


def finite(value: Any) -> Any:
    """A value as JSON has it: None for every number that is not finite.

    What has a `to_json` says that itself; other dataclasses become their fields, arrays lists, and
    what JSON lacks its text.
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return fields_to_json(value)
    if hasattr(value, "tolist"):  # arrays and their numbers
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [finite(each) for each in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)


def fields_to_json(value: Any, *, without: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, except some, as JSON types."""
    names = [field.name for field in fields(value) if field.name not in without]
    return {name: finite(getattr(value, name)) for name in names}


def _line(entry: Mapping[str, Any]) -> str:
    text = json.dumps(dict(entry), ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(dict(entry)) + "\n"
    return text


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
