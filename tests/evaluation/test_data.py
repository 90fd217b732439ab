"""Data of tasks: every kind of file, every message, the order of places, the hub."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskvec.errors import DataError, MissingExtraError
from taskvec.evaluation.data import DataFile, DataPlaces, DataRow, HubData, read_rows, rows_of

HUB = HubData("someone/questions", "main", "test")
FILE = DataFile("test", ("quiz/test.jsonl", "quiz/other.csv"), HUB)
OFFLINE = DataPlaces(hub=False)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def contents(path: Path) -> list[dict[str, Any]]:
    return [dict(row.data) for row in read_rows(path)]


# Kinds of files


def test_json_lines_skip_empty_lines_and_count_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "one"}\n\n{"q": "two"}\n')
    rows = read_rows(path)
    assert [row.data for row in rows] == [{"q": "one"}, {"q": "two"}]
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]
    assert [row.file for row in rows] == ["a", "a"]


def test_json_lines_keep_line_separators_of_unicode_inside_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "one\u2028two\x85three"}\n')
    assert contents(path) == [{"q": "one\u2028two\x85three"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"q": 1}, {"q": 2}]', [{"q": 1}, {"q": 2}]),
        ('{"examples": [1]}', [{"examples": [1]}]),
        ('{"q": 1}\n{"q": 2}\n', [{"q": 1}, {"q": 2}]),  # lines, called .json
    ],
)
def test_json(tmp_path: Path, text: str, expected: list[dict[str, Any]]) -> None:
    assert contents(write(tmp_path / "a.json", text)) == expected


def test_csv_has_quotes_commas_and_line_breaks_in_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'q,a\r\n"one, two","x\ny"\r\nthree,"say ""z"""\r\n')
    rows = read_rows(path)
    assert [dict(row.data) for row in rows] == [
        {"q": "one, two", "a": "x\ny"},
        {"q": "three", "a": 'say "z"'},
    ]
    assert rows[1].where == f"{path}, line 4"


def test_tsv(tmp_path: Path) -> None:
    assert contents(write(tmp_path / "a.tsv", "q\ta\none, two\tx\n")) == [
        {"q": "one, two", "a": "x"}
    ]


def test_text_is_one_row_and_an_empty_one_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n")
    assert read_rows(path) == [DataRow({"text": "one\ntwo\n"}, str(path), "a")]
    assert read_rows(write(tmp_path / "b.txt", "")) == []


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfq,a\n1,2\n")
    assert contents(path) == [{"q": "1", "a": "2"}]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl.gz", '{"q": "é"}\n', [{"q": "é"}]),
        ("a.json.gz", '[{"q": 1}]', [{"q": 1}]),
        ("a.csv.gz", "q,a\n1,2\n", [{"q": "1", "a": "2"}]),
        ("a.tsv.gz", "q\ta\n1\t2\n", [{"q": "1", "a": "2"}]),
        ("a.txt.gz", "one", [{"text": "one"}]),
    ],
)
def test_gzipped(tmp_path: Path, name: str, text: str, expected: list[dict[str, Any]]) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    assert contents(path) == expected
    assert {row.file for row in read_rows(path)} == {"a"}


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"q": ["one", "two"], "choices": [["x"], ["y", "z"]]}), path)
    rows = read_rows(path)
    assert [row.data for row in rows] == [
        {"q": "one", "choices": ["x"]},
        {"q": "two", "choices": ["y", "z"]},
    ]
    assert (rows[1].where, rows[1].file) == (f"{path}, row 1", "a")


def test_endings_in_capitals(tmp_path: Path) -> None:
    assert contents(write(tmp_path / "A.CSV", "q\n1\n")) == [{"q": "1"}]
    assert contents(write(tmp_path / "B.TSV", "q\ta\n1\t2\n")) == [{"q": "1", "a": "2"}]


def test_only_the_ending_says_what_a_file_is(tmp_path: Path) -> None:
    assert contents(write(tmp_path / "from.tsv.csv", "q,a\n1,2\n")) == [{"q": "1", "a": "2"}]


