"""The inner side of the sandbox: a script that isolates itself and starts one program.

It needs nothing but the standard library, for it runs as `python -I -S confine.py` in a process of
its own: what is done here must not happen to a process with threads. It reads a JSON line of
orders and the program from standard input, which stays open: when it closes, the program is killed.

```text
sandbox ─► launcher ─► supervisor (process 1 of the namespace) ─► program ─► whatever it starts
```

Without namespaces launcher and supervisor are one. The supervisor reports how the program ended
when nothing of it is left. In a namespace the kernel ends the rest; without one, the supervisor
kills the process group, which the program cannot leave. It never signals -1: sent by root, that
would end every process of the system.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import re
import resource
import select
import signal
import stat
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 32, 4096, 16384, 1 << 18, 2
NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38

INNER_ID = 1000  # of the program in its user namespace; 0 would have privileges
OWN = "/program"  # its folder, under its own root
OPEN_FILES = 64
MAX_ENTRIES = 4096  # files and folders that fit into the program's folder

# What a program has no use for and could get out by, or use memory that no limit counts: sockets;
# memory of other processes; namespaces (full power over one is the way to most kernel faults);
# shared memory; the kernel's own programs and keys. `setsid` and `setpgid`, because `supervise`
# kills the process group. Numbers for x86-64 and for arm64.
DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "unshare": (272, 97), "setns": (308, 268),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "memfd_create": (319, 279),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "setsid": (112, 157), "setpgid": (109, 154),
}  # fmt: skip
CLONE, CLONE3, PIVOT_ROOT = (56, 220), (435, 435), (155, 41)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, audit number
CAPABILITIES_VERSION = 0x20080522
# Root needs these to become another user and to kill that user's processes; without namespaces also
# to give that user a folder and to remove it. A container may start without any of them.
NEEDED = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}
NEEDED_FOR_FOLDER = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446

# What the interpreter runs: the program as a separate module, then the token if it ran to its end.
RUNNER = """
import os, sys
with open(3, "rb") as given:
    token, _, source = given.read().partition(b"\\n")
os.environ.clear()
module = type(sys)("program")
sys.modules["program"] = module
exec(compile(source, "program.py", "exec"), vars(module))
os.write(4, token)
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Orders:
    """The orders of the launcher; see `sandbox.run_program`.

    Attributes:
        isolation: `namespaces` or `user`.
        user: Whom the program runs as, a user that nobody else is; None: as who calls, in a user
            namespace.
        python: The interpreter.
        visible: What the program may read besides its own folder.
        folder: An empty folder; the program's own, or where its root is mounted.
        token: What the runner writes when the program got through.
        seconds: On the wall.
        memory_bytes: Address space of each process.
        file_bytes: Size of a file; of all files together where they are in memory.
        processes: Processes and threads at once.
        status: Descriptor to report to.
        verdict: Descriptor that the program may write the token to.
    """

    isolation: str
    user: int | None
    python: str
    visible: list[str]
    folder: str
    token: str
    seconds: float
    memory_bytes: int
    file_bytes: int
    processes: int
    status: int
    verdict: int


