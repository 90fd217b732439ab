"""Selection and test data have no request in common, and are the same for the same seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from taskvec.coefficients.splits import Splitting, digest, split
from taskvec.errors import UsageError
from taskvec.evaluation.data import DataPlaces
from taskvec.evaluation.evaluate import EvaluationOptions
from taskvec.evaluation.task import SampleSettings

TASKS = ["zoo:math", "zoo:code", "zoo:text"]


def requests(part):
    return {sample.requests for sample in part.samples}


@pytest.mark.parametrize("seed", range(3))
def test_prompts_are_disjoint(seed):
    """Not only ids: what the zoo asks is made up, and could be made up twice."""
    options = EvaluationOptions(settings=SampleSettings(seed=seed))
    found = split(TASKS, options, Splitting(60, None))
    for chosen, test in zip(found.select, found.test, strict=True):
        assert len(chosen.samples) == 60
        assert len(requests(chosen)) == 60
        assert not requests(chosen) & requests(test)
        assert len(test.samples) >= 38
        assert [sample.id for sample in test.samples] == sorted(
            (sample.id for sample in test.samples), key=int
        )


def test_the_seed_says_which():
    one, again, other = (
        split(
            TASKS, EvaluationOptions(settings=SampleSettings(seed=seed)), Splitting(20, 20)
        ).to_json()
        for seed in (0, 0, 1)
    )
    assert one == again
    assert one["zoo:math"]["select"]["n"] == one["zoo:math"]["test"]["n"] == 20
    for task in TASKS:
        assert one[task]["select"]["digest"] != other[task]["select"]["digest"]


def test_what_is_asked_twice_counts_once(tmp_path: Path):
    """Ids differ, the question does not: it is on one side only."""
    rows = [{"question": f"{i % 12}?", "answer": f"#### {i % 12}"} for i in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "test.jsonl").write_text(text)
    options = EvaluationOptions(
        data=DataPlaces(by_task={"gsm8k": tmp_path / "test.jsonl"}, hub=False)
    )
    options = replace(options, settings=SampleSettings(shots=0))
    found = split(["gsm8k"], options, Splitting(5, None))
    (chosen,), (test,) = found.select, found.test
    assert (len(chosen.samples), len(test.samples)) == (5, 7)
    assert not requests(chosen) & requests(test)


def test_test_data_apart(tmp_path: Path):
    for name, numbers in (("one", range(10)), ("two", range(8, 20))):
        rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in numbers]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    one, two = (
        DataPlaces(by_task={"gsm8k": tmp_path / f"{name}.jsonl"}, hub=False)
        for name in ("one", "two")
    )
    options = EvaluationOptions(data=one, settings=SampleSettings(shots=0))
    found = split(["gsm8k"], options, Splitting(10, None, two))
    (chosen,), (test,) = found.select, found.test
    assert (len(chosen.samples), len(test.samples)) == (10, 10)
    assert not requests(chosen) & requests(test)
    with pytest.raises(UsageError, match="10 different samples and 10 others for the test; 10 for"):
        split(["gsm8k"], options, Splitting(10, 11, two))


def test_defaults():
    found = split(["zoo:math"], EvaluationOptions(), Splitting())
    assert (len(found.select[0].samples), len(found.test[0].samples)) == (75, 75)


def test_too_few():
    with pytest.raises(UsageError) as error:
        split(["zoo:math"], EvaluationOptions(), Splitting(100, 60))
    assert str(error.value) == (
        "task 'zoo:math' has 150 different samples; 100 for selection and 60 for the test do not "
        "fit; ask for fewer, or give separate test data"
    )
    with pytest.raises(UsageError, match="150 for selection and 1 for the test do not fit"):
        split(["zoo:math"], EvaluationOptions(), Splitting(150))
    with pytest.raises(UsageError, match="select_n must be 1 or more; got 0"):
        Splitting(0)


def test_digest_is_of_what_is_asked():
    found = split(["zoo:math"], EvaluationOptions(), Splitting(5, 5))
    samples = found.select[0].samples
    assert digest(samples) == digest(list(samples))
    assert digest(samples) != digest(samples[:-1])
    assert digest(samples) != digest([*samples[:-1], replace(samples[-1], id="x")])
