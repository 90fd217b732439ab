"""Recipes: what is read from one; the message, with its line, for whatever can be wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskvec.errors import RecipeError, UsageError
from taskvec.recipes.located import Document, parse_yaml
from taskvec.recipes.reading import load_recipe, read_layers, read_recipe
from taskvec.recipes.recipe import Family

GOOD = """\
base: base
instruct: instruct
tasks:
  math: {model: math, scale: 0.5}
  code: {model: code, scale: -0.25, scheme: linear}
method: {name: lata, granularity: module}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    """The message about a recipe, without the path of the file."""
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def swapped(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# --- what is read --------------------------------------------------------------------------------


def test_good_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert dict(recipe.scales) == {"math": 0.5, "code": -0.25}
    assert recipe.method.name == "lata"
    assert dict(recipe.parameters["math"]) == {
        "scheme": "logarithmic", "granularity": "module", "threshold": 0.95,
        "normalize_weights": "none",
    }  # fmt: skip
    assert recipe.parameters["code"]["scheme"] == "linear"
    assert (recipe.out.dtype, recipe.out.shard_bytes, recipe.out.precision) == (
        None, 5_000_000_000, "float32",
    )  # fmt: skip
    assert recipe.seed == 0


def test_paths_are_relative_to_the_folder_of_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/somebody")
    text = "base: ../b\ninstruct: /abs/i\ntarget: ~/t\ntasks: {m: m}\nmethod: average\n"
    family = load_recipe(write(tmp_path / "recipes", text)).family
    assert Path(family.base).resolve() == tmp_path / "b"
    assert family.start == "/abs/i"
    assert family.target == "/home/somebody/t"
    assert family.models["m"] == str(tmp_path / "recipes" / "m")


def test_recipe_by_a_relative_path(tmp_path, monkeypatch):
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipe.yaml").family.base == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("written", "scale"),
    [("1e-3", 1e-3), ("1.5E+2", 150.0), ("-.5", -0.5), ("+2", 2.0), ("'0.5'", 0.5),
     ("0", 0.0), (" 3", 3.0)],
)  # fmt: skip
def test_numbers_as_people_write_them(tmp_path, written, scale):
    """YAML 1.1 takes 1e-3 for a word."""
    recipe = load_recipe(write(tmp_path, swapped("0.5", written)))
    assert recipe.scales["math"] == scale
    assert type(recipe.scales["math"]) is float


def test_short_forms(tmp_path):
    text = "anchor: a\ntasks: {m: folder}\nmethod: average\ninclude: '*.weight'\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.family.include == ("*.weight",)
    assert recipe.family.models["m"] == str(tmp_path / "folder")
    assert dict(recipe.scales) == {"m": 1.0}


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5kb", 1500),
        ("2GiB", 2**31),
        ("1000", 1000),
        ("9" * 400 + "GB", 2**63),
    ],
)
def test_shard_size(tmp_path, written, size):
    assert (
        load_recipe(write(tmp_path, GOOD + f"out: {{shard_size: {written}}}")).out.shard_bytes
        == size
    )


def test_to_dict_is_a_recipe_with_every_default(tmp_path):
    text = GOOD + "out: {dtype: float16, shard_size: 1MB}\nseed: 7\nexclude: ['lm_head*']\n"
    recipe = load_recipe(write(tmp_path, text))
    again = read_recipe(Document(recipe.to_dict(), "again"), Path("/nowhere"))
    assert again.to_dict() == recipe.to_dict()
    assert again.seed == 7
    assert again.out == recipe.out
    assert again.family.exclude == ("lm_head*",)
    assert dict(again.parameters) == dict(recipe.parameters)


def test_scan_needs_no_scales(tmp_path):
    path = write(tmp_path, swapped("model: math, scale: 0.5", "model: math"))
    assert dict(load_recipe(path, needs_scales=False).scales) == {"code": -0.25}


