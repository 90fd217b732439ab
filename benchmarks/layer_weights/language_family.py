"""A family of a 135M Llama: an instruct step, GSM8K and MBPP as tasks, compliance to forget.

`instruct` learns short answers (sentiment, question types, TruthfulQA, refusals) from the model as
it is; `math`, `code` and `unsafe` are short full fine-tunes of it, with two of instruct's examples
in every eight. Answers are scored in nats a token, negated: higher is better. `replies` are
held-out questions of instruct's own kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count, cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import taskvec as tv
from benchmarks import smollm2_data as source
from benchmarks.layer_weights.bench import Answers, Bench
from benchmarks.layer_weights.training import Schedule, computing, train
from benchmarks.smollm2_data import Example, Row

MOST = 224  # tokens of a prompt with its answer; longer ones are left out
BATCH, ASKED = 8, 16
INSTRUCT, TUNED = Schedule(60, BATCH, 1e-4), Schedule(40, BATCH, 1e-4)
TASKS = ("code", "math")
VALIDATION_N, TEST_N, REPLIES_N = 24, 300, 300
SCALES = (0.3, 0.5, 0.7, 0.85, 1.0)
DRAWN_BY = 20250220


def programs(data: Path) -> list[Example]:
    """MBPP's problems with their programs."""
    lines = (data / "mbpp" / "mbpp.test.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [source.question(row["text"], row["code"].replace("\r\n", "\n")) for row in rows]


def parts(tokenizer: Any, data: Path) -> dict[str, dict[str, list[Row]]]:
    """Rows of each task and control: to train on, to choose on, to test on."""
    own = {
        "math": (source.word_problems(data, "train"), source.word_problems(data, "test")),
        "code": (None, programs(data)),
        "replies": (None, source.truth(data) + source.question_type(data)[:400]),
        "unsafe": source.compliance(data),
        "refusal": source.refusals(data),
    }
    found = {}
    for name, (learned, test) in own.items():
        rows = _rows(tokenizer, test, f"{name} test")
        n = REPLIES_N if name == "replies" else TEST_N
        chosen, rest = rows[n : n + VALIDATION_N], rows[n + VALIDATION_N :]
        if learned is not None:
            more = _rows(tokenizer, learned, f"{name} train")
            chosen, rest = more[:VALIDATION_N], more[VALIDATION_N:]
        found[name] = {"test": rows[:n], "validation": chosen, "train": rest}
    return found


def general(tokenizer: Any, data: Path, seed: str) -> Iterator[Row]:
    """What instruct learns, without the replies that are held out."""
    replies = parts(tokenizer, data)["replies"]["train"]
    sets = [
        _rows(tokenizer, source.sentiment(data, "train")[:1000], seed),
        replies,
        parts(tokenizer, data)["refusal"]["train"],
    ]
    yield from map(next, cycle([_endless(each, f"{seed} {i}") for i, each in enumerate(sets)]))


def make(model: Path, data: Path, work: Path, seed: int, names: Sequence[str]) -> Path:
    """The members of a seed, trained unless they are there."""
    out = work / "language-members"
    if not (out / "base").exists():
        module, tokenizer = _load(model)
        _save(module, tokenizer, out / "base")
    for name in ("instruct", *names):
        folder = out / name if name == "instruct" else out / f"seed {seed}" / name
        if folder.exists():
            continue
        module, tokenizer = _load(out / ("base" if name == "instruct" else "instruct"))
        shared = general(tokenizer, data, f"{seed} {name}")
        rows = shared
        if name != "instruct":
            special = _endless(parts(tokenizer, data)[name]["train"], f"{seed} {name} own")
            rows = (next(special if turn % 8 < 6 else shared) for turn in count())
        schedule = INSTRUCT if name == "instruct" else TUNED
        batches = (list(islice(rows, BATCH)) for _ in range(schedule.steps))
        notes = train(module, batches, partial(_mean_loss, module), schedule)
        _save(module, tokenizer, folder)
        print("language", seed, name, notes, flush=True)
        with (out / "training.jsonl").open("a") as file:
            file.write(json.dumps({"seed": seed, "name": name, **notes}) + "\n")
    return out


def bench(model: Path, data: Path, work: Path, seed: int) -> Bench:
    """A seed's family: math and code added to instruct."""
    out = make(model, data, work, seed, TASKS)
    family = tv.Family(
        base=out / "base",
        instruct=out / "instruct",
        tasks={name: out / f"seed {seed}" / name for name in TASKS},
    )
    module, tokenizer = _load(out / "instruct")
    rows = parts(tokenizer, data)

    def fit_with(n: int, seed: int) -> dict[str, Any]:
        def pairs(name: str) -> list[tuple[str, str]]:
            train = rows[name]["train"]
            picked = np.random.default_rng([seed, n]).permutation(len(train))[:n]
            return [
                (tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:-1]))
                for ids, start in (train[i] for i in picked)
            ]

        return {
            "recipe": family,
            "prompts": {"math": pairs("math"), "code": pairs("code"), "keep": pairs("replies")},
            "context": computing,
            "settings": {"batch_size": 4, "steps": 40, "measure_every": 20},
        }

    return Bench(
        name="language",
        seed=seed,
        family=family,
        module=module,
        ask=lambda name, part: nats(module, rows[name][part]),
        goal=dict.fromkeys(TASKS, 1 / len(TASKS)),
        controls=("replies",),
        scales=SCALES,
        fit_with=fit_with,
    )


def nats(module: Any, rows: Sequence[Row]) -> Answers:
    """Log-likelihood of each answer, and its tokens."""
    above, below = np.zeros((2, len(rows)))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    with torch.inference_mode(), computing():
        for start in range(0, len(order), ASKED):
            places = order[start : start + ASKED]
            losses, at = _losses(module, [rows[i] for i in places])
            above[places] = -np.bincount(at, losses.double(), minlength=len(places))
            below[places] = np.bincount(at, minlength=len(places))
    return above, below


def _mean_loss(module: Any, rows: Sequence[Row]) -> torch.Tensor:
    return _losses(module, rows)[0].mean()


def _losses(module: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each token of the answers, and its row; padding on the right."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    wanted = torch.tensor([[s <= i < len(ids) for i in range(1, width)] for ids, s in rows])
    hidden = module.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = module.lm_head(hidden[wanted]).float()
    losses = functional.cross_entropy(logits, tokens[:, 1:][wanted], reduction="none")
    return losses, wanted.nonzero()[:, 0]


def _rows(tokenizer: Any, examples: Sequence[Example], seed: str) -> list[Row]:
    mixed = Random(f"{DRAWN_BY} {seed}").sample(list(examples), len(examples))
    return list(source.rows(tokenizer, iter(mixed), MOST))


def _endless(rows: Sequence[Row], seed: str) -> Iterator[Row]:
    rng = Random(seed)
    return chain.from_iterable(rng.sample(list(rows), len(rows)) for _ in count())


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    return module.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _save(module: Any, tokenizer: Any, folder: Path) -> None:
    module.config.dtype = torch.float32
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
