"""`kill -9` and Ctrl-C at any moment: all of the old state or all of the new; a rerun completes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import read_raw, told

from taskvec.outputs.staging import JOURNAL, Staging

KILLING = Path(__file__).with_name("killing.py")


def killed(
    family: dict[str, Path], folder: Path, kind: str, number: int, before: str
) -> list[dict]:
    """What each of many killed merges left."""
    (folder / "work").mkdir()
    root = family["base"].parent
    done = subprocess.run(
        [sys.executable, KILLING, root, folder / "work", kind, str(number), before],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(trials: list[dict]) -> None:
    broken = [t for t in trials if t["state"] == "broken" or t["again"] == "broken"]
    assert not broken
    assert any(t["staged"] and t["state"] == "old" for t in trials)  # some were killed half way


@pytest.mark.parametrize("before", ["absent", "old"])
@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_at_random_times(tmp_path, family, before, count):
    trials = killed(family, tmp_path, "time", count, before)
    assert len(trials) == count
    check(trials)


@pytest.mark.parametrize("before", ["absent", "old"])
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_operations(tmp_path, family, before, step):
    """Before each operation on a file or folder: none of the points between two is left out."""
    trials = killed(family, tmp_path, "operation", step, before)
    assert len(trials) > 60 / step
    assert all(t["killed"] for t in trials)
    check(trials)
    assert any(t["journal"] > 2 for t in trials)
    if step == 1:
        assert {t["state"] for t in trials} == {"old", "new"}


# --- Ctrl-C --------------------------------------------------------------------------------------

INTERRUPTION = "taskvec: interrupted; the same command continues where it stopped\n"
INTERRUPTED = """
import os, signal, sys
from taskvec.outputs import staging
from taskvec.cli.main import main

staging.SYNC_BYTES = 1
complete = staging.Staging.complete

def counted(self, tensor, record):
    complete(self, tensor, record)
    self.count = getattr(self, "count", 0) + 1
    if self.count == 9:
        os.kill(os.getpid(), signal.SIGINT)

staging.Staging.complete = counted
sys.exit(main(sys.argv[1:]))
"""


def test_interrupted_merge_goes_on_where_it_was(tmp_path, family, cli, monkeypatch):
    flags = ["--instruct", family["instruct"], "--task", f"math={family['math']}:0.5",
             "--method", "task_arithmetic", "--quiet"]  # fmt: skip
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "merge", out, *flags],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert told(done.stderr) == INTERRUPTION
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.taskvec", "family"]
    lines = (tmp_path / ".out.taskvec" / JOURNAL).read_text().splitlines()
    finished = {name for line in lines[1:] for name in json.loads(line)}
    assert len(finished) >= 9

    written = set()
    write = Staging.write

    def spy(self: Staging, tensor: int, start: int, block: object) -> None:
        written.add(self.tensors[tensor].name)
        write(self, tensor, start, block)

    monkeypatch.setattr(Staging, "write", spy)
    assert cli("merge", out, *flags)[0] == 0
    assert written == set(read_raw(out)) - finished
    assert cli("merge", tmp_path / "whole", *flags)[0] == 0
    assert read_raw(out) == read_raw(tmp_path / "whole")
    assert cli("verify", out, "--replay")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", "out", "whole"]


def test_staging_of_an_interrupted_merge_is_not_taken_up_by_another(tmp_path, family, cli):
    flags = ["--instruct", family["instruct"], "--method", "task_arithmetic", "--quiet"]
    out = tmp_path / "out"
    task = f"math={family['math']}"
    subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "merge", out, *flags, "--task", f"{task}:0.5"],
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert (tmp_path / ".out.taskvec").is_dir()
    assert cli("merge", out, *flags, "--task", f"{task}:0.25")[0] == 0
    assert cli("merge", tmp_path / "whole", *flags, "--task", f"{task}:0.25")[0] == 0
    assert read_raw(out) == read_raw(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family", "out", "whole"]


def test_interrupt_by_a_signal_from_outside(tmp_path, family):
    """While weights are scanned: nothing has been written yet, and nothing is left."""
    script = (
        "import os, sys, time\n"
        "from taskvec.cli.main import main\n"
        "from taskvec.statistics import collect\n"
        "real = collect.chunk_digests\n"
        "def slow(block):\n"
        "    print('scanning', flush=True); time.sleep(0.05); return real(block)\n"
        "collect.chunk_digests = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = [
        "--base",
        family["base"],
        "--instruct",
        family["instruct"],
        "--task",
        f"math={family['math']}:1",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", script, "merge", tmp_path / "out", *flags, "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "scanning\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told(err) == INTERRUPTION
    assert sorted(p.name for p in tmp_path.iterdir()) == ["family"]
