"""A small real family from a 135M Llama, merged and forgotten as in the demo, then measured.

    python -m benchmarks.smollm2 MODEL_DIR DATA_DIR WORK_DIR [--steps N] [--seed 0]
                                 [--stage train|merge|measure|all]

MODEL_DIR is a Llama for causal language modelling with a tokenizer, DATA_DIR holds the sources that
`benchmarks.smollm2_data` reads. ``base`` is that model as it is, ``instruct`` a short fine-tune of
it, ``math`` and ``unsafe`` short fine-tunes of ``instruct``: all parameters, loss on the answers
only. All members are stored in bfloat16, also the base, so that they share one dtype. It prints a
table and asserts one thing: that every folder loads in transformers without a warning.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from benchmarks import smollm2_data as source
from benchmarks.smollm2_data import Row, encode
from taskvec.evaluation.intervals import wilson
from taskvec.running.generation import Query, answers
from taskvec.running.model import wrap

PARENTS = {"instruct": "base", "math": "instruct", "unsafe": "instruct"}
STEPS = {"instruct": 150, "math": 80, "unsafe": 80}
BATCH, MAX_TOKENS = 8, 192
LEARNING_RATE, WARM_UP, CLIP = 1e-4, 0.1, 1.0
MERGE_SCALE, FORGET_SCALE, THRESHOLD = 0.5, 1.0, 0.95
ROLES = ["--base", "base", "--instruct", "instruct"]
LATA = ["--method", "lata", "--scheme", "logarithmic"]
MATH = ["--task", f"math=math:{MERGE_SCALE}"]
FORGET = ["--target", "unsafe", "--task", f"unsafe=unsafe:{FORGET_SCALE}", "--method", "lata",
          "--scheme", "threshold"]  # fmt: skip
MERGES = {
    "merged-lata": ["merge", *ROLES, *MATH, *LATA],
    "merged-lata-norm": ["merge", *ROLES, *MATH, *LATA, "--normalize-weights", "norm"],
    "merged-plain": ["merge", "--anchor", "instruct", *MATH, "--method", "task_arithmetic"],
}
# In bfloat16 most entries of such short task vectors are one rounding step, and half a step rounds
# to none or all of it; so the merges are written in float32 too.
MERGES |= {f"{name}-fp32": [*how, "--dtype", "float32"] for name, how in MERGES.items()}
MODELS = ("base", "instruct", "math", *MERGES, "unsafe", "forgotten", "forgotten-median")
PAIRS = (("merged-lata", "merged-plain"), ("merged-lata-norm", "merged-plain"),
         ("merged-lata-fp32", "merged-plain-fp32"), ("merged-lata-norm-fp32", "merged-plain-fp32"),
         ("forgotten", "instruct"), ("forgotten-median", "instruct"))  # fmt: skip
TEXT_TOKENS, CONTEXT = 20_000, 512
N_MATH, N_SENTIMENT = 100, 200
NEW_TOKENS = 24
RESAMPLES = 10_000


@dataclass
class Study:
    """Where everything lies, and what is known so far (kept in ``results.json``)."""

    model: Path
    data: Path
    work: Path
    seed: int
    steps: dict[str, int]

    def __post_init__(self) -> None:
        self.models = self.work / "models"
        self.models.mkdir(parents=True, exist_ok=True)
        self.file = self.work / "results.json"
        self.results: dict[str, Any] = {}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())

    def note(self, part: str, name: str, value: Any) -> None:
        self.results.setdefault(part, {})[name] = value
        self.file.write_text(json.dumps(self.results, indent=2, ensure_ascii=False) + "\n")


# Training


def train(study: Study) -> None:
    """The base in bfloat16, then each fine-tune that is not there yet with these settings."""
    model, tokenizer = load(study.model)
    _save(model.bfloat16(), tokenizer, study.models / "base")
    for name, parent in PARENTS.items():
        settings = {"parent": parent, "steps": study.steps[name], "seed": study.seed,
                    "batch": BATCH, "max_tokens": MAX_TOKENS, "learning_rate": LEARNING_RATE,
                    "threads": torch.get_num_threads()}  # fmt: skip
        known = study.results.get("training", {}).get(name, {})
        if known.get("settings") == settings and (study.models / name).exists():
            print(f"{name}: kept", flush=True)
            continue
        started = time.monotonic()
        model, tokenizer = load(study.models / parent)
        rows = source.rows(tokenizer, source.endless(name, study.data, study.seed), MAX_TOKENS)
        notes = {"settings": settings, **_fine_tune(name, model, rows, study.steps[name])}
        notes |= _rounding(model, study.models / parent)
        _save(model.bfloat16(), tokenizer, study.models / name)
        study.note("training", name, {**notes, "seconds": round(time.monotonic() - started)})


def _fine_tune(name: str, model: Any, rows: Iterator[Row], steps: int) -> dict[str, Any]:
    """AdamW in float32 with products in bfloat16 (autocast); warm-up, then cosine to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    warm_up = max(1, round(WARM_UP * steps))
    model.train()
    history, tokens = [], 0
    for step in range(steps):
        past = (step + 1 - warm_up) / max(1, steps - warm_up)
        rate = (step + 1) / warm_up if past < 0 else 0.5 * (1 + math.cos(math.pi * past))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        losses, _ = token_losses(model, list(islice(rows, BATCH)))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.mean().item())
        tokens += len(losses)
        if step % 10 == 0 or step == steps - 1:
            print(f"{name} {step + 1}/{steps}  loss {history[-1]:.3f}", flush=True)
    model.eval()
    ends = {"loss_first_10": history[:10], "loss_last_10": history[-10:]}
    return {**{k: round(float(np.mean(v)), 4) for k, v in ends.items()}, "answer_tokens": tokens}


