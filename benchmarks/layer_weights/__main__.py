"""Run the study of a family, or a part of it; what was done before is not done again.

    python -m benchmarks.layer_weights zoo WORK [--stage S]... [--seed N]...
    python -m benchmarks.layer_weights text WORK --model DIR --data DIR …     MiniLM-L6
    python -m benchmarks.layer_weights vision WORK --model DIR --data DIR …   DINOv2 ViT-S
    python -m benchmarks.layer_weights language WORK --model DIR --data DIR … SmolLM2-135M
    python -m benchmarks.layer_weights report WORK [--figures DIR]

Results are JSON lines in WORK. Several processes may share WORK for different families.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path

import torch

from benchmarks.layer_weights import encoder_family, language_family, rivals, study, zoo_family
from benchmarks.layer_weights.bench import Bench, Records

STAGES = ("members", "methods", "fit", "probe")
CELLS = [("tensor", 128), ("module", 128), ("block", 128), ("model", 128), ("tensor", 32),
         ("tensor", 8)]  # fmt: skip

FEW_CELLS = [("tensor", 128), ("tensor", 32), ("block", 128)]
FORMS = {"all": rivals.variants, "few": rivals.few, "default": rivals.default}


def run(bench: Bench, records: Records, stages: list[str], options: argparse.Namespace) -> None:
    """The stages that a family has."""
    if "members" in stages:
        study.members(bench, records)
    if "methods" in stages:
        study.methods(bench, records, FORMS[options.forms](), tested=options.tested)
    bench.close()


def zoo(options: argparse.Namespace) -> None:
    """Pairs and all three skills, then forgetting; `--only` chooses by name."""
    records = Records(options.work / "zoo.jsonl")
    benches = [partial(zoo_family.adding, tasks) for tasks in zoo_family.sets()]
    benches += [partial(zoo_family.forgetting, language) for language in ("zor", "own")]
    for make in benches:
        bench = make()
        if options.only and bench.name.removeprefix("zoo ") not in options.only:
            continue
        run(bench, records, options.stage, options)
        is_forgetting = bench.sign < 0
        if "fit" in options.stage:
            cells = CELLS if bench.name == "zoo math + code" else CELLS[:1]
            study.fits(bench, records, [("tensor", 96)] if is_forgetting else cells, options.seed)
        if "probe" in options.stage and not is_forgetting:
            study.probe(bench, records, 0.7)
        bench.close()


def encoder(options: argparse.Namespace) -> None:
    kind = encoder_family.KINDS[options.family]
    for seed in options.seed:
        records = Records(options.work / f"{kind.name}.jsonl")
        bench = encoder_family.bench(kind, options.model, options.data, options.work, seed)
        run(bench, records, options.stage, options)
        if "fit" in options.stage:
            study.fits(bench, records, FEW_CELLS, [seed])
        if "probe" in options.stage and seed == options.seed[0]:
            study.probe(bench, records, 0.3)
        bench.close()


def language(options: argparse.Namespace) -> None:
    for seed in options.seed:
        records = Records(options.work / "language.jsonl")
        bench = language_family.bench(options.model, options.data, options.work, seed)
        run(bench, records, options.stage, options)
        if "fit" in options.stage:
            study.fits(bench, records, [("tensor", 32), ("block", 32)], [seed])
        if "probe" in options.stage and seed == options.seed[0]:
            study.probe(bench, records, 0.7, part="validation")
        bench.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_weights", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("family", choices=("zoo", "text", "vision", "language"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, help="folder of the pre-trained encoder")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--tested", type=int, help="forms of LATA asked on test data; default all")
    parser.add_argument("--only", action="append", help="of the zoo, such as 'math + code'")
    parser.add_argument("--forms", choices=list(FORMS), default="all",
                        help="which forms of LATA, and with which controls (all)")  # fmt: skip
    options = parser.parse_args()
    options.stage = options.stage or list(STAGES)
    options.seed = options.seed or [0, 1, 2]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    {"zoo": zoo, "language": language}.get(options.family, encoder)(options)


if __name__ == "__main__":
    main()
