"""Methods of other distributions: found when they are named, told when they are broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import read_raw, run_cli
from tests.test_readme import ROOT, Block, blocks

from taskvec.errors import ParameterError, RecipeError
from taskvec.methods import METHODS, find_method, plugins
from taskvec.methods.method import Method
from taskvec.recipes.located import Document
from taskvec.recipes.reading import read_recipe
from taskvec.testing import MethodConformance

HALF = '''
from dataclasses import replace

from taskvec.methods.method import Method
from taskvec.methods.parameters import Parameter


def decide(inputs):
    table = inputs.layer_weights()
    return replace(table, weights=table.weights / 2, origin="half")


METHOD = Method(
    name="half", summary="half of everything", source="none", formula="θ + Σ λ τ / 2",
    decide=decide, parameters=(Parameter("PARAMETER", 1, "changes nothing", low=0, high=1),),
)
'''  # fmt: skip
INSTALLED = "method 'half' of their-half 1.2 cannot be used: "


def install(
    site: Path,
    modules: Mapping[str, str],
    points: Mapping[str, str],
    distribution: str = "their-half",
    version: str = "1.2",
) -> None:
    """A distribution as pip leaves it."""
    site.mkdir(exist_ok=True)
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[taskvec.methods]", *lines, ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python finds distributions in; what is imported from it is forgotten."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def half(site: Path) -> Path:
    install(site, {"their_half": HALF}, {"half": "their_half:METHOD"})
    return site


@pytest.fixture
def recipe(tmp_path: Path, family: dict[str, Path]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "instruct: family/instruct\ntasks: {math: {model: family/math, scale: 1}}\nmethod: half\n"
    )
    return path


def test_a_method_is_found_by_its_name(half):
    method = find_method("half")
    assert isinstance(method, Method)
    assert method.name == "half"
    assert "half" not in METHODS
    assert plugins.provider("half") == "their-half 1.2"
    assert plugins.provider("lata") is None
    with pytest.raises(ParameterError, match="unknown method 'halff'; did you mean 'half'"):
        find_method("halff")


def test_nothing_is_looked_for_where_a_method_is_ours(half, monkeypatch):
    def asked(**_: object) -> None:
        raise AssertionError("entry points were asked for")

    monkeypatch.setattr(plugins, "entry_points", asked)
    for name in METHODS:
        assert find_method(name) is METHODS[name]
    assert "their_half" not in sys.modules


def test_only_the_method_that_is_named_is_imported(site):
    install(site, {"their_half": HALF, "other": "raise RuntimeError"},
            {"half": "their_half:METHOD", "other": "other:METHOD"})  # fmt: skip
    find_method("half")
    assert "other" not in sys.modules


def test_a_merge_by_a_recipe_is_repeated_and_verified(half, tmp_path, recipe, cli):
    assert cli("merge", recipe, tmp_path / "out")[0] == 0
    manifest = json.loads((tmp_path / "out/taskvec-manifest.json").read_text())
    assert manifest["versions"]["method half"] == "their-half 1.2"
    recipe.write_text(recipe.read_text().replace("scale: 1", "scale: 0.5").replace(
        "method: half", "method: task_arithmetic"))  # fmt: skip
    assert cli("merge", recipe, tmp_path / "same")[0] == 0
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "same")
    plain = json.loads((tmp_path / "same/taskvec-manifest.json").read_text())
    assert not [key for key in plain["versions"] if key.startswith("method ")]
    assert cli("merge", tmp_path / "out/taskvec-manifest.json", tmp_path / "again")[0] == 0
    assert read_raw(tmp_path / "out") == read_raw(tmp_path / "again")
    assert cli("verify", tmp_path / "out", "--replay")[0] == 0


def test_the_method_of_a_stage_is_recorded(half, tmp_path, recipe, cli):
    recipe.write_text(
        "stages:\n  one: {instruct: family/instruct, tasks: {math: {model: family/math, scale: 1}},"
        " method: half}\ntarget: stage:one\nmethod: passthrough\n"
    )
    assert cli("merge", recipe, tmp_path / "out")[0] == 0
    manifest = json.loads((tmp_path / "out/taskvec-manifest.json").read_text())
    assert manifest["versions"]["method half"] == "their-half 1.2"


def test_the_method_that_weighs_layers_is_recorded(site, tmp_path, recipe, cli):
    text = HALF.replace("decide=decide", "needs_scan=True, decide=decide")
    install(site, {"their_half": text}, {"half": "their_half:METHOD"})
    recipe.write_text(recipe.read_text().replace("half", "magnitude\nlayer_weights: half"))
    code, _, err = cli("merge", recipe, tmp_path / "out")
    assert code == 0, err
    manifest = json.loads((tmp_path / "out/taskvec-manifest.json").read_text())
    assert manifest["versions"]["method half"] == "their-half 1.2"


def test_replay_without_the_plugin_says_what_to_install(half, tmp_path, recipe, cli, monkeypatch):
    assert cli("merge", recipe, tmp_path / "out")[0] == 0
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(half)])
    manifest = tmp_path / "out/taskvec-manifest.json"
    told = (
        "method 'half' is that of their-half 1.2, which is not installed; this needs: "
        "pip install 'their-half==1.2'\n"
    )
    assert cli("merge", manifest, tmp_path / "again") == (
        1, "", f"taskvec: error: {manifest}: {told}"
    )  # fmt: skip
    assert cli("verify", tmp_path / "out", "--replay") == (
        1, "", f"taskvec: error: {tmp_path / 'out'}: {told}"
    )  # fmt: skip
    assert cli("verify", tmp_path / "out")[0] == 0
    monkeypatch.setitem(METHODS, "half", METHODS["task_arithmetic"])
    code, _, err = cli("merge", manifest, tmp_path / "again")
    assert code == 1
    assert "method 'half' was that of their-half 1.2; taskvec's own has that name now" in err


def parameter(name: str) -> str:
    return HALF.replace("PARAMETER", name)


BROKEN: dict[str, tuple[str, str]] = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "several lines": ("raise ValueError('a\\nb')", "ValueError: a b"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "attribute": ("", "AttributeError: module 'their_half' has no attribute 'METHOD'"),
    "kind": ("METHOD = len", "it is <built-in function len>, not a Method"),
    "name": (HALF.replace('"half"', '"quarter"'), "its name is 'quarter'"),
    "alignment": (HALF.replace("source=", "alignment='matrix', source="),
                  "alignment must be in element | row | tensor; got 'matrix'"),
    "text": (HALF.replace("half of everything", "half\\nof all"),
             "summary, source and formula must be texts of one line each"),
    "scale": (HALF.replace("source=", "default_scale='1', source="),
                  "default_scale must be a finite number or None; got '1'"),
    "decide": (HALF.replace("decide=decide", "decide=None"),
               "decide must be a function; combine must be a function or None"),
    "list": (HALF + "\nMETHOD = replace(METHOD, parameters=[])", "parameters must be a tuple"),
    "no parameter": (HALF + "\nMETHOD = replace(METHOD, parameters=('x',))",
                     "'x' among its parameters is not a Parameter"),
    "twice": (HALF + "\nMETHOD = replace(METHOD, parameters=METHOD.parameters * 2)",
              "its parameter 'PARAMETER' is declared twice"),
    "default": (HALF.replace("low=0", "low=2"), "the default is not allowed: PARAMETER of half"),
    "key model": (parameter("model"), "its parameter 'model' is already a key of recipes"),
    "key scale": (parameter("scale"), "its parameter 'scale' is already a key of recipes"),
    "key over": (parameter("over"), "its parameter 'over' is already a key of recipes"),
    "key name": (parameter("name"), "its parameter 'name' is already a key of recipes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_told_in_one_line(site, cli, recipe, tmp_path, case):
    text, told = BROKEN[case]
    install(site, {"their_half": text}, {"half": "their_half:METHOD"})
    code, out, err = cli("merge", recipe, tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith(f"taskvec: error: {recipe}:3: {INSTALLED}{told}")
    assert err.endswith("; repair or uninstall it\n")
    assert err.count("\n") == 1
    code, out, err = cli("methods")
    assert code == 0
    assert "lata" in out
    assert "half" not in out
    assert err.startswith(f"taskvec: warning: {INSTALLED}{told}")
    assert err.count("\n") == 1


COMBINE = "\nMETHOD = replace(METHOD, combine=lambda b: {})"
FAILING: dict[str, tuple[str, str]] = {
    "decide": (HALF.replace("    table = ", "    1 / 0\n    table = "),
               ": ZeroDivisionError: division by zero"),
    "no table": (HALF.replace("    return replace", "    return str"),
                 ": TypeError: "),
    "None": (HALF.replace("    return replace", "    return None and replace"),
             ": decide gave None, not a Table or Need"),
    "tasks": (HALF.replace("origin=", "tasks=('x',), origin="),
              ": the table has other tasks or tensors than the merge"),
    "shape": (HALF.replace("table.weights / 2", "table.weights[0]"),
              ": the table has weights of shape (32,), expected (1, 32), or other target factors"),
    "target": (HALF.replace("origin=", "target=table.weights, origin="),
               ": the table has weights of shape (1, 32), expected (1, 32), or other target"),
    "nan": (HALF.replace("table.weights / 2", "table.weights * float('nan')"),
            ": a weight of the table is not finite"),
    "combine": (HALF + COMBINE.format("b.nothing"),
                " in tensor 'lm_head.weight': AttributeError: "),
    "block": (HALF + COMBINE.format("b.target[:1]"),
              " in tensor 'lm_head.weight': combine gave shape (1,), expected ("),
    "number": (HALF + COMBINE.format("0.0"),
               " in tensor 'lm_head.weight': combine gave float, not an array of floating"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_a_plugin_that_fails_is_told_in_one_line(site, cli, recipe, tmp_path, case):
    text, told = FAILING[case]
    install(site, {"their_half": text}, {"half": "their_half:METHOD"})
    code, out, err = cli("merge", recipe, tmp_path / "out", "--threads", "1")
    assert (code, out) == (1, "")
    assert err.startswith(f"taskvec: error: method 'half' of their-half 1.2 failed{told}")
    assert err.endswith("; report it to its authors\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_a_plugin_refuses_is_told_in_its_own_words(site, cli, recipe, tmp_path):
    refuse = (
        "    from taskvec.errors import ParameterError\n"
        "    raise ParameterError('half takes two tasks; got one')\n    table = "
    )
    text = HALF.replace("    table = ", refuse)
    install(site, {"their_half": text}, {"half": "their_half:METHOD"})
    told = "taskvec: error: half takes two tasks; got one\n"
    assert cli("merge", recipe, tmp_path / "out") == (2, "", told)


def test_a_name_must_be_one_that_recipes_can_have(site):
    install(site, {"their_half": HALF.replace('"half"', '"Half!"')}, {"Half!": "their_half:METHOD"})
    with pytest.raises(ParameterError, match="a name must be small letters, digits and _"):
        find_method("Half!")


def test_a_broken_plugin_does_not_stop_others(half, cli, recipe, tmp_path):
    install(half, {"bad": "1 / 0"}, {"bad": "bad:METHOD"}, "their-bad")
    code, _, err = cli("merge", recipe, tmp_path / "out")
    assert (code, err) == (0, "")
    code, _, err = cli("merge", recipe, tmp_path / "own", "--method", "task_arithmetic")
    assert (code, err) == (0, "")


def test_a_name_of_ours_stays_ours(site, cli, recipe, tmp_path):
    install(site, {"theirs": "raise RuntimeError"}, {"lata": "theirs:METHOD"}, "their-lata")
    assert find_method("lata") is METHODS["lata"]
    code, out, err = cli("methods", "--json")
    assert code == 0
    assert [m["name"] for m in json.loads(out)] == [*METHODS]
    assert err == (
        "taskvec: warning: method 'lata' of their-lata 1.2 is not used: taskvec's own has that "
        "name; rename it\n"
    )


def test_two_plugins_of_one_name(half, cli, recipe, tmp_path):
    install(half, {"rival": HALF}, {"half": "rival:METHOD"}, "a-rival", "3")
    told = "method 'half' is given by a-rival 3 and their-half 1.2; uninstall one of them"
    code, _, err = cli("merge", recipe, tmp_path / "out")
    assert (code, err) == (2, f"taskvec: error: {recipe}:3: {told}\n")
    code, _, err = cli("methods")
    assert (code, err) == (0, f"taskvec: warning: {told}\n")
    assert cli("merge", recipe, tmp_path / "own", "--method", "task_arithmetic")[0] == 0


def test_what_recipes_say_beside_parameters_is_reserved():
    """The keys that a recipe with no parameters knows."""

    def known(data: dict[str, Any]) -> set[str]:
        with pytest.raises(RecipeError, match="unknown key") as caught:
            read_recipe(Document(data, "r"), Path())
        return set(str(caught.value).partition("known: ")[2].split(", ")) - {""}

    task = {"model": "x", "scale": 1, "zzz": 1}
    keys = known({"tasks": {"t": task}, "method": "task_arithmetic"})
    assert keys | {"name"} == set(plugins.RESERVED)


# The command


def test_the_list_has_methods_of_others_with_their_distribution(half, cli):
    code, out, err = cli("methods")
    assert (code, err) == (0, "")
    assert "half of everything  (their-half 1.2)\n" in out
    found = {m["name"]: m for m in json.loads(cli("methods", "--json")[1])}
    assert found["half"]["distribution"] == "their-half 1.2"
    assert {found[name]["distribution"] for name in METHODS} == {"taskvec"}
    code, out, err = cli("methods", "half")
    assert (code, err) == (0, "")
    assert "  from their-half 1.2\n" in out
    assert "  PARAMETER        1  [0, 1]  changes nothing\n" in out
    (only,) = json.loads(cli("methods", "half", "--json")[1])
    assert only == found["half"]
    assert "half" not in cli("methods", "--markdown")[1]


def test_the_list_has_one_line_a_method(cli):
    lines = cli("methods")[1].splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(named) == sorted(METHODS)
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("name", METHODS)
def test_one_method_is_shown_whole(cli, name):
    method = METHODS[name]
    out = cli("methods", name)[1]
    assert out.startswith(f"{name}: {method.summary}\n")
    for text in (method.formula, method.source, *(p.name for p in method.parameters)):
        assert text in out


def test_a_page_is_of_all_methods(cli):
    for more in (["lata"], ["--json"]):
        code, out, err = cli("methods", "--markdown", *more)
        assert (code, out) == (2, "")
        assert "--markdown is a page of all methods; give it alone" in err


def test_another_process_finds_it(half, tmp_path):
    code, out, err = run_cli("methods", "half", "--json", cwd=tmp_path, PYTHONPATH=str(half))
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["distribution"] == "their-half 1.2"


def test_help_asks_for_no_entry_points():
    code = (
        "import contextlib, sys\nfrom taskvec.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "print('importlib.metadata' in sys.modules, 'taskvec.methods' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.stdout.endswith("False False\n"), done.stdout + done.stderr


# The pages


def test_the_page_of_all_methods_is_up_to_date(cli):
    """If not: taskvec methods --markdown > docs/methods.md."""
    assert (ROOT / "docs" / "methods.md").read_text("utf-8") == cli("methods", "--markdown")[1]


@pytest.fixture
def page(site: Path) -> list[Block]:
    """Blocks of the page about writing a method; its package is installed, as pip leaves it."""
    found = blocks(ROOT / "docs" / "how-to" / "write-a-method.md")
    files = {name[1]: b.text for b in found if (name := re.match(r"# (\S+\.\w+)\n", b.text))}
    assert set(files) == {"taskvec_bounded.py", "pyproject.toml", "test_taskvec_bounded.py"}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    (site / "test_taskvec_bounded.py").write_text(files["test_taskvec_bounded.py"])
    install(
        site,
        {"taskvec_bounded": files["taskvec_bounded.py"]},
        project["entry-points"]["taskvec.methods"],
        project["name"],
        project["version"],
    )
    return found


def test_the_command_on_the_page_shows_what_it_says(page, cli):
    shown = next(b.text for b in page if "$ taskvec methods bounded\n" in b.text)
    assert cli("methods", "bounded") == (0, shown.partition("methods bounded\n")[2], "")


def test_the_recipe_on_the_page_merges(page, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("zoo", "copy", "--to", "zoo")[0] == 0
    (tmp_path / "recipe.yaml").write_text(
        next(b.text for b in page if b.text.startswith("instruct: zoo/instruct\n"))
    )
    assert cli("merge", "recipe.yaml", "out")[0] == 0
    assert cli("verify", "out", "--replay")[0] == 0


def test_the_tests_on_the_page_pass(page, site):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        capture_output=True, text=True, cwd=site, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    promised = [name for name in vars(MethodConformance) if name.startswith("test_")]
    assert f"{len(promised) + 1} passed" in done.stdout
