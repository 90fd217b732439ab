"""Data of tasks: rows of local files, or of data sets on the hub.

Files are JSON, JSON lines, CSV, TSV, plain text or Parquet, also gzipped (`.gz`). A row knows where
it is from, so that an error about a missing field names file and line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.errors import DataError
from taskvec.extras import require


@dataclass(frozen=True, slots=True)
class HubData:
    """A data set on the Hugging Face hub.

    Attributes:
        name: `org/name`.
        config: One of its configurations; None for the only one.
        split: Such as `test`.
        gated: Whether its owner must grant access first.
    """

    name: str
    config: str | None
    split: str
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.config})' if self.config else ''}, split {self.split}"


@dataclass(frozen=True, slots=True)
class DataFile:
    """What a task reads.

    Attributes:
        role: What the task calls it, such as `test` or `train`.
        names: Paths under a data folder, shell patterns allowed; those of the first that fits any.
        hub: Where else it is to be had; None: nowhere.
        optional: Whether the task can do without it.
    """

    role: str
    names: tuple[str, ...]
    hub: HubData | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class DataRow:
    """One row of data.

    Attributes:
        data: Fields by name.
        where: File and line, or data set and row, for messages.
        file: Name of the file without its ending; empty for the hub.
    """

    data: Mapping[str, Any]
    where: str
    file: str = ""

    def text(self, *keys: str) -> str:
        """The text under the first of these keys that is there.

        Raises:
            DataError: there is none, or it is no text.
        """
        value = self._value(keys)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {keys[0]!r} must be a text; got {_shorten(value)}")
        self._check_encodes(keys[0], value)
        return value

    def number(self, *keys: str) -> int:
        """The whole number under the first of these keys that is there; digits count as one.

        Raises:
            DataError: there is none, or it is no whole number.
        """
        value = self._value(keys)
        if isinstance(value, str) and value.strip().isdecimal():
            return int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(
                f"{self.where}: {keys[0]!r} must be a whole number; got {_shorten(value)}"
            )
        return value

    def texts(self, *keys: str) -> list[str]:
        """The list of texts under the first of these keys that is there.

        Raises:
            DataError: there is none, or it is no list of texts.
        """
        value = self._value(keys)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise DataError(
                f"{self.where}: {keys[0]!r} must be a list of texts; got {_shorten(value)}"
            )
        for text in value:
            self._check_encodes(keys[0], text)
        return value

    def _check_encodes(self, key: str, text: str) -> None:
        """Refuse half of a surrogate pair, which JSON can say and no tokenizer reads."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where}: {key!r} holds half of a surrogate pair, at character {error.start}"
            ) from error

    def _value(self, keys: Sequence[str]) -> Any:
        for key in keys:
            if key in self.data:
                return self.data[key]
        wanted = " or ".join(repr(key) for key in keys)
        raise DataError(f"{self.where}: has no {wanted}; its fields: {', '.join(self.data)}")


@dataclass(frozen=True, slots=True)
class DataPlaces:
    """Where the user says that data lie.

    Attributes:
        folders: Searched in this order.
        by_task: A file or folder for one task alone.
        hub: Whether the hub is asked for what is not found.
    """

    folders: tuple[Path, ...] = ()
    by_task: Mapping[str, Path] = field(default_factory=dict)
    hub: bool = True


def rows_of(task: str, files: Sequence[DataFile], places: DataPlaces) -> dict[str, list[DataRow]]:
    """The rows that a task reads, by role.

    Raises:
        DataError: a file is not there, cannot be read or has no rows.
        MissingExtraError: the hub is needed, and datasets is not installed.
    """
    found: dict[str, list[DataRow]] = {}
    for file in files:
        # What is optional is not fetched where the rest lies in files: the same command would ask
        # something else with a network than without.
        is_local = bool(found) and bool(found[files[0].role][0].file)
        hub = places.hub and not (file.optional and is_local)
        found[file.role] = _rows(task, file, replace(places, hub=hub), first=file is files[0])
    return found


