"""Root with fewer capabilities runs generated code; other processes must survive.

A sandbox that fails here may kill every process that root may signal. So each case runs in a PID
namespace of its own, and the script in it does nothing unless it is process 1 there and alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from taskvec.errors import TaskvecError
from taskvec.sandbox import programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

UNSHARE = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
SOURCE = Path(__file__).parents[2] / "src"
# Process 1 of the namespace, which a signal to -1 does not reach, so it can report the result.
ALONE = """
import json, os, signal, subprocess, sys
outer, worker = sys.argv[1:]
numbers = [name for name in os.listdir("/proc") if name.isdigit()]
if os.getpid() != 1 or numbers != ["1"] or os.readlink("/proc/self/ns/pid") == outer:
    sys.exit("not alone in a PID namespace of its own: nothing is run here")
bystander = subprocess.Popen(["sleep", "60"])
done = subprocess.run([sys.executable, "-c", worker], capture_output=True, text=True)
survived = bystander.poll() is None
known = {"1", str(bystander.pid)}
left = []
for name in os.listdir("/proc"):
    if name.isdigit() and name not in known:
        try:
            with open(f"/proc/{name}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] not in "ZX":
                    left.append(name)
        except OSError:
            pass
print(json.dumps({"survived": survived, "left": left, "code": done.returncode,
                  "out": done.stdout, "error": done.stderr}))
"""
WORKER = """
import json
from taskvec.errors import TaskvecError
from taskvec.sandbox.programs import ProgramLimits, isolation, run_program
def tried(act):
    try:
        return act()
    except TaskvecError as error:
        return str(error)
found = [tried(isolation)]
for kind in ("namespaces", "user"):
    outcome = tried(lambda: run_program({code!r}, limits=ProgramLimits(seconds=2.0), within=kind))
    found.append(outcome if isinstance(outcome, str) else outcome.ended)
print(json.dumps(found))
"""
# Reads its own capabilities with a system call, because the program has no /proc.
NO_CAPABILITIES = """
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget(header, data) == 0
assert not any(data), list(data)
"""
HOPPING = """
import os, time
for _ in range(2):
    if os.fork() == 0:
        try:
            os.setsid()
        except OSError:
            pass
        while True:
            try:
                if os.fork():
                    os._exit(0)
            except OSError:
                pass
time.sleep(0.2)
"""


@cache
def missing_here() -> str:
    """What the system lacks for these tests."""
    if os.geteuid() != 0:
        return "only root makes a PID namespace that has other users"
    tools = [tool for tool in ("unshare", "setpriv", "sleep") if shutil.which(tool) is None]
    if tools:
        return f"{', '.join(tools)} is not installed"
    try:
        programs._python(for_others=True)
    except TaskvecError as error:
        return str(error)
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else f"unshare fails: {done.stderr.decode()}"


def run_alone(tmp_path: Path, code: str, *setpriv: str) -> dict[str, Any]:
    """Runs a program in every isolation, as root with the capabilities that `setpriv` leaves."""
    if missing := missing_here():
        pytest.skip(missing)
    outer = str(Path("/proc/self/ns/pid").readlink())
    done = subprocess.run(
        [*UNSHARE, "setpriv", *setpriv, sys.executable, "-c", ALONE, outer,
         WORKER.format(code=code)],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def answers(found: dict[str, Any]) -> list[str]:
    """Results of `isolation` and the two runs, after checking that the bystander survived."""
    assert found["survived"], found
    assert found["code"] == 0, found
    assert found["left"] == []
    told: list[str] = json.loads(found["out"])
    return told


@pytest.mark.parametrize("lost", ["setuid", "setgid", "kill", "chown", "fowner"])
def test_root_without_a_capability_kills_nobody(tmp_path: Path, lost: str) -> None:
    drop = f"-{lost},-sys_admin"
    best, namespaces, user = answers(
        run_alone(tmp_path, "while True: pass", f"--bounding-set={drop}", f"--inh-caps={drop}")
    )
    for message in (best, namespaces, user):
        assert "cannot be isolated" in message
    assert f"CAP_{lost.upper()}" in user
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["setuid", "setgid", "kill"])
def test_namespaces_alone_are_not_enough_for_root(tmp_path: Path, lost: str) -> None:
    drop = f"-{lost}"
    found = run_alone(tmp_path, "1 / 0", f"--bounding-set={drop}", f"--inh-caps={drop}")
    _, namespaces, _ = answers(found)
    assert f"CAP_{lost.upper()}" in namespaces


def test_processes_that_hop_die_without_namespaces(tmp_path: Path) -> None:
    drop = "-sys_admin"
    found = run_alone(tmp_path, HOPPING, f"--bounding-set={drop}", f"--inh-caps={drop}")
    best, namespaces, user = answers(found)
    if best != "user":
        pytest.skip(best)
    assert "cannot be isolated" in namespaces
    assert user == "passed"


def test_a_program_gets_no_capabilities_from_its_caller(tmp_path: Path) -> None:
    """With these security bits, a change of user keeps all capabilities."""
    found = run_alone(
        tmp_path, NO_CAPABILITIES, "--inh-caps=+kill,+dac_override",
        "--ambient-caps=+kill,+dac_override", "--securebits=+no_setuid_fixup",
    )  # fmt: skip
    for outcome in answers(found)[1:]:
        assert outcome == "passed" or "Landlock" in outcome


def test_elsewhere_the_script_does_nothing() -> None:
    """Started beside other processes, it refuses before it runs anything."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "pid:[0]", "print('ran')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "nothing is run here" in done.stderr
    assert "ran" not in done.stdout


def test_what_fails_while_a_program_runs_ends_the_program() -> None:
    """The supervisor must not go before the program does: nobody else would end it."""
    supervisor = """
import os, time
from taskvec.sandbox import confine
def become_program(orders, source):
    os.setsid()
    time.sleep(60)
def refuse(pid):
    raise OSError("refused")
confine.become_program, os.pidfd_open = become_program, refuse
orders = confine.Orders("user", None, "", [], "", "", 5.0, 0, 0, 0, 2, 2)
try:
    confine.supervise(orders, b"")
except OSError as error:
    print(error)
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("nothing left")
"""
    done = run_apart(supervisor)
    assert done.stdout.split("\n")[:2] == ["refused", "nothing left"], done.stderr


@pytest.mark.parametrize("lie", ["setresuid", "setresgid", "setgroups"])
def test_a_change_of_user_that_changes_nothing_is_refused(lie: str) -> None:
    """A container's filter may answer that all is well without doing anything."""
    become = f"""
import os
from taskvec.sandbox.confine import take_identity
os.setgroups([5])
os.{lie} = lambda *_: None
try:
    take_identity(61200)
except OSError as error:
    print(error)
"""
    assert run_apart(become).stdout.startswith("changing to user 61200 failed")


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as process 1 of a PID namespace of its own."""
    if missing := missing_here():
        pytest.skip(missing)
    return subprocess.run(
        [*UNSHARE, sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SOURCE)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
