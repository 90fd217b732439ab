"""Headers: what is accepted, what is refused and in which words, and agreement with safetensors."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from taskvec.checkpoints import safetensors as module
from taskvec.checkpoints.safetensors import read_header, write_header
from taskvec.dtypes import DTYPES
from taskvec.errors import CheckpointError

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
AGAIN = "download it again"
DAMAGED = "the file is damaged; write it again"
ENTRY = f"header entry needs dtype, shape and data_offsets; {DAMAGED}"
DIMENSIONS = f"is not a list of natural numbers; {DAMAGED}"
PAIR = f"are not two natural numbers; {DAMAGED}"
NO_FILE = "this is probably not a safetensors file"


def put(path: Path, header: Any, data: bytes = bytes(22), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def changed(tensor: str = "b", **fields: Any) -> dict[str, Any]:
    return {**GOOD, tensor: GOOD[tensor] | fields}


def text(header: Any) -> str:
    return json.dumps(header)


def accepted(path: Path) -> bool:
    try:
        read_header(path)
    except CheckpointError:
        return False
    return True


def officially_accepted(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


def test_what_a_header_says(tmp_path):
    path = put(tmp_path / "x", {"__metadata__": {"format": "pt"}, **GOOD})
    start = path.stat().st_size - 22
    a, b = read_header(path)
    assert (a.name, a.dtype.name, a.shape, a.offset) == ("a", "F32", (2, 2), start)
    assert (b.name, b.dtype.name, b.shape, b.offset) == ("b", "BF16", (3,), start + 16)
    assert (a.size, a.nbytes, b.size, b.nbytes) == (4, 16, 3, 6)


def test_order_of_names_does_not_matter(tmp_path):
    path = put(tmp_path / "x", dict(reversed(GOOD.items())))
    assert [info.name for info in read_header(path)] == ["a", "b"]


def test_scalar_and_empty_tensors(tmp_path):
    header = {
        "scalar": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]},
        "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]},
    }
    found = {i.name: (i.shape, i.size) for i in read_header(put(tmp_path / "x", header, bytes(8)))}
    assert found == {"scalar": ((), 1), "empty": ((0, 5), 0)}


LENGTH = len(text(GOOD))
CASES = {
    "empty": (b"", None, f"file has 0 bytes, too few for a header; {AGAIN}"),
    "seven bytes": (bytes(7), None, f"file has 7 bytes, too few for a header; {AGAIN}"),
    "length beyond the file": (
        GOOD, LENGTH + 23,
        f"header of {LENGTH + 23} bytes does not fit a file of {LENGTH + 30} bytes; "
        f"the file is truncated; {AGAIN}"),
    "length of petabytes": (
        GOOD, 2**63,
        f"header of 9,223,372,036,854,775,808 bytes, at most 100,000,000 are allowed; {NO_FILE}"),
    "no header": (b"", 0, f"header is not a JSON object; {NO_FILE}"),
    "length too short": (GOOD, LENGTH - 1, "header is not JSON (Expecting ',' delimiter"),
    "length too long": (GOOD, LENGTH + 1, "header is not JSON (Extra data"),
    "not JSON": (b"{nonsense", None, "header is not JSON (Expecting property name"),
    "a list": (b"[1, 2, 3]", None, f"header is not a JSON object; {NO_FILE}"),
    "a word": (b'"tensors"', None, f"header is not a JSON object; {NO_FILE}"),
    "a zip file": (b"PK\3\4 pickled", None, f"header is not a JSON object; {NO_FILE}"),
    "nested deeply": (b'{"a":' + b"[" * 200_000, None,
                      "header is not JSON (maximum recursion depth exceeded"),
    "UTF-16": (text(GOOD).encode("utf-16-le"), None, "header is not JSON ("),
    "not UTF-8": (b'{"\xff": 1}', None, "header is not JSON ('utf-8' codec can't decode byte 0xff"),
    "half a surrogate pair": (text({"\ud800": GOOD["a"]}).encode(), None,
                              "header is not JSON ('utf-8' codec can't encode character"),
    "tensor twice": (
        f'{{"a": {text(GOOD["a"])}, "a": {text(GOOD["a"])}}}'.encode(), None,
        f"header names 'a' twice; {DAMAGED}"),
    "tensor twice, first of nothing": (
        f'{{"a": 1, "a": {text(GOOD["a"])}}}'.encode(), None, f"header names 'a' twice; {DAMAGED}"),
    "tensor twice, escaped": (
        f'{{"\\u0061": {text(GOOD["a"])}, "a": {text(GOOD["a"])}}}'.encode(), None,
        f"header names 'a' twice; {DAMAGED}"),
    "field twice": (
        b'{"a": {"dtype": "F32", "shape": [1], "shape": [4], "data_offsets": [0, 16]}}', None,
        f"header names 'shape' twice; {DAMAGED}"),
    "metadata twice": (
        f'{{"__metadata__": {{}}, "__metadata__": {{}}, {text(GOOD)[1:]}'.encode(), None,
        f"header names '__metadata__' twice; {DAMAGED}"),
    "metadata a list": ({"__metadata__": [], **GOOD}, None,
                        f"__metadata__ in the header is not a map of strings; {DAMAGED}"),
    "metadata of numbers": ({"__metadata__": {"step": 3}, **GOOD}, None,
                            f"__metadata__ in the header is not a map of strings; {DAMAGED}"),
    "entry not a mapping": ({"a": [1]}, None,
        f"tensor 'a': {ENTRY}"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, None,
        f"tensor 'a': {ENTRY}"),
    "unknown dtype": (changed(dtype="F24"), None,
                      "tensor 'b': unknown dtype 'F24'; known: BF16, F16, F32, F64, BOOL"),
    "dtype not a word": (changed(dtype=["F32"]), None,
                         "tensor 'b': unknown dtype \"['F32']\"; known"),
    "shape a number": (changed(shape=3), None,
                       f"tensor 'b': shape 3 {DIMENSIONS}"),
    "negative dimension": (changed(shape=[-3]), None,
                           f"tensor 'b': shape [-3] {DIMENSIONS}"),
    "two negative dimensions": (changed(shape=[-3, -1]), None,
                                f"tensor 'b': shape [-3, -1] {DIMENSIONS}"),
    "fractional dimension": (changed(shape=[3.0]), None,
                             f"tensor 'b': shape [3.0] {DIMENSIONS}"),
    "boolean dimension": (changed(shape=[True, 3]), None,
                          f"tensor 'b': shape [True, 3] {DIMENSIONS}"),
    "huge dimension": (changed(shape=[10**400]), None, "tensor 'b': shape [1000000"),
    "dimension of 2^64": (changed(shape=[0, 2**64]), None,
        f"tensor 'b': shape [0, 18446744073709551616] {DIMENSIONS}"),
    "huge product": (changed(shape=[2**63] * 20), None,
        "tensor 'b': shape [9223372036854775808, "),
    "huge product of nothing": (changed(shape=[2**63, 2, 0], data_offsets=[16, 16]), None,
        "tensor 'b': shape [9223372036854775808, 2, 0] needs more bytes than there are addresses"),
    "very many huge dimensions": (changed(shape=[2**64 - 1] * 200_000), None,
        "tensor 'b': shape [18446744073709551615, "),
    "minus zero": (changed(shape=[-0.0], data_offsets=[16, 16]), None,
        f"tensor 'b': shape [-0.0] {DIMENSIONS}"),
    "minus zero as a whole number": (
        b'{"a": {"dtype": "BF16", "shape": [-0], "data_offsets": [0, 0]}}', None,
        f"tensor 'a': shape [-0.0] {DIMENSIONS}"),
    "half a surrogate pair in metadata": (
        text({"__metadata__": {"k": "\ud800"}, **GOOD}).encode(), None,
        "header is not JSON ('utf-8' codec can't encode character"),
    "product just too large": (changed(shape=[2**32, 2**32]), None,
        "tensor 'b': shape [4294967296, 4294967296] needs more bytes than there are addresses; "
        f"{DAMAGED}"),
    "three offsets": (changed(data_offsets=[16, 22, 22]), None,
                      f"tensor 'b': data_offsets [16, 22, 22] {PAIR}"),
    "negative offset": (changed("a", data_offsets=[-16, 0]), None,
                        f"tensor 'a': data_offsets [-16, 0] {PAIR}"),
    "offset of 2^64": (changed(data_offsets=[2**64, 2**64 + 6]), None,
        f"tensor 'b': data_offsets [18446744073709551616, 18446744073709551622] {PAIR}"),
    "offsets backwards": (changed(data_offsets=[22, 16]), None,
        f"tensor 'b': data_offsets span -6 bytes, BF16 of shape [3] needs 6; {DAMAGED}"),
    "size too small": (changed(data_offsets=[16, 20]), None,
        f"tensor 'b': data_offsets span 4 bytes, BF16 of shape [3] needs 6; {DAMAGED}"),
    "size of another dtype": (changed(dtype="F32"), None,
        f"tensor 'b': data_offsets span 6 bytes, F32 of shape [3] needs 12; {DAMAGED}"),
    "size of another shape": (changed(shape=[4]), None,
        f"tensor 'b': data_offsets span 6 bytes, BF16 of shape [4] needs 8; {DAMAGED}"),
    "part of a byte": (changed(dtype="F4", shape=[11]), None,
        "tensor 'b': data_offsets span 6 bytes, F4 of shape [11] needs 44 bits, no whole number of "
        f"bytes; {DAMAGED}"),
    "overlap": (changed(data_offsets=[14, 20]), None, f"tensor 'b' overlaps 'a'; {DAMAGED}"),
    "same place": (changed(dtype="F32", shape=[4], data_offsets=[0, 16]), None,
                   f"tensor 'b' overlaps 'a'; {DAMAGED}"),
    "gap": (changed(data_offsets=[18, 24]), None, f"2 unused bytes before tensor 'b'; {DAMAGED}"),
    "gap at the start": ({"b": GOOD["b"]}, None, f"16 unused bytes before tensor 'b'; {DAMAGED}"),
    "tensor out of the file": (changed(shape=[4], data_offsets=[16, 24]), None,
        f"tensor 'b' ends at byte {LENGTH + 32} of a file of {LENGTH + 30} bytes; the file is "
        f"truncated; {AGAIN}"),
    "trailing bytes": ({"a": GOOD["a"]}, None, f"6 bytes behind the last tensor; {DAMAGED}"),
    "no tensors but data": ({}, None, f"22 bytes behind the last tensor; {DAMAGED}"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_broken_header(tmp_path, case):
    header, length, message = CASES[case]
    path = tmp_path / "model.safetensors"
    if isinstance(header, bytes) and len(header) < 8 and length is None:
        path.write_bytes(header)
    else:
        put(path, header, length=length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_truncated_data(tmp_path):
    path = put(tmp_path / "x", GOOD)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"tensor 'b' ends at byte \d+ of a file of \d+ bytes"
    ):
        read_header(path)


def test_truncated_header(tmp_path):
    path = put(tmp_path / "x", GOOD)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(CheckpointError, match="does not fit a file of 30 bytes; the file is trunc"):
        read_header(path)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="absent: cannot be read: No such file or directory"):
        read_header(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def test_many_duplicates_are_found_at_once(tmp_path):
    names = ",".join(f'"n{i}":0' for i in range(200_000))
    path = put(tmp_path / "x", f'{{{names},"n199999":0}}'.encode())
    with pytest.raises(CheckpointError, match="header names 'n199999' twice"):
        read_header(path)


# --- agreement with the official library ---------------------------------------------------------

# Files that the official library takes and this project refuses, each for a reason.
STRICTER = {
    "tensor twice": f'{{"a": {text(GOOD["b"])}, "a": {text(GOOD["b"])}}}',  # which is meant?
    "metadata key twice": f'{{"__metadata__": {{"k": "1", "k": "2"}}, "a": {text(GOOD["b"])}}}',
    "entry as a list": text({"a": ["BF16", [3], [0, 6]]}),
}
# Files that both take, though a stricter reading of the format might not.
ACCEPTED = {
    "unknown field": text({"a": GOOD["b"] | {"scale": 2}}),
    "unknown field named twice in two tensors": text(
        {"a": GOOD["b"] | {"x": 1}, "b": GOOD["b"] | {"shape": [0], "data_offsets": [6, 6], "x": 1}}
    ),
    "space before the brace": " \t\r\n" + text({"a": GOOD["b"]}),
}


@pytest.mark.parametrize("name", STRICTER)
def test_stricter_than_the_official_library(tmp_path, name):
    path = put(tmp_path / "x", STRICTER[name].replace("[16, 22]", "[0, 6]").encode(), bytes(6))
    assert (accepted(path), officially_accepted(path)) == (False, True)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_like_the_official_library(tmp_path, name):
    path = put(tmp_path / "x", ACCEPTED[name].replace("[16, 22]", "[0, 6]").encode(), bytes(6))
    assert (accepted(path), officially_accepted(path)) == (True, True)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c not in ("tensor twice", "tensor twice, escaped")],
)
def test_what_is_refused_is_refused_by_the_official_library(tmp_path, case):
    header, length, _ = CASES[case]
    path = tmp_path / "model.safetensors"
    if isinstance(header, bytes) and len(header) < 8 and length is None:
        path.write_bytes(header)
    else:
        put(path, header, length=length)
    assert not officially_accepted(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_the_official_ones(tmp_path, dtype):
    count = 8  # a whole number of bytes for every dtype
    size = count * DTYPES[dtype].bits // 8
    header = {"x": {"dtype": dtype, "shape": [count], "data_offsets": [0, size]}}
    path = put(tmp_path / "x", header, bytes(size))
    assert accepted(path)
    assert officially_accepted(path)


def test_no_official_dtype_is_unknown(tmp_path):
    path = put(tmp_path / "x", changed(dtype="nonsense"))
    with pytest.raises(SafetensorError) as caught, safe_open(path, "np"):
        pass
    named = set(re.findall(r"`(\w+)`", str(caught.value).split("expected", 1)[1]))
    assert named == set(DTYPES)


ATOM = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(
    ATOM,
    lambda j: st.lists(j, max_size=3) | st.dictionaries(st.text(), j, max_size=3),
    max_leaves=6,
)
DIMENSION = st.integers(0, 4) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 2**64, -1])
OFFSET = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64])


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header without fault and the size of its data."""
    names = draw(
        st.lists(st.text(max_size=6).filter(lambda n: n != "__metadata__"), unique=True, max_size=5)
    )
    header: dict[str, Any] = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
        )
    at = 0
    for name in names:
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if dtype.bits % 8:
            shape = [8, *shape]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.bits // 8
        header[name] = {"dtype": dtype.name, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, at


@st.composite
def mutated_headers(draw: st.DrawFn) -> tuple[bytes, int, int]:
    """A header with some things changed, the size of its data, and an error of the length field."""
    header, size = draw(valid_headers())
    for _ in range(draw(st.integers(0, 3))):
        if not header:
            break
        name = draw(st.sampled_from(sorted(header)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "entry", "delete", "copy"]))
        entry = header[name]
        if field == "delete":
            del header[name]
        elif field == "copy":
            header[draw(st.text(max_size=3))] = entry
        elif field == "entry" or not isinstance(entry, dict):
            header[name] = draw(JSON)
        elif draw(st.booleans()):
            value: Any = {
                "dtype": st.sampled_from(sorted(DTYPES)),
                "shape": st.lists(DIMENSION, max_size=3),
                "data_offsets": st.lists(OFFSET, min_size=2, max_size=2),
            }[field]
            header[name] = entry | {field: draw(value)}
        else:
            header[name] = entry | {field: draw(JSON)}
    raw = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    raw += b" " * draw(st.integers(0, 7))
    if draw(st.integers(0, 3)) == 0 and raw:
        place = draw(st.integers(0, len(raw) - 1))
        raw = raw[:place] + draw(st.binary(max_size=3)) + raw[place + draw(st.integers(0, 3)) :]
    size = max(0, size + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 8])))
    return raw, size, draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1, 8, 2**40]))


