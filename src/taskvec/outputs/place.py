"""Whether a result may be written where the user wants it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from taskvec.errors import OutputError
from taskvec.family.members import Members
from taskvec.outputs.staging import free_bytes, in_words, refuse_occupied, staging_folder
from taskvec.statistics.collect import describe


def check_place(
    members: Members, needed_bytes: int, out: Path, *, force: bool, is_file: bool = False
) -> None:
    """Refuse an output that would harm an input or somebody's folder, or that the disk cannot hold.

    Args:
        members: What is read.
        needed_bytes: Of what is written.
        out: Where.
        force: Whether something that is there may be replaced.
        is_file: Whether it is one file.

    Raises:
        OutputError: overlaps an input, is a file, is not empty, cannot be written, or does not fit.
    """
    real = Path(os.path.realpath(out))
    with in_words(out):
        _check_overlap(members, out, real)
        _check_place(out, real, force=force, is_file=is_file)
        _check_disk(needed_bytes, out, real)


def _check_overlap(members: Members, out: Path, real: Path) -> None:
    for role, source in members.sources.items():
        for path in source.inputs:
            member = Path(os.path.realpath(path))
            if real == member or member in real.parents or real in member.parents:
                inside = "is inside" if member in real.parents else "contains"
                relation = "is" if real == member else inside
                raise OutputError(
                    f"{out}: {relation} the input folder of {describe(role)} ({path}); "
                    "write elsewhere"
                )
    here = Path.cwd().resolve()
    if real == here or real in here.parents:
        raise OutputError(f"{out}: contains the current folder; give another one")


def _check_place(out: Path, real: Path, *, force: bool, is_file: bool) -> None:
    if is_file and real.is_dir():
        raise OutputError(f"{out}: is a folder; give the name of a file")
    if not is_file and real.exists() and not real.is_dir():
        raise OutputError(f"{out}: is a file; give a folder")
    refuse_occupied(out, force=force)
    if real.is_dir() and real.is_mount():
        raise OutputError(f"{out}: is where a disk is mounted; give a folder inside it")
    parent = real.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {parent} cannot be written; choose another place")


def _check_disk(needed: int, out: Path, real: Path) -> None:
    free = free_bytes(real)
    with suppress(OSError):  # there is none, or another run is just removing it
        free += sum(f.stat().st_blocks * 512 for f in staging_folder(real).iterdir())
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed / 1e6:,.2f} MB of disk, {free / 1e6:,.2f} MB are free; "
            "free some space or write elsewhere"
        )