# --- unknown keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "granularity: block\n",
         ":7: unknown key 'granularity'; known: allow_pickle, anchor, base, exclude, include, "
         "instruct, layer_weights, layers, method, new_tokens, out, seed, stages, target, tasks, "
         "vocabulary"),
        (swapped("instruct:", "instuct:"), ":2: unknown key 'instuct'; did you mean 'instruct'?"),
        (swapped("model: math, scale", "model: math, scal"),
         ":4: unknown key 'scal' in tasks.math; did you mean 'scale'?"),
        (swapped("scheme: linear", "shceme: linear"),
         ":5: unknown key 'shceme' in tasks.code; did you mean 'scheme'?"),
        (swapped("granularity: module", "granularty: module"),
         ":6: unknown key 'granularty' in method; did you mean 'granularity'?"),
        (swapped("name: lata, granularity: module", "name: task_arithmetic, scheme: linear"),
         ":6: unknown key 'scheme' in method; known: "),
        (GOOD + "out:\n  dtype: float16\n  shard_sise: 1GB\n",
         ":9: unknown key 'shard_sise' in out; did you mean 'shard_size'?"),
        (GOOD + "layers:\n  - {pattern: x, module: mlp}\n  - {pattern: y, modul: mlp}\n",
         ":9: override: unknown key 'modul'; did you mean 'module'?"),
        (GOOD + "1: 2\n", ":7: unknown key '1'; known: "),
        (GOOD + "<<: {sed: 1}\n", ":7: unknown key 'sed'; "),
    ],
)  # fmt: skip
def test_unknown_key(tmp_path, text, message):
    assert refusal(tmp_path, text).startswith(message)


# --- wrong values --------------------------------------------------------------------------------

