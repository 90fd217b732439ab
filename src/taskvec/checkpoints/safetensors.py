"""The safetensors file format: header in, header out.

A file is 8 bytes (little-endian length of the header), the header (JSON: name → dtype, shape,
data_offsets) and the data. Everything is validated here before a single weight is touched, with the
same rules as the official library: offsets relative to the end of the header, in order, without gap
or overlap, up to the end of the file.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from taskvec.documents import open_regular
from taskvec.dtypes import DTYPES, DType
from taskvec.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the official library's limit
_LIMIT = 2**64  # of any number in a header
_FIELDS = {"dtype", "shape", "data_offsets"}  # of an entry; the official library ignores others
_MINUS_ZERO = re.compile(rb"-0(?![.\deE])")  # JSON's -0 is no natural number; Python reads it as 0


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: Parameter name.
        dtype: Element type.
        shape: Shape; () for a scalar.
        offset: First byte, from the start of the file.
        quantised_bytes: Bytes that it takes in the file, where it is stored quantised.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    quantised_bytes: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        if self.quantised_bytes is not None:
            return self.quantised_bytes
        return self.size * self.dtype.bits // 8


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one file, in the order of their offsets.

    Raises:
        CheckpointError: the file cannot be read or breaks a rule of the format.
    """
    raw, size = _read_raw(path)
    header, _ = _parse(path, raw)
    return _check_layout(path, header, 8 + len(raw), size)


def read_metadata(path: Path) -> dict[str, str]:
    """`__metadata__` of one file; empty without it.

    Raises:
        CheckpointError: the file cannot be read or has no header of this format.
    """
    return _parse(path, _read_raw(path)[0])[1]


def _read_raw(path: Path) -> tuple[bytes, int]:
    """The header of a file as it stands there, and the size of the file."""
    try:
        with open(open_regular(path), "rb") as file:  # noqa: PTH123 (a descriptor)
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if size < 8:
                _fail(path, f"file has {size} bytes, too few for a header", "download it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                _fail(
                    path,
                    f"header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed",
                    "this is probably not a safetensors file",
                )
            if length > size - 8:
                _fail(
                    path,
                    f"header of {length:,} bytes does not fit a file of {size:,} bytes",
                    "the file is truncated; download it again",
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return raw, size


def _fail(path: Path, what: str, remedy: str = "the file is damaged; write it again") -> NoReturn:
    raise CheckpointError(f"{path}: {what}; {remedy}")


def _is_plain(raw: bytes, header: dict[str, Any]) -> bool:
    """Whether all names in a header differ, without a check of every pair.

    Looking at pairs takes most of the time of reading a header of 20,000 tensors. There is at least
    one colon for each pair in the text, and every pair that stands twice is lost in parsing.
    """
    entries = sum([len(entry) for entry in header.values() if type(entry) is dict])
    return raw.count(b":") == len(header) + entries


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            _fail(path, f"header names {name!r} twice")
        seen[name] = value
    return seen


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Entries of the tensors, and metadata."""
    if not raw.lstrip(b" \t\n\r").startswith(b"{"):
        _fail(path, "header is not a JSON object", "this is probably not a safetensors file")
    try:
        text = raw.decode()
        header = json.loads(text)
        if not _is_plain(raw, header) or _MINUS_ZERO.search(raw):
            header = json.loads(
                text, object_pairs_hook=lambda pairs: _unique(path, pairs), parse_int=_natural
            )
        if rb"\u" in raw:
            json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        _fail(path, f"header is not JSON ({str(error)[:80]})")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(path, "__metadata__ in the header is not a map of strings")
    return header, metadata


def _natural(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def _are_natural(values: object) -> bool:
    if type(values) is not list:
        return False
    return all([type(n) is int and 0 <= n < _LIMIT for n in values])  # noqa: C419 (half the time)


def _entry(path: Path, name: str, entry: object) -> tuple[DType, tuple[int, ...], int, int]:
    """dtype, shape and offsets of one header entry, each checked by itself."""
    where = f"tensor {name!r}"
    if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
        _fail(path, f"{where}: header entry needs dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        _fail(
            path,
            f"{where}: unknown dtype {str(entry['dtype'])[:40]!r}",
            f"known: {', '.join(DTYPES)}",
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_natural(shape):
        _fail(path, f"{where}: shape {str(shape)[:60]} is not a list of natural numbers")
    if not _are_natural(offsets) or len(offsets) != 2:
        _fail(path, f"{where}: data_offsets {str(offsets)[:60]} are not two natural numbers")
    begin, end = offsets
    bits = _bits(shape, dtype)
    if bits is None:
        _fail(path, f"{where}: shape {str(shape)[:60]} needs more bytes than there are addresses")
    if bits % 8 or end - begin != bits // 8:
        _fail(
            path,
            f"{where}: data_offsets span {end - begin:,} bytes, "
            f"{dtype.name} of shape {str(shape)[:60]} needs {_in_bytes(bits)}",
        )
    return dtype, tuple(shape), begin, end


def _bits(shape: Sequence[int], dtype: DType) -> int | None:
    """Bits of a tensor; None where a product on the way there exceeds 64 bits, also before a 0.

    The official library refuses the same shapes. Very many large dimensions would otherwise make
    a number of megabytes, in time that is quadratic in them.
    """
    size = 1
    for n in shape:
        size *= n
        if size >= _LIMIT:
            return None
    return size * dtype.bits if size * dtype.bits < _LIMIT else None


def _in_bytes(bits: int) -> str:
    return f"{bits // 8:,}" if bits % 8 == 0 else f"{bits} bits, no whole number of bytes"


def _check_layout(
    path: Path, header: dict[str, Any], data_start: int, size: int
) -> list[TensorInfo]:
    found = [(name, *_entry(path, name, entry)) for name, entry in header.items()]
    found.sort(key=lambda item: item[3:])
    reached, before = 0, ""
    for name, _, _, begin, end in found:
        if begin < reached:
            _fail(path, f"tensor {name!r} overlaps {before!r}")
        if begin > reached:
            _fail(path, f"{begin - reached:,} unused bytes before tensor {name!r}")
        if data_start + end > size:
            _fail(
                path,
                f"tensor {name!r} ends at byte {data_start + end:,} of a file of {size:,} bytes",
                "the file is truncated; download it again",
            )
        reached, before = end, name
    if data_start + reached != size:
        _fail(path, f"{size - data_start - reached:,} bytes behind the last tensor")
    return [
        TensorInfo(name, dtype, shape, data_start + begin) for name, dtype, shape, begin, _ in found
    ]


def write_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a file that holds the tensors in the given order; its data is 8-byte aligned.

    Args:
        tensors: Name, dtype and shape of each.
        metadata: Said about the file besides that its tensors are in torch's layout.

    >>> from taskvec.dtypes import DTYPES
    >>> header = write_header([("w", DTYPES["BF16"], (2, 3))])
    >>> len(header) % 8, header[8:].decode().strip()[-57:]
    (0, '"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}')
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
