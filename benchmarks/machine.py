"""What the figures of a benchmark depend on; nothing that names the machine or its user."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def facts(*, threads: int, mergekit: Path) -> dict[str, str]:
    """By name, ready to print."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "date": date.today().isoformat(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} ({model or 'unknown'})",
        "memory": f"{total_bytes / 1e9:.1f} GB",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "threads": str(threads),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "numba", "taskvec")},
        "mergekit": _mergekit_version(mergekit),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _mergekit_version(command: Path) -> str:
    if not command.exists():
        return "not installed: benchmarks/peer_env.sh makes it; its rows are left out"
    code = "from importlib.metadata import version as v; print(v('mergekit'), 'torch', v('torch'))"
    python = command.with_name("python")
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
