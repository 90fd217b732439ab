"""`taskvec disentangle` as a user runs it, on the zoo."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from taskvec import zoo
from taskvec.disentanglement import disentanglement_error, language
from taskvec.running.model import load, open_stored
from taskvec.zoo.skills import SKILLS

INSTRUCT = zoo.path("instruct")
VECTORS = ("--task", f"math={zoo.path('math')}", "--task", f"code={zoo.path('code')}")
THREE = ("--points", "3", "--low", "0", "--high", "1", "--plain", "--quiet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of questions and answers by skill and split."""
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for split, seed in (("validation", 1), ("test", 2)):
        for skill in ("math", "code", "say"):
            path = found[skill, split] = folder / f"{skill}-{split}.jsonl"
            rows = SKILLS[skill].test(12, seed)
            path.write_text(
                "".join(json.dumps({"prompt": r.prompt, "response": r.answer}) + "\n" for r in rows)
            )
    return found


def given(flag, data, split, *names):
    return [part for name in names for part in (flag, f"{name}={data[name, split]}")]


def test_error_is_that_of_the_function_and_goes_on(cli, data, tmp_path):
    arguments = ("disentangle", INSTRUCT, *VECTORS, *given("--data", data, "test", "math", "code"))
    code, out, err = cli(*arguments, *THREE, "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    model = load(open_stored(INSTRUCT), device="cpu")
    pairs = {t: [(r.prompt, r.answer) for r in SKILLS[t].test(12, 2)] for t in ("math", "code")}
    found = disentanglement_error(
        model.module,
        {task: zoo.path(task) for task in pairs},
        {task: language(task, pairs[task], model.encoder) for task in pairs},
        alphas=(0.0, 0.5, 1.0),
    )
    told = json.loads(out)
    assert told == json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["error"] == json.loads(json.dumps(found.to_json()))
    assert found.values.max() > 0.1
    assert (tmp_path / "out" / "error.csv").read_text() == found.to_csv()
    assert (tmp_path / "out" / "error.svg").read_text().startswith("<svg")
    (records,) = (tmp_path / "out").glob("cells.*.jsonl")
    before = records.stat()
    code, out, err = cli(*arguments, *THREE, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert records.stat().st_mtime_ns == before.st_mtime_ns
    lines = out.splitlines()
    head = "disentanglement error (prediction), 12 examples of math and 12 examples of code"
    assert lines[0] == head
    assert lines[1].split() == ["cell", "α", "math", "α", "code", "ξ"]
    assert lines[4] == f"mean over 9 cells: {found.values.mean():.4f}"
    assert lines[-1] == f"{tmp_path / 'out'}/: results.json, and what was measured"


def test_addition_and_negation_by_several_methods(cli, data, tmp_path):
    code, out, err = cli(
        "disentangle", INSTRUCT, *VECTORS, *THREE, "--out", tmp_path, "--control", "say",
        *given("--data", data, "test", "math", "code", "say"),
        *given("--validation", data, "validation", "math", "code", "say"),
        "--measure", "addition,negation", "--methods", "task_arithmetic,lata",
        "--base", zoo.path("base"),
    )  # fmt: skip
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "results.json").read_text())
    assert [each["method"] for each in told["addition"]] == ["task_arithmetic", "lata"]
    plain = told["addition"][0]
    assert plain["single"]["math"]["value"] > plain["pretrained"]["math"]["value"]
    assert len(plain["tried"]) == 3
    assert list(told["negation"]) == ["math", "code"]
    assert told["negation"]["math"][0]["pretrained"]["control"]["value"] > 0.5
    assert "task addition (shared), on test data; normalised by the single-task models" in out
    assert "task negation of math, 95% of say kept; on test data" in out


