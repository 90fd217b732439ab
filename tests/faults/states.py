"""What the tests of faults share: a merge as arguments, and what a folder holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest(folder: Path) -> str | None:
    """Digest of every name and file below a folder; None if there is none."""
    if not folder.exists():
        return None
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(repr(path.relative_to(folder)).encode())
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def names(folder: Path) -> list[str]:
    """Names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def merging(family: Mapping[str, Path], out: Path, *more: Any) -> list[str]:
    """A merge that reads no base and scans nothing."""
    return [
        "merge", str(out), "--method", "task_arithmetic", "--quiet", "--shard-size", "60kB",
        "--instruct", str(family["instruct"]), "--task", f"math={family['math']}:0.5",
        "--task", f"code={family['code']}:0.25", *map(str, more),
    ]  # fmt: skip


def old_model(folder: Path) -> str | None:
    """A folder that somebody had there before; its digest."""
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"old" * 1000)
    (folder / "sub" / "stale.txt").write_text("old")
    return digest(folder)
