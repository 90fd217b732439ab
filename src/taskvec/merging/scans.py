"""A family's scan: read from the weights, or taken from the cache where the files look untouched.

The cache is keyed by path, size, times and inode of every weight file; those only say that a scan
must be made again. Whether weights still are what was scanned is checked by content when they are
merged.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from taskvec.checkpoints.fingerprint import fingerprint
from taskvec.checkpoints.memory import MARK
from taskvec.errors import CheckpointError
from taskvec.family.members import Members
from taskvec.files import write_whole
from taskvec.layers import classify, override
from taskvec.statistics.collect import Sources, collect, roles_of
from taskvec.statistics.scan import FORMAT, Scan, ScannedModel, read_scan
from taskvec.streaming import RunOptions


def cache_folder() -> Path | None:
    """Where scans are kept: `$TASKVEC_CACHE`, or `taskvec` in the user's cache folder.

    None where a user has no home folder, as in some containers: nothing is kept there.
    """
    given = os.environ.get("TASKVEC_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(given).expanduser() if given else Path(root).expanduser() / "taskvec"
    except RuntimeError:
        return None


def _identity(members: Members, roles: Sequence[str]) -> str:
    """Key of everything that a scan rests on, from outside."""
    parts: list[Any] = [FORMAT, members.merged]
    for role in roles:
        parts.append((role, members.sources[role].identity))
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def _is_in_memory(members: Members) -> bool:
    """Whether a member is in memory: no scan of it can be found again."""
    return any(MARK in repr(source.identity) for source in members.distinct)


def scan_members(members: Members, options: RunOptions = RunOptions()) -> Scan:
    """The scan of an opened family.

    Args:
        members: Opened with the base, if there is one.
        options: How to run.

    Raises:
        CheckpointError: NaN or infinite weights.
    """
    with_base = "base" in members.sources
    roles = roles_of(members.tasks, with_base)
    kept = None if options.cache == "off" else _place(members)
    if options.cache == "use" and (known := cached_scan(members)) is not None:
        return known
    keys = [members.keys[name] for name in members.merged]
    sources = [Sources(name, members.views(name, roles)) for name in members.merged]
    with members.at_rest():
        collected = collect(
            sources,
            members.tasks,
            with_base=with_base,
            named=members.named,
            options=options,
        )
    scan = Scan(
        tasks=members.tasks,
        names=members.merged,
        shapes=tuple(members.target.tensors[name].shape for name in members.merged),
        keys=tuple(keys),
        has_base=with_base,
        gram=collected.gram,
        agree=collected.agree,
        support=collected.support,
        members={
            role: ScannedModel(
                members.sources[role].where,
                fingerprint(digests, describe_tensors(members, role, digests)),
                digests,
            )
            for role, digests in collected.digests.items()
        },
    )
    if kept is not None:
        _keep(kept, scan)
    return scan


def _place(members: Members) -> Path | None:
    """Where the scan of a family is cached; None if it is not."""
    folder = None if _is_in_memory(members) else cache_folder()
    roles = roles_of(members.tasks, "base" in members.sources)
    return folder and folder / f"scan-{_identity(members, roles)}.json"


def cached_scan(members: Members) -> Scan | None:
    """The scan of an opened family, if it is in the cache; no weights are read."""
    place = _place(members)
    keys = [members.keys[name] for name in members.merged]
    with contextlib.suppress(CheckpointError):
        scan = Scan.from_json(read_scan(place), keys) if place is not None else None
        if scan is not None and (scan.tasks, scan.names) == (members.tasks, members.merged):
            return scan
    return None


def describe_tensors(
    members: Members, role: str, names: Iterable[str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of a member's tensors, as fingerprints take them.

    A base that was not opened, because a given table stands for it, is taken to be as the target.
    """
    tensors = members.sources.get(role, members.target).tensors
    return {n: (tensors[n].dtype.name, tensors[n].shape) for n in names}


def save_scan(scan: Scan, path: Path) -> None:
    """Write a scan file, whole or not at all."""
    write_whole(path, json.dumps(scan.to_json()).encode())


def load_scan(path: str | os.PathLike[str], *, layers: Sequence[Mapping[str, Any]] = ()) -> Scan:
    """A scan that was saved, so that tables can be made where the weights are not.

    Args:
        path: File that `save_scan` or `taskvec scan --save-scan` wrote.
        layers: Overrides of the layer table, as in a recipe.

    Raises:
        CheckpointError: not a scan file.
    """
    data = read_scan(Path(path))
    overrides = tuple(override(entry) for entry in layers)
    return Scan.from_json(data, [classify(name, overrides) for name in data["tensors"]])


def _keep(path: Path, scan: Scan) -> None:
    """Store a scan in the cache; a cache that cannot be written is not an error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_scan(scan, path)
