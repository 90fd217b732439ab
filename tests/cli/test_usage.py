"""The contract of the command line: help, imports, usage, order of arguments, encodings."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from typing import Any

import click
import pytest

from taskvec.cli.commands import Option, Verb, make_group
from taskvec.cli.main import main
from taskvec.cli.verbs import VERBS

LIGHT = """
import contextlib, io, sys
from taskvec.cli.main import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main(sys.argv[1:])
heavy = {"numpy", "numba", "torch", "transformers", "yaml", "altair", "pydantic", "rich"}
verbs = {m for m in sys.modules if m.startswith("taskvec.cli.")}
light = {"taskvec.cli." + m for m in ("main", "commands", "streams", "stopping", "verbs")}
print(sorted(heavy & set(sys.modules)), sorted(verbs - light))
"""


def verb(name: str) -> Verb:
    found = make_group().get_command(click.Context(make_group()), name)
    assert isinstance(found, Verb)
    return found


# --- help and imports ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    for name, text in VERBS.items():
        assert f"\n  {name} " in out
        assert text.split()[0] in out


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb(cli, name):
    code, out, err = cli(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: taskvec {name} ")
    words = " ".join(out.split())
    assert VERBS[name][1:].split(",")[0] in words
    for param in verb(name).params:
        assert not isinstance(param, Option) or all(flag in words for flag in param.opts)
    assert cli(name, "-h") == cli("help", name) == (code, out, err)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_nothing_heavy_and_no_verb_is_imported_for_help(arguments):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[] []\n", done.stderr


@pytest.mark.parametrize("name", VERBS)
def test_nothing_heavy_is_imported_for_the_help_of_a_verb(name):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, name, "-h"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("[] ["), done.stderr


def test_version_has_the_name(cli):
    code, out, err = cli("--version")
    assert (code, err) == (0, "")
    name, version = out.split()
    assert (name, version.count(".")) == ("taskvec", 2)


# --- declarations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_the_general_options(name):
    flags = {flag for param in verb(name).params for flag in param.opts}
    assert {"-q", "--quiet", "-v", "--verbose"} <= flags
    no_result = ("schema", "completion", "help")
    assert ("--json" in flags) == (name not in no_result)


WRITING = ("demo", "merge", "forget", "extract", "import", "eval", "search", "sweep", "pairs",
           "propose", "fit", "finetune", "disentangle", "zoo", "schema", "plan")  # fmt: skip


@pytest.mark.parametrize("name", WRITING)
def test_every_verb_that_writes_takes_out(name):
    assert any({"-o", "--out"} <= set(param.opts) for param in verb(name).params)


@pytest.mark.parametrize(
    "name",
    ["scan", "plan", "merge", "forget", "extract", "search", "sweep", "pairs", "propose", "fit"],
)
def test_every_verb_that_takes_a_recipe_takes_settings_and_a_seed(name):
    flags = {flag for param in verb(name).params for flag in param.opts}
    assert {"--set", "--seed"} <= flags


def test_a_flag_is_a_keyword_of_the_same_name():
    for name in VERBS:
        for param in verb(name).params:
            words = [flag.strip("-").replace("-", "_") for flag in param.opts]
            keyword = param.name.removeprefix("out_")  # of a recipe's `out`
            assert keyword in words or keyword in ("settings", "model_dtype")


# --- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mrege"], "unknown verb 'mrege'; did you mean 'merge'?"),
        (["help", "mrege"], "unknown verb 'mrege'; did you mean 'merge'?"),
        (["merge"], "OUT is missing"),
        (["merge", "r.yaml"], "OUT is missing: r.yaml is a recipe"),
        (["merge", "r.yaml", "--task", "m=y:1"], "OUT is missing: r.yaml is a recipe"),
        (["extract", "r.yaml"], "OUT is missing: r.yaml is a recipe"),
        (["merge", "a", "b", "c"], "expected [RECIPE] OUT; got 3 paths: 'a', 'b', 'c'"),
        (["merge", "a", "b", "-o", "c"], "expected [RECIPE] beside --out; got 2 paths: 'a', 'b'"),
        (["verify"], "Missing argument 'OUT'"),
        (["eval"], "MODEL is missing"),
        (["sweep", "r.yaml"], "--vary is missing"),
        (["scan", "--sort", "size"], "Invalid value for '--sort': 'size' is not one of"),
        (
            ["merge", "out", "--threads", "0"],
            "Invalid value for '--threads': 0 is not",
        ),
        (["merge", "out", "--threads", "two"], "'--threads': 'two' is not a valid whole number"),
        (["scan", "--seed", "x"], "'--seed': 'x' is not a valid whole number"),
        (["eval", "m", "--seed", "x"], "'--seed': 'x' is not a valid whole number"),
        (["demo", "--n", "x"], "'--n': 'x' is not a valid whole number"),
        (["merge", "out", "--treads", "2"], "No such option '--treads'"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_usage(cli, arguments, message):
    """One line, then the usage of the verb."""
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    error, usage = err.splitlines()
    assert error.startswith("taskvec: error: ")
    assert message in error
    assert usage.startswith("taskvec: usage: taskvec ")


def test_no_verb_is_the_help_and_a_usage_error(cli):
    code, out, err = cli()
    assert (code, out) == (2, "")
    assert "merge" in err


def test_the_closest_option_is_proposed(cli):
    assert "'--threads'" in cli("merge", "out", "--treads", "2")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "out"], "give a recipe, or --task NAME=MODEL[:SCALE]"),
        (["scan"], "give a recipe, or --task NAME=MODEL[:SCALE]"),
        (["scan", "--task", "math"], "--task takes NAME=MODEL or NAME=MODEL:SCALE; got 'math'"),
        (["scan", "--task", "=x"], "--task takes NAME=MODEL or NAME=MODEL:SCALE; got '=x'"),
        (["scan", "--task", "m="], "--task takes NAME=MODEL or NAME=MODEL:SCALE; got 'm='"),
        (["scan", "--task", "m/x=y"], "--task m/x=y: task name 'm/x'"),
        (["scan", "--task", "m=y", "--anchor", "a", "--instruct", "b"], "--anchor: anchor and"),
        (["scan", "--task", "m=y", "--task", "m=z"], "--task m is given twice"),
        (["merge", "out", "--task", "m=y"], "--task m=y: scale of task 'm' is missing"),
        (["merge", "out", "--task", "m=y:1e999"], "--task m=y:1e999: tasks.m.scale must be a"),
        (["merge", "out", "--task", "m=y:nan"], "--task m=y:nan: tasks.m.scale must be a"),
        (["merge", "out", "--task", "m=y:-inf"], "--task m=y:-inf: tasks.m.scale must be a"),
        (["merge", "out", "--task", "m=y:1", "--method", "lta"], "--method lta: unknown method"),
        (["merge", "out", "--task", "m=y:1", "--threshold", "1.5"], "--threshold 1.5: "),
        (["merge", "out", "--task", "m=y:1", "--scheme", "cubic"], "--scheme cubic: scheme"),
        (["merge", "out", "--task", "m=y:1", "--method", "average", "--scheme", "linear"],
         "--scheme linear: unknown key 'scheme'"),
        (["merge", "out", "--task", "m=y:1", "--dtype", "int8"], "--dtype int8: "),
        (["merge", "out", "--task", "m=y:1", "--shard-size", "big"], "--shard-size big: "),
        (["merge", "out", "--task", "m=y:1", "--shard-size", "5"], "--shard-size 5: has no unit"),
        (["merge", "out", "--task", "m=y:1", "--precision", "half"], "--precision half: "),
        (["merge", "out", "--task", "m=y:1", "--vocabulary", "x"], "--vocabulary x: "),
        (["merge", "out", "--task", "m=y:1", "--set", "sceme=linear"], "--set sceme=linear: unkn"),
        (["merge", "out", "--task", "m=y:1", "--set", "m.sceme=linear"], "--set m.sceme=linear: u"),
        (["merge", "out", "--task", "m=y:1", "--set", "math.scale=1"], "--set math.scale=1: no ta"),
        (["merge", "out", "--task", "m=y:1", "--set", "threshold"], "--set takes NAME=VALUE"),
        (["merge", "no.yaml", "out"], "no.yaml: cannot be read: No such file or directory"),
        (["methods", "soup"], "unknown method 'soup'; known: "),
        (["forget", "out", "--task", "m=y:-1"], "forget subtracts: scale of task 'm'"),
        (["zoo", "copy"], "copy needs --to DIR"),
    ],
)  # fmt: skip
def test_usage_that_is_known_later(tmp_path, cli, monkeypatch, arguments, message):
    """One line; about a flag, it names the flag."""
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"taskvec: error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- order ---------------------------------------------------------------------------------------


def orders(words: list[list[Any]]) -> list[list[Any]]:
    return [[word for part in order for word in part] for order in itertools.permutations(words)]


@pytest.mark.parametrize("number", range(6))
def test_positionals_and_flags_go_in_any_order(tmp_path, cli, recipe, number):
    parts = [[recipe], ["--quiet", "--seed", "1"], [tmp_path / "out"]]
    order = orders(parts)[number]
    if order.index(recipe) > order.index(tmp_path / "out"):
        order = [*order, "--out", tmp_path / "out"]
        order.remove(tmp_path / "out")
    code, out, err = cli("merge", *order)
    assert code == 0, err
    assert "fingerprint" in out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "positionals", "flags"),
    [
        ("verify", ["X"], ["--replay"]), ("inspect", ["X"], ["--norms"]),
        ("scan", ["r.yaml"], ["--full"]), ("plan", ["r.yaml"], ["--threads", "1"]),
        ("import", ["c.yml"], ["--faithful"]), ("eval", ["a", "b"], ["--limit", "3"]),
        ("search", ["r.yaml"], ["--trials", "3"]), ("sweep", ["r.yaml"], ["--vary", "scale=0,1"]),
        ("pairs", ["r.yaml"], ["--limit", "3"]), ("propose", ["r.yaml"], ["--proposal", "nan"]),
        ("fit", ["r.yaml"], ["--prompts", "a=b", "--out", "o"]),
        ("finetune", ["m"], ["--data", "d", "--out", "o"]),
        ("disentangle", ["m"], ["--limit", "3"]),
        ("zoo", ["copy", "math"], ["--to", "d"]), ("methods", ["lata"], ["--json"]),
        ("extract", ["r.yaml", "o"], ["--scaled"]), ("forget", ["r.yaml", "o"], ["--force"]),
        ("completion", ["bash"], ["-q"]), ("help", ["merge"], ["-q"]),
    ],
)  # fmt: skip
def test_every_verb_parses_positionals_on_either_side(name, positionals, flags):
    command = verb(name)

    def parsed(words: list[str]) -> dict[str, Any]:
        return command.make_context(name, list(words)).params

    between = [positionals[0], *flags, *positionals[1:]]
    assert parsed([*positionals, *flags]) == parsed([*flags, *positionals]) == parsed(between)


# --- streams and shells --------------------------------------------------------------------------


def taskvec(*arguments: object, shell: str = "", **environment: str) -> Any:
    command = [sys.executable, "-m", "taskvec", *map(str, arguments)]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(
        command, capture_output=True, env=os.environ | environment, timeout=120, check=False
    )


@pytest.fixture
def on_stream(monkeypatch):
    """Runs a command line whose standard output has an encoding, or is closed (None)."""

    def run(encoding: str | None, *arguments: object) -> tuple[int, str]:
        raw = io.BytesIO()
        stream = None if encoding is None else io.TextIOWrapper(raw, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        code = main(list(map(str, arguments)))
        if stream is None:
            sys.stdout.close()
        return code, raw.getvalue().decode(encoding or "ascii")

    return run


STREAMS = ["ascii", "latin-1", None]


@pytest.mark.parametrize("encoding", STREAMS)
@pytest.mark.parametrize("name", VERBS)
def test_help_where_greek_letters_cannot_be_written(on_stream, capsys, name, encoding):
    code, out = on_stream(encoding, name, "--help")
    assert (code, capsys.readouterr().err) == (0, "")
    assert "\\" not in out
    assert (name == "merge" and encoding is not None) <= ("its lambda" in out)


@pytest.mark.parametrize("encoding", STREAMS)
def test_results_where_greek_letters_cannot_be_written(tmp_path, on_stream, flags, encoding):
    folder = tmp_path / "merged"
    adapter = ("--task", "math", "--form", "lora", "--rank", "1", "--rest", "drop", "--force")
    for command in (
        ["scan", *flags], ["plan", *flags], ["merge", folder, *flags], ["verify", folder],
        ["extract", tmp_path / "lora", *flags, *adapter], ["inspect", folder], ["methods"],
        ["methods", "lata"], ["zoo", "list"], ["propose", *flags], ["scan", *flags, "--json"],
        ["forget", tmp_path / "less", *flags, "--method", "task_arithmetic"],
    ):  # fmt: skip
        code, out = on_stream(encoding, *command, "--quiet")
        assert code == 0, command
        assert "\\" not in out or "--json" in command, command


def test_results_in_a_real_process(flags):
    done = taskvec("scan", *flags, "--quiet", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"; rho and c: whole model" in done.stdout


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, flags, shell):
    done = taskvec("merge", tmp_path / "out", *flags, shell=shell)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    done = taskvec("merge", tmp_path / "out", *flags, shell=shell)
    assert done.returncode == 1  # it is not empty
    assert b"Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(cli, shell):
    code, out, err = cli("completion", shell)
    assert (code, err) == (0, "")
    assert "_TASKVEC_COMPLETE" in out


def complete(*words: str) -> list[str]:
    done = taskvec(
        _TASKVEC_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(words),
        COMP_CWORD=str(len(words) - 1),
    )
    return [line.split(",", 1)[1] for line in done.stdout.decode().splitlines()]


def test_shells_complete_verbs_options_and_words():
    assert complete("taskvec", "me") == ["merge", "methods"]
    assert complete("taskvec", "merge", "--sch") == ["--scheme"]
    assert complete("taskvec", "merge", "--scheme", "l") == ["linear", "logarithmic"]
    assert complete("taskvec", "extract", "--form", "l") == ["lora"]
    assert complete("taskvec", "help", "for") == ["forget"]


@pytest.mark.parametrize("name", ["finetune", "eval", "disentangle", "demo", "search"])
def test_a_missing_extra_is_the_command_that_installs_it(cli, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    command = verb(name)

    def run(args: Any) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(command, "run", run)
    more = {"finetune": ["m", "--data", "d", "--out", "o"], "disentangle": ["m"]}
    code, out, err = cli(name, *more.get(name, []))
    assert (code, out) == (1, "")
    assert err == (
        "taskvec: error: torch is not installed; this needs: pip install "
        f"'taskvec[{command.extra}]'\n"
    )


def test_a_module_of_ours_that_is_missing_is_a_bug_and_not_hidden(cli, monkeypatch):
    def run(args: Any) -> int:
        raise ModuleNotFoundError("No module named 'taskvec.gone'", name="taskvec.gone")

    monkeypatch.setattr(verb("demo"), "run", run)
    with pytest.raises(ModuleNotFoundError):
        cli("demo")
