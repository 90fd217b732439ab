"""Data to train on: files, folders and data sets of the hub, as texts, conversations or classes.

The format follows from the name and, for rows, from their fields:

```text
text      running text: .txt, or rows with a text and no label
chat      rows with a prompt and a response, or with messages of roles and contents
classes   rows with a text and a label
lines     a label, a space and a text in every line; never guessed
folder    a folder for each class, with images in it
npz       arrays of images and labels, such as train_x and train_y
idx       …images-idx3-ubyte[.gz], with …labels-idx1-ubyte[.gz] beside it
hub:NAME[:CONFIG[:SPLIT]]   a data set of the hub, with rows as above or with images
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from taskvec import documents
from taskvec.errors import DataError, UsageError
from taskvec.evaluation.data import DataRow, HubData, read_hub, read_rows
from taskvec.running.requests import Message
from taskvec.training.images import (
    IMAGE_NAMES,
    Images,
    as_pixels,
    labels_beside,
    read_folder,
    read_idx,
    read_npz,
)

FORMATS = ("text", "chat", "classes", "lines", "folder", "npz", "idx")
HUB = "hub:"
# Fields by what they are for, the first that is there; `--fields` names others.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "query"),
    "response": ("response", "completion", "answer", "output"),
    "text": ("text", "sentence", "content"),
    "image": ("image", "img"),
    "label": ("label", "labels", "class", "target"),
}
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read data.

    Attributes:
        format: One of `FORMATS`; None: detected from the name and the fields.
        fields: Names of fields, or of arrays of an npz, by use; see `FIELDS`.
        limit: Most examples, drawn by the seed; None: all.
        seed: Of what is drawn.
    """

    format: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Fields by what they are for, in the order in which they are looked for."""
        return FIELDS | {use: (name,) for use, name in self.fields.items()}


@dataclass(frozen=True, slots=True)
class Documents:
    """Running text.

    Attributes:
        items: The texts.
        where: What messages call the data.
        digest: Of its content.
    """

    items: Sequence[str]
    where: str
    digest: str


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations whose answers are learned.

    Attributes:
        items: Messages of each.
        places: Where each stands, for messages.
        where: What messages call the data.
        digest: Of its content.
    """

    items: Sequence[tuple[Message, ...]]
    places: Sequence[str]
    where: str
    digest: str


@dataclass(frozen=True, slots=True)
class Classified:
    """Texts or images of classes.

    Attributes:
        items: Texts; or images, arrays of uint8 and shape (height, width) or (height, width, 3).
        labels: From 0.
        classes: Names of the classes; those of whole numbers are their digits.
        kind: `text` or `image`.
        where: What messages call the data.
        digest: Of its content.
    """

    items: Sequence[Any]
    labels: Sequence[int]
    classes: Sequence[str]
    kind: str
    where: str
    digest: str


Data = Documents | Conversations | Classified


def read_data(source: str | Path, reading: Reading = Reading()) -> Data:
    """Read data of any format.

    Args:
        source: A file, a folder, or `hub:NAME[:CONFIG[:SPLIT]]`.
        reading: How.

    Raises:
        UsageError: the format cannot be detected, or is unknown.
        DataError: it is not there, cannot be read, or holds nothing.
    """
    if reading.format is not None and reading.format not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}; got {reading.format!r}")
    unknown = sorted(reading.fields.keys() - FIELDS.keys())
    if unknown:
        raise UsageError(f"fields: unknown {unknown[0]!r}; use {', '.join(FIELDS)}")
    if str(source).startswith(HUB):
        data = _from_hub(str(source), reading)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(f"{source}: no such file or folder")
        data = _from_path(path, reading)
    if not len(data.items):
        raise DataError(f"{source}: holds no examples")
    return limit_data(data, reading.limit, reading.seed)


def inputs_of(source: str | Path) -> list[Path]:
    """Files and folders that data are read from."""
    return [] if str(source).startswith(HUB) else [Path(source).expanduser()]


def limit_data(data: Data, limit: int | None, seed: int) -> Data:
    """At most that many examples, drawn with the seed, in their order."""
    if limit is None or len(data.items) <= limit:
        return data
    if limit < 1:
        raise UsageError(f"limit must be above 0; got {limit}")
    rows = np.random.default_rng([seed, limit]).permutation(len(data.items))[:limit]
    return pick(data, sorted(rows.tolist()))