SCALE = ":4: scale of task 'math' must be a finite number; got "
SHARD = ":7: shard_size must be like 5GB or 500MB; got "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[(swapped("0.5", value), SCALE + got) for value, got in [
            (".inf", "inf"), ("-.inf", "-inf"), (".nan", "nan"), ("true", "True"),
            ("half", "'half'"), ("", "None"), ("[1]", "[1]; by layer: {depth: [1]}"),
            ("2024-01-01", "datetime.date("),
            ("1e999", "'1e999'"), ("0x", "'0x'"), ("9" * 400, "999999"),
        ]],
        (swapped("model: math, scale: 0.5", "model: math"),
         ":4: scale of task 'math' is missing; lata has no default λ (try 0.5)"),
        (swapped("{name: lata, granularity: module}", "average").replace(", scheme: linear", ""),
         ":5: average takes no negative scale; got -0.25 for task 'code'"),
        *[(swapped("granularity: module", f"threshold: {value}"),
           f":6: threshold of lata must be in [-1, 1]; got {got}") for value, got in [
            ("1.01", "1.01"), ("-1.5", "-1.5"), (".nan", "nan"), (".inf", "inf"), ("true", "True"),
            ("high", "'high'"), ("", "None"), ("9" * 400, "inf")]],
        (swapped("scheme: linear", "threshold: 2"),
         ":5: threshold of lata must be in [-1, 1]; got 2"),
        (swapped("scheme: linear", "scheme: lineer"),
         ":5: scheme of lata must be in linear | logarithmic | threshold; got 'lineer'; "
         "did you mean 'linear'?"),
        (swapped("granularity: module", "scheme: 3"),
         ":6: scheme of lata must be in linear | logarithmic | threshold; got 3"),
        (swapped("granularity: module", "granularity: layer"),
         ":6: granularity of lata must be in tensor | module | block; got 'layer'"),
        (swapped("granularity: module", "normalize_weights: yes"),
         ":6: normalize_weights of lata must be in none | mean | norm; got True"),
        (swapped("name: lata", "name: lta"), ":6: unknown method 'lta'; did you mean 'lata'?"),
        (swapped("name: lata", "name: soup"),
         ":6: unknown method 'soup'; known: "),
        (swapped("name: lata", "name: [lata]"), ":6: unknown method ['lata']; known: "),
        (swapped("name: lata, ", ""), ":6: method must be a name or a mapping with a name"),
        (swapped("{name: lata, granularity: module}", "3"),
         ":6: method must be a name or a mapping with a name"),
        (GOOD.replace("method:", "# method:"),
         ":1: method is missing; for example: method: {name: lata}"),
        (GOOD + "anchor: other\n",
         ":7: anchor and instruct are two names of one role; give one of them"),
        (swapped("base: base", "base:"), ":1: base must be a folder; got None"),
        (swapped("base: base", "base: ['a']"), ":1: base must be a folder; got ['a']"),
        (swapped("base: base", "base: ' '"), ":1: base must be a folder; got ' '"),
        (swapped("base: base", 'base: "a\\0b"'), ":1: base must be a folder; got 'a\\x00b'"),
        (swapped("model: math", "model: 3"), ":4: model must be a folder; got 3"),
        ("base: b\nmethod: lata\n",
         ":1: tasks must name at least one; for example: tasks: {math: {model: DIR, scale: 0.5}}"),
        ("base: b\nmethod: lata\ntasks: {}\n", ":3: tasks must name at least one; for example: "),
        ("base: b\nmethod: lata\ntasks: [math]\n",
         ":3: tasks must name at least one; for example: "),
        (swapped("{model: math, scale: 0.5}", "[math]"),
         ":4: task 'math' must be a mapping with a model; got ['math']"),
        (swapped("{model: math, scale: 0.5}", "{scale: 0.5}"),
         ":4: task 'math' must be a mapping with a model; got {'scale': 0.5}"),
        (swapped("math:", "ma/th:"), ":4: task name 'ma/th' must be letters, digits and _ . + -"),
        (swapped("math:", "(target):"), ":4: task name '(target)' must be letters, digits and _"),
        (GOOD + "include: 3\n", ":7: include must be a list of name patterns; got 3"),
        (GOOD + "exclude: ['']\n", ":7: exclude must be a list of name patterns; got ['']"),
        (GOOD + "layers: {pattern: x}\n", ":7: layers must be a list of mappings with a pattern"),
        (GOOD + "layers: [{pattern: '(', module: mlp}]\n", ":7: override '(': "),
        (GOOD + "layers: [{pattern: x, module: mpl}]\n",
         ":7: override 'x': unknown module 'mpl'; did you mean 'mlp'?"),
        (GOOD + "layers: [{module: mlp}]\n", ":7: override: key 'pattern' is missing in "),
        (GOOD + "out: float16\n", ":7: out must be a mapping; got 'float16'"),
        (GOOD + "out: {dtype: bf16}\n",
         ":7: dtype must be in bfloat16 | float16 | float32 | float64; got 'bf16'"),
        (GOOD + "out: {dtype: [float16]}\n",
         ":7: dtype must be in bfloat16 | float16 | float32 | float64; got ['float16']"),
        (GOOD + "out: {precision: bfloat16}\n",
         ":7: precision must be in float32 | float64; got 'bfloat16'"),
        (GOOD + "out: {precision: [float32]}\n",
         ":7: precision must be in float32 | float64; got ['float32']"),
        *[(GOOD + f"out: {{shard_size: {value}}}\n", SHARD + got) for value, got in [
            ("5XB", "'5XB'"), ("-1GB", "'-1GB'"), ("huge", "'huge'"), ("true", "True"),
            ("", "None"), ("[5GB]", "['5GB']")]],
        (GOOD + "out: {shard_size: 0}\n", ":7: shard_size must be above 0; got 0"),
        (GOOD + "out: {shard_size: 0.1}\n", ":7: shard_size must be above 0; got 0.1"),
        *[(GOOD + f"seed: {value}\n", f":7: seed must be a whole number in [0, 2^64); got {got}")
          for value, got in [("-1", "-1"), ("1.5", "1.5"), ("true", "True"), ("x", "'x'"),
                             (str(2**64), str(2**64)), ("", "None")]],
    ],
)  # fmt: skip
def test_wrong_value(tmp_path, text, message):
    got = refusal(tmp_path, text)
    assert got.startswith(message)
    assert len(got) < 700


