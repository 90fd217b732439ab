"""Speed and memory of taskvec against mergekit and the raw floor, printed as ratios.

    python -m benchmarks.run [--quick] [--runs 3] [--only NAME]... [--json FILE]

It measures and prints; it asserts nothing. README.md in this folder says how to read it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import floor, machine, quantised, synthetic, vocabulary
from benchmarks.measure import Command, Job, interleave

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = (
    "lata",
    "merge",
    "scan",
    "lora",
    "memory",
    "tensors",
    "startup",
    "vocabulary",
    "quantised",
    "names",
    "methods",
    "evaluation",
    "disentanglement",
    "training",
    "search",
)
MERGEKIT_FLAGS = {
    "default flags": [],
    "async write": ["--async-write", "--write-threads", "{threads}", "--quiet"],
}
LATA = {"name": "lata", "scheme": "logarithmic"}
PLAIN = {"name": "task_arithmetic"}
RANK = 64
# Our method, mergekit's and its target; the density goes to both.
METHODS = (
    ({"name": "ties", "density": 0.2}, "ties", "≤ 0.067"),
    ({"name": "dare", "density": 0.1}, "dare_linear", "≤ 0.125"),
    ({"name": "della", "density": 0.2}, "della", "≤ 0.067"),
    ({"name": "slerp"}, "slerp", "≤ 0.50"),
    ({"name": "average"}, "linear", "≤ 0.50"),
)
# Modes of training with the attention that both sides compute, and the target against `full`.
TRAINING = (
    ("attention", "sdpa", "≤ 0.80"),
    ("attention", "eager", "≤ 0.80"),
    ("full linearised", "eager", "≤ 2.20"),
    ("attention linearised", "eager", "≤ 2.20"),
    ("lora", "sdpa", ""),
)
SPARE_BYTES = 1 << 30


@dataclass
class Bench:
    """The settings of one invocation and all that it measured."""

    work: Path
    taskvec: Path
    mergekit: Path
    threads: int
    runs: int
    quick: bool
    models: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.title = ""
        self.jobs: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def has_mergekit(self) -> bool:
        return self.mergekit.exists()

    @cached_property
    def family(self) -> Family:
        return Family(self, "tiny") if self.quick else Family(self, "1b")

    def heading(self, title: str) -> None:
        self.title = title
        print(f"\n{title}", flush=True)

    def run(self, jobs: Sequence[Job], *, runs: int | None = None) -> None:
        """Measure the jobs interleaved and print one line for each."""
        interleave(jobs, runs=runs or self.runs, log=self.work / "stderr.log")
        print(f"  {'job':<44}{'wall s':>8}  {'min – max':<18}{'RSS MB':>8}{'RssAnon MB':>12}")
        for job in jobs:
            kept = {"failed": bool(job.error), "runs": [asdict(run) for run in job.runs]}
            self.jobs.append({"section": self.title, "name": job.name, **kept})
            if job.error:
                print(f"  {job.name:<44}{'failed':>8}")
                continue
            walls = [run.wall_s for run in job.runs]
            span = f"{min(walls):.2f} – {max(walls):.2f}"
            rss, anon = job.rss_bytes() / 1e6, job.anon_bytes() / 1e6
            print(f"  {job.name:<44}{job.median_s():>8.2f}  {span:<18}{rss:>8.0f}{anon:>12.0f}")

    def compare(self, job: Job, others: Sequence[Job], target: str = "") -> None:
        """Print the ratio of medians of `job` to the fastest of `others`, and its range by round.

        Rounds are paired, so a slow moment of the machine that covers both drops out of the range.
        """
        others = [other for other in others if not other.error]
        if job.error or not others:
            print(f"  {job.name}: no ratio, one side is missing")
            return
        best = min(others, key=Job.median_s)
        pairs = [a.wall_s / b.wall_s for a, b in zip(job.runs, best.runs, strict=True)]
        ratio = job.median_s() / best.median_s()
        self.state(f"{job.name} / {best.name}", ratio, target, by_round=pairs)

    def compare_processor(self, job: Job, other: Job, target: str) -> None:
        """Print the ratio of the least processor times, which other programs disturb little."""
        if job.error or other.error:
            print(f"  {job.name}: no ratio, one side is missing")
            return
        pairs = [a.cpu_s / b.cpu_s for a, b in zip(job.runs, other.runs, strict=True)]
        least = [min(run.cpu_s for run in each.runs) for each in (job, other)]
        name = f"{job.name} / {other.name}, processor time"
        self.state(name, least[0] / least[1], target, by_round=pairs)

    def state(
        self, name: str, value: float, target: str = "", *, by_round: Sequence[float] = ()
    ) -> None:
        """Print and keep one figure with its target."""
        figure = {"name": name, "value": value, "target": target, "by_round": by_round}
        self.figures.append({"section": self.title, **figure})
        span = f" ({min(by_round):.3g} – {max(by_round):.3g})" if by_round else ""
        print(f"  → {name} = {value:.3g}{span}" + (f", target {target}" if target else ""))


class Family:
    """A synthetic family on disk with the commands that are measured on it."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.shapes = synthetic.named(name)
        self.folder = bench.work / name
        self.bytes = synthetic.family_bytes(self.shapes)
        self.out = bench.work / "out"
        _need_disk(self)
        _in_own_process(synthetic.write_family, self.shapes, self.folder)
        floor.read_files(self.files(*synthetic.MEMBERS), threads=bench.threads)

    def __str__(self) -> str:
        tensors = len(self.shapes.tensors())
        return f"{self.name}: 4 members of {self.bytes / 1e9:.3f} GB, {tensors} tensors"

    def files(self, *members: str) -> list[str]:
        return [str(f) for m in members for f in sorted((self.folder / m).glob("*.safetensors"))]

    def merge(self, method: dict[str, Any], *flags: str, rank: int = 0) -> Job:
        """A merge of the full fine-tunes or, with a rank, of the adapters of that rank."""
        threads = ["--threads", str(self.bench.threads)]
        recipe = self._recipe(method, "-lora" if rank else "")
        command: Command = [
            self.bench.taskvec,
            "merge",
            recipe,
            self.out,
            "--force",
            *threads,
            *flags,
        ]
        kind = f", LoRA of rank {rank}" if rank else ""
        return self._job(f"taskvec merge {method['name']}{kind}", command, writes=True)

    def scan(self) -> Job:
        command: Command = [self.bench.taskvec, "scan", self._recipe(LATA), "--json", "--no-cache"]
        command += ["--threads", str(self.bench.threads)]
        return self._job("taskvec scan", command)

    def plan(self) -> Job:
        command: Command = [self.bench.taskvec, "plan", self._recipe(PLAIN), "--json"]
        return self._job("taskvec plan", command)

    def peers(self, method: str = "task_arithmetic", **parameters: Any) -> list[Job]:
        """mergekit's merge of the same two tasks, under each set of flags."""
        config: dict[str, Any] = {
            "merge_method": method,
            "base_model": str(self.folder / ("math" if method == "slerp" else "instruct")),
            "models": [
                {"model": str(self.folder / task), "parameters": {"weight": 0.5, **parameters}}
                for task in ("math", "code")
            ],
            "parameters": {"t": 0.5} if method == "slerp" else {"normalize": method == "linear"},
            "dtype": "bfloat16",
        }
        if method == "linear":
            del config["base_model"]
        file = self._yaml(f"mergekit-{method}", config)
        jobs = []
        for label, template in MERGEKIT_FLAGS.items() if self.bench.has_mergekit else ():
            flags = [flag.format(threads=self.bench.threads) for flag in template]
            command: Command = [self.bench.mergekit, file, self.out, *flags]
            jobs.append(self._job(f"mergekit {method}, {label}", command, writes=True))
        return jobs

    def floor(self, *members: str, writes: bool) -> Job:
        command: Command = [sys.executable, floor.__file__, "--threads", str(self.bench.threads)]
        command += ["--read", *self.files(*members)]
        if writes:
            command += ["--write", str(self.out), "--bytes", str(self.bytes)]
        name = f"floor: read {len(members)}" + (", write 1" if writes else "")
        return self._job(name, command, writes=writes)

    def _job(self, name: str, command: Command, *, writes: bool = False) -> Job:
        return Job(name, command, *((self.out, self.bytes) if writes else ()))

    def _recipe(self, method: dict[str, Any], kind: str = "") -> Path:
        """Only LATA is given the base; the merge pass alone has no use for it."""
        models = {task: str(self.folder / f"{task}{kind}") for task in ("math", "code")}
        tasks = {task: {"model": model, "scale": 0.5} for task, model in models.items()}
        roles = {"anchor": str(self.folder / "instruct")}
        if method is LATA:
            roles = {role: str(self.folder / role) for role in ("base", "instruct")}
        return self._yaml(method["name"] + kind, {**roles, "tasks": tasks, "method": method})

    def _yaml(self, name: str, content: dict[str, Any]) -> Path:
        """JSON, which is YAML too."""
        path = self.folder / f"{name}.yml"
        path.write_text(json.dumps(content, indent=2))
        return path