_libc: Any = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> int:
    """The result of a system call, or its error with the name of what was tried."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(what: str, number: int, *arguments: Any) -> int:
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _call(what, _libc.syscall(ctypes.c_long(number), *longs))


def _prctl(what: str, *arguments: Any) -> None:
    longs = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    _call(what, _libc.prctl(*longs, *[ctypes.c_ulong(0)] * (5 - len(longs))))


def _machine() -> tuple[int, int]:
    if platform.machine() not in MACHINES:
        raise OSError(f"system calls of {platform.machine()} processors are not known here")
    return MACHINES[platform.machine()]


# Namespaces and the view of files


def enter_namespaces(orders: Orders) -> None:
    """Leave the system's processes (for children), network and files for a new root.

    The real root makes them itself, and the program will run as another user. Anybody else gets
    the power to by a user namespace, in which they are the only user.
    """
    kinds = NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_CGROUP
    if orders.user is None:
        release = [int(part) for part in re.findall(r"\d+", platform.release())[:2]]
        if release < [5, 14]:  # before that, other processes of the user count too
            raise OSError("limits on processes of a user namespace need Linux 5.14")
        user, group = os.geteuid(), os.getegid()
        _call("unshare", _libc.unshare(kinds | NEW_USER))
        Path("/proc/self/setgroups").write_text("deny", "ascii")
        Path("/proc/self/gid_map").write_text(f"{INNER_ID} {group} 1", "ascii")
        Path("/proc/self/uid_map").write_text(f"{INNER_ID} {user} 1", "ascii")
    else:
        _call("unshare", _libc.unshare(kinds))
    _mount("none", "/", flags=MS_REC | MS_PRIVATE)
    _build_root(orders)
    os.chdir(orders.folder)
    _syscall("pivot_root", PIVOT_ROOT[_machine()[0]], b".", b".")
    _call("umount", _libc.umount2(b".", MNT_DETACH))
    os.chdir(OWN)


def _build_root(orders: Orders) -> None:
    """A root in memory: what is visible, read-only, and a folder that is the program's own."""
    root, owner = Path(orders.folder), INNER_ID if orders.user is None else orders.user
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for name in orders.visible:
        source, target = Path(name), root / name.lstrip("/")
        if target.is_symlink() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
            continue
        if source.is_dir():
            target.mkdir()
        else:
            target.touch()
        _mount(source, target, flags=MS_BIND | MS_REC)
    own = root / OWN.lstrip("/")
    own.mkdir()
    if not (root / "tmp").exists():
        (root / "tmp").symlink_to(OWN)
    _make_read_only(root)
    options = f"size={orders.file_bytes},nr_inodes={MAX_ENTRIES},mode=700,uid={owner},gid={owner}"
    _mount("tmpfs", own, "tmpfs", MS_NOSUID | MS_NODEV, options)


