"""Documents: text, JSON and YAML from users and models, read within limits.

Such a file may be anything: a pipe that never ends, a few lines that stand for a billion values, a
link to somebody's secrets. Every way in goes through here, and every failure is one line that names
the file, what is wrong and the remedy. The caller chooses the class of the error.

- Only regular files are opened, and never waited for: a pipe, socket, device or folder is refused.
- A file is at most as large as its kind allows (`Limits`); this is checked before it is parsed.
- JSON and YAML hold at most so many values, nested at most so deep, aliases counted as often as
  they are used. Text is UTF-8 without half surrogate pairs, so that it can be written again.
- A file of a model's folder that could end up in an output must lie in that folder (`inside`).
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import re
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.errors import CheckpointError, TaskvecError

if TYPE_CHECKING:
    import yaml

MIB = 2**20
_SLOW = MIB // 2  # characters of YAML where PyYAML has no libyaml: some 80,000 a second
_NUMBER_LENGTH = 300  # digits; a longer number is not a float and takes quadratic time to read
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # may begin or end a surrogate pair


@dataclass(frozen=True, slots=True)
class Limits:
    """How large one kind of document may be.

    Attributes:
        nbytes: Of the file, and of what a compressed file holds.
        values: Keys, items and single values, each counted as often as it is used.
        depth: Lists and mappings around a value.
        names_files: Whether names of files that are not UTF-8 may stand in it, as Python has them.
        non_finite: Whether NaN and Infinity may stand in it, as in configs of state-space models.
    """

    nbytes: int
    values: int
    depth: int = 100
    names_files: bool = False
    non_finite: bool = False


# Configs of models and adapters, indices of shards.
CONFIG = Limits(64 * MIB, 5_000_000, non_finite=True)
# Files of a tokenizer, and others that are copied to an output.
TOKENIZER = Limits(512 * MIB, 20_000_000, non_finite=True)
RECIPE = Limits(MIB, 100_000)  # and a mergekit config
CARD = Limits(8 * MIB, 500_000)  # model cards list thousands of scores
# Scans, tables, manifests, records of runs.
MEASURED = Limits(2048 * MIB, 200_000_000, names_files=True)
DATA = Limits(8192 * MIB, 500_000_000, non_finite=True)  # for evaluation and training
TEXT = Limits(8 * MIB, 1)  # rubrics, lists of phrases

_Error = type[TaskvecError]
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> int:
    """A descriptor of a regular file, for reading; opening anything else neither waits nor works.

    Args:
        path: The file.
        flags: Of `os.open`, besides those for reading.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    _check_kind(path, os.stat(path).st_mode)  # noqa: PTH116 (a device is not even opened)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    try:
        _check_kind(path, os.fstat(fd).st_mode)
    except OSError:
        os.close(fd)
        raise
    return fd


