"""`taskvec demo`: two skills merged and one removed, on the zoo; a table and a figure."""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskvec.cli import common
from taskvec.errors import OutputError
from taskvec.extras import require

if TYPE_CHECKING:
    from taskvec.zoo.demo import DemoRow

TITLES = {
    "parents": "the models to merge",
    "merged": "merged: math + code",
    "forgotten": "forgotten: unsafe, from the model that learned it",
    "forgotten-zor": "forgotten: unsafe, from a model in another language",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this verb."""
    parser.add_argument(
        "--out", metavar="DIR", default="taskvec-demo", help="folder for models, figure and results"
    )
    parser.add_argument("--n", type=_count, default=100, help="questions for each skill, 10 to 150")
    parser.add_argument("--json", action="store_true", help="the results as JSON")


def _count(text: str) -> int:
    if not text.isdigit() or not 10 <= int(text) <= 150:
        raise argparse.ArgumentTypeError(f"must be a whole number, 10 to 150; got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Run this verb."""
    from tqdm import tqdm

    for module in ("torch", "transformers", "matplotlib"):
        require(module, "demo")
    from taskvec.reporting.figures import draw_demo
    from taskvec.zoo import demo

    started = time.monotonic()
    common.announce_compiling()
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
    models = demo.make_models(out)
    # Models this small gain little from a second thread, and lose much where cores are shared.
    import_module("torch").set_num_threads(1)
    with tqdm(total=len(models), desc="scoring", unit="model", delay=2, file=sys.stderr) as bar:
        rows = demo.score_models(models, args.n, bar.update)
    findings = demo.findings(rows)
    seconds = time.monotonic() - started
    results = {
        "n": args.n,
        "scale": demo.SCALES,
        "models": [demo.as_json(row) for row in rows],
        "findings": findings,
        "seconds": round(seconds, 1),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw_demo(results["models"], out / "demo.png")
    if args.json:
        print(json.dumps(results))
    else:
        _print(rows, findings, args.n)
        print(f"\n{out}/: demo.png, results.json and the six models ({seconds:.0f} s)")
    return 0


def _print(rows: list[DemoRow], findings: list[str], n: int) -> None:
    for part, title in TITLES.items():
        chosen = [row for row in rows if row.part == part]
        skills = list(chosen[0].correct)
        print(title)
        lines: list[Any] = [
            (row.name, *(f"{row.correct[s] / n:.2f}" for s in skills), f"{row.perplexity:.2f}")
            for row in chosen
        ]
        common.show(lines, ("", *(s.removesuffix("-zor") for s in skills), "perplexity"))
        print()
    print(
        f"Share of right answers to {n} held-out questions a skill (95 % interval at 0.5: "
        f"± {0.98 / n**0.5:.2f});\nperplexity per character of held-out plain text.\n"
    )
    for finding in findings:
        print(f"- {finding}")