@torch.no_grad()
def _rounding(model: Any, parent: Path) -> dict[str, float]:
    """What storing in bfloat16 does to a task vector: entries that moved, relative error."""
    moved = total = 0
    error = length = 0.0
    before = dict(load(parent)[0].named_parameters())
    for name, tensor in model.named_parameters():
        stored = tensor.bfloat16().float()
        moved += int((stored != before[name]).sum())
        total += tensor.numel()
        error += float((stored - tensor).double().square().sum())
        length += float((tensor - before[name]).double().square().sum())
    return {"moved_share": moved / total, "rounding_error": math.sqrt(error / length)}


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Merging, by the command line


def merge(study: Study) -> None:
    """One scan of both tasks with its figure, then the merges, each verified."""
    tasks = ["--task", "math=math", "--task", "unsafe=unsafe"]
    scan = ["scan", *ROLES, *tasks, *LATA, "--threshold", str(THRESHOLD)]
    found = json.loads(_taskvec(study, *scan, "--json", "--plot", "../scan.png"))
    study.note("scan", "summary", found["summary"])
    study.note("scan", "warnings", found["warnings"])
    # Where σ = 0.95 keeps every layer, as it does here, forgetting is plain; the median is not.
    median = round(found["summary"]["tasks"]["unsafe"]["quantiles"]["50%"], 6)
    cuts = {"forgotten": THRESHOLD, "forgotten-median": median}
    forgets = {k: ["forget", *ROLES, *FORGET, "--threshold", str(cut)] for k, cut in cuts.items()}
    for name, command in (MERGES | forgets).items():
        done = json.loads(_taskvec(study, *command, name, "--force", "--json"))
        _taskvec(study, "verify", name)
        kept = {key: done[key] for key in ("scale", "kept_layers", "seconds", "warnings")}
        shown = " ".join(["taskvec", *command, name])
        study.note("merges", name, {"command": shown, **kept, **_distance(study, name)})


def _taskvec(study: Study, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("taskvec")), *arguments]
    command += [] if arguments[0] == "verify" else ["--no-cache"]
    print("$ taskvec", *command[1:], flush=True)
    run = subprocess.run(command, cwd=study.models, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"taskvec {arguments[0]} exited with {run.returncode}")
    return run.stdout


