"""Studies: every candidate once, the same for the same seed, resumed, shared, and never stuck."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from tests.coefficients.made_up import Formula, job, peak, recipe

from taskvec.coefficients.api import run_search
from taskvec.errors import CheckpointError, TaskvecError, UsageError

ROOT = Path(__file__).resolve().parents[2]
MIXED = ("scale=0:1.5", "method=lata,task_arithmetic", "threshold=0.5:1")


def points(found):
    return [trial["point"] for trial in found.record["trials"]]


def test_a_grid_is_tried_once(tmp_path):
    scorer = peak(0.7)
    found = run_search(job("scale=0:1:0.1"), tmp_path, executor=scorer)
    assert found.record["sampler"] == "grid"
    assert scorer.scales[0] == 0.5  # the recipe as it was given
    assert sorted(scorer.scales) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert found.record["tried"] == 11
    assert found.recipe.scales == {"math": 0.7, "code": 0.7}
    assert found.record["winner"]["objectives"] == [0.9]
    assert found.record["winner"]["values"] == {"zoo:math": 0.9}
    assert found.record["target"] == {"zoo:math": 0.2}


def test_the_same_command_again_scores_nothing(tmp_path):
    first = run_search(job("scale=0:1:0.1"), tmp_path, executor=peak())
    scorer = peak()
    again = run_search(job("scale=0:1:0.1"), tmp_path, executor=scorer)
    assert scorer.asked == []
    assert again.record == first.record


@pytest.mark.parametrize(
    ("axes", "about", "sampler", "trials"),
    [
        (("scale=0:1.5",), {}, "qmc", 8),
        (("scale.math=0:1.5", "scale.code=0:1"), {}, "qmc", 8),
        (("scale=0:1.5", "threshold=0.5:1", "scale.math=0:1"), {"lata": True}, "cmaes", 12),
        (("scale=0:1.5",), {"sampler": "tpe"}, "tpe", 14),
        (MIXED, {"lata": True}, "tpe", 14),
        (("scale=0:1.5", "scale.math=0:1"), {"trade_off": True}, "nsga2", 20),
    ],
)
def test_samplers(tmp_path, axes, about, sampler, trials):
    """By the shape of the space; the same for one seed; the same when it is resumed."""
    about = dict(about)
    if about.pop("lata", False):
        about["of"] = recipe(method={"name": "lata", "scheme": "threshold"})
    both = ("zoo:math", "zoo:code")

    def run(folder, count, seed=0):
        made = job(*axes, maximize=both, seed=seed, **about)
        return run_search(made, tmp_path / folder, trials=count, executor=peak())

    whole = run("one", trials)
    assert whole.record["sampler"] == sampler
    assert len(whole.record["trials"]) == trials
    assert len({str(point) for point in points(whole)}) > 3 * trials // 4
    assert points(run("two", trials)) == points(whole)
    run("three", trials // 2)
    assert points(run("three", trials)) == points(whole)
    assert points(run("four", trials, seed=1)) != points(whole)


def test_a_sampler_finds_the_peak(tmp_path):
    """CMA-ES and TPE over three axes come near it."""
    of = recipe(method={"name": "lata", "scheme": "threshold"})

    def score(candidate):
        if candidate is None:
            return {"zoo:math": 0.0}
        scale, sigma = candidate.scales, candidate.parameters["math"]["threshold"]
        off = (scale["math"] - 0.8) ** 2 + (scale["code"] - 0.4) ** 2 + (sigma - 0.7) ** 2
        return {"zoo:math": max(0.0, 1 - off)}

    axes = ("scale.math=0:1.5", "scale.code=0:1.5", "threshold=0.5:1")
    for sampler, least in (("cmaes", 0.98), ("tpe", 0.96)):
        made = job(*axes, of=of, sampler=sampler)
        found = run_search(made, tmp_path / sampler, trials=60, executor=Formula(score))
        assert found.record["winner"]["objectives"][0] >= least, sampler
        assert set(found.record["importance"]) == {"scale.math", "scale.code", "threshold"}
        assert sum(found.record["importance"].values()) == pytest.approx(1)


def test_constraints(tmp_path):
    """say is lost beyond λ = 1, where math would be best."""
    found = run_search(job("scale=0:1.5:0.1", keep=["zoo:say"]), tmp_path, executor=peak(at=1.4))
    assert found.recipe.scales["math"] == 1.0
    by_scale = {trial["point"]["scale"]: trial for trial in found.record["trials"]}
    assert by_scale[1.0]["violations"]["zoo:say"] == pytest.approx(-0.05)
    assert by_scale[1.4]["violations"]["zoo:say"] == pytest.approx(0.45)
    assert by_scale[1.4]["objectives"][0] > found.record["winner"]["objectives"][0]


def test_nothing_is_kept(tmp_path):
    scorer = peak(at=1.4)
    found = run_search(job("scale=1.1:1.5:0.1", keep=["zoo:say"]), tmp_path, executor=scorer)
    assert found.recipe is None
    miss = found.choice.miss
    assert (miss.goal, miss.value, miss.bound) == ("zoo:say", 0.5, 0.95)
    assert miss.share == pytest.approx(0.45)
    assert found.record["nearest_miss"]["goal"] == "zoo:say"
    assert not any(ask.part == "test" for ask in scorer.asked)
    assert not (tmp_path / "recipe.yaml").exists()
    assert (tmp_path / "trials.csv").exists()


def test_a_trade_off(tmp_path):
    """math grows with λ, code falls: everything in between is on the front."""

    def score(candidate):
        scale = 0.0 if candidate is None else candidate.scales["math"]
        return {"zoo:math": scale / 2, "zoo:code": 1 - scale / 2}

    found = run_search(
        job("scale=0:2:0.25", maximize=["zoo:math", "zoo:code"], trade_off=True, sampler="grid"),
        tmp_path,
        executor=Formula(score),
    )
    assert len(found.record["front"]) == 9
    assert found.recipe.scales["math"] == 1.0  # the most balanced
    assert {path.name for path in (tmp_path / "front").iterdir()} == {
        "recipe.schema.json",
        *(f"{number}.yaml" for number in found.record["front"]),
    }
    assert len(found.record["test"]["objectives"]) == 2


def test_failures_are_kept_with_their_error(tmp_path):
    scorer = peak()
    inner = scorer.score

    def score(candidate):
        if candidate is not None and candidate.scales["math"] > 0.75:
            raise CheckpointError("out of paper")
        return inner(candidate)

    scorer.score = score
    found = run_search(job("scale=0:1:0.1"), tmp_path, executor=scorer)
    errors = {t["point"]["scale"]: t["error"] for t in found.record["trials"] if t["error"]}
    assert errors == {0.8: "out of paper", 0.9: "out of paper", 1.0: "out of paper"}
    assert (found.record["tried"], found.record["failed"]) == (8, 3)
    assert "out of paper" in (tmp_path / "trials.csv").read_text()
    asked = len(scorer.asked)
    run_search(job("scale=0:1:0.1"), tmp_path, executor=scorer)
    assert len(scorer.asked) == asked  # not tried again


def test_when_every_candidate_fails(tmp_path):
    def score(candidate):
        if candidate is None:
            return {"zoo:math": 0.5}
        raise CheckpointError("out of paper")

    with pytest.raises(TaskvecError, match="every candidate failed; the last one: out of paper"):
        run_search(job("scale=0:1:0.5"), tmp_path, executor=Formula(score))


def test_a_point_that_was_scored_is_not_scored_again(tmp_path):
    """TPE comes back to the few points there are."""
    scorer = peak()
    made = job("scale=0:1:0.5", sampler="tpe")
    found = run_search(made, tmp_path, trials=12, executor=scorer)
    assert len(found.record["trials"]) == 12
    assert sorted(scorer.scales) == [0.0, 0.5, 1.0]
    assert found.record["tried"] == 3
    twins = [trial for trial in found.record["trials"] if trial["same_as"] is not None]
    assert len(twins) == 9
    assert all(t["objectives"] == found.record["trials"][t["same_as"]]["objectives"] for t in twins)


def test_several_at_once_in_any_order(tmp_path):
    scorer = peak()
    scorer.workers = 4
    most = 0

    class Backwards(type(scorer)):
        def next(self):
            nonlocal most
            most = max(most, len(self.asks))
            self.asks.rotate(1)
            return super().next()

    backwards = Backwards(scorer.score, workers=4)
    found = run_search(job("scale=0:1:0.1"), tmp_path, executor=backwards)
    assert most == 4
    assert len(backwards.scales) == 11
    assert found.recipe.scales["math"] == 0.7


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"axes": ["scale=0:2:0.1"]}, 'axes was ["scale=0:1:0.1"], is ["scale=0:2:0.1"]'),
        ({"keep": ["zoo:say"]}, "what differs: goals; samples; tasks"),
        ({"seed": 1}, "samples; asking; seed was 0, is 1"),
        ({"select_n": 11}, "what differs: samples"),
        ({"of": {"scale": 0.6}}, "what differs: recipe"),
        ({"of": {"tasks": {"math": {"model": "code", "scale": 0.5}}}}, "recipe; members"),
        ({"sampler": "tpe"}, 'what differs: sampler was "grid", is "tpe"'),
    ],
)
def test_a_study_of_something_else_is_refused(tmp_path, other, message):
    run_search(job("scale=0:1:0.1"), tmp_path, executor=peak())
    axes = other.pop("axes", ["scale=0:1:0.1"])
    if "of" in other:
        other["of"] = recipe(**other["of"])
    scorer = peak()
    with pytest.raises(UsageError) as error:
        run_search(job(*axes, **other), tmp_path, executor=scorer)
    assert str(error.value).startswith(f"{tmp_path}: holds a study of something else; what differs")
    assert message in str(error.value)
    assert str(error.value).endswith("Give another --out")
    assert scorer.asked == []


def test_a_beginning_that_was_cut_short(tmp_path):
    """Killed while the grid was queued: each point is still tried once."""
    made = job("scale=0:1:0.1")
    from taskvec.coefficients.study import open_study
    from taskvec.coefficients.study_locks import worker

    with worker(tmp_path) as name:
        open_study(made, tmp_path, name)
    journal = tmp_path / "study.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    (last,) = [i for i, line in enumerate(lines) if '"definition"' in line]
    journal.write_text("".join(lines[: last - 4]))
    scorer = peak()
    found = run_search(made, tmp_path, executor=scorer)
    assert sorted(scorer.scales) == [x / 10 for x in range(11)]
    assert len(found.record["trials"]) == 11


def test_when_nothing_matters(tmp_path):
    """All candidates score the same: a winner, and importances that are no error."""
    same = Formula(lambda candidate: {"zoo:math": 0.5})
    made = job("scale.math=0:1", "scale.code=0:1", sampler="tpe")
    found = run_search(made, tmp_path, trials=24, executor=same)
    assert found.record["winner"]["number"] == 0
    assert set(found.record["importance"]) == {"scale.math", "scale.code"}


def test_no_journal(tmp_path):
    (tmp_path / "study.jsonl").write_text("not a journal\n{}\n")
    with pytest.raises(UsageError, match=r"study\.jsonl: is not the journal of a study"):
        run_search(job("scale=0:1:0.1"), tmp_path, executor=peak())


def test_an_interruption_takes_nothing_away(tmp_path):
    """The candidate that was under way is scored when the study goes on, any number of times."""
    for _ in range(3):
        scorer = peak()
        inner, calls = scorer.score, []

        def score(candidate, inner=inner, calls=calls):
            calls.append(candidate)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return inner(candidate)

        scorer.score = score
        with pytest.raises(KeyboardInterrupt):
            run_search(job("scale=0:1:0.1"), tmp_path, executor=scorer)
    found = run_search(job("scale=0:1:0.1"), tmp_path, executor=peak())
    assert found.record["tried"] == 11
    scored = [t["point"]["scale"] for t in found.record["trials"] if not t["error"]]
    assert sorted(scored) == [x / 10 for x in range(11)]


def test_what_is_not_foreseen_is_raised_and_tried_once_more(tmp_path):
    for _ in range(2):
        scorer = peak()
        inner = scorer.score

        def score(candidate, inner=inner):
            if candidate is not None and candidate.scales["math"] == 0.25:
                raise ZeroDivisionError("bug")
            return inner(candidate)

        scorer.score = score
        with pytest.raises(ZeroDivisionError):
            run_search(job("scale=0:1:0.25"), tmp_path, executor=scorer)
    found = run_search(job("scale=0:1:0.25"), tmp_path, executor=scorer)
    assert found.record["tried"] == 4
    assert [t["error"] for t in found.record["trials"] if t["error"]] == [
        "the process that scored it ended"
    ] * 2


SCRIPT = """
import os, sys, time
from pathlib import Path
from tests.coefficients.made_up import job, peak
from taskvec.coefficients.api import run_search

