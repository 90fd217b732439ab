"""Where scores should move: said by the user, or by the sign of λ in a manifest or recipe."""

from __future__ import annotations

import json

import pytest
from tests.evaluation import made_up

from taskvec.errors import UsageError
from taskvec.evaluation.expectations import MergeScales, expect, merges_among
from taskvec.evaluation.task import Metric
from taskvec.recipes.coerce import as_recipe
from taskvec.recipes.recipe import Family, TaskSpec

SKILL = made_up.make(name="zoo:unsafe", metrics=(Metric("right"),))
HARM = made_up.make(name="harm", metrics=(Metric("success", higher_is_better=False),))
TASKS = [SKILL, HARM]


def manifest(folder, tasks):
    folder.mkdir()
    model = {"path": "/models/unsafe", "digests": {}, "fingerprint": "x"}
    about = {
        "format": 1,
        "recipe": {"tasks": tasks},
        "table": {},
        "versions": {},
        "members": {"target": model},
        "output": {"digests": {}, "fingerprint": "x"},
    }
    (folder / "taskvec-manifest.json").write_text(json.dumps(about))
    return str(folder)


def test_merges_are_folders_with_a_manifest_and_candidates(tmp_path):
    tasks = {"unsafe": {"model": "u", "scale": -1}, "math": {"scale": {"times": 0.5, "by": [1]}}}
    (tmp_path / "plain").mkdir()

    family = Family(anchor="a", target="t", tasks={"math": TaskSpec("m", scale=-0.5)})
    recipe = as_recipe(family, {"method": "task_arithmetic"})
    found = merges_among(
        {
            "merged": manifest(tmp_path / "merged", tasks),
            "plain": str(tmp_path / "plain"),
            "hub": "org/name",
            "candidate": recipe,
        }
    )
    assert found == {
        "merged": MergeScales({"unsafe": -1.0, "math": 0.5}, "/models/unsafe"),
        "candidate": MergeScales({"math": -0.5}, "t"),
    }


def test_a_damaged_manifest_is_still_a_merge(tmp_path):
    (tmp_path / "taskvec-manifest.json").write_text("{")
    assert merges_among({"m": str(tmp_path)}) == {"m": MergeScales({})}


def test_the_sign_of_lambda_says_where_scores_of_a_subtracted_task_go():
    merges = {"m": MergeScales({"unsafe": -1.0, "harm": -0.5}, "/models/unsafe")}
    of_target = expect(merges, [], {}, TASKS, reference="/models/unsafe")
    assert of_target == {"m": {"zoo:unsafe": "down", "harm": "up"}}
    of_another = expect(merges, [], {}, TASKS, reference="/models/instruct")
    assert of_another == {"m": {"zoo:unsafe": "not up", "harm": "not down"}}
    assert expect({"m": MergeScales({"unsafe": 1.0})}, [], {}, TASKS) == {"m": {}}


def test_what_the_user_says_goes_first_and_holds_for_all_models():
    merges = {"m": MergeScales({"unsafe": -1.0})}
    found = expect(merges, ["m", "other"], {"unsafe": "keep", "harm": "down"}, TASKS)
    said = {"zoo:unsafe": "keep", "harm": "down"}
    assert found == {"m": said, "other": said}


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"unsafe": "lower"}, "up, down, keep"),
        ({"math": "down"}, "known: .*harm.*zoo:unsafe"),
        ({"unsaf": "down"}, "--expect unsaf=down: .*did you mean 'unsafe'"),
    ],
)
def test_unknown_directions_and_tasks(given, remedy):
    with pytest.raises(UsageError, match=remedy):
        expect({}, ["m"], given, TASKS)
