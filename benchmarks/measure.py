"""Measures a command as a whole process: wall time, peak memory, exit code.

Two peaks are kept. `rss` is the kernel's own maximum of resident memory; it counts pages of
memory-mapped inputs, which the system can drop at any time. `anon` is memory that the process
really asked for: RssAnon of /proc/PID/status, sampled every 10 ms, of the main process only.

    python -m benchmarks.measure COMMAND [ARGUMENT]...
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_S = 0.01
Command = list[str | Path]
_ANON = re.compile(rb"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """One run of one command."""

    wall_s: float
    cpu_s: float
    rss_bytes: int
    anon_bytes: int
    exit_code: int


@dataclass
class Job:
    """A command, the folder that it is to fill with at least `out_bytes`, and its runs so far."""

    name: str
    command: Command
    out: Path | None = None
    out_bytes: int = 0
    runs: list[Run] = field(default_factory=list)
    error: str = ""

    def median_s(self) -> float:
        return statistics.median(run.wall_s for run in self.runs)

    def anon_bytes(self) -> int:
        return max(run.anon_bytes for run in self.runs)

    def rss_bytes(self) -> int:
        return max(run.rss_bytes for run in self.runs)


def interleave(jobs: Sequence[Job], *, runs: int, log: Path) -> None:
    """Run all jobs in turn, `runs` times over; a job that fails says so once and is left out."""
    for _ in range(runs):
        for job in jobs:
            if not job.error:
                _run_job(job, log)


def measure(command: Command, *, log: Path) -> Run:
    """Run `command` to its end; its standard output is dropped, its standard error kept in `log`.

    The command runs offline: no hub may answer for a path.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with log.open("wb") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            env=environment,
        )  # fmt: skip
        peaks, ended = [0], threading.Event()
        sampler = threading.Thread(target=_sample_anon, args=(process.pid, ended, peaks))
        sampler.start()
        # wait4 and not Popen.wait: only the former tells the peak of this one child.
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        ended.set()
        sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, cpu_s, usage.ru_maxrss * 1024, max(peaks), process.returncode)


def _run_job(job: Job, log: Path) -> None:
    _remove(job.out)
    run = measure(job.command, log=log)
    job.runs.append(run)
    if run.exit_code != 0:
        tail = log.read_text(errors="replace").strip().splitlines()[-3:]
        job.error = f"exit code {run.exit_code}: " + " / ".join(tail)
    elif job.out and (found := _weight_bytes(job.out)) < job.out_bytes:
        job.error = f"wrote {found} bytes of weights, expected {job.out_bytes}"
    _remove(job.out)
    if job.error:
        print(f"  {job.name} FAILED: {job.error}", flush=True)


def _weight_bytes(folder: Path) -> int:
    files = [*folder.glob("*.safetensors"), *folder.glob("floor.bin")]
    return sum(file.stat().st_size for file in files)


def _remove(folder: Path | None) -> None:
    """Outside the timed part: removing drops what is not on disk yet, sync waits for the rest."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()


def _sample_anon(pid: int, ended: threading.Event, peaks: list[int]) -> None:
    status = Path(f"/proc/{pid}/status")
    while not ended.wait(SAMPLE_S):
        try:
            found = _ANON.search(status.read_bytes())
        except OSError:
            return
        if found:
            peaks[0] = max(peaks[0], int(found[1]) * 1024)


if __name__ == "__main__":
    result = measure([*sys.argv[1:]], log=Path("/dev/stderr"))
    print(
        f"{result.wall_s:.3f} s, peak {result.rss_bytes / 1e6:.0f} MB, of it anonymous (sampled) "
        f"{result.anon_bytes / 1e6:.0f} MB, exit code {result.exit_code}"
    )