def stricter(raw: bytes) -> bool:
    """Whether a header has an oddity of STRICTER, so that opinions may differ."""
    pairs: list[list[tuple[str, Any]]] = []

    def see(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs.append(found)
        return dict(found)

    try:
        header = json.loads(raw.decode(), object_pairs_hook=see)
    except (ValueError, RecursionError):
        return False
    if not isinstance(header, dict):
        return False
    entries = [e for name, e in header.items() if name != "__metadata__"]
    return any(len(dict(found)) != len(found) for found in pairs) or any(
        isinstance(e, list) for e in entries
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


FUZZ = settings(
    max_examples=250, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@FUZZ
@given(valid_headers())
def test_fuzz_valid_headers(scratch, drawn):
    header, size = drawn
    put(scratch, header, bytes(size))
    assert officially_accepted(scratch)
    found = {i.name: (i.dtype.name, list(i.shape)) for i in read_header(scratch)}
    header.pop("__metadata__", None)
    assert found == {name: (e["dtype"], e["shape"]) for name, e in header.items()}


@FUZZ
@given(mutated_headers())
def test_fuzz_mutated_headers(scratch, drawn):
    raw, size, error = drawn
    put(scratch, raw, bytes(size), max(0, len(raw) + error))
    try:
        infos = read_header(scratch)
    except CheckpointError as refused:
        str(refused).encode()
        assert not officially_accepted(scratch) or error or stricter(raw)
        return
    inside(infos, scratch)
    assert officially_accepted(scratch) or error


@FUZZ
@given(st.binary(max_size=60), st.integers(0, 80) | st.integers(0, 2**64 - 1) | st.none())
def test_fuzz_bytes(scratch, content, length):
    """Random bytes, alone and behind a length field."""
    scratch.write_bytes(content if length is None else length.to_bytes(8, "little") + content)
    try:
        infos = read_header(scratch)
    except CheckpointError:
        assert not officially_accepted(scratch)
    else:
        inside(infos, scratch)


@FUZZ
@given(st.text(alphabet='{}[]":,0129-.e "adtypeshape_offsetF32BF16\\u', max_size=80))
def test_fuzz_json_like_text(scratch, content):
    put(scratch, content.encode(), bytes(4))
    with contextlib.suppress(CheckpointError):
        inside(read_header(scratch), scratch)


def inside(infos: list[module.TensorInfo], path: Path) -> None:
    """Every tensor lies in the file, behind the header, and none over another."""
    content = path.read_bytes()
    reached = 8 + int.from_bytes(content[:8], "little")
    for info in infos:
        assert info.offset >= reached or info.nbytes == 0
        reached = info.offset + info.nbytes
        assert reached <= len(content)


# --- writing -------------------------------------------------------------------------------------


def test_written_header_is_read_back(tmp_path):
    tensors = [
        ("zeile", DTYPES["F32"], (2, 3)),
        ('name "quoted" ü', DTYPES["BF16"], (5,)),
        ("scalar", DTYPES["I64"], ()),
        ("empty", DTYPES["F16"], (0, 4)),
    ]
    path = tmp_path / "x"
    header = write_header(tensors)
    path.write_bytes(header + bytes(24 + 10 + 8))
    assert len(header) % 8 == 0
    assert [(i.name, i.dtype, i.shape) for i in read_header(path)] == tensors
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, _, _ in tensors}
