"""Bars and tables: on a terminal, in a log file, and without colour."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from tests.cli.conftest import strict

from taskvec.cli import progress, streams
from taskvec.cli.commands import Arguments
from taskvec.cli.printing import show
from taskvec.cli.progress import Bars


def args(**values: bool) -> Arguments:
    return Arguments(**{"quiet": False, "verbose": False} | values)


def on_a_terminal(command: list[str], columns: int = 80, **environment: str) -> str:
    """What a command writes to a terminal of its own."""
    main, inner = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", **environment}
    with subprocess.Popen(
        command, stdout=inner, stderr=inner, stdin=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(inner)
        written = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
        os.close(main)
    assert process.returncode == 0, written
    return written.decode()


BAR = """
import sys, time
from taskvec.cli.commands import Arguments
from taskvec.cli.progress import Bars
bars = Bars(Arguments(quiet="-q" in sys.argv, verbose=False), name="big-model")
with bars("merge", 10**9) as advance:
    time.sleep(0.9)  # as one large matrix: nothing advances
    advance(5 * 10**8)
    time.sleep(0.3)
print("done")
"""


def test_a_bar_appears_within_a_second_and_names_the_model():
    text = on_a_terminal([sys.executable, "-c", BAR], columns=120)
    assert "big-model: merge" in text
    assert "0%" in text
    assert "50%" in text
    assert "GB" in text
    assert "\x1b[?25h" in text  # the cursor is back
    assert text.rstrip().endswith("done")


def test_no_bar_where_it_is_not_wanted():
    assert on_a_terminal([sys.executable, "-c", BAR, "-q"]).split() == ["done"]


def test_no_colour_where_it_is_not_wanted():
    text = on_a_terminal([sys.executable, "-c", BAR], NO_COLOR="1")
    assert "big-model: merge" in text
    assert not re.search(r"\x1b\[[0-9;]*[34][0-7][;m]", text)


def test_a_bar_in_plain_letters():
    text = on_a_terminal([sys.executable, "-c", BAR], PYTHONIOENCODING="ascii")
    assert text.isascii()
    assert "merge" in text


def test_no_bars_and_no_colour_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    with Bars(args(), name="m")("merge", 10) as advance:
        time.sleep(0.05)
        advance(10)
    streams.warn(["careful"])
    assert capsys.readouterr().err == "taskvec: warning: careful\n"


def test_verbose_logs_every_step_once(tmp_path, cli, flags):
    code, out, err = cli("merge", tmp_path / "out", *flags, "--json", "-v")
    assert code == 0
    assert strict(out)["path"] == str(tmp_path / "out")
    assert re.findall(r"taskvec: out: (\w+): [\d.]+ [kM]?B in ", err) == ["scan", "merge"]
    assert " in " not in cli("merge", tmp_path / "two", *flags, "--quiet")[2]


def test_what_is_short_shows_no_bar():
    short = BAR.replace("0.9", "0.01").replace("0.3", "0.01")
    assert on_a_terminal([sys.executable, "-c", short]).split() == ["done"]


def test_steps_that_follow_each_other_keep_the_bar(monkeypatch):
    """The delay is that of the command: many short steps are not invisible."""
    steps = BAR.replace("with bars", "for _ in range(20):\n  with bars").replace(
        "\n    ", "\n      ").replace("0.9", "0.05").replace("0.3", "0.05")  # fmt: skip
    assert "big-model: merge" in on_a_terminal([sys.executable, "-c", steps], columns=120)


TABLE = """
from taskvec.cli.printing import show
show([("a name that is long " * 3, 0.5), ("short", 10.25)], ("what", "value"))
"""


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_a_table_fits_the_terminal(columns):
    text = on_a_terminal([sys.executable, "-c", TABLE], columns=columns)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= columns
    assert "10.2500" in plain


WIDE = """
from taskvec.cli.printing import show
row = ["model.layers.10.mlp.up_proj.weight", 1234567, "12.50%", "0.500 [0.400, 0.600]", "41.92 kB"]
show([row, ["norm", 1, "–", "", "8 B"]], ("layer", "elements", "share", "score of math", "size"))
"""


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_numbers_never_wrap(columns):
    """Columns that do not fit follow in a second table, with the first column again."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal([sys.executable, "-c", WIDE], columns))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= columns
    for whole in ("1,234,567", "12.50%", "0.500 [0.400, 0.600]", "41.92 kB"):
        assert whole in text
    assert text.count("norm ") == (2 if columns == 60 else 1)
    right = {len(line) for line in lines if line.endswith((" B", "kB"))}
    assert len(right) == 1


def test_a_row_is_a_line_elsewhere(capsys: Any):
    show([("a name that is long " * 9, 0.5), ("short", 10.25)], ("what", "value"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("  value")
    assert lines[1].endswith("  0.5000")