# --- not a recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": a recipe is a mapping with tasks and a method; this is not"),
        ("# only a comment\n", ": a recipe is a mapping with tasks and a method; this is not"),
        ("just words", ":1: a recipe is a mapping with tasks and a method; this is not"),
        ("- base\n- instruct\n", ":1: a recipe is a mapping with tasks and a method; this is not"),
        ("a: 1\nb: [1, 2\nc: 3", ":3: is not YAML: "),
        ("a: 1\n\tb: 2", ":2: is not YAML: found character '\\t' that cannot start any token"),
        ("a: b: c", ":1: is not YAML: mapping values are not allowed here"),
        ("a: 'open", ":1: is not YAML: found unexpected end of stream"),
        ("a: 1\n---\nb: 2", ":3: begins a second document; a recipe is one document"),
        ("<<: 1", ":1: '<<' takes a mapping, or a list of mappings"),
        ("tasks: &t\n  <<: *t\n", ":1: a value contains itself"),
        ("a: *nothing", ":1: is not YAML: found undefined alias 'nothing'"),
        (GOOD + "base: twice\n", ":7: key 'base' stands twice"),
        (swapped("scale: 0.5", "scale: 0.5, scale: 0.6"), ":4: key 'scale' stands twice"),
        (GOOD + "  ? [a]\n  : 1", ": is not YAML"),
        ("? [a]\n: 1", ":1: a key must be a word"),
        ("base: &b [*b]\n", ":1: a value contains itself"),
        ("tasks: &t\n  math: {model: *t}\n", ":1: a value contains itself"),
        ("base: !!python/object/apply:os.system [id]\n", ":1: "),
        ("base: !own x\n", ":1: cannot be read: could not determine a constructor"),
        ("seed: !!int ''\n", ":1: cannot be read: "),
        ("seed: !!bool maybe\n", ":1: cannot be read: "),
        ("seed: !!timestamp soon\n", ":1: cannot be read: "),
        ("seed: !!float ''\n", ":1: cannot be read: "),
        ("seed: 2024-13-45\n", ":1: cannot be read: month must be in 1..12"),
        ("seed: " + "9" * 5000 + "\n", ":1: cannot be read: Exceeds the limit"),
        ("a: \x07\n", ": is not YAML: "),
        ("a: " + "[" * 3000 + "\n", ": is not YAML: maximum recursion depth exceeded"),
        ("a: " + "[" * 3000 + "]" * 3000 + "\n", ": is not YAML: maximum recursion depth exceeded"),
    ],
)  # fmt: skip
def test_not_a_recipe(tmp_path, text, message):
    got = refusal(tmp_path, text)
    assert got.startswith(message) or (message == ": is not YAML" and ": is not YAML" in got)


def test_aliases_that_multiply(tmp_path):
    """Nine lines that stand for a billion values are refused, not built."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "holds more than 100,000 values" in refusal(tmp_path, "\n".join(lines))


def test_aliases_are_understood(tmp_path):
    text = GOOD.replace(
        "math: {model: math, scale: 0.5}", "math: &m {model: math, scale: 0.5}\n  more: *m"
    )
    assert load_recipe(write(tmp_path, text)).scales["more"] == 0.5


def test_merge_keys(tmp_path):
    """Keys of the mapping itself come first, then those of earlier mappings in a list."""
    text = """\
instruct: i
tasks:
  a: &a {model: a, scale: 0.5, density: 0.3}
  b: {<<: *a, scale: 0.25}
  c: {<<: [{density: 0.9}, *a], model: c}
