"""What killed runs have left in a folder: half-written outputs, locks, old outputs, drafts.

.OUT.taskvec         half-written; the same command resumes from it
.OUT.taskvec-old     the old output, where a kill hit between two renames
.OUT.taskvec-lock    of a run that writes, or that was killed
.FILE.taskvec-123    a draft of process 123
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from taskvec.errors import OutputError
from taskvec.files import hold, recover, writing

_NAME = re.compile(r"\.(?P<of>.+)\.taskvec(?P<kind>-lock|-old|-(?P<process>\d+))?")
_KINDS = {None: "half-written output", "-lock": "lock", "-old": "old output"}


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that no run uses any more.

    Attributes:
        path: Where it is.
        of: Name of the output that it belongs to.
        kind: `half-written output`, `old output`, `lock` or `draft`.
        nbytes: On the disk, with everything in it.
        age_s: Seconds since its last change.
    """

    path: Path
    of: str
    kind: str
    nbytes: int
    age_s: float

    def __str__(self) -> str:
        return f"{self.kind} {self.path.name}, {self.nbytes / 1e6:,.2f} MB, {_ago(self.age_s)} old"


def leftovers(folder: Path) -> list[Leftover]:
    """What killed runs have left in a folder, without what a running one uses, by name.

    Raises:
        OutputError: the folder cannot be read.
    """
    found = []
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read: {error.strerror or error}") from error
    for path in paths:
        name = _NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or _is_used(folder, name):
            continue
        with contextlib.suppress(OSError):  # its run is just ending
            last = path.stat().st_mtime
            kind = _KINDS.get(name["kind"], "draft")
            size = _size(path)
            found.append(Leftover(path, name["of"], kind, size, max(0.0, time.time() - last)))
    return found


def clean(folder: Path) -> list[Leftover]:
    """Remove what killed runs have left; an old output whose place is empty is put back.

    Returns:
        What was removed or put back.

    Raises:
        OutputError: something cannot be removed.
    """
    found = leftovers(folder)
    for left in found:
        with writing(left.path):
            if left.kind == "old output":
                recover(folder / left.of)
            elif left.path.is_dir():
                shutil.rmtree(left.path)
            else:
                left.path.unlink(missing_ok=True)
    return found


def notes_on_leftovers(out: Path, old: Path | None) -> list[str]:
    """What a run tells of its output's folder, in words.

    Args:
        out: Its output.
        old: The old output, where it could not be removed.
    """
    notes = []
    if old is not None:
        notes.append(f"the old output could not be removed and is in {old}; remove it by hand")
    found = []
    with contextlib.suppress(OutputError):  # a folder that may be written and not listed
        found = [left for left in leftovers(out.parent) if left.of != out.name]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        listed = "; ".join(map(str, found[:3]))
        notes.append(
            f"{out.parent}: has leftovers of killed runs ({listed}{more}); repeat their commands, "
            f"or remove them with taskvec clean {shlex.quote(str(out.parent))}"
        )
    return notes


def _is_used(folder: Path, name: re.Match[str]) -> bool:
    if name["process"] is not None:
        return _is_alive(int(name["process"]))
    try:
        fd = os.open(folder / f".{name['of']}.taskvec-lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not hold(fd, waits=False)
    finally:
        os.close(fd)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # of another user
    return True


def _size(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(file.lstat().st_blocks * 512 for file in files)


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
