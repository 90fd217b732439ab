"""`taskvec eval` as a user runs it."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.conftest import run_cli

from taskvec import zoo
from taskvec.evaluation.tasks import task as registered

INSTRUCT, MATH = f"instruct={zoo.path('instruct')}", f"math={zoo.path('math')}"
MATHS = ("--tasks", "zoo:math", "--limit", "20", "--quiet")


UNSAFE = f"unsafe={zoo.path('unsafe')}"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "half.yaml"
    path.write_text(
        f"anchor: {zoo.path('instruct')}\nmethod: task_arithmetic\n"
        f"tasks:\n  math: {{model: {zoo.path('math')}, scale: 1.0}}\n"
    )
    return path


def test_a_table_with_intervals(tmp_path):
    """In a process of its own: nothing but the table on standard output, nothing else on error."""
    code, out, err = run_cli(
        "eval", INSTRUCT, MATH, "--tasks", "zoo:math,zoo:text", "--limit", "20",
        "--single", "zoo:math=math", "--out", tmp_path / "out", "--quiet", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "zoo:math: n = 20 of 150, seed 0"
    assert lines[1].split() == [
        "accuracy",
        "Δ",
        "accuracy",
        "vs",
        "instruct",
        "share",
        "of",
        "math's",
    ]
    assert lines[2].split() == ["instruct", "0.000", "[0.000,", "0.161]", "0%"]
    assert lines[3].startswith("math      ")
    assert lines[3].endswith("100%")
    assert lines[5] == "zoo:text: n = 20 of 100, seed 0, context 128, stride 128"
    assert lines[-1] == f"{tmp_path / 'out'}/: results.json, and what was asked and replied"


def test_results_file(cli, tmp_path, recipe):
    """The same as is printed; a recipe is merged in memory."""
    out = tmp_path / "out"
    code, text, _ = cli(
        "eval", INSTRUCT, recipe, *MATHS, "--out", out, "--json", "--reference", "half.yaml"
    )
    assert code == 0
    told = json.loads(text)
    assert told == json.loads((out / "results.json").read_text())
    instruct, half = told["tasks"]["zoo:math"]
    assert told["reference"] == "half.yaml"
    assert instruct["model"] == "instruct"
    assert half["figures"]["accuracy"]["value"] > 0.8
    assert instruct["difference"]["value"] < -0.8
    assert half["difference"] is None
    assert half["n"] == 20
    assert {"taskvec", "torch", "transformers", "python"} <= told["versions"].keys()
    assert {path.name for path in out.iterdir()} == {"results.json", "instruct", "half.yaml"}
    assert {path.name for path in (out / "half.yaml").iterdir()} == {"zoo-math.jsonl"}


def test_findings(cli, tmp_path):
    asked = (INSTRUCT, UNSAFE, "--tasks", "zoo:refusal", "--limit", "20", "--quiet")
    _, text, _ = cli("eval", *asked, "--out", tmp_path, "--json")
    (finding,) = json.loads(text)["findings"]
    assert (finding["model"], finding["sign"]) == ("unsafe", "below_reference")
    _, out, _ = cli("eval", *asked, "--out", tmp_path)
    _, _, printed = out.partition("\nFindings:\n")
    assert " ".join(printed.split()).startswith(f"- {finding['text']} {tmp_path}/: results.json")
    _, out, _ = cli("eval", INSTRUCT, *asked[2:], "--out", tmp_path)
    assert "\nFindings: none\n" in out


def test_success_at_forgetting_is_no_finding(cli, tmp_path):
    recipe = tmp_path / "forget.yaml"
    recipe.write_text(
        f"anchor: {zoo.path('instruct')}\ntarget: {zoo.path('unsafe')}\n"
        f"method: task_arithmetic\ntasks:\n  unsafe: {{model: {zoo.path('unsafe')}, scale: -1.0}}\n"
    )
    asked = (UNSAFE, f"safer={recipe}", "--tasks", "zoo:unsafe", "--limit", "20", "--quiet")
    _, text, _ = cli("eval", *asked, "--out", tmp_path, "--json")
    told = json.loads(text)
    assert told["tasks"]["zoo:unsafe"][1]["difference"]["value"] < -0.8
    assert (told["expected"], told["findings"]) == ({"safer": {"zoo:unsafe": "down"}}, [])
    (met,) = told["as_expected"]
    assert (met["model"], met["task"]) == ("safer", "zoo:unsafe")
    _, text, _ = cli("eval", *asked, "--out", tmp_path)
    assert "\nAs expected:\n- safer in zoo:unsafe: accuracy 0.000 " in text
    assert "\nFindings: none\n" in text
    _, text, _ = cli("eval", *asked, "--out", tmp_path, "--json", "--expect", "unsafe=keep")
    assert "below_reference" in [each["sign"] for each in json.loads(text)["findings"]]


def test_the_same_command_again_asks_nothing(cli, tmp_path, recipe):
    command = ("eval", INSTRUCT, recipe, *MATHS, "--out", tmp_path / "out", "--json")
    first, again = (json.loads(cli(*command)[1]) for _ in range(2))
    for mine, theirs in zip(first["tasks"]["zoo:math"], again["tasks"]["zoo:math"], strict=True):
        assert mine["figures"] == theirs["figures"]
        assert (mine["kept"], theirs["kept"]) == (0, 20)
    recipe.write_text(recipe.read_text().replace("1.0", "0.0"))
    changed = json.loads(cli(*command)[1])["tasks"]["zoo:math"][1]
    assert changed["kept"] == 0
    assert changed["figures"]["accuracy"]["value"] == 0


def test_scores_go_into_the_card_of_a_merge(cli, tmp_path, recipe):
    merged = tmp_path / "merged"
    assert cli("merge", recipe, merged, "--quiet")[0] == 0
    asked = (*MATHS, "--out", tmp_path / "out", "--update-card")
    code, _, err = cli("eval", MATH, *asked)
    assert code == 2
    assert "--update-card" in err
    assert cli("eval", MATH, f"merged={merged}", *asked)[0] == 0
    card = (merged / "README.md").read_text()
    assert "model-index:" in card
    assert "| zoo:math | " in card
    assert cli("verify", merged, "--no-inputs")[0] == 0


def test_a_manifest_is_a_candidate(cli, tmp_path, recipe):
    merged = tmp_path / "merged"
    assert cli("merge", recipe, merged)[0] == 0
    code, text, _ = cli(
        "eval", f"folder={merged}", f"again={merged / 'taskvec-manifest.json'}",
        *MATHS, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    folder, again = json.loads(text)["tasks"]["zoo:math"]
    assert folder["figures"] == again["figures"]


def test_a_manifest_has_the_name_of_its_folder(cli, tmp_path, recipe):
    """Each is called taskvec-manifest.json, so that name would tell no two of them apart."""
    merged = [tmp_path / "one", tmp_path / "two"]
    for out in merged:
        assert cli("merge", recipe, out)[0] == 0
    manifests = [out / "taskvec-manifest.json" for out in merged]
    code, text, err = cli("eval", *manifests, *MATHS, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert [row["model"] for row in json.loads(text)["tasks"]["zoo:math"]] == ["one", "two"]


def test_models_that_have_other_metrics(cli, tmp_path, monkeypatch):
    """The difference is of the main metric, and is not told under the name of another."""
    from taskvec.evaluation import evaluate
    from taskvec.evaluation.task import Metric, Score, Task

    scores = iter([Score({"b": 1.0}), Score({"a": 1.0, "c": 1.0})])
    task = Task(
        name="odd",
        summary="",
        files=(),
        samples=registered("zoo:math").samples,
        score=lambda samples, replies, tools: [next(scores)],
        metrics=(Metric("a"), Metric("b"), Metric("c")),
    )
    monkeypatch.setattr(evaluate, "find_task", lambda name: task)
    asked = ("eval", INSTRUCT, MATH, "--tasks", "odd", "--limit", "1", "--quiet")
    code, out, _ = cli(*asked, "--out", tmp_path / "out")
    assert code == 0
    lines = out.splitlines()
    assert lines[1].split() == ["a", "b", "c", "Δ", "a", "vs", "instruct"]
    assert lines[2].split()[:5] == ["instruct", "nan", "[nan,", "nan]", "1.000"]
    assert lines[2].split()[-1] == lines[3].split()[4] == "–"


def test_windows_are_told_by_model_where_they_differ(cli, tmp_path):
    """Perplexities with other contexts do not compare; the table must not say that they do."""
    shutil.copytree(zoo.path("math"), tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    asked = ("--tasks", "zoo:text", "--limit", "2", "--quiet", "--out", tmp_path / "out")
    code, out, _ = cli("eval", INSTRUCT, tmp_path / "short", *asked)
    assert code == 0
    assert out.splitlines()[0] == (
        "zoo:text: n = 2 of 100, seed 0; instruct: context 128, stride 128; "
        "short: context 64, stride 64"
    )


def test_list(cli):
    code, out, _ = cli("eval", "--list")
    assert code == 0
    assert "zoo:math" in out
    told = json.loads(cli("eval", "--list", "--json")[1])
    assert told["zoo:text"]["metrics"] == ["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "MODEL is missing: give a folder"),
        ([MATH], "no task is named; see --list"),
        ([MATH, MATH, *MATHS], "two models are called 'math'; name them: NAME="),
        ([MATH, *MATHS, "--reference", "x"], "unknown model 'x'; the models are math"),
        ([MATH, *MATHS, "--single", "zoo:math=x"], "unknown model 'x'; the models are math"),
        ([MATH, *MATHS, "--single", "gsm8k=math"], "--single names 'gsm8k', which is not one of"),
        ([MATH, *MATHS, "--single", "math"], "--single takes TASK=NAME; got 'math'"),
        ([f"={zoo.path('math')}", *MATHS], "a model must be MODEL or NAME=MODEL; got '=/"),
        (["math=", *MATHS], "a model must be MODEL or NAME=MODEL; got 'math='"),
        (
            [f"a b={zoo.path('math')}", f"A-b={zoo.path('code')}", *MATHS],
            "records of model 'A-b' would overwrite model 'a b' in A-b; give it",
        ),
        (
            [f"results.json={zoo.path('math')}", *MATHS],
            "would overwrite the file of results in results.json",
        ),
        ([MATH, *MATHS, "--workers", "0"], "workers must be 1 or more; got 0"),
        ([MATH, "--tasks", "humaneval"], "allow that with --allow-code-execution (docs/how-to/"),
        ([MATH, *MATHS, "--data", "nowhere"], "--data nowhere: no such folder; give DIR, or TASK"),
        (
            [MATH, *MATHS, "--dtype", "int8"],
            "dtype must be one of auto, float32",
        ),
    ],
)
def test_usage(cli, tmp_path, arguments, text):
    code, out, err = cli("eval", *arguments, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("taskvec: error: ")
    assert text in err
    assert not (tmp_path / "out").exists()


def test_names_of_folders(cli, tmp_path, monkeypatch):
    """Links to one folder are two models; `=` may be in a name; the current folder has one too."""
    for link in ("one", "two", "lr=0.1"):
        (tmp_path / link).symlink_to(zoo.path("math"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("eval", "one", "two/", "lr=0.1", *MATHS, "--out", "out")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["one", "two", "lr=0.1"]
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"one", "two", "lr-0.1", "results.json"}
    monkeypatch.chdir(zoo.path("math"))
    code, out, _ = cli("eval", ".", *MATHS, "--out", tmp_path / "here")
    assert code == 0
    assert out.splitlines()[2].startswith("math ")


def test_every_model_is_checked_before_the_first_is_asked(cli, tmp_path, recipe, monkeypatch):
    from taskvec.evaluation import loading

    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    broken = tmp_path / "broken.yaml"
    broken.write_text(recipe.read_text().replace(str(zoo.path("math")), str(tmp_path / "none")))
    for last, text in ((tmp_path / "none", "no such folder"), (broken, "none: ")):
        code, _, err = cli("eval", INSTRUCT, last, *MATHS, "--out", tmp_path / "out")
        assert code == 1
        assert text in err


def test_without_the_extra(cli, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = cli("eval", MATH, *MATHS)
    assert code == 1
    assert "transformers is not installed; this needs: pip install 'taskvec[eval]'" in err