def _rows(task: str, file: DataFile, places: DataPlaces, *, first: bool) -> list[DataRow]:
    given = places.by_task.get(task)
    if given is not None and not given.exists():
        raise DataError(f"task {task!r}: {given} is not there; it was given by --data {task}=…")
    if given is not None and given.is_file() and first:
        return _read_all([given])
    tried: list[Path] = []
    folders = [] if given is None else [given if given.is_dir() else given.parent]
    for folder in [*folders, *places.folders]:
        for name in file.names:
            for pattern in dict.fromkeys((name, Path(name).name)):
                found = sorted(path for path in folder.glob(pattern) if path.is_file())
                if found:
                    return _read_all(found)
                tried.append(folder / pattern)
    if file.hub is not None and places.hub and not (given and first):
        return _from_hub(task, file.hub)
    if file.optional:
        return []
    looked = f"; looked for {', '.join(map(str, tried[:4]))}" if tried else ""
    raise DataError(
        f"task {task!r} has no {file.role} data{looked}; "
        f"give a folder with {file.names[0]!r} in it by --data DIR, or --data {task}=FILE"
    )


def _read_all(paths: Sequence[Path]) -> list[DataRow]:
    rows = [row for path in paths for row in read_rows(path)]
    if not rows:
        raise DataError(f"{paths[0]}: has no rows")
    return rows


def read_rows(path: Path) -> list[DataRow]:
    """All rows of one file; see the module for the kinds.

    A plain text is one row with the field `text`; so is a JSON object, with its own fields.

    Raises:
        DataError: it cannot be read as what its name says.
    """
    name = path.name.removesuffix(".gz")
    kind = Path(name).suffix.lower()
    stem = Path(name).stem
    if kind == ".parquet":
        parquet = require("pyarrow.parquet", "data")
        try:
            with open(documents.open_regular(path), "rb") as file:  # noqa: PTH123 (a descriptor)
                frames = parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        return [DataRow(data, f"{path}, row {i}", stem) for i, data in enumerate(frames)]
    raw = documents.read_bytes(path, documents.DATA, DataError)
    if path.suffix == ".gz":
        raw = documents.unzip(raw, documents.DATA, str(path), DataError)
    text = documents.decode(raw, str(path), DataError)
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".tsv": _csv}
    if kind in readers:
        return [DataRow(data, where, stem) for data, where in readers[kind](path, text)]
    return [DataRow({"text": text}, str(path), stem)] if text else []


def _json(path: Path, text: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A list of objects or one object; or, as some call `.json` too, an object in every line."""
    if _is_lines(text):
        yield from _json_lines(path, text)
        return
    value = _parse(text, str(path))
    values = value if isinstance(value, list) else [value]
    for i, each in enumerate(values):
        yield _object(each, f"{path}, row {i}")


def _json_lines(path: Path, text: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(_parse(line, where), where)


def _is_lines(text: str) -> bool:
    """Whether a value ends in the first line and another one follows."""
    first, _, rest = text.strip().partition("\n")
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, where: str) -> Any:
    return documents.parse_json(text, documents.DATA, where, DataError)


def _object(value: object, where: str) -> tuple[Mapping[str, Any], str]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a JSON object; got {_shorten(value)}")
    return value, where


def _csv(path: Path, text: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    delimiter = "\t" if Path(path.name.removesuffix(".gz")).suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for data in reader:
            where = f"{path}, line {reader.line_num}"
            if None in data or None in data.values():
                raise DataError(
                    f"{where}: has another number of fields than the {len(reader.fieldnames or ())}"
                    " of the first line"
                )
            yield data, where
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: is not CSV: {error}") from error


def _from_hub(task: str, hub: HubData) -> list[DataRow]:
    try:
        return read_hub(hub, "--data")
    except DataError as error:
        raise DataError(f"task {task!r}: {error}") from error


def read_hub(hub: HubData, remedy: str) -> list[DataRow]:
    """Rows of a data set, through the datasets library and its cache.

    Args:
        hub: Which.
        remedy: What says where local files lie.

    Raises:
        DataError: it cannot be loaded.
        MissingExtraError: datasets is not installed.
    """
    datasets = require("datasets", "data")
    try:
        loaded = datasets.load_dataset(
            hub.name, hub.config, split=hub.split, trust_remote_code=False
        )
    except Exception as error:  # the library raises what its many back ends raise
        gated = "; access must be asked for on its page" if hub.gated else ""
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"data set {hub} cannot be loaded from the hub: {text}{gated}; "
            f"or give local files by {remedy}"
        ) from error
    return [DataRow(dict(data), f"{hub.name}, row {i}") for i, data in enumerate(loaded)]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
