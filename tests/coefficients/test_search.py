"""`search` on the zoo: what is found is what is merged, and what is written says how."""

from __future__ import annotations

import csv
import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optuna")

from tests.coefficients.made_up import recipe
from tests.conftest import read_raw

from taskvec.coefficients import search
from taskvec.coefficients.api import make_job
from taskvec.coefficients.goals import make_goals
from taskvec.coefficients.scoring import Ask, Local
from taskvec.coefficients.space import parse_axis
from taskvec.coefficients.splits import Splitting
from taskvec.evaluation.evaluate import EvaluationOptions
from taskvec.outputs.run import run
from taskvec.recipes.reading import load_recipe

AXES = ("scale=0.3:0.7:0.2", "scale.code=0.3:0.9", "threshold.math=0.8:1")
LATA = {"name": "lata", "scheme": "threshold"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("search")
    about = {"maximize": ["zoo:math", "zoo:code"], "keep": ["zoo:say"]}
    sizes = {"select_n": 8, "test_n": 12}
    return out, search(recipe(method=LATA), vary=AXES, trials=5, out=out, **about, **sizes)


def test_the_recipe_merges_to_the_candidate(found, tmp_path):
    """Bit for bit: what was scored, what `merge` writes of the file, and of the recipe."""
    out, result = found
    read = load_recipe(out / "recipe.yaml")
    assert read.scales == result.recipe.scales
    assert read.parameters == result.recipe.parameters
    run(read, tmp_path / "from-file")
    run(result.recipe, tmp_path / "from-recipe")
    assert read_raw(tmp_path / "from-file") == read_raw(tmp_path / "from-recipe")

    goals = make_goals(["zoo:math"], tasks=["math", "code"])
    axes = [parse_axis(axis) for axis in AXES]
    job = make_job(recipe(method=LATA), axes, goals, EvaluationOptions(), Splitting(2, 2))
    point = result.record["winner"]["point"]
    with Local(job) as scorer:
        scorer.submit(Ask(0, job.space.recipe_at(point)))
        assert scorer.next().error == ""
        state = scorer._models._bench[1].module.state_dict()
        candidate = {name: tensor.clone() for name, tensor in state.items()}
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "from-file", dtype="float32")
    for name, tensor in merged.state_dict().items():
        assert tensor.equal(candidate[name]), name


def test_what_is_told(found):
    out, result = found
    told = json.loads((out / "trials.json").read_text())
    assert told == result.record
    assert told["sampler"] == "tpe"
    assert told["axes"] == list(AXES)
    assert told["samples"]["zoo:math"]["select"]["n"] == 8
    assert told["samples"]["zoo:math"]["test"]["n"] == 12
    assert {"optuna", "torch", "taskvec"} <= told["versions"].keys()
    assert told["target"]["zoo:math"] == 0
    assert len(told["trials"]) == 5
    assert all(t["switching_s"] > 0 and t["scoring_s"] > 0 for t in told["trials"])
    (first, *_) = told["trials"]
    assert first["point"] == {"scale": 0.5, "scale.code": 0.5, "threshold.math": 0.95}
    assert told["winner"]["recipe"]["tasks"]["code"]["scale"] == result.recipe.scales["code"]


def test_test_scores_are_those_of_an_evaluation(found, tmp_path):
    """The merged folder, asked the same samples by `evaluate`, has the same figures."""
    from taskvec.coefficients.splits import split
    from taskvec.evaluation.loading import Models

    out, result = found
    run(load_recipe(out / "recipe.yaml"), tmp_path / "merged")
    parts = split(["zoo:math", "zoo:code", "zoo:say"], EvaluationOptions(), Splitting(8, 12))
    with Models(EvaluationOptions()) as models:
        merged = models.evaluate(tmp_path / "merged", parts.test, "merged")
    told = result.record["test"]["figures"]["winner"]
    for each in merged:
        assert told[each.task] == each.main.to_json()


def test_differences_on_test_data(found):
    """Winner less the recipe as given, and the mean of both, from the figures themselves."""
    test = found[1].record["test"]
    assert test["reference"] == "given"
    figures = test["figures"]
    both = []
    for goal in ("zoo:math", "zoo:code"):
        apart = figures["winner"][goal]["value"] - figures["given"][goal]["value"]
        assert test["differences"][goal]["value"] == pytest.approx(apart)
        both.append(apart)
    (overall,) = test["objectives"]
    assert overall["difference"]["value"] == pytest.approx(sum(both) / 2)
    low, high = overall["difference"]["interval"]
    assert low <= overall["difference"]["value"] <= high
    kept = test["kept"]["zoo:say"]
    assert kept["bound"] == pytest.approx(0.95 * figures["target"]["zoo:say"]["value"])
    assert kept["holds"] == (kept["value"] >= kept["bound"])


def test_the_table_of_trials(found):
    out, result = found
    with (out / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row, trial in zip(rows, result.record["trials"], strict=True):
        assert float(row["zoo:math"]) == trial["values"]["zoo:math"]
        assert float(row["objective_1"]) == trial["objectives"][0]
        assert float(row["scale.code"]) == trial["point"]["scale.code"]
        assert row["allowed"] == str(trial["violations"]["zoo:say"] <= 0)


def test_shares_of_single_tasks(tmp_path):
    """λ = 1 of one task alone is its fine-tune, whose share is 1."""
    singles = {"zoo:math": "math", "zoo:code": "code"}
    result = search(
        recipe(scale=1.0), vary={"scale.code": "0,1"}, maximize=["zoo:math", "zoo:code"],
        single=singles, select_n=6, test_n=6, out=tmp_path,
    )  # fmt: skip
    alone = next(t for t in result.record["trials"] if t["point"]["scale.code"] == 0)
    code = alone["values"]["zoo:code"]
    assert alone["values"]["zoo:math"] == result.record["single"]["zoo:math"]
    assert alone["objectives"] == [
        pytest.approx((1 + code / result.record["single"]["zoo:code"]) / 2)
    ]


def test_perplexity_counts_in_nats(tmp_path):
    import math

    result = search(
        recipe(), vary={"scale": "0,1"}, maximize=["zoo:text"], select_n=6, test_n=6, out=tmp_path
    )
    for trial in result.record["trials"]:
        assert trial["objectives"] == [pytest.approx(-math.log(trial["values"]["zoo:text"]))]
    assert result.recipe.scales["math"] == 0


def test_a_candidate_that_cannot_be_merged_is_told(tmp_path):
    """A parameter that must be the same for all tasks: only its default goes with the others."""
    result = search(
        recipe(method="ties"), vary={"merge.math": "mean,sum"}, maximize=["zoo:math"],
        select_n=2, test_n=2, out=tmp_path,
    )  # fmt: skip
    (error,) = [trial["error"] for trial in result.record["trials"] if trial["error"]]
    assert error.startswith("merge must be the same for all tasks; got code ")
    assert (result.record["tried"], result.record["failed"]) == (1, 1)
