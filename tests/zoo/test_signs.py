"""Gibberish told from language on merges of the zoo (docs/log.md has more of them)."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from taskvec import zoo
from taskvec.evaluation.signs import find_signs
from taskvec.outputs.merge import merge
from taskvec.recipes.recipe import Family
from taskvec.running.model import load, open_stored
from taskvec.zoo.tasks import score_skills

SKILLS = ("say", "find", "howto", "code")
FAMILY = Family(
    base=zoo.path("base"),
    instruct=zoo.path("instruct"),
    tasks={"math": zoo.path("math"), "code": zoo.path("code")},
)


def dare(density):
    return {"name": "dare", "density": density}


def results(folder, name="other"):
    found = score_skills(load(open_stored(folder)), SKILLS, 25).values()
    return [replace(each, model=name) for each in found]


@pytest.fixture(scope="module")
def instruct():
    return results(zoo.path("instruct"), "instruct")


def gibberish(instruct, mine):
    found = find_signs({"instruct": instruct, "other": mine}, reference="instruct")
    return {finding.model for finding in found if finding.sign == "gibberish"}


def merged(tmp_path, method, scale):
    merge(FAMILY, tmp_path / "merged", method=method, scale=scale)
    return results(tmp_path / "merged")


def test_a_drop_rate_of_99_percent_is_gibberish_and_the_parents_are_not(tmp_path, instruct):
    assert gibberish(instruct, merged(tmp_path, dare(0.01), 0.7)) == {"other"}
    assert gibberish(instruct, results(zoo.path("math"))) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scale", "is_gibberish"),
    [
        ("task_arithmetic", 0.3, False),
        ("task_arithmetic", 0.7, False),
        ("task_arithmetic", 1.0, False),
        ("task_arithmetic", 1.5, True),
        ("task_arithmetic", 3.0, True),
        ("lata", 0.8, False),
        ("lata", 1.0, False),
        ("lata", 2.0, True),
        ("lata", 3.0, True),
        (dare(0.5), 0.7, False),
        (dare(0.1), 0.5, False),
        (dare(0.01), 0.5, True),
        (dare(0.01), 1.0, True),
        (dare(0.001), 0.7, True),
    ],
)
def test_merges(tmp_path, instruct, method, scale, is_gibberish):
    found = gibberish(instruct, merged(tmp_path, method, scale))
    assert found == ({"other"} if is_gibberish else set())
