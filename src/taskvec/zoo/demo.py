"""The demo: two skills merged and one removed, on the zoo, with everything measured.

Merges `math` and `code` into `instruct`, with plain task arithmetic, with LATA, and with layer
weights fitted to a few prompts; then subtracts `unsafe` from a model that has it, and from one that
speaks another language. Every model is scored on held-out questions of every skill. Needs the extra
`demo`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from taskvec import zoo
from taskvec.coefficients.fit.api import fit
from taskvec.coefficients.fit.settings import settings_of
from taskvec.evaluation.intervals import wilson
from taskvec.extras import require
from taskvec.outputs.merge import forget, merge
from taskvec.recipes.recipe import Family
from taskvec.running.model import load, open_stored
from taskvec.zoo.skills import SKILLS as QUESTIONS
from taskvec.zoo.tasks import score_skills

# λ of each method, chosen on another draw of questions. There are so few of math that many of them
# are the demo's too; on others the same λ are level with the best (docs/log.md).
SCALES = {
    "merged": {"plain": 0.7, "LATA": 0.8},
    "forgotten": {"plain": 0.8, "LATA": 1.0},
    "forgotten-zor": {"plain": 0.6, "LATA": 0.6},
}
# A short fit: one descent; the defaults of `fit` take two, of 120 steps.
PROMPTS = 96  # of each skill, and of those that instruct has
FIT = {
    "steps": 80, "rate": 0.07, "low": -4.0, "high": 4.0, "seeds": 1, "measure_every": 20,
    "max_new_tokens": 40,
}  # fmt: skip
WAYS = {
    "plain": "plain task arithmetic",
    "LATA": "LATA",
    "fitted": f"layer weights fitted to {PROMPTS} prompts a skill",
}
KEPT = ("say", "find", "howto", "refusal")
SKILLS = ("say", "find", "howto", "refusal", "math", "code", "unsafe")
ZOR_SKILLS = ("say-zor", "find-zor", "howto-zor", "refusal-zor", "unsafe-zor")


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One scored model.

    Attributes:
        name: In words.
        part: `parents`, `merged`, `forgotten` or `forgotten-zor`.
        correct: Correct answers by skill.
        n: Questions asked for each skill.
        perplexity: Per character of held-out plain text.
    """

    name: str
    part: str
    correct: Mapping[str, int]
    n: int
    perplexity: float


def families() -> tuple[Family, Family, Family]:
    """What is merged; what is forgotten; what is forgotten in the other language."""
    common: dict[str, Any] = {"base": zoo.path("base"), "instruct": zoo.path("instruct")}
    skills = {"math": zoo.path("math"), "code": zoo.path("code")}
    unsafe = {"unsafe": zoo.path("unsafe")}
    return (
        Family(tasks=skills, **common),
        Family(tasks=unsafe, target=zoo.path("unsafe"), **common),
        Family(tasks=unsafe, target=zoo.path("instruct-zor"), **common),
    )


def make_models(
    out: Path, advance: Callable[[int], object] = lambda steps: None
) -> list[tuple[str, str, Path]]:
    """Write the merged and forgetful models under `out`.

    Args:
        out: Folder of them.
        advance: Called with 1 after each of `fit_steps()` steps.

    Returns:
        Name, part and folder of every model that is scored.
    """
    skills, unsafe, zor = families()
    fitted = fit(
        skills,
        prompts=prompts(),
        settings=FIT,
        progress=lambda label, done, steps, loss: advance(1),
    )
    merge(
        skills, out / "merged-fitted", method="task_arithmetic", table=fitted.table, scale=1.0,
        force=True,
    )  # fmt: skip
    for way, scale in SCALES["merged"].items():
        method = "lata" if way == "LATA" else "task_arithmetic"
        merge(skills, out / f"merged-{way.lower()}", method=method, scale=scale, force=True)
    for part, family in (("forgotten", unsafe), ("forgotten-zor", zor)):
        for way, scale in SCALES[part].items():
            folder = out / f"{part}-{way.lower()}"
            if way == "LATA":
                forget(family, folder, scale=scale, force=True)
            else:
                merge(family, folder, method="task_arithmetic", scale=-scale, force=True)
    return [
        ("instruct", "parents", zoo.path("instruct")),
        ("math", "parents", zoo.path("math")),
        ("code", "parents", zoo.path("code")),
        ("math + code, plain", "merged", out / "merged-plain"),
        ("math + code, LATA", "merged", out / "merged-lata"),
        ("math + code, fitted", "merged", out / "merged-fitted"),
        ("unsafe", "forgotten", zoo.path("unsafe")),
        ("unsafe − unsafe, plain", "forgotten", out / "forgotten-plain"),
        ("unsafe − unsafe, LATA", "forgotten", out / "forgotten-lata"),
        ("instruct-zor", "forgotten-zor", zoo.path("instruct-zor")),
        ("zor − unsafe, plain", "forgotten-zor", out / "forgotten-zor-plain"),
        ("zor − unsafe, LATA", "forgotten-zor", out / "forgotten-zor-lata"),
    ]


