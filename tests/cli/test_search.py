"""`taskvec search` as a user runs it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optuna")

from tests.conftest import run_cli

from taskvec import zoo
from taskvec.cli.search import _remarks

SMALL = ("--select-n", "6", "--test-n", "6", "--quiet")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "family.yaml"
    path.write_text(
        f"base: {zoo.path('base')}\ninstruct: {zoo.path('instruct')}\nmethod: task_arithmetic\n"
        f"tasks:\n  math: {{model: {zoo.path('math')}, scale: 0.5}}\n"
    )
    return path


def test_a_table_and_a_recipe(tmp_path, recipe):
    """In a process of its own: the table on standard output, nothing on standard error."""
    out = tmp_path / "out"
    command = ("search", recipe, "--vary", "scale=0:1:0.5", "--maximize", "zoo:math", "--keep",
               "zoo:say", *SMALL, "--out", out, "--plot")  # fmt: skip
    code, text, err = run_cli(*command, HF_HUB_OFFLINE="1")
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert lines[0] == (
        "3 candidates scored, 0 failed; sampler grid, seed 0, n = 6 a task for selection"
    )
    assert lines[1].split() == ["candidate", "scale", "zoo:math", "zoo:say", "objective", "kept"]
    assert lines[2].split()[1] == "1.0000"
    assert lines[5].split() == ["target", "–", "0.0000", "1.0000", "–"]
    assert lines[7].startswith("On test data, which were not used for the choice (zoo:math n = 6")
    assert lines[8].split()[:2] == ["winner", "recipe"]
    assert lines[9].startswith("maximize zoo:math")
    assert lines[10].startswith("keep zoo:say")
    assert lines[10].endswith("yes")
    assert "the best of 3 and therefore too good" in text
    assert lines[-1] == (f"{out}/: recipe.yaml, trials.csv, trials.json, candidates.svg")
    for name in lines[-1].partition(": ")[2].split(", "):
        assert (out / name).stat().st_size > 0
    code, again, _ = run_cli(*command, HF_HUB_OFFLINE="1")
    assert (code, again) == (0, text)
    assert run_cli("merge", out / "recipe.yaml", tmp_path / "merged")[0] == 0


@pytest.mark.parametrize(("scores", "level"), [((0.5, 0.5, 0.4), 2), ((0.5, 0.4, 0.4), 0)])
def test_a_choice_among_equals_is_told(scores, level):
    trials = [
        {"number": i, "error": None, "same_as": None, "violations": {}, "objectives": [score]}
        for i, score in enumerate(scores)
    ]
    lost = {**trials[0], "number": 3, "violations": {"zoo:say": 0.1}}
    told = {"trials": [*trials, lost], "tried": 4, "winner": {"number": 0}}
    remarks = _remarks(told)
    assert len(remarks) == 1 + bool(level)
    assert not level or remarks[1].startswith(f"{level} of 4 candidates are level with the winner")


def test_json_and_flags_for_a_recipe(cli, tmp_path):
    code, text, _ = cli(
        "search", "--instruct", zoo.path("instruct"), "--task", f"math={zoo.path('math')}",
        "--method", "task_arithmetic", "--maximize", "zoo:math", "--vary", "scale=0:1",
        "--trials", "3", *SMALL, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    told = json.loads(text)
    assert told == json.loads((tmp_path / "out" / "trials.json").read_text())
    assert (told["sampler"], len(told["trials"])) == ("qmc", 3)
    assert told["test"]["reference"] == "target"  # no λ is given that it could be compared with


def test_when_nothing_is_kept(cli, tmp_path, recipe):
    """Exit code 3, and the nearest miss in words."""
    code, text, err = cli(
        "search", recipe, "--vary", "scale=3:5:1", "--maximize", "zoo:math", "--keep", "zoo:say",
        *SMALL, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 3
    assert err.startswith(
        "taskvec: warning: no candidate keeps 95% of the target in all of zoo:say. The nearest "
        "miss is candidate "
    )
    assert "zoo:say is 0 and would have to be 0.95, off by 95.0% of the target's" in err
    assert f"{tmp_path / 'out'}/: trials.csv, trials.json" in text
    assert "On test data" not in text


def test_a_trade_off(cli, tmp_path, recipe):
    code, text, _ = cli(
        "search", recipe, "--vary", "scale=0:1:0.5", "--maximize", "zoo:math", "--minimize",
        "zoo:say", "--trade-off", "--trials", "4", *SMALL, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert "sampler nsga2" in text
    assert "front/, trials.csv" in text
    assert "minimize zoo:say" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "no goal is named; give --maximize TASK or --minimize TASK"),
        (["--maximize", "zoo:maths"], "there is no task 'zoo:maths'; did you mean 'zoo:math'"),
        (["--maximize", "zoo:math", "--vary", "sale=0:1"], "task_arithmetic has no sale; did you"),
        (["--maximize", "zoo:math", "--select-n", "150"], "150 for selection and 1 for the test"),
        (["--maximize", "zoo:math", "--single", "zoo:math"], "--single takes GOAL=TASK; got"),
        (["--maximize", "zoo:math", "--test-data", "none"], "--test-data none: no such folder; "),
        (["--maximize", "zoo:math", "--sampler", "sobol"], "sampler must be one of auto, grid"),
        (["--maximize", "zoo:math", "--keep-share", "2"], "keep_share must be above 0 and at mo"),
        (["--maximize", "zoo:math", "--trials", "0"], "trials must be 1 or more; got 0"),
    ],
)  # fmt: skip
def test_usage(cli, tmp_path, recipe, arguments, text):
    code, out, err = cli("search", recipe, *arguments, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert text in err
    assert not (tmp_path / "out").exists()


def test_a_manifest_is_refused(cli, tmp_path):
    code, _, err = cli("search", tmp_path / "taskvec-manifest.json", "--maximize", "zoo:math")
    assert code == 2
    assert "the weights of a manifest are fixed; give a recipe" in err


def test_without_the_extra(cli, monkeypatch, tmp_path, recipe):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = cli("search", recipe, "--maximize", "zoo:math", "--out", tmp_path / "out")
    assert code == 1
    assert "optuna is not installed; this needs: pip install 'taskvec[search]'" in err
