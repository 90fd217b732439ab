"""`taskvec import`, and a mergekit configuration in the place of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.conftest import read_raw, run_cli, write_family

CONFIG = """\
merge_method: task_arithmetic
base_model: instruct
models:
  - model: math
    parameters: {weight: [0.2, 0.8], densty: 0.5}
  - model: code
    parameters: {weight: 0.5}
out_dtype: float32
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_family(tmp_path)
    (tmp_path / "c.yml").write_text(CONFIG)
    return tmp_path


def test_recipe_to_standard_output_and_differences_to_standard_error(root):
    code, out, err = run_cli("import", "c.yml", cwd=root)
    assert code == 0
    assert yaml.safe_load(out)["tasks"]["math"]["scale"]["head"] == 0.8
    lines = err.splitlines()
    assert lines[0] == "taskvec: c.yml: what differs from mergekit 0.1.5"
    assert lines[1].split() == ["line", "mergekit", "here", "to", "get", "mergekit's"]
    assert lines[2].split()[:4] == ["5", "the", "key", "'densty'"]
    assert "  left out" in lines[2]
    assert len(lines) == 2 + 3
    assert run_cli("import", "c.yml", "--quiet", cwd=root) == (0, out, "")


def test_faithful_says_so(root):
    code, out, err = run_cli("import", "c.yml", "--faithful", cwd=root)
    assert code == 0
    assert "\n# Imported from mergekit, faithfully (random masks have other bits)" in out
    assert yaml.safe_load(out)["tasks"]["math"]["scale"]["head"] == 0.2
    assert "the same, by final_norm and head 0.2" in err


def test_json_has_recipe_and_notes(root):
    code, out, err = run_cli("import", "c.yml", "--json", cwd=root)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["recipe"]["anchor"] == "instruct"
    assert found["faithful"] is False
    assert found["notes"][0]["line"] == 5
    assert set(found["notes"][0]) == {"line", "theirs", "ours", "switch"}


def test_the_recipe_merges_and_so_does_the_configuration(root):
    (root / "recipes").mkdir()
    assert run_cli("import", "c.yml", "-o", "recipes/r.yaml", cwd=root)[:2] == (0, "")
    recipe = yaml.safe_load((root / "recipes" / "r.yaml").read_text())
    assert recipe["anchor"] == "../instruct"
    assert run_cli("merge", "recipes/r.yaml", "one", cwd=root)[0] == 0
    code, _, err = run_cli("merge", "c.yml", "two", cwd=root)
    assert code == 0
    assert err.count("taskvec: c.yml: what differs from mergekit 0.1.5\n") == 1
    assert err.count("densty") == 1
    assert run_cli("merge", "c.yml", "--quiet", "three", cwd=root)[2] == ""
    assert read_raw(root / "one") == read_raw(root / "two")
    assert (
        yaml.safe_load((root / "two" / "taskvec.yaml").read_text())["tasks"]["code"]["scale"] == 0.5
    )


def test_flags_go_beside_a_configuration_and_paths_are_of_the_current_folder(root):
    (root / "configs").mkdir()
    (root / "c.yml").rename(root / "configs" / "c.yml")
    code, out, _ = run_cli("plan", "configs/c.yml", "--dtype", "float16", "--json", cwd=root)
    assert code == 0
    assert json.loads(out)["scale"]["code"] == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("experts: []\n", "c.yml:1: building a mixture of experts (mergekit-moe) is not supported"),
        ("instruct: a\n", "c.yml:1: merge_method is missing"),
        (CONFIG + "tokenizer: {tokens: {x: {source: math}}}\n", "c.yml:9: transplanting tokens"),
        ("merge_method: [\n", "c.yml:2: is not YAML"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(root, text, says):
    (root / "c.yml").write_text(text)
    code, out, err = run_cli("import", "c.yml", cwd=root)
    assert (code, out) == (2, "")
    assert err.startswith(f"taskvec: error: {says}")
    assert err.count("\n") == 1


def test_nothing_is_written_where_it_cannot_be(root):
    code, _, err = run_cli("import", "c.yml", "-o", "c.yml/r.yaml", cwd=root)
    assert code == 1
    assert "c.yml/r.yaml: cannot be written" in err


def test_merge_faithful_gives_what_the_imported_recipe_gives(root):
    assert run_cli("import", "c.yml", "--faithful", "-o", "r.yaml", cwd=root)[0] == 0
    assert run_cli("merge", "r.yaml", "one", cwd=root)[0] == 0
    code, _, err = run_cli("merge", "--faithful", "c.yml", "two", cwd=root)
    assert code == 0, err
    assert run_cli("merge", "c.yml", "ours", cwd=root)[0] == 0
    assert read_raw(root / "one") == read_raw(root / "two") != read_raw(root / "ours")
    code, _, err = run_cli("merge", "r.yaml", "four", "--faithful", cwd=root)
    assert code == 2
    assert "--faithful goes with a mergekit configuration" in err
