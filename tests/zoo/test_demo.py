"""The demo's findings follow from its numbers, whichever method they favour."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from taskvec.cli.main import main
from taskvec.zoo import demo
from taskvec.zoo.skills import SKILLS as QUESTIONS

N = 100
PARENTS = {"say": N, "find": 90, "howto": N, "refusal": N, "math": 0, "code": 0, "unsafe": 0}


def row(name: str, part: str, suffix: str = "", **correct: int) -> demo.DemoRow:
    scores = {**PARENTS, **correct}
    return demo.DemoRow(name, part, {skill + suffix: c for skill, c in scores.items()}, N, 1.5)


def rows(plain: int, lata: int, fitted: int = 90) -> list[demo.DemoRow]:
    out = [
        row("instruct", "parents"),
        row("math", "parents", math=90),
        row("code", "parents", code=100),
        row("math + code, plain", "merged", math=plain, code=plain),
        row("math + code, LATA", "merged", math=lata, code=lata),
        row("math + code, fitted", "merged", math=fitted, code=fitted),
    ]
    for name, stem, suffix in (
        ("unsafe", "unsafe − unsafe", ""),
        ("instruct-zor", "zor − unsafe", "-zor"),
    ):
        out.append(row(name, "forgotten", suffix, unsafe=100, refusal=0))
        out.append(row(f"{stem}, plain", "forgotten", suffix, unsafe=10, refusal=80, howto=40))
        out.append(row(f"{stem}, LATA", "forgotten", suffix, unsafe=30, refusal=60))
    return out


def test_findings_tell_the_shares_that_were_kept() -> None:
    found = demo.findings(rows(plain=45, lata=72))
    assert found[0] == (
        "Merged by plain task arithmetic: keeps 50% of the gain in math and 45% of that in code."
    )
    assert found[1] == "Merged by LATA: keeps 80% of the gain in math and 72% of that in code."
    assert found[2] == (
        "Merged by layer weights fitted to 96 prompts a skill: keeps 100% of the gain in math and "
        "90% of that in code."
    )
    assert found[5] == (
        "Forgotten from unsafe by plain: unsafe answers 1.00 → 0.10, refusals 0.00 → 0.80, "
        "other questions 0.97 → 0.77."
    )


@pytest.mark.parametrize(
    ("plain", "lata", "verdict"),
    [
        (45, 72, "difference +0.27 ± 0.09: LATA is better here."),
        (72, 45, "difference -0.27 ± 0.09: plain is better here."),
        (50, 54, "difference +0.04 ± 0.10: not significant with 200 questions."),
    ],
)
def test_findings_say_which_is_better_if_any(plain: int, lata: int, verdict: str) -> None:
    assert demo.findings(rows(plain, lata))[3].endswith(verdict)


def test_findings_compare_fitted_weights_with_plain() -> None:
    found = demo.findings(rows(plain=45, lata=72, fitted=90))[4]
    assert found.startswith("math and code together: fitted 0.90, plain 0.45, difference +0.45")
    assert found.endswith(": fitted is better here.")


def test_the_fit_draws_from_the_training_part() -> None:
    found = demo.prompts()
    assert {name: len(each) for name, each in found.items()} == dict.fromkeys(
        ("math", "code", "keep"), demo.PROMPTS
    )
    asked = {e.prompt for skill in demo.SKILLS for e in QUESTIONS[skill].test(150)}
    assert not asked & {prompt for each in found.values() for prompt in each}


@pytest.mark.parametrize("count", ["9", "151", "x", "-1"])
def test_the_number_of_questions_is_checked(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--n", count]) == 2
    said = capsys.readouterr().err
    assert "--n" in said
    assert count in said


@pytest.mark.slow
def test_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--n", "10", "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in results["models"]][3:6] == [
        "math + code, plain",
        "math + code, LATA",
        "math + code, fitted",
    ]
    assert all(m["n"] == 10 for m in results["models"])
    assert results["findings"]
    assert (out / "demo.png").stat().st_size > 10_000
    assert json.loads((out / "results.json").read_text()) == results
    assert len(list(out.glob("*/model.safetensors"))) == 7