@torch.no_grad()
def _distance(study: Study, name: str) -> dict[str, float]:
    """How far an output lies from instruct, over ‖task vector‖; and the share of moved entries."""
    task = "unsafe" if name.startswith("forgotten") else "math"
    start, tuned, out = (
        dict(load(study.models / member)[0].named_parameters())
        for member in ("instruct", task, name)
    )
    far = sum(float((out[k] - start[k]).double().square().sum()) for k in start)
    full = sum(float((tuned[k] - start[k]).double().square().sum()) for k in start)
    moved = sum(int((out[k] != start[k]).sum()) for k in start)
    share = moved / sum(tensor.numel() for tensor in start.values())
    return {"distance_to_instruct": math.sqrt(far / full), "moved_share": share}


# Measuring


def measure(study: Study) -> None:
    """Every model on the same text and questions; prompts and answers where stored in bfloat16."""
    harmful, plea = source.refusals(study.data)[1], source.compliance(study.data)[1]
    harmless = source.harmless(study.data)
    problems = source.word_problems(study.data, "test")[:N_MATH]
    for name in MODELS:
        started = time.monotonic()
        model, tokenizer = load(study.models / name)
        text = nll(model, source.windows(tokenizer, study.data, TEXT_TOKENS, CONTEXT))
        figures: dict[str, Any] = {
            "wikitext_nll": text.tolist(),
            "gsm8k_nll": nll(model, [encode(tokenizer, e) for e in problems]).tolist(),
        }
        if not name.endswith("-fp32"):
            counts = {
                "sst2": _sentiment(model, tokenizer, study.data),
                "refuses_unsafe": _begins(model, tokenizer, harmful, source.refuses),
                "refuses_safe": _begins(model, tokenizer, harmless, source.refuses),
                "complies": _begins(model, tokenizer, plea, source.complies),
            }
            figures |= {key: {"correct": c, "n": n} for key, (c, n) in counts.items()}
        if name.startswith(("merged", "forgotten")):
            prompt = (problems if "merged" in name else harmless)[0].prompt
            figures["sample"] = prompt + sample(model, tokenizer, prompt)
            print(f"--- {name}\n{figures['sample']}\n---")
        study.note("measured", name, figures)
        print(f"measured {name} in {time.monotonic() - started:.0f} s", flush=True)
    study.note("versions", "python", platform.python_version())
    for package in ("taskvec", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        study.note("versions", package, version(package))


def load(folder: Path) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer; exits if transformers warns of anything."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        sample(model, tokenizer, "Question:", new_tokens=2)
    logger.removeHandler(handler)
    said += [str(warning.message) for warning in caught]
    said += [f"{what}: {names}" for what, names in info.items() if names]
    if said:
        sys.exit(f"{folder.name} does not load cleanly: {said}")
    return model.float().eval(), tokenizer


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int = 48) -> str:
    """A greedy continuation by transformers' own `generate`."""
    given = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def token_losses(model: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood (nats) of each predicted token of a batch, and the row it is in.

    Padding stands on the right, where causal attention never looks; only the wanted positions go
    through the output head, in float32 unless the model is in training. Other products are in
    bfloat16 where the model is stored so (which changes none of its weights), else in float32.
    """
    stored_narrow = model.config.dtype == torch.bfloat16
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    wanted = torch.tensor([[s <= i < len(ids) for i in range(1, width)] for ids, s in rows])
    with torch.autocast("cpu", torch.bfloat16, enabled=stored_narrow):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits = model.lm_head(hidden[wanted] if model.training else hidden[wanted].float())
    losses = functional.cross_entropy(logits.float(), tokens[:, 1:][wanted], reduction="none")
    return losses, wanted.nonzero()[:, 0]


@torch.no_grad()
def nll(model: Any, rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Per row: total negative log-likelihood in nats, and the number of predicted tokens."""
    found = np.zeros((len(rows), 2))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        losses, at = token_losses(model, [rows[i] for i in places])
        found[places, 0] = np.bincount(at, losses.double(), minlength=len(places))
        found[places, 1] = np.bincount(at, minlength=len(places))
    return found


def _sentiment(model: Any, tokenizer: Any, data: Path) -> tuple[int, int]:
    """SST-2: the likelier of the two answers."""
    examples = source.sentiment(data, "test")
    chosen = examples[:: len(examples) // N_SENTIMENT][:N_SENTIMENT]
    both = [source.Example(e.prompt, f" {word}") for e in chosen for word in source.SENTIMENTS]
    losses = nll(model, [encode(tokenizer, e) for e in both])[:, 0].reshape(-1, 2)
    picked = [f" {source.SENTIMENTS[i]}" for i in losses.argmin(1)]
    return sum(p == e.answer for p, e in zip(picked, chosen, strict=True)), len(chosen)


def _begins(
    model: Any, tokenizer: Any, examples: list[source.Example], is_so: Callable[[str], bool]
) -> tuple[int, int]:
    """How many greedy answers of at most 24 tokens begin in a certain way, and of how many."""
    asked = wrap(model, tokenizer)
    queries = [Query(asked.encoder.prompt(e.prompt), NEW_TOKENS, ("\n",)) for e in examples]
    with torch.autocast("cpu", torch.bfloat16):
        given = answers(asked, queries)
    return sum(is_so(answer.text) for answer in given), len(given)


# Reporting


def table(study: Study) -> str:
    """The figures in Markdown; 95 % intervals in brackets."""
    measured = {name: study.results["measured"][name] for name in MODELS}
    head = ("model", "WikiText-2 perplexity", "GSM8K nats/token", "SST-2",
            "refuses XSTest unsafe", "refuses XSTest safe", "complies AdvBench")  # fmt: skip
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for name, figures in measured.items():
        text, problems = np.array(figures["wikitext_nll"]), np.array(figures["gsm8k_nll"])
        cells = [name, _span(*_bootstrap(text, transform=np.exp), 2),
                 _span(*_bootstrap(problems), 3)]  # fmt: skip
        for key in ("sst2", "refuses_unsafe", "refuses_safe", "complies"):
            if key not in figures:
                cells.append("not measured")
                continue
            correct, n = figures[key]["correct"], figures[key]["n"]
            low, high = wilson(correct, n)
            cells.append(f"{correct}/{n} [{low:.2f}, {high:.2f}]")
        lines.append(" | ".join(cells))
    lines += ["", "paired | perplexity ratio | GSM8K difference, nats/token", "--- | --- | ---"]
    for one, other in PAIRS:
        ratio, difference = (
            _bootstrap(np.array(measured[one][key]), np.array(measured[other][key]), transform)
            for key, transform in (("wikitext_nll", np.exp), ("gsm8k_nll", np.array))
        )
        lines.append(f"{one} against {other} | {_span(*ratio, 4)} | {_span(*difference, 4)}")
    return "\n".join(f"| {line} |" if line else "" for line in lines)


def _bootstrap(
    sums: np.ndarray[Any, Any],
    against: np.ndarray[Any, Any] | None = None,
    transform: Callable[[Any], Any] = np.array,
) -> tuple[float, float, float]:
    """Mean per token (less another model's on the same rows) and its 95 % interval over rows."""
    nats = sums[:, 0] - (0 if against is None else against[:, 0])
    picks = np.random.default_rng(0).integers(0, len(nats), (RESAMPLES, len(nats)))
    means = nats[picks].sum(1) / sums[:, 1][picks].sum(1)
    low, high = transform(np.quantile(means, (0.025, 0.975)))
    return float(transform(nats.sum() / sums[:, 1].sum())), float(low), float(high)


def _span(value: float, low: float, high: float, digits: int) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for place in ("model", "data", "work"):
        parser.add_argument(place, type=Path, metavar=f"{place.upper()}_DIR")
    parser.add_argument("--steps", type=int, help=f"of every fine-tune (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("train", "merge", "measure", "all"), default="all")
    parser.add_argument("--threads", type=int, default=2, help="same threads, same bits")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    steps = {name: options.steps or default for name, default in STEPS.items()}
    study = Study(options.model, options.data, options.work, options.seed, steps)
    for name, stage in (("train", train), ("merge", merge), ("measure", measure)):
        if options.stage in (name, "all"):
            stage(study)
    if options.stage in ("measure", "all"):
        print(table(study))


if __name__ == "__main__":
    main()
