"""What a training step costs in each mode, side by side in one process.

    python -m benchmarks.training MODEL [--attention eager] [--runs 10] [--threads 2]

MODEL is `vit-s` or `smollm2-135m`, random weights in the shapes of these, or a folder with a
backbone of images or a causal language model. Rounds run every mode once, in turn. Prints one JSON
object: by mode, seconds of every step, parameters that train, and operations of the matrix products
and attention of a step, which do not depend on the machine. With `--mode`, that mode alone; its
peak of memory is then that of the process. `benchmarks.run` makes ratios of the seconds.

A step is what the training loop does: forward, loss, backward, clipping, AdamW.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from taskvec.training.heads import Classifier
from taskvec.training.linearised import Linearised
from taskvec.training.lora import add_lora
from taskvec.training.selection import freeze_rest, select

MODES = ("full", "attention", "attention linearised", "full linearised", "lora")
SHAPES = ("vit-s", "smollm2-135m", "tiny")
RANK = 16
CLASSES = 10
# Images of a step and their side; texts of a step and their tokens.
IMAGES, PIXELS = 32, 84
TEXTS, TOKENS = 4, 128


def backbone(model: str, attention: str) -> nn.Module:
    """A model of a named shape or from a folder, in float32."""
    torch.manual_seed(0)
    options = {"attn_implementation": attention, "dtype": torch.float32}
    if model in SHAPES:
        config = config_of(model)
    else:
        config = transformers.AutoConfig.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
    causal = str((config.architectures or [""])[0]).endswith("ForCausalLM")
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    made: nn.Module
    if model in SHAPES:
        made = kind.from_config(config, **options, trust_remote_code=False)
    else:
        made = kind.from_pretrained(
            model, local_files_only=True, **options, trust_remote_code=False
        )
    return made


def config_of(shape: str) -> Any:
    if shape == "smollm2-135m":
        return transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
        )  # fmt: skip
    width, depth, heads = (384, 12, 6) if shape == "vit-s" else (32, 2, 2)
    return transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=518,
        patch_size=14, architectures=["Dinov2Model"],
    )  # fmt: skip


def steps(model: str, attention: str, mode: str) -> tuple[Callable[[], None], int]:
    """A step of a mode on a batch that stays the same, and how many parameters train."""
    core: Any = backbone(model, attention).train()
    is_causal = hasattr(core, "lm_head")
    words = core.config.vocab_size if is_causal else 0
    if mode == "lora":
        core, selection = add_lora(core, "lora", rank=RANK)
    else:
        selection = select(core, "attention" if mode.startswith("attention") else "all")
        freeze_rest(core, selection)
    if mode.endswith("linearised"):
        core = Linearised(core, selection.names, rows=selection.rows)
    if is_causal:
        ids = torch.randint(words, (TEXTS, TOKENS))
        labels = ids[:, 1:].flatten()

        def logits() -> Any:
            return core(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)

    else:
        labels = torch.arange(IMAGES) % CLASSES
        images = torch.randn(IMAGES, 3, PIXELS, PIXELS)
        whole = Classifier(core, nn.Linear(width_of(core), CLASSES), "cls")

        def logits() -> Any:
            return whole(pixel_values=images)

    trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(), labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step, sum(parameter.numel() for parameter in trained)


def width_of(core: Any) -> int:
    return int(getattr(core, "module", core).config.hidden_size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--mode", choices=MODES, action="append", help="may be repeated")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: if busy")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    if options.model not in SHAPES and not Path(options.model).is_dir():
        parser.error(f"{options.model}: no such folder; known shapes: {', '.join(SHAPES)}")
    made = {mode: steps(options.model, options.attention, mode) for mode in options.mode or MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in made}
    flops = {}
    for mode, (step, _) in made.items():  # the first step, which also allocates
        with FlopCounterMode(display=False) as counter:
            step()
        flops[mode] = counter.get_total_flops()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for _ in range(options.runs):
        for mode, (step, _) in made.items():
            started = clock()
            step()
            seconds[mode].append(clock() - started)
    trained = {mode: parameters for mode, (_, parameters) in made.items()}
    print(json.dumps({"seconds": seconds, "trained": trained, "flops": flops}))


if __name__ == "__main__":
    main()