def speed(bench: Bench, wanted: set[str]) -> None:
    """LATA against mergekit, merge pass and scan against their floors, in the same rounds."""
    family = bench.family
    bench.heading(f"speed, {family}; {bench.runs} interleaved runs, warm cache")
    lata, merge, scan = family.merge(LATA, "--no-cache"), family.merge(PLAIN), family.scan()
    peers = family.peers() if wanted & {"lata", "merge"} else []
    merge_floor = family.floor("instruct", "math", "code", writes=True)
    scan_floor = family.floor(*synthetic.MEMBERS, writes=False)
    by_section = {"lata": [lata], "merge": [merge, merge_floor], "scan": [scan, scan_floor]}
    jobs = [job for section, part in by_section.items() if section in wanted for job in part]
    bench.run([*jobs, *peers])
    if "lata" in wanted:
        bench.compare(lata, peers, "≤ 0.40")
    if "merge" in wanted:
        bench.compare(merge, [merge_floor], "≤ 2.00")
        bench.compare(merge, peers)
    if "scan" in wanted:
        bench.compare(scan, [scan_floor], "≤ 2.00")


def methods(bench: Bench) -> None:
    """Other methods against mergekit's of the same name; one run: some of those take minutes."""
    family = bench.family
    bench.heading(f"first calls, which compile, not counted below, {family}")
    bench.run([family.merge(ours) for ours, _, _ in METHODS], runs=1)
    for ours, theirs, target in METHODS:
        bench.heading(f"{ours['name']}, {family}; one run")
        parameters = {key: value for key, value in ours.items() if key == "density"}
        merge, peers = family.merge(ours), family.peers(theirs, **parameters)
        bench.run([merge, *peers], runs=1)
        bench.compare(merge, peers, target)
        if not merge.error:
            bench.state(f"{merge.name}, RssAnon MB", merge.anon_bytes() / 1e6, "< 700")


