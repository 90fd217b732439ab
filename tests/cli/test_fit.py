"""`taskvec fit`: a recipe whose merge is the fitted one, and a line for each fault."""

from __future__ import annotations

import json
import re
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from tests.cli.conftest import strict  # noqa: E402
from tests.coefficients.fit_models import PROMPTS, Made, weight  # noqa: E402

import taskvec as tv  # noqa: E402

QUICK = ("--seeds", "1", "--held-out", "0.4", "--max-new-tokens", "6", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tasks, and a model that has one of them in each block."""
    found = Made(tmp_path_factory.mktemp("family"))
    found.save("planted", {"a": weight(0), "b": weight(1)})
    found.lines("prompts", [{"text": text} for text in PROMPTS])
    found.lines("short", [{"text": text} for text in PROMPTS[:2]])
    (found.folder / "recipe.yaml").write_text(
        "instruct: instruct\ntasks:\n  a: {model: a}\n  b: {model: b}\nmethod: task_arithmetic\n"
    )
    return found


PLANTED = ("--steps", "30", "--rate", "0.1", "--granularity", "block")


def planted(made, out, *more):
    prompts = ["--prompts", f"x={made.folder}/prompts.jsonl"]
    teacher = ["--teacher", f"x={made.folder}/planted"]
    return [f"{made.folder}/recipe.yaml", *prompts, *teacher, *QUICK, *PLANTED, "--out", out, *more]


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A fit of the planted model: its folder, and what was printed."""
    from click.testing import CliRunner

    from taskvec.cli.commands import make_group

    out = tmp_path_factory.mktemp("fits") / "fit"
    done = CliRunner().invoke(
        make_group(), ["fit", *planted(made, str(out), "--quiet")], standalone_mode=False
    )
    assert done.exception is None, done.exception
    return out, done.stdout, done.stderr


def test_losses_choice_and_what_goes_on_are_printed(run):
    out, printed, said = run
    assert said == ""
    lines = printed.splitlines()
    assert "8 held-out prompts" in lines[0]
    rows = {line.split("  ")[0]: line.split()[1:] for line in lines}
    assert {"target", "start", "one weight", "layers"} <= rows.keys()
    assert re.search(r"Chosen: weights by block: .* \+\d", printed)
    table = tv.load_table(out / "table.csv")
    for task in ("a", "b"):
        values = list(table.of(task).values())
        mean = sum(values) / len(values)
        assert rows[task] == [f"{x:.4f}" for x in (mean, min(values), max(values))] + ["–"]
    assert f"{out}/: table.csv, recipe.yaml, fit.json" in lines
    assert lines[-1] == f"Merge: taskvec merge {out / 'recipe.yaml'} OUT"
    assert {path.name for path in out.iterdir()} >= {"table.csv", "recipe.yaml", "fit.json"}


def test_the_written_recipe_is_the_fitted_merge(cli, made, run, tmp_path):
    out, *_ = run
    for name in ("once", "again"):
        assert cli("merge", out / "recipe.yaml", tmp_path / name, "--quiet")[0] == 0
    assert cli("verify", tmp_path / "once", "--replay", "--quiet")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tv.fit(  # the same fit: it goes on in the folder, where there is nothing left to do
            made.folder / "recipe.yaml",
            prompts={"x": str(made.folder / "prompts.jsonl")},
            teachers={"x": str(made.folder / "planted")},
            settings={
                "seeds": 1, "held_out": 0.4, "max_new_tokens": 6,
                "steps": 30, "rate": 0.1, "granularity": "block",
            },
            out=out,
        )  # fmt: skip
    assert found.chosen == "layers"
    tv.merge(found.recipe, tmp_path / "python", table=found.table)
    merged = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again", "python")
    ]
    assert merged[0] == merged[1] == merged[2]
    assert merged[0] != (made.folder / "instruct" / "model.safetensors").read_bytes()


