"""Files of others: what is read, and the one line about what is not."""

from __future__ import annotations

import gzip
import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.hostile import KINDS, in_time, pipe

from taskvec import documents
from taskvec.documents import CONFIG, MEASURED, RECIPE, Limits
from taskvec.errors import CheckpointError, DataError, TaskvecError

SMALL = Limits(100, 10, depth=3)


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    with in_time():
        yield


def refused(function: Callable[..., object], *args: object, **options: object) -> str:
    """The line that a document is refused with."""
    with pytest.raises(DataError) as caught:
        function(*args, DataError, **options)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "config.json"
    KINDS[kind](path)
    got = refused(documents.read_bytes, path, CONFIG)
    assert got.startswith(f"{path}: cannot be read: ")
    assert kind in got
    with pytest.raises(OSError, match=kind):
        documents.open_regular(path)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look and the opening; also no descriptor is left open."""
    path = tmp_path / "a"
    path.write_text("")
    regular = path.stat()
    path.unlink()
    pipe(path)
    monkeypatch.setattr(documents.os, "stat", lambda path: regular)
    there = len(list(Path("/proc/self/fd").iterdir()))
    assert "pipe" in refused(documents.read_bytes, path, CONFIG)
    assert len(list(Path("/proc/self/fd").iterdir())) == there


def test_a_file_may_be_as_large_as_its_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert documents.read_bytes(path, SMALL) == b"x" * 100
    path.write_bytes(b"x" * 101)
    assert "is too large: 101 bytes, at most 100" in refused(documents.read_bytes, path, SMALL)


def test_a_file_that_says_that_it_is_empty_is_read(tmp_path):
    """As those of the system do; one of them never ends."""
    path = Path("/proc/self/status")
    assert path.stat().st_size == 0
    assert documents.read_bytes(path, CONFIG).startswith(b"Name:")
    assert "is too large" in refused(documents.read_bytes, path, SMALL)


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "is too large: 1,099,511,627,776 bytes" in refused(documents.read_bytes, path, MEASURED)


def test_a_compressed_file_is_limited_by_what_it_holds():
    assert documents.unzip(gzip.compress(b"x" * 100), SMALL, "a.gz", DataError) == b"x" * 100
    bomb = gzip.compress(b"x" * 2**24)
    assert "a.gz: is too large" in refused(documents.unzip, bomb, SMALL, "a.gz")
    assert "a.gz: cannot be read" in refused(documents.unzip, bomb[:50], CONFIG, "a.gz")


def test_text_is_utf_8(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("ä".encode("utf-8-sig"))
    assert documents.read_text(path, CONFIG) == "ä"
    path.write_bytes(b"abc\xff")
    assert "byte 3 is not UTF-8; save it as UTF-8" in refused(documents.read_text, path, CONFIG)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not JSON (Expecting value"),
        ("{", "is not JSON (Expecting property name"),
        ("NaN", "NaN"),
        ('{"a": [-Infinity]}', "-Infinity"),
        ("9" * 301, "a number of 301 digits"),
        ("9" * 100_000, "digits"),
        ("[" * 1_000_000, "nested more than 100 levels deep"),
        ('{"a":' * 100_000, "nested more than 100 levels deep"),
        ("[" * 101 + "]" * 101, "nested more than 100 levels deep"),
        (r'"\ud800"', "half of a surrogate pair"),
        (r'{"\uDFFF": 1}', "half of a surrogate pair"),
        (b'"\xed\xa0\x80"', "is not UTF-8"),
    ],
)
def test_json_that_is_refused(text, what):
    for content in (text, text.encode()) if isinstance(text, str) else (text,):
        limits = replace(CONFIG, non_finite=False)
        got = refused(documents.parse_json, content, limits, "x.json")
        assert got.startswith("x.json: ")
        assert what in got


def test_json_holds_at_most_so_many_values():
    assert documents.parse_json("[0,0,0,0,0,0,0,0,0,0]", SMALL, "x") == [0] * 10
    for text in ("[0,0,0,[0,0,0,0,0,0,0]]", "[]" * 20):
        assert "more than 10 values" in refused(documents.parse_json, text, SMALL, "x")


def test_json_that_is_read():
    deep = "[" * 100 + "]" * 100
    assert json.dumps(documents.parse_json(deep, CONFIG, "x")) == deep
    assert documents.parse_json("9" * 300, CONFIG, "x") == int("9" * 300)
    assert documents.parse_json(r'"\ud83d\ude00"', CONFIG, "x") == "😀"
    flat = json.dumps({"a": [["["] * 200, "{" * 200]})
    assert documents.parse_json(flat, CONFIG, "x") == json.loads(flat)
    # As configs of state-space models have it.
    found = documents.parse_json("[0.0, Infinity]", CONFIG, "x")
    assert found == [0.0, float("inf")]
    # Records of runs name files, some of which are not UTF-8.
    assert documents.parse_json(r'"\udcff"', MEASURED, "x") == "\udcff"


def test_an_object_is_asked_for(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    assert refused(documents.read_object, path, CONFIG) == (
        f"{path}: is not a JSON object; got list"
    )
    assert "m: a.json: is not" in refused(documents.read_object, path, CONFIG, where="m: a.json")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [", ": is not YAML: "),
        ("[" * 900_000, "nested more than 100 levels deep"),
        ("- " * 400_000, "nested more than 100 levels deep"),
        ("? " * 400_000, "nested more than 100 levels deep"),
        ("\n".join(" " * i + "a:" for i in range(1000)), "nested more than 100 levels deep"),
        ("".join(f"k{i}: v\n" for i in range(90_000)), "holds more than 100,000 values"),
        ("[" + "0," * 200_000 + "]", "holds more than 100,000 values"),
        ("a: " + "x" * 2**20, "is too large"),
        ('a: "\\ud800"', "is not YAML"),
        ("a: \ud800", "is not YAML"),
        ("a: \x00", "is not YAML"),
    ],
)
def test_yaml_that_is_refused(text, what):
    got = refused(documents.compose_yaml, text, RECIPE, "x")
    assert got.startswith("x:")
    assert what in got


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [", ": is not YAML: "),
        ("[" * 5000, "nested more than 100 levels deep"),
        ("a: " + "x" * 2**20, "is too large: 1,048,579 characters, at most 524,288"),
    ],
)
def test_yaml_without_libyaml(monkeypatch, text, what):
    """The parser in Python reads some 80,000 characters a second."""
    monkeypatch.delattr(yaml, "CSafeLoader")
    assert what in refused(documents.compose_yaml, text, RECIPE, "x")


def test_yaml_that_is_read():
    found = documents.compose_yaml("a: [1, &b 2, *b]", RECIPE, "x")
    assert [type(node) for node in found] == [yaml.MappingNode]
    assert documents.compose_yaml("", RECIPE, "x") == []
    assert len(documents.compose_yaml("a: 1\n---\nb: 2", RECIPE, "x")) == 2


def test_links_that_stay_in_the_folder(tmp_path):
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "real").write_text("x")
    (model / "one").symlink_to("sub/real")
    (model / "two").symlink_to("one")
    (tmp_path / "link").symlink_to(model)
    for folder in (model, tmp_path / "link"):
        for name in ("one", "two", "sub/real"):
            assert documents.read_bytes(folder / name, CONFIG, of=folder) == b"x"


@pytest.mark.parametrize("how", ["absolute", "relative", "link to a link", "folder", "loop"])
def test_links_that_leave_the_folder(tmp_path, how):
    model, secret = tmp_path / "model", tmp_path / "model-2" / "secret"
    for folder in (model, secret.parent):
        folder.mkdir()
    secret.write_text("secret")
    path = model / "LICENSE"
    if how == "folder":
        (model / "sub").symlink_to(secret.parent)
        path = model / "sub" / "secret"
    elif how == "link to a link":
        (tmp_path / "other").symlink_to(secret)
        path.symlink_to(tmp_path / "other")
    elif how == "loop":
        path.symlink_to(model / "again")
        (model / "again").symlink_to(path)
    else:
        path.symlink_to(secret if how == "absolute" else "../model-2/secret")
    with pytest.raises(CheckpointError) as caught:
        documents.read_bytes(path, CONFIG, of=model)
    got = str(caught.value)
    assert got.startswith(f"{path}: ")
    if how != "loop":
        assert str(secret) in got
        assert got.endswith("put a copy of the file there, or remove the link")


def snapshot(root: Path, name: str = "models--org--name") -> tuple[Path, Path]:
    """A snapshot of a hub cache and its blobs."""
    made = root / name / "snapshots" / "c0ffee"
    blobs = root / name / "blobs"
    (made / "sub").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("x")
    return made, blobs


def test_blobs_of_a_hub_cache(tmp_path):
    made, _ = snapshot(tmp_path)
    (made / "LICENSE").symlink_to("../../blobs/abc")
    (made / "sub" / "a.jinja").symlink_to("../../../blobs/abc")
    (tmp_path / "link").symlink_to(made)
    for folder in (made, tmp_path / "link"):
        assert documents.read_bytes(folder / "LICENSE", CONFIG, of=folder) == b"x"
    assert documents.read_bytes(made / "sub" / "a.jinja", CONFIG, of=made) == b"x"
    assert documents.read_bytes(made / "sub" / "a.jinja", CONFIG, of=made / "sub") == b"x"


@pytest.mark.parametrize("where", ["other", "below", "blobs elsewhere", "no cache"])
def test_what_only_looks_like_blobs(tmp_path, where):
    made, blobs = snapshot(tmp_path, "models--a--b" if where != "no cache" else "models")
    _, theirs = snapshot(tmp_path, "models--c--d")
    path = made / "LICENSE"
    path.symlink_to("../../blobs/abc")
    if where == "other":
        path.unlink()
        path.symlink_to(theirs / "abc")
    elif where == "below":
        (blobs / "sub").mkdir()
        (blobs / "sub" / "abc").write_text("x")
        path.unlink()
        path.symlink_to("../../blobs/sub/abc")
    elif where == "blobs elsewhere":
        blobs.rename(tmp_path / "etc")
        blobs.symlink_to(tmp_path / "etc")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        documents.read_bytes(path, CONFIG, of=made)


def test_a_link_that_is_put_there_after_the_look_is_not_followed(tmp_path, monkeypatch):
    path, secret = tmp_path / "model" / "LICENSE", tmp_path / "secret"
    path.parent.mkdir()
    secret.write_text("secret")
    path.symlink_to(secret)
    monkeypatch.setattr(documents, "inside", lambda path, folder: path)
    with pytest.raises(TaskvecError, match="LICENSE: cannot be read: "):
        documents.read_bytes(path, CONFIG, of=path.parent)
    assert stat.S_ISLNK(path.lstat().st_mode)