# Files that are not what their names say


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"q": 1}\n{"q": \n', "{path}, line 2: is not JSON (Expecting value"),
        ("a.jsonl", "[1, 2]\n", "{path}, line 1: must be a JSON object; got [1, 2]"),
        ("a.json", '[{"q": 1}, 7]', "{path}, row 1: must be a JSON object; got 7"),
        ("a.json", "nonsense", "{path}: is not JSON (Expecting value"),
        (
            "a.csv",
            "q,a\n1,2,3\n",
            "{path}, line 2: has another number of fields than the 2 of the first line",
        ),
        (
            "a.csv",
            "q,a\n1\n",
            "{path}, line 2: has another number of fields than the 2 of the first line",
        ),
    ],
)
def test_malformed_files_say_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_a_field_too_long_for_csv_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "q\n1\n" + "x" * 200_000 + "\n")
    with pytest.raises(DataError, match=r"a\.csv, line \d: is not CSV: field larger than"):
        read_rows(path)


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    latin, broken, cut = tmp_path / "a.jsonl", tmp_path / "b.csv.gz", tmp_path / "c.csv.gz"
    latin.write_bytes(b'{"q": "\xe9"}')
    broken.write_bytes(b"no gzip")
    cut.write_bytes(gzip.compress(b"q\n" + bytes(range(65, 90)) * 9)[:-9])
    spoilt, parquet = tmp_path / "d.csv.gz", tmp_path / "e.parquet"
    spoilt.write_bytes(gzip.compress(b"q\n")[:10] + b"\xff" * 20)
    parquet.write_bytes(b"no parquet")
    for path in (latin, broken, cut, spoilt, parquet, tmp_path / "absent.csv"):
        with pytest.raises(DataError) as caught:
            read_rows(path)
        assert str(caught.value).startswith(f"{path}: cannot be read: ")


# Fields


FIELDS = {"n": 3, "digits": " 12 ", "square": "²", "b": True, "t": "x", "list": ["a"]}
ROW = DataRow(FIELDS | {"mixed": ["a", 1]}, "here")


def test_fields_are_taken_under_the_first_key_that_is_there() -> None:
    assert ROW.text("question", "t") == "x"
    assert ROW.number("n") == 3
    assert ROW.number("digits") == 12
    assert ROW.texts("choices", "list") == ["a"]