def test_json_is_the_record_and_a_family_may_be_flags(cli, made, tmp_path):
    out = tmp_path / "fit"
    code, printed, said = cli(
        "fit", "--instruct", made.folder / "instruct", "--task", f"a={made.folder}/a:0.3",
        "--method", "task_arithmetic", "--prompts", f"a={made.folder}/prompts.jsonl",
        "--prompts", f"keep={made.folder}/short.jsonl", "--weight", "keep=0.5",
        "--start", "recipe", "--granularity", "model", "--steps", "2", "--no-hold", "--seed", "7",
        *QUICK, "--out", out, "--json", "--quiet",
    )  # fmt: skip
    assert code == 0, said
    told = strict(printed)
    assert told == json.loads((out / "fit.json").read_text())
    assert told["chosen"] == "one weight"
    assert told["settings"]["seed"] == 7
    assert told["settings"]["hold"] is False
    sources = told["sources"]
    assert {name: each["teacher"] for name, each in sources.items()} == {
        "a": "task a", "keep": "target",
    }  # fmt: skip
    assert sources["a"]["weight"] == pytest.approx(2 * sources["keep"]["weight"])
    start = cli("fit", f"{made.folder}/recipe.yaml", "--prompts",
                f"a={made.folder}/prompts.jsonl", *QUICK, "--steps", "1", "--granularity", "model",
                "--start", "0.3", "--low", "0.3", "--high", "0.4", "--out", tmp_path / "bounded",
                "--json", "--quiet")  # fmt: skip
    assert start[0] == 0, start[2]
    for row in (tmp_path / "bounded" / "table.csv").read_text().splitlines()[1:]:
        assert all(0.3 <= float(value) <= 0.4 for value in row.split(",")[1:])


def test_warnings_are_lines_on_standard_error(cli, made, tmp_path):
    """`keep` without prompts has those of the others."""
    code, _, said = cli(
        "fit", f"{made.folder}/recipe.yaml", "--prompts", f"a={made.folder}/prompts.jsonl",
        "--teacher", "keep=target", "--granularity", "model", "--steps", "1", *QUICK,
        "--out", tmp_path / "fit", "--quiet",
    )  # fmt: skip
    assert code == 0
    assert said.count("\n") == 1
    assert said.startswith("taskvec: warning: source 'keep' has no prompts")


def test_a_fit_of_other_settings_is_refused_in_a_folder(cli, made, run):
    out, *_ = run
    code, printed, said = cli("fit", *planted(made, out, "--stay", "0.1"))
    assert (code, printed) == (1, "")
    assert str(out) in said
    assert "choose another folder" in said


@pytest.mark.parametrize(
    ("flags", "code", "subject", "remedy"),
    [
        ("--prompts a", 2, "--prompts", "NAME=FILE"),
        ("--prompts a={p} --prompts a={p}", 2, "--prompts a", "name of its own"),
        ("--prompts a={f}/none.jsonl", 1, "none.jsonl", "no such file"),
        ("--prompts aa={p}", 2, "'aa' is not a task", "give it one: 'target'"),
        ("--prompts a={p} --teacher b=target --teacher c=a", 2, "'c' has no prompts", "known: "),
        ("--prompts x={p} --teacher x=plantet", 2, "'plantet'", "'target'"),
        ("--prompts a={p} --weight a=much", 2, "--weight a=much", "number"),
        ("--prompts a={p} --weight a=0", 2, "weight of source 'a'", "above 0"),
        ("--prompts a={p} --start nowhere.csv", 2, "--start nowhere.csv", "a number, lata, recipe"),
        ("--prompts a={p} --start lata", 2, "start 'lata'", "needs a scale"),
        ("--prompts a={p} --start 3", 2, "start must lie within", "widen low and high"),
        ("--prompts a={p} --granularity layer", 2, "granularity", "'layer'"),
        ("--prompts a={p} --objective guess", 2, "objective", "likelihood"),
        ("--prompts a={p} --objective likelihood", 1, "source 'a'", "prompt and answer"),
        ("--prompts a={p} --fields text", 2, "--fields", "USE=NAME"),
        ("--prompts a={p} --seeds 0", 2, "seeds", "1 or more"),
        ("--teacher a=target", 2, "--prompts", "usage:"),
    ],
)
def test_faults_are_one_line(cli, made, tmp_path, flags, code, subject, remedy):
    words = flags.format(p=made.folder / "prompts.jsonl", f=made.folder).split()
    found, printed, said = cli("fit", made.folder / "recipe.yaml", *words, "--out", tmp_path / "o")
    assert (found, printed) == (code, ""), said
    assert said.startswith("taskvec: error: ")
    assert subject in said
    assert remedy in said
    assert said.count("\n") == 1 + ("usage:" in said)
    assert not (tmp_path / "o" / "recipe.yaml").exists()
