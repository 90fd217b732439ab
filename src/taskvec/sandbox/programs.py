"""Run generated programs in a sandbox.

A program runs in a child process with an empty environment, limits on time, memory, files, output
and processes, and its own folder. There are two kinds of isolation (`isolation`):

- `namespaces`: new user, process, network, file and IPC namespaces. The program sees no other
  process, no network, and only the files of Python and the system's libraries, read-only.
- `user`: a user ID that nothing else uses, which requires root; Landlock restricts files.

In both, a filter refuses system calls that programs do not need, such as sockets. If neither works,
nothing runs. `confine` does all this in the child. A program that inspects its interpreter can
forge the verdict; the how-to page lists what is not covered.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from taskvec.errors import TaskvecError, UsageError

ISOLATIONS = ("namespaces", "user")  # in the order of preference

# Ranges of user numbers that systems give to nobody; the second fits into a container's 65,536.
_UNUSED_USERS = (range(1879048192, 2147352576), range(61184, 65520))
_SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store", "/gnu/store",
    "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom",
)  # fmt: skip
_GRACE_S = 10.0  # for starting and clearing away, before the supervisor is given up
_next_user = itertools.count(random.randrange(1 << 28))


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """What a program may use.

    Attributes:
        seconds: On the wall, from its start.
        memory_bytes: Address space of each process.
        file_bytes: Size of a file, and with `namespaces` of all its files together.
        output_bytes: Of everything that it prints.
        processes: Processes and threads at once.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    processes: int = 4


@dataclass(frozen=True, slots=True)
class ProgramOutcome:
    """How a program ended.

    Attributes:
        ended: `passed` (it got through to its end), `failed`, `time`, `memory`, `output` (it met
            that limit) or `killed` (by a signal).
        detail: The last line of its error, or what happened.
    """

    ended: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.ended == "passed"


@functools.cache
def isolation() -> str:
    """The first of `ISOLATIONS` that works on this system; tested once.

    Raises:
        TaskvecError: none works; no program can be run.
    """
    reasons = []
    for kind in ISOLATIONS:
        try:
            outcome = run_program("", within=kind)
        except TaskvecError as error:
            reasons.append(str(error).partition(": ")[2])
        else:
            if outcome.passed:
                return kind
            reasons.append(f"{kind}: {outcome.detail or outcome.ended}")
    why = "; ".join(dict.fromkeys(reasons))
    raise TaskvecError(
        f"generated programs cannot be isolated here ({why}); needs Linux with user namespaces, or "
        "root and Landlock: use a virtual machine or a container that has them, or leave out the "
        "tasks that run code"
    )


def require_permission(what: str, *, allowed: bool) -> None:
    """Refuse a task that runs programs, unless the user allows it and an isolation works.

    Raises:
        UsageError: the user has not allowed it.
        TaskvecError: no isolation works here.
    """
    if not allowed:
        raise UsageError(
            f"{what} runs generated programs; allow that with --allow-code-execution "
            "(docs/how-to/run-generated-code.md describes the sandbox)"
        )
    isolation()


def run_program(
    code: str, *, limits: ProgramLimits | None = None, within: str = ""
) -> ProgramOutcome:
    """Run an untrusted Python program; several threads may do so at once.

    The program passes if it runs to its end: what raises, leaves early, or meets a limit does not.
    It has the standard library only, and sees itself as the module `program`.

    Args:
        code: The program with its tests.
        limits: What it may use.
        within: One of `ISOLATIONS`; empty: the best that works.

    Raises:
        TaskvecError: it cannot be isolated here.
    """
    kind, limits = within or isolation(), limits or ProgramLimits()
    if sys.platform != "linux":
        raise TaskvecError(f"a program cannot be isolated: {sys.platform} has no namespaces")
    user = _lone_user()
    if kind == "user" and user is None:
        raise TaskvecError("a program cannot be isolated: user: only root can become another user")
    visible = dict.fromkeys([*_SYSTEM, sys.base_prefix, sys.base_exec_prefix])
    orders = {
        "isolation": kind,
        "user": user,
        "python": _python(for_others=kind == "user"),
        "visible": [path for path in visible if os.path.lexists(path)],
        "token": secrets.token_hex(16),
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "processes": limits.processes,
    }
    folder = Path(tempfile.mkdtemp(prefix="taskvec-program-"))
    try:
        heard = _launch(orders | {"folder": str(folder)}, code, limits)
    finally:
        remove_folder(folder)
    return _outcome(heard, orders, limits)