@pytest.mark.parametrize(
    ("take", "key", "message"),
    [
        (DataRow.text, "n", "here: 'n' must be a text; got 3"),
        (DataRow.number, "t", "here: 't' must be a whole number; got 'x'"),
        (DataRow.number, "square", "here: 'square' must be a whole number; got '²'"),
        (DataRow.number, "b", "here: 'b' must be a whole number; got True"),
        (DataRow.texts, "t", "here: 't' must be a list of texts; got 'x'"),
        (DataRow.texts, "mixed", "here: 'mixed' must be a list of texts; got ['a', 1]"),
    ],
)
def test_a_field_of_another_type_is_told(
    take: Callable[[DataRow, str], object], key: str, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        take(ROW, key)
    assert str(caught.value) == message


def test_a_missing_field_is_told_with_those_that_are_there() -> None:
    with pytest.raises(DataError) as caught:
        ROW.text("question", "prompt")
    expected = (
        "here: has no 'question' or 'prompt'; its fields: n, digits, square, b, t, list, mixed"
    )
    assert str(caught.value) == expected


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(DataError) as caught:
        DataRow({"q": ["x" * 500]}, "here").text("q")
    assert str(caught.value) == "here: 'q' must be a text; got " + ("['" + "x" * 500)[:57] + "..."


# Places


def places(*folders: Path, hub: bool = False, **by_task: Path) -> DataPlaces:
    return DataPlaces(folders, by_task, hub)


def found(where: DataPlaces, *files: DataFile) -> dict[str, list[Any]]:
    rows = rows_of("quiz", files or (FILE,), where)
    return {role: [row.data["q"] for row in mine] for role, mine in rows.items()}


def test_folders_are_searched_in_order_and_names_within_each(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(second / "quiz/test.jsonl", '{"q": "second"}')
    assert found(places(first, second)) == {"test": ["second"]}
    write(first / "quiz/other.csv", "q\nother\n")
    assert found(places(first, second)) == {"test": ["other"]}  # the folder counts before the name
    write(first / "quiz/test.jsonl", '{"q": "test"}')
    assert found(places(first, second)) == {"test": ["test"]}


def test_a_file_may_lie_in_the_folder_itself(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", '{"q": "flat"}')
    assert found(places(tmp_path)) == {"test": ["flat"]}
    write(tmp_path / "quiz/test.jsonl", '{"q": "deep"}')
    assert found(places(tmp_path)) == {"test": ["deep"]}


def test_patterns_take_all_files_that_fit_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glob = Path.glob  # disks list in an order of their own
    monkeypatch.setattr(Path, "glob", lambda it, name: sorted(glob(it, name), reverse=True))
    write(tmp_path / "parts/b.csv", "q\n2\n")
    write(tmp_path / "parts/a.csv", "q\n1\n")
    (tmp_path / "parts/c.csv").mkdir()
    assert found(places(tmp_path), DataFile("test", ("parts/*.csv",))) == {"test": ["1", "2"]}


def test_a_file_for_the_task_stands_for_its_first_role_alone(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.csv", "q\nmine\n")
    folder = tmp_path / "data"
    write(folder / "quiz/test.jsonl", '{"q": "test"}')
    write(folder / "train.jsonl", '{"q": "train"}')
    train = DataFile("train", ("train.jsonl",))
    expected = {"test": ["mine"], "train": ["train"]}
    assert found(places(folder, quiz=mine), FILE, train) == expected


def test_a_folder_for_the_task_comes_before_the_others(tmp_path: Path) -> None:
    write(tmp_path / "common/quiz/test.jsonl", '{"q": "common"}')
    write(tmp_path / "own/test.jsonl", '{"q": "own"}')
    assert found(places(tmp_path / "common", quiz=tmp_path / "own")) == {"test": ["own"]}


def test_the_hub_does_not_stand_in_for_what_a_given_folder_lacks(
    tmp_path: Path, hub: Callable[..., Hub]
) -> None:
    it = hub([{"q": "hub"}])
    with pytest.raises(DataError, match=r"task 'quiz' has no test data; looked for "):
        rows_of("quiz", [FILE], places(hub=True, quiz=tmp_path))
    assert it.asked == []


def test_what_is_optional_may_be_absent(tmp_path: Path) -> None:
    write(tmp_path / "quiz/test.jsonl", '{"q": "test"}')
    shots = DataFile("train", ("train.jsonl",), optional=True)
    assert found(places(tmp_path), FILE, shots) == {"test": ["test"], "train": []}


def test_what_is_nowhere_is_told_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        rows_of("quiz", [FILE], places(tmp_path))
    names = ["quiz/test.jsonl", "test.jsonl", "quiz/other.csv", "other.csv"]
    looked = ", ".join(str(tmp_path / name) for name in names)
    assert str(caught.value) == (
        f"task 'quiz' has no test data; looked for {looked}; "
        "give a folder with 'quiz/test.jsonl' in it by --data DIR, or --data quiz=FILE"
    )


def test_without_any_place_the_message_says_what_to_give() -> None:
    with pytest.raises(DataError) as caught:
        rows_of("quiz", [FILE], OFFLINE)
    assert str(caught.value) == (
        "task 'quiz' has no test data; "
        "give a folder with 'quiz/test.jsonl' in it by --data DIR, or --data quiz=FILE"
    )


def test_nothing_stands_in_for_a_given_path_that_is_not_there(tmp_path: Path) -> None:
    absent = tmp_path / "absent.csv"
    write(tmp_path / "quiz/test.jsonl", '{"q": "another"}')
    with pytest.raises(DataError) as caught:
        rows_of("quiz", [FILE], places(tmp_path, hub=True, quiz=absent))
    assert str(caught.value) == (
        f"task 'quiz': {absent} is not there; it was given by --data quiz=…"
    )


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "quiz/test.jsonl", "\n\n")
    with pytest.raises(DataError) as caught:
        rows_of("quiz", [FILE], places(tmp_path))
    assert str(caught.value) == f"{path}: has no rows"


# The hub


class Hub:
    """Stands for the datasets library."""

    def __init__(self, answer: list[dict[str, Any]] | Exception) -> None:
        self.answer, self.asked = answer, []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, trust_remote_code: bool
    ) -> list[dict[str, Any]]:
        assert trust_remote_code is False
        self.asked.append((name, config, split))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def stub(answer: list[dict[str, Any]] | Exception) -> Hub:
        it = Hub(answer)
        module = SimpleNamespace(load_dataset=it.load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
        return it

    return stub


def test_the_hub_is_asked_for_what_lies_nowhere(tmp_path: Path, hub: Callable[..., Hub]) -> None:
    it = hub([{"q": "one"}, {"q": "two"}])
    (rows,) = rows_of("quiz", [FILE], places(tmp_path, hub=True)).values()
    assert it.asked == [("someone/questions", "main", "test")]
    assert [(row.data, row.where, row.file) for row in rows] == [
        ({"q": "one"}, "someone/questions, row 0", ""),
        ({"q": "two"}, "someone/questions, row 1", ""),
    ]


def test_local_files_never_ask_the_hub(tmp_path: Path, hub: Callable[..., Hub]) -> None:
    it = hub([{"q": "hub"}])
    write(tmp_path / "quiz/test.jsonl", '{"q": "local"}')
    assert found(places(tmp_path, hub=True)) == {"test": ["local"]}
    assert it.asked == []


def test_optional_files_come_from_where_the_first_one_is(
    tmp_path: Path, hub: Callable[..., Hub]
) -> None:
    it = hub([{"q": "hub"}])
    train = HubData("someone/questions", "main", "train")
    shots = DataFile("train", ("train.jsonl",), train, optional=True)
    assert found(places(hub=True), FILE, shots) == {"test": ["hub"], "train": ["hub"]}
    write(tmp_path / "quiz/test.jsonl", '{"q": "local"}')
    it.asked.clear()
    assert found(places(tmp_path, hub=True), FILE, shots) == {"test": ["local"], "train": []}
    assert it.asked == []


def test_without_leave_the_hub_is_not_asked(hub: Callable[..., Hub]) -> None:
    it = hub([{"q": "hub"}])
    with pytest.raises(DataError, match="has no test data"):
        rows_of("quiz", [FILE], OFFLINE)
    assert it.asked == []


def test_a_file_for_the_task_leaves_other_roles_to_the_hub(
    tmp_path: Path, hub: Callable[..., Hub]
) -> None:
    hub([{"q": "hub"}])
    mine = write(tmp_path / "mine.csv", "q\nmine\n")
    train = DataFile("train", ("train.jsonl",), HubData("someone/questions", None, "train"))
    expected = {"test": ["mine"], "train": ["hub"]}
    assert found(places(hub=True, quiz=mine), FILE, train) == expected


@pytest.mark.parametrize("gated", [False, True])
def test_what_the_hub_refuses_is_told_in_one_line(hub: Callable[..., Hub], gated: bool) -> None:
    hub(RuntimeError("no such data set\nmore\nlines"))
    file = DataFile("test", ("a.csv",), HubData("some/set", None, "test", gated))
    with pytest.raises(DataError) as caught:
        rows_of("quiz", [file], DataPlaces())
    access = "; access must be asked for on its page" if gated else ""
    assert str(caught.value) == (
        "task 'quiz': data set some/set, split test cannot be loaded from the hub: "
        f"no such data set{access}; or give local files by --data"
    )


def test_an_error_without_words_has_its_name(hub: Callable[..., Hub]) -> None:
    hub(ConnectionError())
    with pytest.raises(DataError, match="from the hub: ConnectionError; or give local"):
        rows_of("quiz", [FILE], DataPlaces())


def test_hub_data_are_named_with_their_configuration() -> None:
    assert str(HUB) == "someone/questions (main), split test"


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'taskvec\[data\]'"):
        rows_of("quiz", [FILE], DataPlaces())


def test_rows_are_plain_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": [1, {"x": null}]}\n')
    assert json.dumps(contents(path)) == '[{"q": [1, {"x": null}]}]'


@pytest.mark.parametrize("take", [DataRow.text, DataRow.texts])
def test_half_of_a_surrogate_pair_is_told(take: Callable[[DataRow, str], Any]) -> None:
    text = json.loads(r'"a \ud83d b"')
    row = DataRow({"q": text if take is DataRow.text else ["fine", text]}, "here")
    with pytest.raises(DataError) as caught:
        take(row, "q")
    assert str(caught.value) == "here: 'q' holds half of a surrogate pair, at character 2"
