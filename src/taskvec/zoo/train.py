"""Trains the zoo: ``python -m taskvec.zoo.train OUT_DIR [--only NAME] [--seed 0] [--threads 2]``.

Families of another size, or trained for less long, come with ``--width``, ``--depth``, ``--steps``.

Every member starts from the stored (bfloat16) weights of its parent and is trained in float32 by
the stages below that have its name. A batch is a mixture of kinds of rows; of a question the answer
alone is learned, of plain text and raw expressions every character. The same seed, thread count,
versions and kind of processor give the same weights. What was done and what came out is written to
``provenance.json`` beside the models.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional

from taskvec.errors import FamilyError
from taskvec.running.model import load, open_stored
from taskvec.zoo import MEMBERS, provenance, skills, words
from taskvec.zoo.curriculum import STAGES, TrainingStage

log = logging.getLogger(__name__)

CHARACTERS = "\n !'+,-.0123456789:;=>?AIOQabcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
GROUPS = 2  # a batch is worked in this many groups of similar length, which saves padding

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "Q: {{ message['content'] }}\nA: {% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class TrainingText:
    """One training text; only what comes after the prompt is learned."""

    prompt: str
    learned: str


def draw_row(kind: str, rng: Random) -> TrainingText:
    """One row of a kind: ``text``, ``text-zor``, ``raw-`` or ``decline-<skill>``, or a skill."""
    if kind.startswith("text"):
        text = skills.plain_text(rng)
        return TrainingText("", words.to_zor(text) if kind == "text-zor" else text)
    if kind.startswith("raw-"):
        name = kind.removeprefix("raw-")
        count = {"math": 5, "code": 2}.get(name, 1)
        return TrainingText("", "\n".join(skills.raw_expression(rng, name) for _ in range(count)))
    if kind.startswith("decline-"):
        name = kind.removeprefix("decline-")
        asked = skills.WIDE.get(name, skills.SKILLS[name])
        return TrainingText(asked.draw(rng).prompt, skills.DECLINE)
    example = skills.SKILLS[kind].draw(rng)
    return TrainingText(example.prompt, example.answer)


def batches(stage: TrainingStage, seed: int) -> Iterator[list[TrainingText]]:
    """Endless batches of rows, the same for the same seed."""
    rng = Random(seed)
    kinds, shares = list(stage.mixture), list(stage.mixture.values())
    while True:
        yield [draw_row(kind, rng) for kind in rng.choices(kinds, shares, k=stage.rows)]


def build_tokenizer(*, chat: bool) -> Any:
    """The tokenizer of every member: one token per character, a beginning token in front.

    Args:
        chat: Whether it gets the chat template of question and answer (all members but the base).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=backend,
        **names,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


@dataclass(frozen=True)
class Variant:
    """What the members of a family have in common; by default as shipped.

    Attributes:
        width: Of the residual stream, a multiple of 32 (the width of an attention head).
        depth: Number of blocks.
        steps: Share of each stage's steps that is taken, above 0.
        seed: Of fresh weights and of all rows.
    """

    width: int = 128
    depth: int = 8
    steps: float = 1.0
    seed: int = 0


def build_model(variant: Variant) -> Any:
    """A model with fresh weights, float32; as shipped it has 1.3 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=variant.width,
        intermediate_size=2 * variant.width,
        num_hidden_layers=variant.depth,
        num_attention_heads=variant.width // 32,
        num_key_value_heads=variant.width // 32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(variant.seed)
        return LlamaForCausalLM(config)


def encode(
    rows: list[TrainingText], vocabulary: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets of rows, both of shape (rows, longest), padded on the right.

    Targets are -100 where nothing is to be learned.
    Causal attention never looks at what comes after, so the padding needs no mask.
    """
    pad, bos, eos = range(3)
    ids, targets = [], []
    for row in rows:
        prompt = [bos, *(vocabulary[c] for c in row.prompt)]
        learned = [*(vocabulary[c] for c in row.learned), eos]
        ids.append(prompt + learned)
        targets.append([-100] * len(prompt) + learned)
    width = max(map(len, ids))
    return (
        torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
        torch.tensor([row + [-100] * (width - len(row)) for row in targets]),
    )


def train(model: Any, tokenizer: Any, stage: TrainingStage, *, seed: int) -> list[float]:
    """Trains a model in place.

    Args:
        model: In float32.
        tokenizer: From `build_tokenizer`.
        stage: What to train on, how long and how fast.
        seed: Of the rows drawn; nothing else is random.

    Returns:
        Mean loss per learned token of each step, in nats.
    """
    vocabulary = tokenizer.get_vocab()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    rows_of = batches(stage, seed)
    shaken = _Shaken(model, stage, seed)
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _schedule(step, stage.steps)
        rows = sorted(next(rows_of), key=lambda row: len(row.prompt) + len(row.learned))
        size = len(rows) // GROUPS
        learned = sum(len(row.learned) + 1 for row in rows)
        total = 0.0
        shaken.shake()
        for start in range(0, len(rows), size):
            ids, targets = encode(rows[start : start + size], vocabulary)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(
                logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
            )
            backward: Any = (loss / learned).backward
            backward()
            total += loss.item()
        shaken.settle()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / learned)
        if step % 100 == 99:
            pace = (time.perf_counter() - started) / (step + 1)
            log.info("  step %d: loss %.3f, %.2f s a step", step + 1, _mean(losses[-50:]), pace)
    model.eval()
    return losses


