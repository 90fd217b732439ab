"""Programs that attack what they are shut in.

Each runs in every isolation that the system has; as root also in namespaces that another user
makes. What a program finds out it tells by an error, whose last line is the outcome's detail.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from shutil import copy, rmtree

import pytest

from taskvec.errors import TaskvecError, UsageError
from taskvec.sandbox import programs
from taskvec.sandbox.programs import (
    ProgramLimits,
    ProgramOutcome,
    isolation,
    remove_folder,
    run_program,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

# A user that is not root, for namespaces that root did not make; not one of tests beside these.
ORDINARY = 20000 + os.getpid() % 40000
SHORT = ProgramLimits(seconds=1.0)
DRIVER = """
import json, sys
from taskvec.sandbox.programs import ProgramLimits, run_program
told = json.load(sys.stdin)
outcome = run_program(told["code"], limits=ProgramLimits(**told["limits"]), within="namespaces")
print(json.dumps([outcome.ended, outcome.detail]))
"""
# In front of programs that signal whatever they can: nothing of this is to run unless shut in.
SHUT_IN = f"""
import os
if os.getpid() > 99 and os.getuid() in (0, {os.getuid()}):
    raise SystemExit("neither a PID namespace nor a user of its own")
"""
Run = Callable[..., ProgramOutcome]


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder in which anybody may write, with the sandbox as a package that anybody may read."""
    folder = Path(tempfile.mkdtemp(prefix="taskvec-public-"))
    package = folder / "package" / "taskvec"
    (package / "sandbox").mkdir(parents=True)
    inside = Path(programs.__file__).parent
    for name in ("programs.py", "confine.py"):
        copy(inside / name, package / "sandbox")
    copy(inside.parent / "errors.py", package)
    for path in (package, package / "sandbox"):
        (path / "__init__.py").touch()
    (folder / "temporary").mkdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o644 if path.is_file() else 0o777)
    yield folder
    rmtree(folder)


def as_ordinary_user(public: Path, code: str, limits: ProgramLimits) -> ProgramOutcome:
    done = subprocess.run(
        [programs._python(for_others=True), "-c", DRIVER],
        input=json.dumps({"code": code, "limits": asdict(limits)}),
        env={"PYTHONPATH": str(public / "package"), "TMPDIR": str(public / "temporary")},
        user=ORDINARY, group=ORDINARY, extra_groups=[],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise TaskvecError(done.stderr.splitlines()[-1])
    return ProgramOutcome(*json.loads(done.stdout))


@cache
def lacking(kind: str) -> str:
    """What the system lacks for an isolation, found without the code under test."""
    if kind != "namespaces" and os.geteuid() != 0:
        return "only root can become another user"
    other = {"user": ORDINARY} if kind == "ordinary" else {}
    python = sys.executable if kind == "namespaces" else f"/usr/bin/python3.{sys.version_info[1]}"
    everything = 0x6E020000 | (0x10000000 if kind == "ordinary" or os.geteuid() != 0 else 0)
    call = "syscall(444, None, 0, 1)" if kind == "user" else f"unshare({everything})"
    probe = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).{call} < 0)"
    if not Path(python).exists():
        return f"there is no {python} for other users"
    done = subprocess.run([python, "-c", probe], check=False, **other)  # type: ignore[call-overload]
    return f"{call} fails" if done.returncode else ""


