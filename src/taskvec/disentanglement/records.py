"""Measurements that are stored as they come: a run with the same key continues from them.

The journal is named by the key, so that other settings have other files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from taskvec.files import writing
from taskvec.journal import Journal


def key_of(parts: object) -> str:
    """Digest of JSON data that a run depends on."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())[:16]


@dataclass(slots=True)
class Records:
    """Measurements by name.

    Attributes:
        journal: Where they are stored; None: nowhere.
        known: What is there.
    """

    journal: Journal | None
    known: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Mapping[str, Any]) -> None:
        """Store a measurement.

        Raises:
            OutputError: the file cannot be written.
        """
        self.known[name] = value
        if self.journal is not None:
            self.journal.add({"name": name, "value": value})


def open_records(folder: Path | None, what: str, key: str) -> Records:
    """The measurements of an earlier run with the same key, and the file that more are added to.

    Args:
        folder: Made if it is not there; None: nothing is stored.
        what: Beginning of the file's name.
        key: Of `key_of`.

    Raises:
        OutputError: the file cannot be written.
    """
    if folder is None:
        return Records(None)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / f"{what}.{key}.jsonl")
    return Records(journal, {entry["name"]: entry["value"] for entry in journal.resume()})