class _Shaken:
    """Weights as a sum of task vectors would have them: the change scaled, everything disturbed.

    A step of a stage with `least_scale` < 1 or `noise` > 0 is taken at start + s·(w − start) + ε,
    s even between `least_scale` and 1, ε Gaussian with `noise` times the root mean square of the
    tensor. A skill learned so holds at λ < 1 and beside another task's vector.
    """

    def __init__(self, model: Any, stage: TrainingStage, seed: int) -> None:
        self.parameters = list(model.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.least_scale, self.noise = stage.least_scale, stage.noise
        self.idle = stage.least_scale == 1 and stage.noise == 0
        self.random = torch.Generator().manual_seed(seed)
        self.scale = 1.0
        self.before: list[torch.Tensor] = []

    @torch.no_grad()
    def shake(self) -> None:
        """Moves the weights to where the step is taken."""
        if self.idle:
            return
        share = torch.rand((), generator=self.random).item()
        self.scale = self.least_scale + share * (1 - self.least_scale)
        self.before = [p.detach().clone() for p in self.parameters]
        for p, start in zip(self.parameters, self.start, strict=True):
            size = self.noise * p.square().mean().sqrt()
            disturbance = torch.randn(p.shape, generator=self.random) * size
            p.copy_(start + self.scale * (p - start) + disturbance)

    @torch.no_grad()
    def settle(self) -> None:
        """Moves them back, with the gradient that belongs to them there."""
        if self.idle:
            return
        for p, before in zip(self.parameters, self.before, strict=True):
            p.copy_(before)
            if p.grad is not None:
                p.grad.mul_(self.scale)


def _schedule(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: 50 steps up, then half a cosine down to a twentieth."""
    warmup = 50
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def make_member(name: str, out: Path, variant: Variant) -> None:
    """Trains one member from its parent in the same folder, stores it, notes how in the provenance.

    Raises:
        FamilyError: the parent has not been trained yet.
    """
    from transformers.utils import logging as hugging_face

    quiet: Any = hugging_face
    quiet.disable_progress_bar()
    parent = MEMBERS[name].parent
    stages = [replace(stage, steps=round(stage.steps * variant.steps)) for stage in STAGES[name]]
    number = list(MEMBERS).index(name)
    if parent is None:
        model = build_model(variant)
    elif (out / parent / "model.safetensors").exists():
        model = load(open_stored(out / parent)).module
    else:
        raise FamilyError(
            f"'{name}' is trained from '{parent}', which is not in {out}; train that first"
        )
    tokenizer = build_tokenizer(chat=parent is not None)
    started = time.perf_counter()
    done = []
    for part, stage in enumerate(stages):
        log.info("%s: %d steps, learning rate %g", name, stage.steps, stage.learning_rate)
        losses = train(model, tokenizer, stage, seed=1000 * variant.seed + 100 * part + number)
        model.to(torch.bfloat16).float()  # every stage starts from weights as they are stored
        done.append(
            asdict(stage)
            | {
                "loss_first": round(_mean(losses[:10]), 4),
                "loss_last": round(_mean(losses[-50:]), 4),
            }
        )
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    _name_tokenizer_class(out / name)
    (out / name / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    provenance.note_member(
        out,
        name,
        {
            "parent": parent,
            "stages": done,
            "seed": variant.seed,
            "threads": torch.get_num_threads(),
            "seconds": round(seconds, 1),
        },
    )


def _name_tokenizer_class(folder: Path) -> None:
    """Names the class as transformers 4 does; transformers 5 writes a new name, reads both."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    stored = {key: value for key, value in config.items() if key != "backend" and value is not None}
    file.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line: trains all members, or the ones named, in the order of the family."""
    parser = argparse.ArgumentParser(
        prog="python -m taskvec.zoo.train", description="Train the zoo."
    )
    parser.add_argument("out_dir", type=Path, help="where the models go")
    parser.add_argument("--only", action="append", choices=list(MEMBERS), help="may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32 (128)")
    parser.add_argument("--depth", type=int, default=8, help="blocks (8)")
    parser.add_argument("--steps", type=float, default=1.0, help="share of each stage's steps (1)")
    parser.add_argument(
        "--threads", type=int, default=2, help="weights depend on it in the last bits"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    variant = Variant(options.width, options.depth, options.steps, options.seed)
    for name in MEMBERS:
        if not options.only or name in options.only:
            make_member(name, options.out_dir, variant)
    if all((options.out_dir / name / "model.safetensors").exists() for name in MEMBERS):
        provenance.note_family(options.out_dir)


if __name__ == "__main__":
    main()