folder, pause, kill = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
scorer = peak()
inner = scorer.score

def score(candidate):
    if candidate is not None:
        with open(folder / "scored", "a") as file:
            file.write(f"{candidate.scales['math']}\\n")
        time.sleep(pause)
        if str(candidate.scales["math"]) in kill:
            os.kill(os.getpid(), 9)
    return inner(candidate)

scorer.score = score
run_search(job("scale=0:1:0.1"), folder, executor=scorer)
"""


def start(folder, pause, *kill):
    folder.mkdir(exist_ok=True)
    (folder / "scored").touch()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(pause), *kill]
    return subprocess.Popen(command, env=env)


def scored(folder):
    return sorted(map(float, (folder / "scored").read_text().split()))


def test_processes_share_a_study(tmp_path):
    folder = tmp_path / "out"
    processes = [start(folder, 0.05) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    tried = scored(folder)
    # Each of the 11 once; then the winner and the recipe as given, on test data, once in all.
    assert sorted(set(tried)) == [x / 10 for x in range(11)]
    assert len(tried) == 11 + 2
    told = json.loads((folder / "trials.json").read_text())
    assert told["tried"] == 11
    assert told["winner"]["point"] == {"scale": 0.7}
    assert not list((folder / ".workers").iterdir())


def test_a_candidate_that_kills_is_tried_twice(tmp_path):
    """And a study goes on whoever is killed, whenever."""
    folder = tmp_path / "out"
    for _ in range(2):
        assert start(folder, 0, "0.3").wait(timeout=120) == -signal.SIGKILL
    assert start(folder, 0, "0.3").wait(timeout=120) == 0
    assert scored(folder).count(0.3) == 2
    told = json.loads((folder / "trials.json").read_text())
    assert told["tried"] == 10
    assert [t["error"] for t in told["trials"] if t["point"]["scale"] == 0.3] == [
        "the process that scored it ended"
    ] * 2
    assert len(told["trials"]) == 12


def test_another_process_takes_over(tmp_path):
    """The others do not wait for one that was killed, and score what it had under way."""
    folder = tmp_path / "out"
    first = start(folder, 60)
    for _ in range(600):
        if (folder / "scored").exists() and scored(folder):
            break
        time.sleep(0.1)
    (held,) = scored(folder)
    second = start(folder, 0)
    time.sleep(2)
    first.kill()
    first.wait()
    assert second.wait(timeout=120) == 0
    assert json.loads((folder / "trials.json").read_text())["tried"] == 11
    assert scored(folder).count(held) >= 2


def test_a_line_that_a_crash_cut_short(tmp_path):
    run_search(job("scale=0:1:0.1"), tmp_path, trials=4, executor=peak())
    with (tmp_path / "study.jsonl").open("a") as file:
        file.write('{"op_code": 4, "worker_')
    found = run_search(job("scale=0:1:0.1"), tmp_path, executor=peak())
    assert found.record["tried"] == 11
    for line in (tmp_path / "study.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize(
    ("axes", "about", "message"),
    [
        (["scale=0:1"], {"sampler": "sobol"}, "sampler must be one of auto, grid, qmc, tpe, cmaes"),
        (["scale=0:1"], {"sampler": "grid"}, "sampler grid: scale=0:1 has no step; give LOW:HIGH:"),
        (["scale=0:1:1e-6"], {"sampler": "grid"}, "1,000,001 points are too many; give LOW:HIGH:"),
        (["scale=0,1"], {"sampler": "qmc"}, "sampler qmc takes no choices; use tpe"),
        (["scale=0:1"], {"sampler": "cmaes"}, "sampler cmaes needs two or more axes; use qmc"),
        (
            ["scale=0:1", "scale.math=0:1"],
            {"sampler": "cmaes", "keep": ["zoo:say"]},
            "sampler cmaes knows no constraints and no trade-offs; use tpe",
        ),
    ],
)
def test_samplers_that_cannot(axes, about, message):
    with pytest.raises(UsageError) as error:
        job(*axes, **about)
    assert message in str(error.value)


def test_no_trials(tmp_path):
    with pytest.raises(UsageError, match="trials must be 1 or more; got 0"):
        run_search(job("scale=0:1"), tmp_path, trials=0, executor=peak())
