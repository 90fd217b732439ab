"""`taskvec propose`: λ and a scheme, from the weights alone."""

import json

import pytest
import yaml

from taskvec import zoo
from taskvec.cli.main import main
from taskvec.recipes.writing import SCHEMA_FILE

FAMILY = {
    "base": str(zoo.path("base")),
    "instruct": str(zoo.path("instruct")),
    "tasks": {task: {"model": str(zoo.path(task))} for task in ("math", "code")},
}


def propose(tmp_path, recipe, *flags):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return main(["propose", str(file), "--quiet", *flags])


def test_proposals_are_shown_with_what_they_rest_on(tmp_path, capsys):
    assert propose(tmp_path, FAMILY | {"method": "task_arithmetic"}) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].endswith("(task_arithmetic)")
    assert lines[1].split()[:5] == ["proposal", "math", "share", "code", "share"]
    names = [line.split()[0] for line in lines[2:9]]
    assert names == ["radius", "radius_shared", "metagpt", "nan", "average", "constant_0.3",
                     "constant_0.5"]  # fmt: skip
    assert "arXiv:2406.11385, as we read it" in lines[4]
    assert "sign conflict math, code: " in out
    assert "scheme: none (task_arithmetic)" in out


def test_proposals_as_json_and_a_recipe_that_merges(tmp_path, capsys):
    out = tmp_path / "proposed.yaml"
    assert propose(tmp_path, FAMILY | {"method": "lata"}, "--json", "--write-recipe", str(out)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["weights"].startswith("lata: scheme logarithmic")
    assert told["scheme"]["scheme"] is None
    scales = told["proposals"]["radius_shared"]["scale"]
    written = yaml.safe_load(out.read_text())
    assert {task: entry["scale"] for task, entry in written["tasks"].items()} == {
        task: round(scale, 4) for task, scale in scales.items()
    }
    assert out.read_text().startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    assert json.loads((tmp_path / SCHEMA_FILE).read_text())["properties"]["tasks"]
    assert main(["merge", str(out), str(tmp_path / "merged"), "--quiet"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_another_proposal_can_be_written(tmp_path, capsys):
    out = tmp_path / "proposed.yaml"
    recipe = FAMILY | {"method": "task_arithmetic"}
    assert propose(tmp_path, recipe, "--proposal", "average", "--write-recipe", str(out)) == 0
    written = yaml.safe_load(out.read_text())
    assert [entry["scale"] for entry in written["tasks"].values()] == [0.5, 0.5]


def test_a_family_without_a_base_has_proposals_but_no_scheme(tmp_path, capsys):
    recipe = {"anchor": FAMILY["instruct"], "tasks": FAMILY["tasks"], "method": "task_arithmetic"}
    assert propose(tmp_path, recipe, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scheme"]["reasons"] == ["no base: similarities cannot be known"]
    assert told["proposals"]["radius"]["scale"]["math"] > 0


def with_scale(scale):
    tasks = {task: dict(entry) for task, entry in FAMILY["tasks"].items()}
    tasks["math"]["scale"] = scale
    return FAMILY | {"tasks": tasks, "method": "task_arithmetic"}


@pytest.mark.parametrize(
    ("recipe", "flags", "text"),
    [
        (FAMILY | {"method": "ties"}, (),
         "method ties: λ can be proposed from a scan for lata and task_arithmetic only"),
        (with_scale(-1), (),
         "task 'math' has scale -1: λ can be proposed only for addition; remove it"),
        (with_scale({"depth": [0.2, 0.8], "outside": 0.2}), (),
         "scale of task 'math' differs by layer; give one number, or none"),
        (FAMILY, ("--proposal", "meta"),
         "--proposal: did you mean 'metagpt'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_proposed_is_refused(tmp_path, capsys, recipe, flags, text):
    assert propose(tmp_path, {"method": "task_arithmetic"} | recipe, *flags) == 2
    assert text in capsys.readouterr().err