def lora(bench: Bench) -> None:
    """Adapters on every linear layer as the two tasks, against full fine-tunes as tasks."""
    family = bench.family
    _in_own_process(partial(synthetic.write_adapters, rank=RANK), family.shapes, family.folder)
    floor.read_files(family.files("math-lora", "code-lora"), threads=bench.threads)
    methods = ((PLAIN, ()), (LATA, ("--no-cache",)))
    bench.heading(f"first call with an adapter, which compiles, not counted below, {family}")
    bench.run([family.merge(PLAIN, rank=RANK)], runs=1)
    bench.heading(f"adapters of rank {RANK} on all linear layers, {family}; {bench.runs} runs")
    adapters = [family.merge(method, *flags, rank=RANK) for method, flags in methods]
    full = [family.merge(method, *flags) for method, flags in methods]
    bench.run([*adapters, *full])
    for adapter, whole in zip(adapters, full, strict=True):
        bench.compare(adapter, [whole], "≤ 1.50")
        if not adapter.error:
            bench.state(f"{adapter.name}, RssAnon MB", adapter.anon_bytes() / 1e6, "< 700")


def memory(bench: Bench) -> None:
    """Peak anonymous memory, and the same for a family of twice the size."""
    peaks: list[list[Job]] = []
    double = Family(bench, "tiny2" if bench.quick else "2b")
    for family in (bench.family, double):
        bench.heading(f"memory, {family}; one run")
        jobs = [family.merge(LATA, "--no-cache"), family.merge(PLAIN), family.scan()]
        bench.run(jobs, runs=1)
        peaks.append(jobs)
    for small, large in zip(*peaks, strict=True):
        if small.error or large.error:
            continue
        bench.state(f"{small.name}, RssAnon MB", small.anon_bytes() / 1e6, "< 500")
        growth = large.anon_bytes() / small.anon_bytes()
        bench.state(f"{small.name}, RssAnon at twice the size", growth, "0.90 – 1.10")