def test_a_task_is_not_its_own_control(cli, data, tmp_path):
    vectors = [*VECTORS, "--task", f"say={VECTORS[1].removeprefix('math=')}"]
    code, out, err = cli(
        "disentangle", INSTRUCT, *vectors, *THREE, "--out", tmp_path, "--control", "say",
        *given("--data", data, "test", "math", "code", "say"), "--measure", "negation",
        *given("--validation", data, "validation", "math", "code", "say"),
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "task negation of math, 95% of say kept; on test data" in out
    assert "negation of say" not in out


def test_a_control_that_the_model_cannot_do(cli, data, tmp_path):
    code, _, err = cli(
        "disentangle", INSTRUCT, *VECTORS[:2], *THREE, "--out", tmp_path, "--control", "code",
        *given("--data", data, "test", "math", "code"), "--measure", "negation",
        *given("--validation", data, "validation", "math", "code"),
    )  # fmt: skip
    assert code == 1
    assert err == (
        "taskvec: error: the pre-trained model has no correct answer on the control's validation "
        "data; give another control\n"
    )


@pytest.mark.parametrize(("low", "nearest"), [(-2, ["2", "2"]), (0, None)])
def test_cells_on_the_axes_are_not_shown_as_near_one(cli, data, tmp_path, low, nearest):
    """There one of the vectors is not added, and at (0, 0) the error is 0 whatever they are."""
    points = ("--points", 3 if nearest else 1, "--low", low, "--high", -low, "--plain", "--quiet")
    code, out, _ = cli(
        "disentangle", INSTRUCT, *VECTORS, *points, "--out", tmp_path,
        *given("--data", data, "test", "math", "code"),
    )  # fmt: skip
    assert code == 0
    lines = [line.split()[4:6] for line in out.splitlines() if line.startswith("nearest to (1, 1)")]
    assert [[f"{float(x):g}" for x in line] for line in lines] == ([nearest] if nearest else [])
    assert "mean over 1 " not in out


def test_linearity_by_part(cli, data, tmp_path):
    code, out, err = cli(
        "disentangle", INSTRUCT, *VECTORS[:2], *given("--data", data, "test", "math"),
        "--measure", "linearity", "--points", 1, "--low", 0.5, "--high", 0.5,
        "--plain", "--quiet", "--out", tmp_path,
    )  # fmt: skip
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "results.json").read_text())["linearity"]
    parts = ["whole", "attention", "mlp", "norm", "embedding", "final_norm", "head"]
    assert [each["part"] for each in told] == parts
    assert sum(each["share"] for each in told[1:]) == pytest.approx(1)
    by_part = {each["part"]: each["departure"]["value"] for each in told}
    assert by_part["head"] == pytest.approx(0, abs=1e-4)  # the logits are linear in the head
    assert by_part["whole"] > 0.1
    assert out.splitlines()[0] == "departure from the tangent: ‖f − f_lin‖ / ‖f − f0‖"


def test_the_tangent_is_measured_instead(cli, data, tmp_path):
    arguments = ("disentangle", INSTRUCT, *VECTORS, *given("--data", data, "test", "math", "code"))
    values = []
    for more in ((), ("--linearised",)):
        code, out, _ = cli(*arguments, *THREE, *more, "--out", tmp_path, "--json")
        assert code == 0
        values.append([c["error"]["value"] for c in json.loads(out)["error"]["cells"]])
    assert values[0] != values[1]
    assert np.min(values[1]) == values[1][0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no task vector is given; give --task NAME=VECTOR"),
        (["--task", "a"], "--task takes NAME=…; got 'a'"),
        (["--task", "a=x", "--task", "a=y"], "--task a is given twice"),
        (["--task", "a=x", "--data", "b=y"], "--data b: unknown task; give --task b=VECTOR"),
        (["--task", "a=x"], "--data a=PATH is missing"),
        (["--task", "a=x", "--data", "a=y"], "the error is of two tasks; got 1: a"),
        (["--task", "a=x", "--data", "a=y", "--measure", "addition"],
         "--validation a=PATH is missing"),
        (["--task", "a=x", "--data", "a=y", "--measure", "negation"],
         "negation needs data that it must keep: give --control NAME"),
        (["--task", "a=x", "--data", "a=y", "--validation", "a=z", "--measure", "negation",
          "--control", "a"], "--control a: is what is taken away; give other data"),
        (["--task", "a=x", "--data", "a=y", "--measure", "linearity", "--linearised"],
         "a linearised model is linear; measure the linearity of the model itself"),
        (["--task", "a=x", "--data", "a=y", "--measure", "linearity", "--low", "0"],
         "linearity is measured at coefficients other than 0; change --low, --high or --points"),
        (["--measure", "erorr"], "--measure: unknown 'erorr'; did you mean 'error'?"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told_before_anything_is_loaded(cli, arguments, message):
    code, _, err = cli("disentangle", "nowhere", *arguments)
    assert code == 2
    assert message in err


def test_data_of_two_kinds_or_a_head_for_texts_are_refused(cli, data, tmp_path):
    classes = tmp_path / "classes.jsonl"
    classes.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    arguments = ["disentangle", INSTRUCT, *VECTORS, *given("--data", data, "test", "math")]
    code, _, err = cli(*arguments, "--data", f"code={classes}", "--out", tmp_path / "out")
    assert code == 2
    assert "prompts to continue and classes cannot be evaluated in one model" in err
    arguments += given("--data", data, "test", "code")
    code, _, err = cli(*arguments, "--fields", "prompt", "--out", tmp_path / "out")
    assert (code, err) == (2, "taskvec: error: --fields takes USE=NAME,…; got 'prompt'\n")
    code, _, err = cli(*arguments, "--head", "probe", "--out", tmp_path / "out")
    assert code == 2
    assert "head 'probe' is for classes; texts are asked of the model's own" in err
