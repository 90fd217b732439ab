"""What was measured, kept as it comes: a run with the same key goes on from it.

A file of JSON lines, named by the key; other settings have other files. A last line that a crash
cut short is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from taskvec import documents
from taskvec.errors import OutputError
from taskvec.files import write_whole


def key_of(parts: object) -> str:
    """Digest of JSON data that a run depends on."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())[:16]


@dataclass(slots=True)
class Records:
    """Measurements by name.

    Attributes:
        path: Of the file; None: nothing is written.
        kept: What is there.
    """

    path: Path | None
    kept: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a measurement.

        Raises:
            OutputError: the file cannot be written.
        """
        self.kept[name] = value
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, "value": value}) + "\n")
        except OSError as error:
            text = error.strerror or error
            raise OutputError(f"{self.path}: cannot be written: {text}") from error


def open_records(folder: Path | None, what: str, key: str) -> Records:
    """The measurements of an earlier run with the same key, and the file that more are added to.

    Args:
        folder: Made if it is not there; None: nothing is kept.
        what: Beginning of the file's name.
        key: Of `key_of`.

    Raises:
        OutputError: the file cannot be written.
    """
    if folder is None:
        return Records(None)
    path = folder / f"{what}.{key}.jsonl"
    kept: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = ""
        if os.path.lexists(path):
            text = documents.read_text(path, documents.MEASURED, OutputError)
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            kept[entry["name"]] = entry["value"]
        whole = "".join(json.dumps({"name": n, "value": v}) + "\n" for n, v in kept.items())
        if whole != text:  # what a crash cut short must not stand before what is added
            write_whole(path, whole.encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    return Records(path, kept)


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite: JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value
