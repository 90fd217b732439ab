"""Run the study, or a part of it; what was done before is not done again.

    python -m benchmarks.attention_only vision MODEL_DIR DATA_DIR OUT_DIR [--mode M] [--seed N]
    python -m benchmarks.attention_only text   MODEL_DIR DATA_DIR OUT_DIR …

vision: MODEL_DIR is a DINOv2 ViT, DATA_DIR holds cifar10_small/, gtsrb_small/, mnist/ and
fashion-mnist/. text: MODEL_DIR is a BERT encoder with its tokenizer, DATA_DIR holds sentconv/.
Several processes may share OUT_DIR if their modes or seeds differ. `--report` writes tables and
figures from what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.attention_only import study
from benchmarks.attention_only.data import Sizes, image_tasks, text_tasks
from taskvec.disentanglement.error import coefficients

SCALES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
NEGATIVE_SCALES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)


def vision(model: Path, data: Path, out: Path, **given: Any) -> study.Setup:
    """ViT-S/14 at 84 pixels, the class token after the last norm."""
    from transformers import AutoModel

    return study.Setup(
        name="vision",
        backbone=lambda: AutoModel.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        ),
        pooled=lambda output, inputs: output.last_hidden_state[:, 0],
        tasks=image_tasks(data, Sizes(train=1920, validation=100, test=300), pixels=84),
        tuned_on=("cifar10", "gtsrb"),
        pair=("cifar10", "gtsrb"),
        out=out,
        **given,
    )


def text(model: Path, data: Path, out: Path, **given: Any) -> study.Setup:
    """MiniLM-L6, the mean over tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)

    def pooled(output: Any, inputs: Any) -> Any:
        mask = inputs["attention_mask"][..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1)

    return study.Setup(
        name="text",
        backbone=lambda: AutoModel.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        ),
        pooled=pooled,
        tasks=text_tasks(data, Sizes(train=1920, validation=200, test=400), tokenizer, tokens=40),
        tuned_on=("trec", "sst2"),
        pair=("trec", "subj"),
        out=out,
        **given,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_only", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["vision", "text"])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mode", action="append", choices=list(study.MODES))
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stage", choices=["measure", "error", "all"], default="all")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    make = vision if options.what == "vision" else text
    setup = make(
        options.model,
        options.data,
        options.out,
        seeds=options.seed or [0, 1, 2],
        steps=options.steps,
        batch=options.batch,
        scales=SCALES,
        negative_scales=NEGATIVE_SCALES,
        fixed=0.3,
        grid=coefficients(9, -2.0, 2.0),
        error_n=100,
        precision=options.precision,
    )
    study.probe(setup)
    for seed in setup.seeds:
        for mode in options.mode or study.MODES:
            if options.stage in ("measure", "all"):
                study.measured(setup, mode, seed)
            if options.stage in ("error", "all") and seed == setup.seeds[0]:
                study.error(setup, mode, seed)


if __name__ == "__main__":
    main()