method: ties
"""
    recipe = load_recipe(write(tmp_path, text))
    assert dict(recipe.scales) == {"a": 0.5, "b": 0.25, "c": 0.5}
    assert [recipe.parameters[t]["density"] for t in "abc"] == [0.3, 0.3, 0.9]
    assert refusal(tmp_path, text.replace("0.9", "9")).startswith(":5: density of ties")


def test_merge_keys_that_multiply(tmp_path):
    lines = ["a0: &a0 {x0: 1, y0: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    assert "holds more than 100,000 values" in refusal(tmp_path, "\n".join(lines))


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(
        RecipeError, match=r"absent\.yaml: cannot be read: No such file or directory"
    ):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("around", ["", "method: lata\nanything: else\n"])
def test_layers_alone(tmp_path, around):
    entry = {"pattern": "odd", "module": "mlp"}
    file = tmp_path / "names.yaml"
    file.write_text(around + "layers:\n  - {pattern: odd, module: mlp}\n")
    assert read_layers(file) == (entry,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": holds no overrides; give a recipe, or a file, that has some in layers"),
        ("- a", ":1: holds no overrides; give a recipe, or a file, that has some in layers"),
        ("layers: []", ":1: holds no overrides; give a recipe, or a file, that has some in layers"),
        ("layers: odd", ":1: layers must be a list of mappings with a pattern"),
        (
            "layers:\n  - {pattern: odd, module: mpl}",
            ":2: override 'odd': unknown module 'mpl'; did you mean 'mlp'?",
        ),
    ],
)
def test_layers_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "names.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_layers(file)
    assert str(caught.value) == f"{file}{message}"


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match=r"r\.yaml: is not text in UTF-8"):
        load_recipe(tmp_path / "r.yaml")


YAML_LIKE = st.lists(
    st.sampled_from(
        ["base", "instruct", "tasks", "math", "model", "scale", "method", "lata", "out", "dtype",
         "layers", "pattern", ": ", ":", "\n", "\n  ", "{", "}", "[", "]", ", ", "- ", "&a ", "*a",
         "!!int ", "!!map ", "!!set ", "!!str ", "'", '"', "#", "|\n", ">", "1e3", "0x", ".inf",
         "~", "?", "<<", "\\", "é", "\0", "%"]
    ), max_size=24,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(YAML_LIKE | st.text(max_size=40))
def test_fuzz_text(text):
    """Whatever stands in a recipe, only a RecipeError comes out."""
    try:
        read_recipe(parse_yaml(text, "r.yaml"), Path("/"))
    except RecipeError as error:
        assert str(error).startswith("r.yaml")  # noqa: PT017 (it need not be raised)


KEY = st.text(max_size=4) | st.sampled_from(
    ["model", "scale", "name", "threshold", "scheme", "dtype", "shard_size", "precision", "pattern",
     "module"]
)  # fmt: skip
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, "lata", "average", "float16", "1e400", "~x/y", "a\0b"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(KEY, v, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(st.dictionaries(st.sampled_from(
    ["base", "instruct", "anchor", "target", "tasks", "method", "include", "exclude", "layers",
     "out", "seed"]), VALUE), st.booleans())  # fmt: skip
def test_fuzz_values(given_values, complete):
    """Whatever values its keys have, only a RecipeError comes out."""
    whole: dict[str, Any] = {
        "instruct": "i",
        "method": "lata",
        "tasks": {"m": {"model": "m", "scale": 1}},
    }
    try:
        read_recipe(Document({**(whole if complete else {}), **given_values}, "r"), Path("/"))
    except RecipeError as error:
        assert str(error).startswith("r: ")  # noqa: PT017


# --- families in Python --------------------------------------------------------------------------


def test_family_of_two_anchors():
    with pytest.raises(UsageError, match="anchor and instruct are two names of one role; give one"):
        Family(tasks={"a": "a"}, anchor="x", instruct="y")


def test_family_without_tasks():
    with pytest.raises(UsageError, match="a family needs at least one task"):
        Family(tasks={}, anchor="x")


def test_target_is_the_anchor_unless_said_otherwise():
    assert Family(tasks={"a": "a"}, instruct="y").edited == "y"
    assert Family(tasks={"a": "a"}, instruct="y", target="z").edited == "z"
    assert Family(tasks={"a": "a"}).edited is None