def _make_read_only(root: Path) -> None:
    """Every mount under a folder; other restrictions stay."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    targets = [line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines]
    inside = os.fsencode(root)
    for target in targets:
        if target == inside or target.startswith(inside + b"/"):
            kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
            flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept
            _mount("none", os.fsdecode(target), flags=flags)


def _mount(
    source: str | Path, target: str | Path, kind: str = "none", flags: int = 0, options: str = ""
) -> None:
    given = [os.fsencode(source), os.fsencode(target), kind.encode()]
    done = _libc.mount(*given, ctypes.c_ulong(flags), options.encode())
    _call(f"mount {target if target == '/' else source}", done)


# What binds the program itself


def set_limits(orders: Orders) -> None:
    """Limits of the kernel, on each process and, as for `processes`, on their user."""
    others = 2 if orders.user is None and orders.isolation == "namespaces" else 0
    cpu_seconds = int(orders.seconds) + 2
    for what, most in {
        resource.RLIMIT_AS: orders.memory_bytes,
        resource.RLIMIT_FSIZE: orders.file_bytes,
        resource.RLIMIT_NPROC: orders.processes + others,  # launcher and supervisor
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        12: 0,  # RLIMIT_MSGQUEUE
    }.items():
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def restrict_files(visible: list[int], own: int) -> None:
    """Landlock: files under `visible` can be read, those under `own` changed, others neither.

    Args:
        visible: Open descriptors of files and folders.
        own: Open descriptor of the program's folder.
    """
    try:
        version = _syscall("landlock", LANDLOCK_CREATE, None, 0, 1)
    except OSError as error:
        raise OSError("a kernel with Landlock (Linux 5.13) is needed to guard files") from error
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    execute, read, read_folder = 1, 4, 8
    scopes = 3 if version >= 6 else 0  # no signals and no abstract sockets to others
    attributes = struct.pack("<QQQ", every, 0, scopes)
    size = len(attributes) if version >= 6 else 8
    ruleset = _syscall("landlock", LANDLOCK_CREATE, attributes, size, 0)
    rules = [(own, every)]
    for place in visible:
        is_folder = stat.S_ISDIR(os.fstat(place).st_mode)
        rules.append((place, execute | read | (read_folder if is_folder else 0)))
    for place, allowed in rules:
        _syscall("landlock", LANDLOCK_ADD, ruleset, 1, struct.pack("<Qi", allowed, place), 0)
    _syscall("landlock", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def seccomp_filter(column: int, audit: int) -> bytes:
    """The filter that refuses `DENIED`, as instructions of the kernel's packet filter.

    Args:
        column: Of the numbers of system calls.
        audit: What the kernel calls this kind of processor.
    """
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, unknown, allow = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000
    namespaces = 0x7E020000  # all flags of clone that make one
    body = [(equal, number[column], refuse) for number in DENIED.values()]
    if column == 0:
        body.insert(0, (at_least, 0x40000000, refuse))  # the same calls under other numbers
    body.append((equal, CLONE3[column], unknown))  # its flags cannot be seen; libc takes clone
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    for test, number, verdict in body:
        code += [(test, 0, 1, number), (give, 0, 0, verdict)]
    code += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, namespaces)]
    code += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def restrict_calls() -> None:
    """No more rights by set-user-id programs, and no system calls that are `DENIED`."""
    instructions = seccomp_filter(*_machine())
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(buffer))
    _prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
    _prctl("seccomp", PR_SET_SECCOMP, 2, ctypes.c_char_p(program))


# Processes


def become_program(orders: Orders, source: bytes) -> NoReturn:
    """Turns this process into the program, with no way back."""
    os.setsid()
    given = _move_up(os.memfd_create("program"))
    with open(given, "wb", closefd=False) as file:
        file.write(orders.token.encode("ascii") + b"\n" + source)
    os.lseek(given, 0, os.SEEK_SET)
    own, nothing = _move_up(os.open(".", os.O_PATH)), _move_up(os.open("/dev/null", os.O_RDONLY))
    visible = [path for path in orders.visible if Path(path).exists()]
    places = [_move_up(os.open(path, os.O_PATH)) for path in visible]
    for target, fd in {0: nothing, 3: given, 4: orders.verdict}.items():
        os.dup2(fd, target)
    set_limits(orders)
    take_identity(orders.user)
    if orders.isolation == "user":
        _prctl("no_new_privs", PR_SET_NO_NEW_PRIVS, 1)
        restrict_files(places, own)
    restrict_calls()
    # Sets and dictionaries of texts have the same order in every run.
    options = ["-s", "-S", "-P", "-B", "-X", "utf8", "-c", RUNNER]
    os.execve(orders.python, [orders.python, *options], {"PYTHONHASHSEED": "0"})


def require_capabilities(isolation: str) -> None:
    """Checks, before anything is started, that root has the capabilities that an isolation needs.

    Raises:
        OSError: some are missing; the message names them.
    """
    needed = NEEDED if isolation == "namespaces" else NEEDED | NEEDED_FOR_FOLDER
    effective = _capabilities()[0]
    lacking = [name for name, number in needed.items() if not effective >> number & 1]
    if lacking:
        raise OSError(f"root lacks {', '.join(lacking)}; add this to the container's capabilities")


def _capabilities() -> ctypes.Array[ctypes.c_uint32]:
    """Bits of this process: effective, permitted, inheritable for 0 to 31, then for 32 to 63."""
    header, found = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call("capget", _libc.capget(header, found))
    return found


def take_identity(user: int | None) -> None:
    """Changes user and group, drops all capabilities, and reads both back.

    Args:
        user: The user and its only group; None where a user namespace has made it `INNER_ID`.

    Raises:
        OSError: the system refused the change, or reported success without making it.
    """
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    # With some security bits a change of user keeps capabilities, and `execve` passes them on.
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call("capset", _libc.capset(header, none))
    wanted = INNER_ID if user is None else user
    users, groups = os.getresuid(), os.getresgid()
    if {*users, *groups} != {wanted} or (user is not None and os.getgroups()):
        raise OSError(
            f"changing to user {wanted} failed without an error: users (real, effective, saved) "
            f"are {users}, groups {groups}, supplementary groups {os.getgroups()}"
        )
    if any(_capabilities()):
        raise OSError(f"user {wanted} still has capabilities")


def _move_up(fd: int) -> int:
    """A copy of a descriptor above 0 to 4, which the program will use; not inherited."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


