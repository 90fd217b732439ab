"""Journals: what was added is there after a crash, except for a line that it cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from taskvec.errors import OutputError
from taskvec.journal import Journal, cut_unfinished_line, finite

ENTRIES = [{"a": 1}, {"b": "猫"}, {"c": "\ud800"}]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "new" / "x.jsonl")
    made.begin(ENTRIES[:1])
    for entry in ENTRIES[1:]:
        made.add(entry)
    return made


def test_entries_come_back(journal: Journal) -> None:
    assert journal.read() == ENTRIES
    assert "猫" in journal.path.read_text("utf-8")
    assert Journal(journal.path.with_name("none")).read() == []


@pytest.mark.parametrize("left", [b'{"d": 1', b'{"d": 1}', b"\x00\x00", b"\xff", b'{"d": "\xe7'])
def test_a_line_that_was_cut_off_is_removed_before_more_is_added(
    journal: Journal, left: bytes
) -> None:
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + left)
    assert journal.resume() == ENTRIES
    journal.add({"e": 1})
    assert journal.path.read_bytes() == whole + b'{"e": 1}\n'


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b"7", b"[" * 100_000, b"\xff"])
def test_lines_that_are_not_entries_are_left_out(journal: Journal, line: bytes) -> None:
    journal.path.write_bytes(line + b"\n" + journal.path.read_bytes())
    assert journal.resume() == ENTRIES


def test_begin_replaces_whole_or_not_at_all(journal: Journal, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="No space left"):
            journal.begin([])
    assert journal.read() == ENTRIES
    journal.begin([])
    assert journal.path.read_bytes() == b""


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / "none" / "x").add({})
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path).add({})


def test_only_an_unfinished_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "x"
    cut_unfinished_line(path)
    assert not path.exists()
    for before, after in ((b"", b""), (b"a\n", b"a\n"), (b"a\nb", b"a\n"), (b"a", b"")):
        path.write_bytes(before)
        cut_unfinished_line(path)
        assert path.read_bytes() == after


def test_json_has_finite_numbers_only() -> None:
    value = finite({"a": [1.0, float("nan")], "b": (float("inf"), "x"), "c": None})
    assert json.dumps(value) == '{"a": [1.0, null], "b": [null, "x"], "c": null}'
