"""Tables: files keep every bit, and what is no table is told in words."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from taskvec.errors import UsageError
from taskvec.methods.table import Table, check_table, load_table, table_from_json

TASKS = ("code", "math")
REMEDY = "expected weights by task and tensor"
NAMES = ("lm_head.weight", "model.norm.weight", 'odd, "name"')


def table(weights=None, target=None):
    weights = [[1, 0.1, 1 / 3], [0, -0.0, 2e-308]] if weights is None else weights
    return Table(TASKS, NAMES, np.array(weights, np.float64), target)


def same_bits(a, b):
    return (a is None and b is None) or np.array_equal(a.view(np.uint64), b.view(np.uint64))


numbers = st.floats(allow_nan=False, allow_infinity=False)
rows = st.lists(numbers, min_size=3, max_size=3)


@pytest.mark.parametrize("name", ["t.csv", "t.json", "table"])
@settings(
    max_examples=100, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the file is written anew
)  # fmt: skip
@given(weights=st.tuples(rows, rows), target=st.none() | rows)
@example(weights=([0.1, 1 / 3, -0.0], [5e-324, 1.7976931348623157e308, 0.0]), target=[0.1, 1, -0.0])
def test_files_keep_every_bit(tmp_path, name, weights, target):
    path = tmp_path / name
    written = table(weights, None if target is None else np.array(target, np.float64))
    written.save(path)
    read = load_table(path)
    assert (read.tasks, read.names) == (TASKS, NAMES)
    assert same_bits(read.weights, written.weights)
    assert same_bits(read.target, written.target)
    again = table_from_json(json.loads(json.dumps(written.to_json())), "there")
    assert same_bits(again.weights, written.weights)
    assert same_bits(again.target, written.target)


def test_csv_is_made_for_editing(tmp_path):
    table(target=np.array([1, 0.5, 0])).save(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "tensor,code,math,(target)",
        "model.norm.weight,0.1,-0.0,0.5",  # in the order of a model
        "lm_head.weight,1.0,0.0,1.0",
        '"odd, ""name""",0.3333333333333333,2e-308,0.0',
    ]


def test_rows_and_columns_may_be_in_any_order(tmp_path):
    (tmp_path / "t.csv").write_text("tensor,math,code\nb,1,2\na,3,4\n")
    read = load_table(tmp_path / "t.csv")
    assert (read.tasks, read.names) == (("code", "math"), ("a", "b"))
    assert read.weights.tolist() == [[4, 2], [3, 1]]
    (tmp_path / "t.json").write_text(
        '{"weights": {"math": {"b": 1, "a": 3}, "code": {"a": 4, "b": 2}}}'
    )
    assert load_table(tmp_path / "t.json").weights.tolist() == [[4, 2], [3, 1]]


def test_of_gives_weights_by_name():
    assert table([[1, 2, 3], [4, 5, 6]]).of("math") == dict(zip(NAMES, [4, 5, 6], strict=True))


@pytest.mark.parametrize(("text", "message"), [
    ("", "is not a table; the first line must be: tensor,TASK,…"),
    ("name,math\na,1\n", "is not a table; the first line must be: tensor,TASK,…"),
    ("tensor\na\n", "is not a table; the first line must be: tensor,TASK,…"),
    ("tensor,math,math\na,1,2\n", "a task occurs twice in the first line"),
    ("tensor,math\na,1,2\n", ":2: 3 fields, expected 2"),
    ("tensor,math\na,1\n\n", ":3: 0 fields, expected 2"),
    ("tensor,math\na,1\na,2\n", ":3: tensor 'a' occurs twice"),
    ('tensor,math\n"a' + "x" * 200_000, "is not CSV (field larger than field limit (131072))"),
    ("tensor,math\na,one\n", "weight of 'math' for 'a' must be a finite number; got 'one'"),
    ("tensor,math\na,\n", "weight of 'math' for 'a' must be a finite number; got ''"),
    ("tensor,math\na,nan\n", "weight of 'math' for 'a' must be a finite number; got 'nan'"),
    ("tensor,math\na,-inf\n", "weight of 'math' for 'a' must be a finite number; got '-inf'"),
])  # fmt: skip
def test_csv_errors(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_table(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not JSON ("),
    ("[" * 100_000, "is nested more than 100 levels deep"),
    ("[]", REMEDY),
    ("{}", REMEDY),
    ('{"weights": {}}', REMEDY),
    ('{"weights": [1]}', REMEDY),
    ('{"weights": {"math": 1}}', REMEDY),
    ('{"weights": {"m": {"a": "x"}}}', "weights.m.a must be a finite number; got 'x'"),
    ('{"weights": {"math": {"a": null}}}', "weights.math.a must be a finite number; got None"),
    ('{"weights": {"math": {"a": true}}}', "weights.math.a must be a finite number; got True"),
    ('{"weights": {"math": {"a": NaN}}}', "weights.math.a must be a finite number; got nan"),
    ('{"weights": {"math": {"a": [1]}}}', "weights.math.a must be a finite number; got [1]"),
    ('{"wieghts": {"math": {"a": 1}}}', "did you mean 'weights'?"),
    ('{"weights": {"m": {"a": 1}, "n": {"a": 1, "b": 2}}}', "tensor 'b' has no weight for every "
                                                            "task"),
    ('{"weights": {"m": {"a": 1}}, "target": {}}', "tensor 'a' has no weight for every task"),
    ('{"weights": {"m": {"a": 1}}, "target": [1]}', REMEDY),
    ('{"weights": {"m": {"a": 1' + "0" * 400 + "}}}", "a number of 401 digits"),
    ('{"weights": {"m": {"a": 1}}, "target": 0}', REMEDY),
])  # fmt: skip
def test_json_errors(tmp_path, text, message):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"none\.csv: cannot be read: "):
        load_table(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"t\.csv: cannot be read: "):
        load_table(tmp_path / "t.csv")


@pytest.mark.parametrize(("tasks", "names", "message"), [
    (("math",), NAMES, "table: has tasks code, math; the merge has math"),
    (("code", "maths"), NAMES, "table: has tasks code, math; the merge has code, maths"),
    (TASKS, NAMES[:2], "table: tensor 'odd, \"name\"' is not merged here"),
    (TASKS, ("lm_head.weights", *NAMES[1:]),
     "table: tensor 'lm_head.weight' is not merged here; did you mean 'lm_head.weights'?"),
    (TASKS, (*NAMES, "new"),
     "table: no weight for tensor 'new' (1 missing); give 0 to leave it unchanged"),
])  # fmt: skip
def test_a_table_that_does_not_fit(tasks, names, message):
    with pytest.raises(UsageError) as caught:
        check_table(table(), tasks, names, "table")
    assert str(caught.value) == message


def test_a_table_that_fits():
    check_table(table(), ("math", "code"), tuple(reversed(NAMES)), "table")