@pytest.fixture(autouse=True)
def users(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The users of the test's programs."""
    users, lone_user = {ORDINARY}, programs._lone_user

    def noted() -> int | None:
        user = lone_user()
        if user is not None:
            users.add(user)
        return user

    monkeypatch.setattr(programs, "_lone_user", noted)
    return users


@pytest.fixture(params=["namespaces", "user", "ordinary"])
def run(
    request: pytest.FixtureRequest, public: Path, monkeypatch: pytest.MonkeyPatch, users: set[int]
) -> Iterator[Run]:
    """Runs a program in one isolation; afterwards nothing of it may be left."""
    kind = request.param
    monkeypatch.setattr(tempfile, "tempdir", str(public / "temporary"))

    def run(code: str, limits: ProgramLimits | None = None) -> ProgramOutcome:
        if kind == "ordinary":
            return as_ordinary_user(public, code, limits or ProgramLimits())
        return run_program(code, limits=limits, within=kind)

    if missing := lacking(kind):
        pytest.skip(missing)
    run.kind = kind  # type: ignore[attr-defined]
    yield run
    assert not left_over(users)
    assert not list((public / "temporary").iterdir())


def left_over(users: set[int]) -> list[str]:
    """What processes of some users are called."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if path.stat().st_uid in users and state not in "ZX":  # ended, but not yet reaped
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


def told(outcome: ProgramOutcome) -> str:
    """What a program raised a `ValueError` with."""
    assert outcome.ended == "failed"
    assert outcome.detail.startswith("ValueError: "), outcome
    return outcome.detail.removeprefix("ValueError: ")


# Verdicts


def test_a_program_that_ends_has_passed(run: Run) -> None:
    assert run("import json, re, typing\nassert 1 + 1 == 2\n") == ProgramOutcome("passed")


def test_a_program_that_fails_has_not(run: Run) -> None:
    assert run("assert 1 == 2, 'no'") == ProgramOutcome("failed", "AssertionError: no")
    assert run("f(").detail.startswith("SyntaxError")
    assert run("x = '\ud800'").ended == "failed"
    assert run("x = '\0'").ended == "failed"


@pytest.mark.parametrize(
    "leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"]
)
def test_leaving_before_the_tests_is_no_pass(run: Run, leave: str) -> None:
    assert run(f"{leave}\nassert False") == ProgramOutcome(
        "failed", "ended before its end, with exit code 0"
    )


def test_guessing_at_the_verdict_is_no_pass(run: Run) -> None:
    guess = "import os, sys\nprint('passed')\nfor fd in range(1, 9):\n    try:\n        "
    guess += "os.write(fd, b'passed')\n    except OSError:\n        pass\n"
    assert not run(f"{guess}os._exit(0)").passed
    assert not run(guess).passed  # it also spoils its own verdict
    finds = "import sys\nraise ValueError(sum(len(a) == 32 for a in sys.orig_argv))"
    assert told(run(finds)) == "0"


def test_a_program_without_its_descriptors_is_no_pass(run: Run) -> None:
    assert not run("import os; os.closerange(0, 99)").passed
    endless = "import os\nos.close(1); os.close(2)\nwhile True: pass"
    assert run(endless, SHORT) == ProgramOutcome("time", "more than 1 s")


def test_signals_are_named(run: Run) -> None:
    assert run("import os; os.kill(os.getpid(), 11)") == ProgramOutcome("killed", "by SIGSEGV")
    assert run("import os; os.kill(os.getpid(), 41)") == ProgramOutcome("killed", "by signal 41")


def test_a_detail_is_one_printable_line(run: Run) -> None:
    outcome = run("import sys; print('a\\n\\x1b[31m' + 'b' * 999, file=sys.stderr); 1 / 0")
    assert outcome.detail == "ZeroDivisionError: division by zero"
    outcome = run("import os; os.write(2, b'a\\n\\x1b[31m' + b'b' * 999); os._exit(3)")
    assert outcome == ProgramOutcome("failed", "[31m" + "b" * 196)


def test_sets_of_texts_have_one_order(run: Run) -> None:
    program = "raise ValueError(list({'spam', 'ham', 'eggs', 'toast'}))"
    assert told(run(program)) == told(run(program))


# ProgramLimits


def test_endless_loop(run: Run) -> None:
    begun = time.monotonic()
    assert run("while True: pass", SHORT) == ProgramOutcome("time", "more than 1 s")
    assert time.monotonic() - begun < 5


def test_ignoring_signals(run: Run) -> None:
    ignore = "import signal\nfor s in set(signal.Signals) - {9, 19}:\n    "
    ignore += "signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    assert run(ignore, SHORT).ended == "time"


def test_memory(run: Run) -> None:
    assert run("x = bytearray(2 << 30)") == ProgramOutcome(
        "memory", "more than 1,073,741,824 bytes"
    )
    grow = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    assert run(grow, ProgramLimits(memory_bytes=200 << 20)).ended == "memory"


def test_memory_that_is_in_no_process(run: Run) -> None:
    hidden = (
        "import ctypes, os\ncall = ctypes.CDLL(None, use_errno=True)\n"
        "a = call.shmget(0, 1 << 20, 0o600 | 0o1000)\n"
        "b = call.memfd_create(b'x', 0)\nraise ValueError(a, b)"
    )
    assert told(run(hidden)) == "(-1, -1)"


@pytest.mark.parametrize("fd", [1, 2, 4])
def test_endless_output(run: Run, fd: int) -> None:
    outcome = run(f"import os\nwhile True: os.write({fd}, b'x' * 9999)")
    assert outcome == ProgramOutcome("output", "more than 1,048,576 bytes of output")


def test_output_up_to_the_limit(run: Run) -> None:
    assert run("print('x' * (1 << 19))").passed


def test_processes_and_threads(run: Run) -> None:
    fork = (
        "import os, time\nn = 1\ntry:\n    while n < 50:\n        if os.fork() == 0:\n"
        "            time.sleep(60)\n        n += 1\nexcept OSError:\n    pass\nraise ValueError(n)"
    )
    assert told(run(fork)) == "4"
    threads = (
        "import threading, time\nn = 1\ntry:\n    while n < 50:\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "        n += 1\nexcept RuntimeError:\n    pass\nraise ValueError(n)"
    )
    assert told(run(threads)) == "4"


def test_fork_bomb(run: Run) -> None:
    bomb = (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    )
    assert run(bomb, SHORT).ended == "time"


def test_processes_that_hop(run: Run) -> None:
    """Each forks and ends, so that whoever kills them one by one comes too late."""
    hop = "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n    "
    hop += "except OSError:\n        pass\n"
    assert not run(hop, SHORT).passed


def test_processes_that_kill(run: Run) -> None:
    kill = "if os.fork() == 0:\n    while True:\n        try:\n"
    kill += "            os.kill(-1, 9)\n        except OSError:\n            pass\n"
    outcome = run(f"{SHUT_IN}{kill}import time\ntime.sleep(0.5)\n")
    assert outcome.ended in ("passed", "killed")


def test_huge_files(run: Run) -> None:
    one = "with open('x', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))"
    assert run(one).detail in (
        "OSError: [Errno 27] File too large", "OSError: [Errno 28] No space left on device",
    )  # fmt: skip
    sparse = "with open('x', 'wb') as f: f.truncate(1 << 30)"
    assert run(sparse).detail == "OSError: [Errno 27] File too large"
    if run.kind != "user":  # type: ignore[attr-defined]
        many = "for i in range(9):\n    with open(f'{i}', 'wb') as f: f.write(bytes(4 << 20))"
        assert run(many).detail == "OSError: [Errno 28] No space left on device"
        empty = "for i in range(9999): open(f'{i}', 'w').close()"
        assert run(empty).detail.startswith("OSError: [Errno 28] No space left on device")


def test_deep_recursion(run: Run) -> None:
    deep = "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return [f(n + 1)]\nf(0)"
    outcome = run(deep, ProgramLimits(seconds=60, memory_bytes=100 << 20))
    assert outcome.ended in ("memory", "failed", "killed"), outcome  # as the interpreter has it
    in_c = "x = []\nfor _ in range(10 ** 6): x = [x]\nimport sys\n"
    assert run(f"{in_c}sys.setrecursionlimit(10 ** 9)\nrepr(x)").ended in ("memory", "killed")


# Getting out


def test_writing_outside(run: Run, public: Path) -> None:
    victim = public / "victim"
    victim.write_text("untouched")
    victim.chmod(0o666)
    if os.geteuid() == 0:  # the user that makes the namespaces owns it
        os.chown(victim, ORDINARY, ORDINARY)
    begun = victim.stat()
    write = f"""
import os, sys
done = []
folders = ["/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/etc", "/usr", "/usr/lib", "/proc",
           {str(public)!r}, {str(Path.home())!r}, sys.base_prefix, os.path.dirname(os.__file__)]
for folder in folders:
    if os.path.realpath(folder) == os.getcwd():
        continue
    try:
        open(os.path.join(folder, "taskvec-was-here"), "w").close()
        done.append(folder)
    except OSError:
        pass
victim = {str(victim)!r}
for act in (lambda: open(victim, "w"), lambda: os.chmod(victim, 0), lambda: os.unlink(victim),
            lambda: os.utime(victim, (1, 1)), lambda: os.rename(victim, "own"),
            lambda: os.link(victim, "own"), lambda: os.truncate(victim, 0)):
    try:
        act()
        done.append(victim)
    except OSError:
        pass
raise ValueError(done)
"""
    assert told(run(write)) == "[]"
    ended = victim.stat()
    assert ended[:7] == begun[:7]
    assert ended.st_mtime_ns == begun.st_mtime_ns
    assert victim.read_text() == "untouched"
    victim.unlink()


def test_what_it_sees_is_read_only(run: Run) -> None:
    if run.kind == "user":  # type: ignore[attr-defined]
        pytest.skip("Landlock makes no mounts")
    seen = "import os, sys\nplaces = ['/', '/usr', '/dev/null', sys.base_prefix, os.__file__]\n"
    seen += "raise ValueError([os.statvfs(place).f_flag & 1 for place in places])"
    assert told(run(seen)) == "[1, 1, 1, 1, 1]"


def test_its_own_folder_is_its_own(run: Run) -> None:
    own = "import os, tempfile\nassert os.listdir() == []\nopen('x', 'w').write('y')\n"
    own += "assert open('x').read() == 'y'\ntempfile.TemporaryFile().write(b'z')\nos.mkdir('d')\n"
    assert run(own) == ProgramOutcome("passed")
    assert run(own) == ProgramOutcome("passed")  # not the same one


def test_reading_outside(run: Run, public: Path) -> None:
    secret = public / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    read = f"""
import os
found = []
pids = [{os.getpid()}, 1, os.getppid(), "self"]
for path in [{str(secret)!r}, {__file__!r}, "/etc/passwd", "/etc/hostname",
             *(f"/proc/{{pid}}/{{what}}" for pid in pids for what in ("environ", "mem", "maps"))]:
    try:
        open(path, "rb").close()
        found.append(path)
    except OSError:
        pass
for path in ("/proc", "/home", "/var", {str(public)!r}):
    try:
        found += os.listdir(path)
    except OSError:
        pass
raise ValueError(found)
"""
    assert told(run(read)) == "[]"
    secret.unlink()


def test_reading_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert told(run("import os\nraise ValueError(dict(os.environ))")) == "{}"
    in_c = "import ctypes\nget = ctypes.CDLL(None).getenv\nget.restype = ctypes.c_char_p\n"
    assert told(run(f"{in_c}raise ValueError(get(b'HF_TOKEN'), get(b'PATH'))")) == "(None, None)"


def test_descriptors_of_others(run: Run) -> None:
    held = "import os\nfound = []\nfor fd in range(999):\n    try:\n        os.fstat(fd)\n"
    held += "        found.append(fd)\n    except OSError:\n        pass\nraise ValueError(found)"
    assert told(run(held)) == "[0, 1, 2, 4]"
    assert told(run("raise ValueError([open(0).read()])")) == "['']"


def test_killing_the_parent(run: Run) -> None:
    kill = f"""{SHUT_IN}
for pid in (os.getppid(), 1, {os.getpid()}, {os.getppid()}, -1, -{os.getpgrp()}):
    for signal in (9, 19):
        if pid in (0, os.getpid(), -os.getpgrp()):  # itself, by the number of another
            continue
        try:
            os.kill(pid, signal)
        except OSError:
            pass
"""
    assert run(kill) == ProgramOutcome("passed")


def test_sockets(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        connect = f"""
import socket
done = []
for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
    for way in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(kind, way)
            done.append((kind, way))
        except PermissionError:
            pass
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 0.5)
    done.append("loopback")