def supervise(orders: Orders, source: bytes) -> dict[str, Any]:
    """Starts the program, waits for its end or makes one, and leaves nothing of it alive."""
    _prctl("dumpable", PR_SET_DUMPABLE, 0)  # not even a program of the same user may look inside
    child = os.fork()
    if child == 0:
        _or_report(orders, lambda: become_program(orders, source))
    how = "failed"
    try:
        how = _await_end(child, orders.seconds)
    finally:
        if how != "exit":
            os.kill(child, signal.SIGKILL)
        if orders.isolation == "user":  # else the kernel does, when process 1 ends
            _kill_group(child)
        _, status = os.waitpid(child, 0)
    if orders.isolation == "user":
        with suppress(ChildProcessError):
            while True:  # orphans come to this process
                os.waitpid(-1, 0)
    return {"ended": how, "code": os.waitstatus_to_exitcode(status)}


def _await_end(child: int, seconds: float) -> str:
    """Waits until the program ends (`exit`), is out of `time`, or is to be `stopped`."""
    ended, handle = select.poll(), os.pidfd_open(child)
    ended.register(handle, select.POLLIN)
    ended.register(sys.stdin.fileno(), select.POLLIN)  # closed: stop
    ready = [fd for fd, _ in ended.poll(1000 * seconds)]
    return "exit" if handle in ready else "stopped" if ready else "time"


def _kill_group(child: int) -> None:
    """Waits for the end of a child and kills every process that it left in its group.

    The child is reaped later, so its number cannot belong to another process. One signal reaches
    the whole group: no process can fork away from it, and none can leave the group (`DENIED`).
    """
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError):  # it ended before it led a group, so it started nothing
        os.killpg(child, signal.SIGKILL)


def _or_report(orders: Orders, todo: Any) -> NoReturn:
    """Run code that should not return; if it raises, report that to `status`."""
    try:
        todo()
    except BaseException as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        os.write(orders.status, json.dumps({"error": f"{text}{where}"}).encode() + b"\n")
    os._exit(1)


def launch(orders: Orders, source: bytes) -> None:
    """Isolate this process and supervise the program, as process 1 of a namespace."""

    def report() -> None:
        if orders.isolation == "namespaces" and os.getpid() != 1:
            raise OSError("unshare: no PID namespace was made")
        done = supervise(orders, source)
        os.write(orders.status, json.dumps(done).encode() + b"\n")

    with suppress(OSError):  # a machine out of memory is to kill this first
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")
    if orders.user is not None:
        require_capabilities(orders.isolation)
    if orders.isolation == "namespaces":
        enter_namespaces(orders)
        first = os.fork()
        if first == 0:
            _or_report(orders, report)
        os.waitpid(first, 0)
    else:
        assert orders.user is not None
        _prctl("subreaper", PR_SET_CHILD_SUBREAPER, 1)
        os.chown(orders.folder, orders.user, orders.user)
        os.chdir(orders.folder)
        report()


def main() -> None:
    """Reads orders and program from standard input; see the module."""
    given = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
    header = b""
    while not header.endswith(b"\n"):
        header += given.read(1) or os._exit(1)
    orders = Orders(**(message := json.loads(header))["orders"])
    source = b""
    while len(source) < message["length"]:
        source += given.read(message["length"] - len(source)) or os._exit(1)
    orders = replace(orders, status=_move_up(orders.status), verdict=_move_up(orders.verdict))
    _or_report(orders, lambda: launch(orders, source))


if __name__ == "__main__":
    main()