def tensors(bench: Bench, *, with_mergekit: bool) -> None:
    """Cost of the number of tensors: three sizes of a family of experts, linear if growth is 1."""
    scale = 10 if bench.quick else 1
    sizes = [size // scale for size in (5_000, 10_000, 20_000)]
    by_size: list[list[Job]] = []
    for size in sizes:
        family = Family(bench, f"moe-{size}")
        bench.heading(f"tensors, {family}")
        jobs = [family.plan(), family.merge(PLAIN), family.merge(LATA, "--no-cache")]
        bench.run(jobs)
        by_size.append(jobs)
    for small, middle, large in zip(*by_size, strict=True):
        if small.error or middle.error or large.error:
            continue
        bench.state(f"{large.name}, {sizes[2]} tensors, s", large.median_s(), "< 3.00")
        # Differences of short times: the fastest runs, because noise only ever adds.
        walls = [min(run.wall_s for run in job.runs) for job in (small, middle, large)]
        per_tensor_us = (walls[2] - walls[1]) / (sizes[2] - sizes[1]) * 1e6
        bench.state(f"{large.name}, µs for one more tensor", per_tensor_us)
        growth = (walls[2] - walls[1]) / (2 * (walls[1] - walls[0]))
        bench.state(f"{large.name}, growth of that cost per doubling", growth, "about 1")
    family = Family(bench, f"moe-{sizes[-1]}-sharded")
    bench.heading(f"tensors, {family}; about 20 shards a member")
    bench.run([family.plan(), family.merge(PLAIN)])
    if with_mergekit:
        _peer_tensors(bench, [size // scale for size in (1_000, 2_000, 4_000)])


def _peer_tensors(bench: Bench, sizes: Sequence[int]) -> None:
    """A Llama of very many blocks, since mergekit has no definition for loose experts."""
    for size in sizes:
        family = Family(bench, f"deep-{size}")
        bench.heading(f"tensors against mergekit, {family}")
        merge, peers = family.merge(PLAIN), family.peers()[:1]
        bench.run([merge, *peers], runs=1)
        bench.compare(merge, peers)


def startup(bench: Bench) -> None:
    """What every call costs before it works, with kernels compiled by an earlier call."""
    family = Family(bench, "tiny")
    bench.heading(f"start-up, {family}; compiled kernels cached")
    usage = Job("taskvec --help", [bench.taskvec, "--help"])
    merge, peers = family.merge(PLAIN), family.peers()[:1]
    bench.run([usage, merge, *peers], runs=max(5, bench.runs))
    if not usage.error:
        bench.state("taskvec --help, s", usage.median_s(), "< 0.30")


def by_token(bench: Bench) -> None:
    """Embeddings whose rows are matched by token, against the same ones taken row by row."""
    shapes = vocabulary.QUICK if bench.quick else vocabulary.SHAPES
    folder = bench.work / ("vocabulary-quick" if bench.quick else "vocabulary")
    _in_own_process(synthetic.write_family, shapes, folder)
    vocabulary.write_tokenizers(shapes, folder)
    size = synthetic.family_bytes(shapes)
    bench.heading(
        f"vocabulary, {shapes.vocab} rows of {shapes.hidden}: {size / 1e6:.0f} MB a member"
    )
    jobs = []
    for kind in vocabulary.ORDERS:
        command: Command = [bench.taskvec, "merge", bench.work / "out", "--force", "--quiet"]
        command += ["--anchor", folder / "instruct", "--task", f"math={folder}/math-{kind}:0.5"]
        command += ["--task", f"code={folder}/code:0.5", "--method", "task_arithmetic"]
        command += ["--threads", str(bench.threads)]
        command += ["--vocabulary", "refuse" if kind == "same" else "by-token"]
        jobs.append(Job(f"rows {kind}", command, bench.work / "out", size))
    bench.run(jobs)
    for job in jobs[1:]:
        bench.compare(job, jobs[:1], "≤ 2.00")


def quantised_members(bench: Bench) -> None:
    """Merges of FP8 and MXFP4 members against that of the same parameters in bfloat16."""
    folder = bench.work / ("quantised-quick" if bench.quick else "quantised")
    _in_own_process(partial(quantised.write_formats, quick=bench.quick), folder)
    size = quantised.bfloat16_bytes(quick=bench.quick)
    jobs = []
    for kind in quantised.FORMATS:
        files = sorted((folder / kind).glob("*/*.safetensors"))
        floor.read_files([str(file) for file in files], threads=bench.threads)
        members = {role: folder / kind / role for role in quantised.ROLES}
        jobs.append(_two_tasks(bench, f"merge of {kind}", members, size))
    bench.heading(f"first calls, which compile, not counted below, {size / 2e6:.0f}M parameters")
    bench.run(jobs, runs=1)
    bench.heading(f"quantised members, {size / 2e6:.0f}M parameters; {bench.runs} runs")
    jobs = [Job(job.name, job.command, job.out, job.out_bytes) for job in jobs]
    bench.run(jobs)
    for job in jobs[1:]:
        bench.compare(job, jobs[:1], "≤ 1.30")
        bench.compare_processor(job, jobs[0], "≤ 1.30")


def names(bench: Bench) -> None:
    """Tasks under the names of a trainer's wrappers against the same ones under the target's."""
    family = Family(bench, "moe-2000" if bench.quick else "moe-20000")
    _in_own_process(quantised.write_wrapped, family.folder)
    jobs = []
    for label, end in (("names alike", ""), ("wrapped names", "-wrapped")):
        members = {task: family.folder / f"{task}{end}" for task in ("math", "code")}
        members["instruct"] = family.folder / "instruct"
        jobs.append(_two_tasks(bench, f"merge, {label}", members, family.bytes))
    bench.heading(f"names, {family}; {bench.runs} runs")
    bench.run(jobs)
    bench.compare(jobs[1], jobs[:1], "≤ 1.10")
    bench.compare_processor(jobs[1], jobs[0], "≤ 1.10")


def _two_tasks(bench: Bench, name: str, members: dict[str, Path], size: int) -> Job:
    command: Command = [bench.taskvec, "merge", bench.work / "out", "--force", "--quiet"]
    command += ["--anchor", members["instruct"], "--method", "task_arithmetic"]
    command += ["--task", f"math={members['math']}:0.5", "--task", f"code={members['code']}:0.5"]
    command += ["--threads", str(bench.threads)]
    return Job(name, command, bench.work / "out", size)


def evaluation(bench: Bench) -> None:
    """Switching candidates and asking a model, against a copy and bare forward passes."""
    family = Family(bench, "tiny" if bench.quick else "135m")
    bench.heading(f"evaluation, {family}; fastest of {max(5, bench.runs)} runs in one process")
    command = [sys.executable, "-m", "benchmarks.evaluation", str(family.folder), str(family.out)]
    command += ["--runs", str(max(5, bench.runs)), "--threads", str(bench.threads)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, list[float]] = json.loads(done.stdout)
    shutil.rmtree(family.out)
    bench.jobs.append({"section": bench.title, "name": "evaluation", "seconds": seconds})
    best = {name: min(runs) for name, runs in seconds.items()}
    for name, value in best.items():
        print(f"  {name:<44}{value:>8.3f}")
    bench.state("switch of 2 tasks / copy", best["switch"] / best["copy"], "≤ 2.50")
    bench.state("folder written and loaded / switch", best["folder"] / best["switch"], "≥ 20")
    for name in ("perplexity", "answers"):
        bench.state(f"{name} / bare", best[name] / best[f"{name}, bare"], "≤ 1.10")
    usage = Job("taskvec eval --help", [bench.taskvec, "eval", "--help"])
    bench.run([usage], runs=max(5, bench.runs))
    bench.state("taskvec eval --help, s", usage.median_s(), "< 0.50")


def disentanglement(bench: Bench) -> None:
    """The grid of the disentanglement error, against both sides of every cell worked out anew."""
    bench.heading(f"disentanglement, a ViT-S/14 at 84 px, attention only; {bench.runs} runs")
    command = [sys.executable, "-m", "benchmarks.disentanglement", "--runs", str(bench.runs)]
    command += ["--threads", str(bench.threads), *(["--tiny"] if bench.quick else [])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, list[float]] = json.loads(done.stdout)
    bench.jobs.append({"section": bench.title, "name": "disentanglement", "seconds": seconds})
    for name, runs in seconds.items():
        print(f"  {name:<44}{min(runs):>8.3f}")
    rounds = [a / b for a, b in zip(seconds["grid"], seconds["anew"], strict=True)]
    ratio = min(seconds["grid"]) / min(seconds["anew"])
    bench.state("grid of 5 × 5 / every cell anew", ratio, "≤ 0.60", by_round=rounds)


def training(bench: Bench) -> None:
    """Steps of every mode of fine-tuning against full steps; time, memory, what trains."""
    from benchmarks.training import MODES

    for model in bench.models or (("tiny",) if bench.quick else ("vit-s", "smollm2-135m")):
        common = [
            sys.executable,
            "-m",
            "benchmarks.training",
            model,
            "--threads",
            str(bench.threads),
        ]
        found = {}
        for attention in ("sdpa", "eager"):
            bench.heading(f"training, {Path(model).name}, {attention}; steps in one process")
            command = [*common, "--attention", attention, "--runs", str(max(5, bench.runs))]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found[attention] = json.loads(done.stdout)
            bench.jobs.append({"section": bench.title, "name": model, **found[attention]})
            trained, flops = found[attention]["trained"], found[attention]["flops"]
            print(f"  {'':<24}{'s':>8}{'operations / full':>20}{'parameters train':>20}")
            for mode, runs in found[attention]["seconds"].items():
                share = flops[mode] / flops["full"]
                line = f"{statistics.median(runs):>8.3f}{share:>20.3f}{trained[mode]:>20,}"
                print(f"  {mode:<24}{line}")
        for mode, attention, target in TRAINING:
            full, own = (found[attention]["seconds"][name] for name in ("full", mode))
            pairs = [a / b for a, b in zip(own, full, strict=True)]
            ratio = statistics.median(own) / statistics.median(full)
            bench.state(f"{mode} / full, {attention}", ratio, target, by_round=pairs)
        bench.heading(f"training, {Path(model).name}, eager: peak memory of a process of its own")
        jobs = [
            Job(mode, [*common, "--attention", "eager", "--runs", "1", "--mode", mode])
            for mode in MODES
        ]
        bench.run(jobs, runs=1)
        for job in jobs[1:]:
            if not job.error and not jobs[0].error:
                ratio = job.anon_bytes() / jobs[0].anon_bytes()
                bench.state(f"{job.name} / full, peak memory", ratio)


def search(bench: Bench, models: Path | None) -> None:
    """What a candidate costs besides its scoring; a switch against a folder, on a real family."""
    bench.heading("search, the zoo; in one process")
    command = [sys.executable, "-m", "benchmarks.search", str(bench.work)]
    command += ["--runs", str(max(5, bench.runs)), "--threads", str(bench.threads)]
    command += [] if models is None else ["--family", str(models)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, list[float]] = json.loads(done.stdout)
    bench.jobs.append({"section": bench.title, "name": "search", "seconds": seconds})
    middle = {name: median(runs) for name, runs in seconds.items()}
    for name, value in middle.items():
        print(f"  {name:<44}{value:>8.4f}")
    scoring = sum(seconds["scoring"]) / len(seconds["scoring"])
    bench.state("all but scoring / scoring, a candidate", middle["overhead"] / scoring, "≤ 0.10")
    if models is None:
        print("  switch against a folder: give a real family with --models DIR")
    else:
        best = {name: min(seconds[name]) for name in ("folder", "switch", "copy")}
        bench.state(f"{models.name}, folder / switch", best["folder"] / best["switch"], "≥ 20")
        bench.state(f"{models.name}, switch / copy of parameters", best["switch"] / best["copy"])


def _need_disk(family: Family) -> None:
    """Stop before anything is written when members and one output do not fit."""
    there = (family.folder / "complete.json").exists()
    need = family.bytes * (1 if there else 1 + len(synthetic.MEMBERS)) + SPARE_BYTES
    free = shutil.disk_usage(family.bench.work).free
    if free < need:
        sys.exit(
            f"not enough disk for family {family.name}: {need / 1e9:.1f} GB needed, "
            f"{free / 1e9:.1f} GB free; choose another place with --work, or run less with "
            "--quick or --only"
        )


def _in_own_process(function: Callable[..., None], *arguments: object) -> None:
    """So that its memory is not ours: a child's peak (ru_maxrss) starts from its parent's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")


def _warm_up(bench: Bench) -> None:
    """Compile kernels and fill caches of code, so that no measured run pays for it."""
    family = Family(bench, "tiny")
    bench.heading(f"first calls, not counted below, {family}")
    jobs = [family.merge(LATA, "--no-cache"), family.merge(PLAIN), family.scan()]
    bench.run([*jobs, *family.peers()], runs=1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny sizes: does everything run? figures mean little")
    add("--runs", type=int, default=3, help="interleaved runs of each job (default 3)")
    add("--only", choices=SECTIONS, action="append", help="one section; may be repeated")
    add("--work", type=Path, default=ROOT / "benchmarks" / "work", help="folder for families")
    add("--json", type=Path, metavar="FILE", help="write everything measured there too")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add(
        "--models", type=Path, metavar="DIR", help="instruct, math, unsafe of a real family: search"
    )
    add("--mergekit-tensors", action="store_true", help="many tensors in mergekit too: minutes")
    add("--train-model", action="append", metavar="M", help="folder to train; may be repeated")
    add("--taskvec", type=Path, default=Path(sys.executable).with_name("taskvec"))
    add("--mergekit", type=Path, default=ROOT / ".venv-mergekit" / "bin" / "mergekit-yaml")
    return parser.parse_args()


def main() -> None:
    options = _options()
    wanted = set(options.only or SECTIONS)
    bench = Bench(
        work=options.work.resolve(),
        taskvec=options.taskvec.absolute(),  # not resolved: a link into an environment stays there
        mergekit=options.mergekit.absolute(),
        threads=options.threads,
        runs=options.runs,
        quick=options.quick,
        models=options.train_model or (),
    )
    facts = machine.facts(threads=bench.threads, mergekit=bench.mergekit)
    print("\n".join(f"{name:<12} {value}" for name, value in facts.items()))
    _warm_up(bench)
    if wanted & {"lata", "merge", "scan"}:
        speed(bench, wanted)
    if "lora" in wanted:
        lora(bench)
    if "memory" in wanted:
        memory(bench)
    if "tensors" in wanted:
        tensors(bench, with_mergekit=options.mergekit_tensors)
    if "startup" in wanted:
        startup(bench)
    if "vocabulary" in wanted:
        by_token(bench)
    if "quantised" in wanted:
        quantised_members(bench)
    if "names" in wanted:
        names(bench)
    if "methods" in wanted:
        methods(bench)
    if "evaluation" in wanted:
        evaluation(bench)
    if "disentanglement" in wanted:
        disentanglement(bench)
    if "training" in wanted:
        training(bench)
    if "search" in wanted:
        search(bench, options.models)
    if options.json:
        content = {"machine": facts, "jobs": bench.jobs, "figures": bench.figures}
        options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
