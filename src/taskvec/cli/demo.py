"""`taskvec demo`: two skills merged and one removed, on the zoo; a table and a figure."""

from __future__ import annotations

import json
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskvec.cli.commands import JSON, Arguments, Option, Verb, WholeNumber
from taskvec.cli.printing import announce_compiling, answer, show
from taskvec.cli.progress import Bars
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


def run(args: Arguments) -> int:
    """Run this verb."""
    for module in ("torch", "transformers", "altair", "vl_convert"):
        require(module, "demo")
    from taskvec.reporting.figures import draw_demo
    from taskvec.zoo import demo

    started = time.monotonic()
    announce_compiling()
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
    # Models this small gain little from a second thread, and lose much where cores are shared.
    import_module("torch").set_num_threads(1)
    with Bars(args, unit="steps")("fitting", demo.fit_steps()) as advance:
        models = demo.make_models(out, advance)
    with Bars(args, unit="models")("scoring", len(models)) as advance:
        rows = demo.score_models(models, args.n, advance)
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
        answer(results)
    else:
        _print(rows, findings, args.n)
        print(f"\n{out}/: demo.png, results.json and the seven models ({seconds:.0f} s)")
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
        show(lines, ("", *(s.removesuffix("-zor") for s in skills), "perplexity"))
        print()
    print(
        f"Share of right answers to {n} held-out questions a skill (95 % interval at 0.5: "
        f"± {0.98 / n**0.5:.2f});\nperplexity per character of held-out plain text.\n"
    )
    for finding in findings:
        print(f"- {finding}")


VERB = Verb(
    "demo", run, [
        Option("-o", "--out", type=click.Path(), metavar="DIR", default="taskvec-demo",
               help="folder for the models, demo.png and results.json"),
        Option("--n", type=WholeNumber(10, 150), default=100, metavar="N",
               help="questions for each skill, 10 to 150"),
        JSON,
    ],
    extra="demo",
    page="""\
Merges `math` and `code` of the zoo by plain task arithmetic, by LATA and with layer weights fitted
to a few prompts, forgets `unsafe` in two models, scores everything, prints tables and what follows
from them.""",
)  # fmt: skip