def _launch(orders: dict[str, Any], code: str, limits: ProgramLimits) -> dict[str, bytes]:
    """Run the program; returns the content of each pipe."""
    source = code.encode("utf-8", "surrogatepass")
    with ExitStack() as stack:

        def pipe() -> tuple[IO[bytes], IO[bytes]]:
            read, write = os.pipe()
            ends = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)
            return stack.enter_context(ends[0]), stack.enter_context(ends[1])

        status, status_end = pipe()
        verdict, verdict_end = pipe()
        ends = {"status": status_end.fileno(), "verdict": verdict_end.fileno()}
        launcher = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("confine.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={},
                cwd="/",
                pass_fds=tuple(ends.values()),
                start_new_session=True,
            )
        )
        stack.callback(_end, launcher)
        status_end.close()
        verdict_end.close()
        leash, out, error = launcher.stdin, launcher.stdout, launcher.stderr
        assert leash is not None
        assert out is not None
        assert error is not None
        stack.callback(leash.close)
        header = json.dumps({"orders": orders | ends, "length": len(source)}).encode() + b"\n"
        with suppress(BrokenPipeError):  # then the status, or its absence, reports the failure
            leash.write(header + source)
        sources = {"status": status, "verdict": verdict, "out": out, "error": error}
        return _listen(sources, leash, limits)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Waits for the supervisor, whose leash was closed and who clears away by itself."""
    try:
        launcher.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        launcher.kill()


def _listen(
    sources: dict[str, IO[bytes]], leash: IO[bytes], limits: ProgramLimits
) -> dict[str, bytes]:
    """What comes over each pipe until all are closed; stops the program when it is too much."""
    heard = dict.fromkeys(sources, b"")
    total, until = 0, time.monotonic() + limits.seconds + _GRACE_S
    with selectors.DefaultSelector() as selector:
        for name, pipe in sources.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        while selector.get_map():
            ready = selector.select(until - time.monotonic())
            if not ready:
                if leash.closed:
                    break
                leash.close()
                until = time.monotonic() + _GRACE_S
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                total += len(data)
                if total <= limits.output_bytes:
                    heard[key.data] += data
                elif key.data == "status":
                    heard["status"] += data
                else:
                    leash.close()
                    heard["too much"] = b"yes"
    return heard


def _outcome(
    heard: dict[str, bytes], orders: dict[str, Any], limits: ProgramLimits
) -> ProgramOutcome:
    status = json.loads(heard["status"].partition(b"\n")[0] or b"{}")
    if "error" in status:
        raise TaskvecError(
            f"a program cannot be isolated: {orders['isolation']}: {status['error']}"
        )
    if "too much" in heard:
        return ProgramOutcome("output", f"more than {limits.output_bytes:,} bytes of output")
    if status.get("ended") != "exit":
        if status.get("ended") == "time":
            return ProgramOutcome("time", f"more than {limits.seconds:g} s")
        return ProgramOutcome("killed", "with its supervisor")
    code, lines = status["code"], heard["error"].decode("utf-8", "replace").split("\n")
    if code == 0 and heard["verdict"] == str(orders["token"]).encode():
        return ProgramOutcome("passed")
    if code < 0:
        names = {known.value: known.name for known in signal.Signals}
        return ProgramOutcome("killed", f"by {names.get(-code, f'signal {-code}')}")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    last = "".join(filter(str.isprintable, last))
    if last.split(":")[0] == "MemoryError":
        return ProgramOutcome("memory", f"more than {limits.memory_bytes:,} bytes")
    return ProgramOutcome("failed", last[:200] or f"ended before its end, with exit code {code}")


def _lone_user() -> int | None:
    """An unused user ID; None if this process cannot become another user."""
    if os.geteuid() != 0:
        return None
    maps = [Path(f"/proc/self/{name}_map").read_text("ascii").split() for name in ("uid", "gid")]
    for unused in _UNUSED_USERS:
        if all(_covers(numbers, unused) for numbers in maps):
            return unused[next(_next_user) % len(unused)]
    return None


def _covers(numbers: list[str], wanted: range) -> bool:
    """Whether a map of a user namespace, in triples of first, outer first and count, has them."""
    return any(
        int(first) <= wanted.start and wanted.stop <= int(first) + int(count)
        for first, count in zip(numbers[::3], numbers[2::3], strict=True)
    )


def _python(*, for_others: bool) -> str:
    """The interpreter; where other users cannot reach this one, the system's of this version."""
    own = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    if not for_others:
        return str(own)
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for path in (own, Path("/usr/local/bin") / name, Path("/usr/bin") / name):
        if path.exists() and all(part.stat().st_mode & 1 for part in (path, *path.parents)):
            return str(path.resolve())
    raise TaskvecError(
        f"a program cannot be isolated: user: other users cannot reach {own}, and there is no "
        f"/usr/bin/{name}; install one of them"
    )


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, however deep, and follows no link out of it.

    Nobody else may be writing there. It goes down and up again with one open folder at a time:
    neither the length of a path nor the number of descriptors limits it.
    """
    below: list[str] = []  # names of the folders that are open or were on the way
    folder.chmod(0o700)
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        while True:
            name = _empty(here)
            if name:
                os.chmod(name, 0o700, dir_fd=here)
                beyond = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                below.append(name)
            elif below:
                beyond = os.open("..", os.O_RDONLY, dir_fd=here)
                os.rmdir(below.pop(), dir_fd=beyond)
            else:
                break
            os.close(here)
            here = beyond
    finally:
        os.close(here)
    folder.rmdir()


def _empty(folder: int) -> str:
    """Removes files of an open folder; the name of the first folder in it, or nothing."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=folder)
    return ""