except PermissionError:
    pass
raise ValueError(done)
"""
        assert told(run(connect)) == "[]"
        with pytest.raises(TimeoutError):
            server.accept()


def test_calls_that_lead_out(run: Run) -> None:
    calls = f"""
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
done = []
def attempt(name, result):
    if result != -1 or ctypes.get_errno() != errno.EPERM:
        done.append((name, result, ctypes.get_errno()))
attempt("unshare", libc.unshare(0x10000000))
attempt("setns", libc.setns(0, 0))
attempt("ptrace", libc.ptrace(16, os.getppid(), 0, 0))
attempt("process_vm_readv", libc.process_vm_readv({os.getpid()}, 0, 0, 0, 0, 0))
stack = ctypes.create_string_buffer(1 << 16)
nothing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: os._exit(0))
attempt("clone", libc.clone(nothing, ctypes.byref(stack, 1 << 15), 0x10000011, None))
raise ValueError(done)
"""
    assert told(run(calls)) == "[]"
    for leave in ("setsid()", "setpgid(0, 0)"):  # the first process leads its group and cannot
        group = f"import os\nif os.fork() == 0:\n    os.{leave}\n    os._exit(7)\n"
        assert told(run(f"{group}raise ValueError(os.wait()[1] >> 8)")) == "1"
    become = "import os\nfor act in (os.setuid, os.setgid, os.seteuid):\n    try:\n"
    become += "        act(0)\n    except OSError:\n        continue\n    raise ValueError(act)"
    assert run(become) == ProgramOutcome("passed")
    more = "import resource as r\nlimits = (r.RLIMIT_NPROC, r.RLIMIT_AS, r.RLIMIT_FSIZE)\n"
    more += "for limit in limits:\n    try:\n        r.setrlimit(limit, (1 << 40, 1 << 40))\n"
    more += "    except ValueError:\n        continue\n    raise TypeError(limit)"
    assert run(more) == ProgramOutcome("passed")


def test_leaving_a_daemon(run: Run, users: set[int]) -> None:
    daemon = "import os, time\nif os.fork() == 0:\n    try:\n        os.setsid()\n"
    daemon += "    except PermissionError:\n        pass\n    if os.fork() == 0:\n"
    daemon += "        time.sleep(60)\n    os._exit(0)\nos.wait()\n"
    begun = time.monotonic()
    assert run(daemon) == ProgramOutcome("passed")
    assert time.monotonic() - begun < 5
    assert not left_over(users)


def test_a_group_with_many_leaders(run: Run, users: set[int]) -> None:
    """The program ends first and leaves children that it tried to give groups of their own."""
    leave = (
        "import os, time\nfor _ in range(3):\n    child = os.fork()\n"
        "    for pid, group in ((0, 0), (child, child)):\n        try:\n"
        "            os.setpgid(pid, group)\n        except OSError:\n            pass\n"
        "    if child == 0:\n        time.sleep(60)\n        os._exit(0)\n"
    )
    assert run(leave) == ProgramOutcome("passed")
    assert not left_over(users)


def test_a_folder_that_resists(run: Run, public: Path) -> None:
    kept = public / "kept"
    (kept / "inner").mkdir(parents=True, exist_ok=True)
    (kept / "inner" / "file").write_text("kept")
    kept.chmod(0o777)
    resist = f"""