def _check_kind(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, expected a regular file", str(path))


def inside(path: Path, folder: Path) -> Path:
    """The real path of a file of a model's folder, which must be inside that folder.

    The files of a snapshot in a hub cache are links to its blobs; those count as in the folder.

    Args:
        path: The file, in `folder` or below it.
        folder: As the user gave it; may itself be a link.

    Raises:
        CheckpointError: a link leads to somewhere else.
    """
    if path.parent == folder and not path.is_symlink():
        return path
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if root in real.parents or real.parent == _blobs(root):
        return real
    raise CheckpointError(
        f"{path}: is a link out of its folder, to {real}; what it leads to could be published with "
        "an output: put a copy of the file there, or remove the link"
    )


def _blobs(root: Path) -> Path | None:
    """Where a hub cache keeps the files of the snapshot that a folder is, or lies in."""
    for place in (root, *root.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def read_bytes(
    path: str | os.PathLike[str],
    limits: Limits,
    error: _Error = CheckpointError,
    *,
    of: Path | None = None,
    where: str | None = None,
) -> bytes:
    """The content of a file.

    Args:
        path: The file.
        limits: Of its kind.
        error: Class of the errors.
        of: A model's folder that it must lie in, see `inside`.
        where: What messages call the file; default: its path.

    Raises:
        TaskvecError: of class `error`: it is not a regular file, too large, or cannot be read.
    """
    where = str(path) if where is None else where
    real = inside(Path(path), of) if of is not None else path
    try:
        fd = open_regular(real, os.O_NOFOLLOW if of is not None else 0)
        with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
            size = os.fstat(fd).st_size
            content = b"" if size > limits.nbytes else _read(file, size, limits.nbytes + 1)
    except OSError as failure:
        raise error(f"{where}: cannot be read: {failure.strerror or failure}") from failure
    if max(size, len(content)) > limits.nbytes:
        raise error(
            f"{where}: is too large: {max(size, len(content)):,} bytes, at most "
            f"{limits.nbytes:,} are read; is it the right file?"
        )
    return content


def _read(file: io.FileIO, size: int, most: int) -> bytes:
    """At most that many bytes; special files report a size of 0."""
    parts: list[bytes] = []
    step = size + 1
    while most and (part := file.read(min(step, most))):
        parts.append(part)
        most -= len(part)
        step = MIB
    return parts[0] if len(parts) == 1 else b"".join(parts)


def unzip(content: bytes, limits: Limits, where: str, error: _Error) -> bytes:
    """The content of a gzip file; a small file may expand to terabytes."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            found = file.read(limits.nbytes + 1)
    except (OSError, EOFError, zlib.error) as failure:
        raise error(f"{where}: cannot be read: {failure}; compress it again") from failure
    if len(found) > limits.nbytes:
        raise error(
            f"{where}: is too large: at most {limits.nbytes:,} bytes are read; split the file"
        )
    return found


def read_text(
    path: str | os.PathLike[str],
    limits: Limits,
    error: _Error = CheckpointError,
    *,
    of: Path | None = None,
    where: str | None = None,
) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; see `read_bytes`."""
    where = str(path) if where is None else where
    return decode(read_bytes(path, limits, error, of=of, where=where), where, error)


def decode(content: bytes, where: str, error: _Error) -> str:
    """Text of UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(
            f"{where}: cannot be read: byte {failure.start:,} is not UTF-8; save it as UTF-8"
        ) from failure


def read_json(
    path: str | os.PathLike[str],
    limits: Limits,
    error: _Error = CheckpointError,
    *,
    of: Path | None = None,
    where: str | None = None,
) -> Any:
    """The value of a JSON file; see `read_bytes` and `parse_json`."""
    where = str(path) if where is None else where
    content = read_bytes(path, limits, error, of=of, where=where)
    return parse_json(content, limits, where, error)


def read_object(
    path: str | os.PathLike[str],
    limits: Limits,
    error: _Error = CheckpointError,
    *,
    of: Path | None = None,
    where: str | None = None,
) -> dict[str, Any]:
    """The object of a JSON file; see `read_json`."""
    where = str(path) if where is None else where
    value = read_json(path, limits, error, of=of, where=where)
    return as_object(value, where, error)


def as_object(value: object, where: str, error: _Error = CheckpointError) -> dict[str, Any]:
    """A JSON value that is an object."""
    if not isinstance(value, dict):
        raise error(f"{where}: is not a JSON object; got {type(value).__name__}")
    return value


def parse_json(
    content: str | bytes,
    limits: Limits,
    where: str,
    error: _Error = CheckpointError,
) -> Any:
    """The value of a JSON text.

    Args:
        content: The text, as `decode` returns it, or its bytes in UTF-8.
        limits: Of its kind.
        where: What messages call it.
        error: Class of the errors.

    Raises:
        TaskvecError: of class `error`: not JSON, too many values or too deep, a number that is too
            long, or text that could not be written again.
    """
    text = decode(content, where, error) if isinstance(content, bytes) else content
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > limits.values:
        raise error(f"{where}: holds more than {limits.values:,} values; is it the right file?")
    try:
        value = (_LENIENT if limits.non_finite else _STRICT).decode(text)
        if _HALF_PAIR.search(text):
            known = "surrogateescape" if limits.names_files else "strict"
            json.dumps(value, ensure_ascii=False).encode(errors=known)
    except UnicodeEncodeError as failure:
        raise error(
            f"{where}: holds half of a surrogate pair, which cannot be written; "
            "write the whole character"
        ) from failure
    except json.JSONDecodeError as failure:
        raise error(
            f"{where}: is not JSON ({failure.msg}, line {failure.lineno} column {failure.colno}); "
            "correct it or write it again"
        ) from failure
    except ValueError as failure:
        raise error(f"{where}: is not JSON ({str(failure)[:80]}); write it again") from failure
    except RecursionError as failure:
        raise error(_too_deep(where, limits)) from failure
    if opened > limits.depth and _is_deeper(value, limits.depth):
        raise error(_too_deep(where, limits))
    return value


def _too_deep(where: str, limits: Limits) -> str:
    return f"{where}: is nested more than {limits.depth} levels deep; is it the right file?"


def _is_deeper(value: object, depth: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _integer(text: str) -> int:
    if len(text) > _NUMBER_LENGTH:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON; write null")


_STRICT = json.JSONDecoder(parse_int=_integer, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder(parse_int=_integer)


def compose_yaml(
    text: str, limits: Limits, where: str, error: _Error = CheckpointError
) -> list[yaml.Node]:
    """The root nodes of a file of YAML documents.

    Counting does not follow aliases; code that builds values from the nodes must count again.

    Raises:
        TaskvecError: of class `error`: not YAML, too large, too many values or too deep.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    most = limits.nbytes if loader is not yaml.SafeLoader else min(limits.nbytes, _SLOW)
    if len(text) > most:
        raise error(
            f"{where}: is too large: {len(text):,} characters, at most {most:,} are read; "
            "is it the right file?"
        )
    try:
        text.encode()
        _check_events(yaml.parse(text, Loader=loader), limits, where, error)
        roots = list(yaml.compose_all(text, Loader=loader))
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise error(f"{where}{line}: is not YAML: {failure.problem}") from failure
    except (yaml.YAMLError, ValueError, RecursionError) as failure:
        raise error(f"{where}: is not YAML: {one_line(failure)}") from failure
    return roots


def _check_events(events: Any, limits: Limits, where: str, error: _Error) -> None:
    """Count before nodes are made: the composer calls itself once for each level."""
    import yaml

    depth = values = 0
    for event in events:
        if isinstance(event, yaml.NodeEvent):
            values += 1
            if values > limits.values:
                raise error(f"{where}: holds more than {limits.values:,} values")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > limits.depth:
                raise error(_too_deep(where, limits))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def scalar(constructor: Any, node: yaml.Node) -> Any:
    """The value of a scalar node, by PyYAML's safe constructor.

    Raises:
        ValueError: it has none.
    """
    import yaml

    is_number = node.tag.endswith((":int", ":float"))
    if is_number and len(node.value) > _NUMBER_LENGTH:
        raise ValueError(f"a number of {len(node.value):,} digits")
    try:
        return constructor.construct_object(node)
    except (yaml.YAMLError, LookupError, AttributeError, ArithmeticError) as failure:
        raise ValueError(one_line(failure)) from failure


def one_line(error: BaseException) -> str:
    """The text of a parser's error, shortened for a message."""
    text = getattr(error, "problem", None) or str(error)
    return " ".join(text.split())[:100]


def plain(text: str) -> str:
    r"""Text as one line that can be written: control characters and lone surrogates escaped.

    >>> plain("a" + chr(10) + "b")
    'a\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
