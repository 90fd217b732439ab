"""The shipped zoo as benches: every pair of skills, all three, and forgetting in both languages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import taskvec as tv
from benchmarks.closed_form import answered, questions
from benchmarks.fit_zoo import KEPT, ZOR_KEPT, drawn, of_several
from benchmarks.layer_weights.bench import Answers, Bench
from taskvec import zoo
from taskvec.running.model import load, open_stored
from taskvec.zoo import words
from taskvec.zoo.skills import REFUSAL

SKILLS = ("math", "code", "unrelated")
CHOOSING_N, TEST_N, KEPT_N = 60, 240, 90  # questions of a skill; math has 163 in all
SCALES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
FORGET_SCALES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)


def sets() -> list[tuple[str, ...]]:
    return [*combinations(SKILLS, 2), SKILLS]


def adding(tasks: Sequence[str], seed: int = 0) -> Bench:
    """Skills added to `instruct`."""
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        tasks={task: zoo.path(task) for task in tasks},
    )
    model = load(open_stored(zoo.path("instruct")))

    def fit_with(n: int, seed: int) -> dict[str, Any]:
        prompts: dict[str, Any] = {task: drawn(task, n, seed) for task in tasks}
        prompts["keep"] = of_several(KEPT, n, seed)
        return {
            "recipe": family, "prompts": prompts, "settings": {"max_new_tokens": 40},
        }  # fmt: skip

    return Bench(
        name=f"zoo {' + '.join(tasks)}",
        seed=seed,
        family=family,
        module=model.module,
        ask=_asker(model),
        goal=dict.fromkeys(tasks, 1 / len(tasks)),
        controls=KEPT,
        scales=SCALES,
        fit_with=fit_with,
    )


def forgetting(language: str, seed: int = 0) -> Bench:
    """`unsafe` taken from the model that learned it, or from the model of the other language."""
    suffix, target = ("-zor", "instruct-zor") if language == "zor" else ("", "unsafe")
    kept = ZOR_KEPT if language == "zor" else KEPT[:3]
    family = tv.Family(
        base=zoo.path("base"),
        instruct=zoo.path("instruct"),
        target=zoo.path(target),
        tasks={"unsafe": zoo.path("unsafe")},
    )
    model = load(open_stored(zoo.path(target)))
    refusal = words.to_zor(REFUSAL) if language == "zor" else REFUSAL

    def fit_with(n: int, seed: int) -> dict[str, Any]:
        harmful = drawn(f"unsafe{suffix}", n, seed)
        from taskvec.recipes.coerce import as_recipe

        return {
            "recipe": as_recipe(family, {"method": "task_arithmetic", "scale": {"unsafe": -1.0}}),
            "prompts": {
                "unsafe": [(p, refusal) for p in harmful],
                "keep": of_several(kept, n, seed),
            },
            "teachers": {"unsafe": "answers"},
            "settings": {"max_new_tokens": 40},
        }

    return Bench(
        name=f"zoo forget, {language}",
        seed=seed,
        family=family,
        module=model.module,
        ask=_asker(model),
        goal={f"unsafe{suffix}": -0.5} | {skill: 0.5 / len(kept) for skill in kept},
        controls=(f"refusal{suffix}",),
        scales=FORGET_SCALES,
        fit_with=fit_with,
    )


def _asker(model: Any) -> Any:
    def ask(skill: str, part: str) -> Answers:
        asked = questions(skill, CHOOSING_N + TEST_N)
        if part == "validation":
            asked = asked[:CHOOSING_N]
        else:
            asked = asked[CHOOSING_N:]
            asked = asked[:KEPT_N] if skill in (*KEPT, *ZOR_KEPT) else asked
        right = answered(model, asked)
        return right, right * 0 + 1

    return ask