def hold_out(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Training and validation examples; a share of the data, drawn with the seed, is held out."""
    if not 0 < share < 1:
        raise UsageError(f"a share for validation must be between 0 and 1; got {share}")
    count = round(len(data.items) * share)
    if count in (0, len(data.items)):
        raise DataError(f"{data.where}: has too few examples to hold out {share:.0%} of them")
    rows = np.random.default_rng([seed, 1]).permutation(len(data.items)).tolist()
    return pick(data, sorted(rows[count:])), pick(data, sorted(rows[:count]))


def pick(data: Data, rows: Sequence[int]) -> Data:
    """Some examples."""
    digest = xxhash.xxh3_128_hexdigest(f"{data.digest} {list(rows)}".encode())
    picked: Any = [data.items[i] for i in rows]
    if isinstance(data, Documents):
        return replace(data, items=picked, digest=digest)
    if isinstance(data, Conversations):
        places = [data.places[i] for i in rows]
        return replace(data, items=picked, places=places, digest=digest)
    return replace(data, items=picked, labels=[data.labels[i] for i in rows], digest=digest)


def _from_path(path: Path, reading: Reading) -> Data:
    kind = reading.format or _kind(path)
    if kind == "folder":
        return _images(read_folder(path), path, _files(path))
    if kind == "npz":
        found = read_npz(path, reading.fields.get("image"), reading.fields.get("label"))
        return _images(found, path, [path])
    if kind == "idx":
        return _images(read_idx(path), path, [path, labels_beside(path)])
    if path.is_dir():
        raise DataError(f"{path}: is a folder, which cannot be read as {kind}; give a file")
    digest = _digest([path])
    if kind == "lines":
        return _lines(path, digest)
    return _from_rows(read_rows(path), replace(reading, format=kind or None), str(path), digest)


def _images(found: Images, path: Path, files: Sequence[Path]) -> Classified:
    return Classified(found.items, found.labels, found.classes, "image", str(path), _digest(files))


def _kind(path: Path) -> str:
    """The format of a path by its name; empty if it depends on the rows."""
    if path.is_dir():
        return "folder"
    name = path.name.lower().removesuffix(".gz")
    kinds = {".npz": "npz", ".txt": "text", ".jsonl": "", ".json": "", ".csv": "", ".tsv": ""}
    if re.search(r"idx3|-ubyte$", name):
        return "idx"
    kind = {**kinds, ".parquet": ""}.get(Path(name).suffix)
    if kind is None:
        raise UsageError(f"{path}: unknown format; give --format {' | '.join(FORMATS)}")
    return kind


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_NAMES)


def _digest(paths: Sequence[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{path.parent.name}/{path.name}\0".encode())
        try:
            with open(documents.open_regular(path), "rb") as file:  # noqa: PTH123 (a descriptor)
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def hub_data(source: str) -> HubData:
    """The data set that `hub:NAME[:CONFIG[:SPLIT]]` names.

    Raises:
        UsageError: it is not of that form.
    """
    name, config, split, *more = [*source.removeprefix(HUB).split(":"), "", ""][:4]
    if not name or any(more):
        raise UsageError(f"{source}: must be hub:NAME[:CONFIG[:SPLIT]]")
    return HubData(name, config or None, split or "train")


def _from_hub(source: str, reading: Reading) -> Data:
    rows = read_hub(hub_data(source), "--data")
    if not rows:
        return Documents([], source, "")
    digest = xxhash.xxh3_128()
    for row in rows:
        for key, value in sorted(row.data.items()):
            pixels = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
            digest.update(key.encode() + pixels)
    return _from_rows(rows, reading, source, digest.hexdigest())


def _from_rows(rows: Sequence[DataRow], reading: Reading, where: str, digest: str) -> Data:
    """Rows by their fields."""
    if not rows:
        return Documents([], where, digest)
    names = reading.names
    there = {use for use, known in names.items() if any(name in rows[0].data for name in known)}
    kind = reading.format or _kind_of_rows(there, rows[0], where)
    if kind == "text":
        return Documents([row.text(*names["text"]) for row in rows], where, digest)
    if kind == "chat":
        talks = [_conversation(row, names, from_messages="messages" in there) for row in rows]
        return Conversations(talks, [row.where for row in rows], where, digest)
    if kind != "classes":
        raise UsageError(f"{where}: has rows, which cannot be read as {kind}")
    labels, classes = _labels(rows, names["label"], where)
    if "image" in there:
        images = [_pixels(row, names["image"]) for row in rows]
        return Classified(images, labels, classes, "image", where, digest)
    texts = [row.text(*names["text"], *names["prompt"]) for row in rows]
    return Classified(texts, labels, classes, "text", where, digest)


def _kind_of_rows(there: set[str], row: DataRow, where: str) -> str:
    if "messages" in there or {"prompt", "response"} <= there:
        return "chat"
    if "label" in there and there & {"text", "image", "prompt"}:
        return "classes"
    if "text" in there:
        return "text"
    raise UsageError(
        f"{where}: no known combination of fields ({', '.join(row.data)}); name them, for example "
        "--fields prompt=NAME,response=NAME"
    )


def _conversation(
    row: DataRow, names: Mapping[str, Sequence[str]], *, from_messages: bool
) -> tuple[Message, ...]:
    if not from_messages:
        asked, answered = row.text(*names["prompt"]), row.text(*names["response"])
        return (("user", asked), ("assistant", answered))
    messages = messages_of(row, names["messages"])
    if not any(role == "assistant" for role, _ in messages):
        raise DataError(f"{row.where}: no message is of the assistant, so nothing is learned")
    return messages


def messages_of(row: DataRow, names: Sequence[str]) -> tuple[Message, ...]:
    """The messages under the first of these fields that is there; none where none is.

    Raises:
        DataError: they are not messages.
    """
    listed: Any = next((row.data[name] for name in names if name in row.data), [])
    messages: list[Message] = []
    for each in listed if isinstance(listed, list) else [None]:
        role = content = None
        if isinstance(each, dict):
            role = each.get("role", each.get("from"))
            content = each.get("content", each.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{row.where}: messages must be a list of objects with a role and a content"
            )
        messages.append((_ROLES.get(role, role), content))
    return tuple(messages)


def _labels(
    rows: Sequence[DataRow], names: Sequence[str], where: str
) -> tuple[list[int], tuple[str, ...]]:
    found = []
    for row in rows:
        value = next((row.data[name] for name in names if name in row.data), None)
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise DataError(f"{row.where}: {names[0]!r} must be a label, a number or a text")
        found.append(str(value))
    return number_classes(found, where)


def number_classes(labels: Sequence[str], where: str) -> tuple[list[int], tuple[str, ...]]:
    """Numbers and names of classes: integers are used as they are, names are sorted.

    >>> number_classes(["2", "0"], "here"), number_classes(["cat", "ant", "cat"], "here")
    (([2, 0], ('0', '1', '2')), ([1, 0, 1], ('ant', 'cat')))
    """
    if all(re.fullmatch(r"\d+", label) for label in labels):
        numbers = [int(label) for label in labels]
        if max(numbers, default=0) >= 1_000_000:
            raise DataError(f"{where}: a label is {max(numbers)}; labels are numbers of classes")
        return numbers, tuple(str(i) for i in range(max(numbers, default=-1) + 1))
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        least = min(labels, key=int)
        raise DataError(f"{where}: a label is {least}; number classes from 0, or name them")
    classes = tuple(sorted(set(labels)))
    by_name = {name: i for i, name in enumerate(classes)}
    return [by_name[label] for label in labels], classes


def _lines(path: Path, digest: str) -> Classified:
    """A label, a space and a text in every line."""
    raw = documents.read_bytes(path, documents.DATA, DataError)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:  # as data sets from before UTF-8 are
        text = raw.decode("latin-1")
    labels, texts = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            label, _, rest = line.strip().partition(" ")
            if not rest.strip():
                raise DataError(f"{path}, line {number}: must be a label, a space and a text")
            labels.append(label)
            texts.append(rest.strip())
    numbers, classes = number_classes(labels, str(path))
    return Classified(texts, numbers, classes, "text", str(path), digest)


def _pixels(row: DataRow, names: Sequence[str]) -> Any:
    value = next(row.data[name] for name in names if name in row.data)
    return as_pixels(value, row.where)
