"""Tables of layer weights: written by scan, edited, given to merge."""

from __future__ import annotations

import json

import pytest
from tests.conftest import read_checkpoint, read_raw


@pytest.mark.parametrize("name", ["table.csv", "table.json"])
def test_table_round_trip(tmp_path, cli, flags, name):
    path = tmp_path / name
    assert cli("scan", *flags, "--scheme", "linear", "--save-table", path)[0] == 0
    assert cli("merge", tmp_path / "one", *flags, "--scheme", "linear")[0] == 0
    assert cli("merge", tmp_path / "two", *flags, "--table", path)[0] == 0
    assert (
        cli("merge", tmp_path / "three", *flags, "--table", path, "--method", "task_arithmetic")[0]
        == 0
    )
    assert read_raw(tmp_path / "one") == read_raw(tmp_path / "two") == read_raw(tmp_path / "three")


@pytest.mark.parametrize("name", ["table.csv", "table.json"])
def test_edited_table(tmp_path, family, cli, name):
    """Zero everywhere but in one tensor, with the weight that was written there."""
    flags = [
        "--instruct",
        family["instruct"],
        "--task",
        f"math={family['math']}:2",
        "--method",
        "task_arithmetic",
    ]
    path = tmp_path / name
    assert cli("scan", *flags, "--save-table", path)[0] == 0
    text = path.read_text()
    if name.endswith("json"):
        data = json.loads(text)
        data["weights"]["math"] = {n: -0.25 * (n == "odd") for n in data["weights"]["math"]}
        path.write_text(json.dumps(data))
    else:
        lines = text.replace(",1.0", ",0").replace("odd,0", "odd,-.25").splitlines()
        path.write_text("\r\n".join([lines[0], *reversed(lines[1:])]) + "\r\n")
    assert cli("merge", tmp_path / "out", *flags, "--table", path, "--dtype", "float32")[0] == 0
    got, start, task = (
        read_checkpoint(p) for p in (tmp_path / "out", family["instruct"], family["math"])
    )
    for tensor in got:
        expected = start[tensor].astype("f8")
        if tensor == "odd":
            expected = expected + 2 * -0.25 * (task["odd"].astype("f8") - start["odd"])
        assert got[tensor] == pytest.approx(expected, abs=1e-7)


def test_table_of_a_spreadsheet_with_a_byte_order_mark(tmp_path, cli, flags):
    path = tmp_path / "table.csv"
    assert cli("scan", *flags, "--save-table", path)[0] == 0
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert cli("merge", tmp_path / "out", *flags, "--table", path)[0] == 0


def rows(**changes: str) -> str:
    return "tensor,math\n" + "".join(
        f"{k},{v}\n" for k, v in {"a": "1", "b": "0.5", **changes}.items()
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", ": is not a table; the first line must be: tensor,TASK,…"),
        ("t.csv", "name,math\na,1\n", ": is not a table; the first line must be: tensor,TASK,…"),
        ("t.csv", "tensor\na\n", ": is not a table; the first line must be: tensor,TASK,…"),
        ("t.csv", "tensor,math,math\na,1,1\n", ": a task occurs twice in the first line"),
        ("t.csv", rows() + "c,1,2\n", ":4: 3 fields, expected 2"),
        ("t.csv", rows() + "c\n", ":4: 1 fields, expected 2"),
        ("t.csv", rows() + "a,1\n", ":4: tensor 'a' occurs twice"),
        ("t.csv", rows(a="x"), ": weight of 'math' for 'a' must be a finite number; got 'x'"),
        ("t.csv", rows(a="nan"), ": weight of 'math' for 'a' must be a finite number; got 'nan'"),
        ("t.csv", rows(a="inf"), ": weight of 'math' for 'a' must be a finite number; got 'inf'"),
        ("t.csv", rows(a=""), ": weight of 'math' for 'a' must be a finite number; got ''"),
        ("t.csv", "tensor,math\n" + "x" * 200_000,
         ": is not CSV (field larger than field limit (131072))"),
        ("t.json", "{", ": is not JSON (Expecting property name"),
        ("t.json", "[" * 100_000, ": is nested more than 100 levels deep"),
        ("t.json", "[]", ": it must be a mapping; got []"),
        ("t.json", "{}", ": weights is missing; expected weights by task and tensor"),
        ("t.json", '{"weights": {}}', ": has no weights; expected weights by task and tensor"),
        ("t.json", '{"weights": {"math": [1]}}', ": weights.math must be a mapping; got [1]"),
        ("t.json", '{"weights": {"math": {"a": 1}}, "target": 3}',
         ": target must be a mapping; got 3"),
        ("t.json", '{"weights": {"math": {"a": true}}}',
         ": weights.math.a must be a finite number; got True"),
        ("t.json", '{"weights": {"math": {"a": NaN}}}',
         ": weights.math.a must be a finite number; got nan"),
        ("t.json", '{"weights": {"math": {"a": [1]}}}',
         ": weights.math.a must be a finite number; got [1]"),
        ("t.json", '{"weights": {"math": {"a": 1' + "0" * 400 + "}}}",
         ": is not JSON (a number of 401 digits)"),
        ("t.json", '{"weights": {"math": {"a": 1}, "code": {"b": 1}}}',
         ": tensor 'a' has no weight for every task (see 'code')"),
    ],
)  # fmt: skip
def test_broken_table(tmp_path, cli, flags, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    code, out, err = cli("merge", tmp_path / "out", *flags, "--table", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"taskvec: error: {path}{message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_table_that_cannot_be_read(tmp_path, cli, flags):
    code, _, err = cli("merge", tmp_path / "out", *flags, "--table", tmp_path / "absent.csv")
    assert code == 2
    assert err.startswith(f"taskvec: error: {tmp_path}/absent.csv: cannot be read: ")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    code, _, err = cli("merge", tmp_path / "out", *flags, "--table", tmp_path / "t.csv")
    assert code == 2
    assert err.startswith(f"taskvec: error: {tmp_path}/t.csv: cannot be read: byte 0")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("code"), "table t.json: has tasks math; the merge has code, math"),
        (lambda w: w.update(third=w["math"]),
         "table t.json: has tasks code, math, third; the merge has code, math"),
        (lambda w: [c.update({"odt": 1}) for c in w.values()],
         "table t.json: tensor 'odt' is not merged here; did you mean 'odd'?"),
        (lambda w: [c.pop("odd") for c in w.values()],
         "table t.json: no weight for tensor 'odd' (1 missing); give 0 to leave it unchanged"),
    ],
)  # fmt: skip
def test_table_that_does_not_fit(tmp_path, cli, flags, edit, message):
    path = tmp_path / "t.json"
    assert cli("scan", *flags, "--save-table", path)[0] == 0
    data = json.loads(path.read_text())
    edit(data["weights"])
    path.write_text(json.dumps(data))
    assert cli("merge", tmp_path / "out", *flags, "--table", path) == (
        2, "", f"taskvec: error: {message}\n",
    )  # fmt: skip


def test_average_takes_no_table(tmp_path, cli, flags):
    (tmp_path / "t.csv").write_text(rows())
    code, _, err = cli(
        "merge", tmp_path / "out", *flags, "--method", "average", "--table", tmp_path / "t.csv"
    )
    assert code == 2
    assert err == "taskvec: error: average does not accept a table; use task_arithmetic or lata\n"