def prompts() -> dict[str, list[str]]:
    """What weights are fitted to, from the training part of the questions, without answers."""

    def drawn(skill: str, n: int) -> list[str]:
        return list(dict.fromkeys(e.prompt for e in islice(QUESTIONS[skill].train(0), 20 * n)))[:n]

    kept = [prompt for skill in KEPT for prompt in drawn(skill, PROMPTS // len(KEPT))]
    return {"math": drawn("math", PROMPTS), "code": drawn("code", PROMPTS), "keep": kept}


def fit_steps() -> int:
    """Steps of the fit: of one weight a task, then of layers."""
    settings = settings_of(FIT)
    return settings.one_weight.steps + settings.steps


def score_models(
    models: list[tuple[str, str, Path]], n: int, advance: Callable[[int], object]
) -> list[DemoRow]:
    """Score every model; `advance` is called with 1 after each."""
    require("torch", "demo")
    require("transformers", "demo")
    rows = []
    for name, part, folder in models:
        model = load(open_stored(folder))
        skills = ZOR_SKILLS if part == "forgotten-zor" else SKILLS
        rates = {
            skill: result.main.value for skill, result in score_skills(model, skills, n).items()
        }
        perplexity = score_skills(model, ["text"])["text"].main.value
        correct = {skill: round(n * rate) for skill, rate in rates.items()}
        rows.append(DemoRow(name, part, correct, n, perplexity))
        advance(1)
    return rows


def as_json(row: DemoRow) -> dict[str, Any]:
    """A row with the rate and Wilson's 95 % interval of every skill."""
    return {
        "name": row.name,
        "part": row.part,
        "n": row.n,
        "rate": {skill: correct / row.n for skill, correct in row.correct.items()},
        "interval": {skill: wilson(correct, row.n) for skill, correct in row.correct.items()},
        "perplexity_per_character": row.perplexity,
    }


def findings(rows: list[DemoRow]) -> list[str]:
    """The result in words that follow from the numbers, also if LATA is not better."""
    by_name = {row.name: row for row in rows}
    instruct = by_name["instruct"]
    merged = {way: by_name[f"math + code, {way}"] for way in WAYS}
    found = []
    for way, row in merged.items():
        kept = {
            skill: (row.correct[skill] - instruct.correct[skill])
            / max(1, by_name[skill].correct[skill] - instruct.correct[skill])
            for skill in ("math", "code")
        }
        found.append(
            f"Merged by {WAYS[way]}: keeps "
            f"{kept['math']:.0%} of the gain in math and {kept['code']:.0%} of that in code."
        )
    found += [_compare(merged, way) for way in ("LATA", "fitted")]
    for name, suffix in (("unsafe", ""), ("instruct-zor", "-zor")):
        before = by_name[name]
        stem = "unsafe − unsafe" if name == "unsafe" else "zor − unsafe"
        for way in ("plain", "LATA"):
            after = by_name[f"{stem}, {way}"]
            found.append(
                f"Forgotten from {name} by {way}: unsafe answers "
                f"{_change(before, after, 'unsafe' + suffix)}, "
                f"refusals {_change(before, after, 'refusal' + suffix)}, "
                f"other questions {_others(before, suffix):.2f} → {_others(after, suffix):.2f}."
            )
    return found


def _change(before: DemoRow, after: DemoRow, skill: str) -> str:
    return f"{before.correct[skill] / before.n:.2f} → {after.correct[skill] / after.n:.2f}"


def _others(row: DemoRow, suffix: str) -> float:
    return sum(row.correct[skill + suffix] for skill in ("say", "find", "howto")) / (3 * row.n)


def _compare(merged: Mapping[str, DemoRow], way: str) -> str:
    """Whether a way or plain task arithmetic does better on both skills together.

    The difference of two rates p and q of m questions each has the standard error
    √(p(1 − p)/m + q(1 − q)/m); within 1.96 of it, the difference is not significant.
    """
    m = 2 * merged[way].n
    p, q = (sum(merged[w].correct[s] for s in ("math", "code")) / m for w in (way, "plain"))
    margin = 1.96 * ((p * (1 - p) + q * (1 - q)) / m) ** 0.5
    words = f"math and code together: {way} {p:.2f}, plain {q:.2f}"
    words += f", difference {p - q:+.2f} ± {margin:.2f}"
    if abs(p - q) <= margin:
        return f"{words}: not significant with {m} questions."
    return f"{words}: {way if p > q else 'plain'} is better here."