import os
os.symlink({str(kept)!r}, "link")
os.mkdir("locked")
os.symlink({str(kept)!r}, "locked/link")
open("locked/file", "w").close()
os.mkdir("locked/inner")
os.symlink("..", "locked/inner/up")
os.chmod("locked/inner", 0)
os.chmod("locked", 0)
os.mkfifo("fifo")
open(b"\\xff\\n", "w").close()
own = os.getcwd()
for _ in range(1100):  # more than Python recurses
    os.mkdir("deep")
    os.chdir("deep")
os.chdir(own)
os.chmod(own, 0)
"""
    assert run(resist) == ProgramOutcome("passed")
    assert not list((public / "temporary").iterdir())
    assert (kept / "inner" / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees whom programs belong to")
def test_namespaces_are_its_own(users: set[int]) -> None:
    """Seen from outside while it runs: sockets are refused besides."""
    if missing := lacking("namespaces"):
        pytest.skip(missing)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_program, "import time; time.sleep(1)", within="namespaces")
        found: dict[str, bool] = {}
        while not running.done() and not found:
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    if path.stat().st_uid in users:
                        for kind in ("net", "pid", "mnt", "ipc", "uts", "cgroup"):
                            mine = Path(f"/proc/self/ns/{kind}").readlink()
                            found[kind] = (path / "ns" / kind).readlink() != mine
                except OSError:
                    continue
        assert found == dict.fromkeys(("net", "pid", "mnt", "ipc", "uts", "cgroup"), True)
        assert running.result().passed


# The parent


def test_several_at_once(run: Run) -> None:
    programs = [f"import time\ntime.sleep(0.05)\nassert {i} % 3" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(run, programs))
    assert [outcome.passed for outcome in outcomes] == [bool(i % 3) for i in range(12)]
    assert threading.active_count() < 20


def best() -> str:
    """The isolation that is taken; the test is skipped where there is none."""
    try:
        return isolation()
    except TaskvecError as error:
        pytest.skip(str(error))


def test_descriptors_of_the_parent_are_closed() -> None:
    best()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for code in ("", "1 / 0", "while True: print('x' * 9999)"):
        run_program(code)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees whom programs belong to")
def test_a_parent_that_is_killed_leaves_nothing(run: Run, public: Path, users: set[int]) -> None:
    if run.kind == "ordinary":  # type: ignore[attr-defined]
        pytest.skip("the same as namespaces")
    program = "from taskvec.sandbox import programs\nfrom taskvec.sandbox.programs import *\n"
    program += f"programs._lone_user = lambda: {programs._lone_user()}\n"
    program += f"run_program('while True: pass', limits=ProgramLimits(60), within={run.kind!r})"  # type: ignore[attr-defined]
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(public / "package"), "TMPDIR": str(public / "temporary")},
    )
    until = time.monotonic() + 10
    while not left_over(users) and time.monotonic() < until:
        time.sleep(0.01)
    assert left_over(users)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while left_over(users) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left_over(users)
    for folder in (public / "temporary").iterdir():  # nobody was there to do it
        remove_folder(folder)


def test_user_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_lone_user", lambda: None)
    with pytest.raises(TaskvecError) as error:
        run_program("", within="user")
    assert str(error.value) == (
        "a program cannot be isolated: user: only root can become another user"
    )


def test_other_users_need_a_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "python").touch()
    monkeypatch.setattr(sys, "_base_executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "version_info", (9, 8))
    with pytest.raises(TaskvecError) as error:
        programs._python(for_others=True)
    assert str(error.value) == (
        f"a program cannot be isolated: user: other users cannot reach {tmp_path / 'python'}, and "
        "there is no /usr/bin/python9.8; install one of them"
    )
    assert programs._python(for_others=False) == str(tmp_path / "python")


def test_users_that_nobody_has() -> None:
    every, container = ["0", "0", "4294967295"], ["0", "1000", "1", "1", "100000", "65535"]
    assert [programs._covers(every, unused) for unused in programs._UNUSED_USERS] == [True, True]
    assert [programs._covers(container, u) for u in programs._UNUSED_USERS] == [False, True]
    assert not programs._covers(["0", "1000", "1"], programs._UNUSED_USERS[1])


def test_what_cannot_be_set_up_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = best()
    monkeypatch.setattr(programs, "_python", lambda **_: "/usr/no-such-python")
    with pytest.raises(TaskvecError) as error:
        run_program("", within=kind)
    assert str(error.value) == (
        f"a program cannot be isolated: {kind}: No such file or directory: /usr/no-such-python"
    )


def test_no_isolation_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: str, *, within: str) -> ProgramOutcome:
        raise TaskvecError(f"a program cannot be isolated: {within}: not today")

    monkeypatch.setattr(programs, "run_program", refuse)
    isolation.cache_clear()
    with pytest.raises(TaskvecError) as error:
        programs.require_permission("task 'x'", allowed=True)
    assert str(error.value) == (
        "generated programs cannot be isolated here (namespaces: not today; user: not today); "
        "needs Linux with user namespaces, or root and Landlock: use a virtual machine or a "
        "container that has them, or leave out the tasks that run code"
    )


def test_permission_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "isolation", lambda: pytest.fail("tried"))
    with pytest.raises(UsageError) as error:
        programs.require_permission("task 'x'", allowed=False)
    assert str(error.value).startswith("task 'x' runs generated programs")
    assert "--allow-code-execution" in str(error.value)
