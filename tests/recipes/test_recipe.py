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
from taskvec.recipes.schema import OF_TASK, RecipeFile, StageRecipe, TaskEntry

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


# --- what is wrong in one ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "remedy"),
    [
        (GOOD + "granularity: block\n", 7, "granularity", "method: {name: "),
        (GOOD + "colour: blue\n", 7, "colour", "known: allow_pickle, anchor, base, "),
        (swapped("instruct:", "instuct:"), 2, "instuct", "'instruct'?"),
        (swapped("model: math, scale", "model: math, scal"), 4, "scal", "'scale'?"),
        (swapped("scheme: linear", "shceme: linear"), 5, "shceme", "'scheme'?"),
        (swapped("granularity: module", "granularty: module"), 6, "granularty", "'granularity'?"),
        (swapped("name: lata, granularity: module", "name: task_arithmetic, scheme: linear"),
         6, "scheme", "no keys"),
        (GOOD + "out:\n  dtype: float16\n  shard_sise: 1GB\n", 9, "shard_sise", "'shard_size'?"),
        (GOOD + "layers:\n  - {pattern: x, module: mlp}\n  - {pattern: y, modul: mlp}\n",
         9, "modul", "'module'?"),
        (GOOD + "1: 2\n", 7, "1", "known: "),
        (GOOD + "<<: {sed: 1}\n", 7, "sed", "'seed'?"),
        (GOOD + "stages:\n  one: {target: a, method: average, seed: 1}\n", 8, "seed", "known: "),
        (GOOD + "stages:\n  one: {target: a, methd: average}\n", 8, "methd", "'method'?"),
    ],
)  # fmt: skip
def test_unknown_key(tmp_path, text, line, key, remedy):
    got = refusal(tmp_path, text)
    assert got.startswith(f":{line}: unknown key {key!r}")
    assert remedy in got


@pytest.mark.parametrize(
    ("text", "line", "key", "ours"),
    [
        (GOOD + "dtype: float16\n", 7, "dtype", "out: {dtype: "),
        (GOOD + "density: 0.3\n", 7, "density", "`method`"),
        (GOOD + "scale: 0.3\n", 7, "scale", "tasks: "),
        (GOOD + "weight: 0.3\n", 7, "weight", "`scale`"),
        (GOOD + "merge_method: ties\n", 7, "merge_method", "`method`"),
        (GOOD + "models: []\n", 7, "models", "`tasks`"),
        (swapped("base: base", "base_model: base"), 1, "base_model", "`instruct`"),
        (swapped("scale: 0.5", "weight: 0.5"), 4, "weight", "`scale`"),
        (swapped("scale: 0.5", "parameters: {weight: 0.5}"), 4, "parameters", "beside `model`"),
        (swapped("granularity: module", "normalize: true"), 6, "normalize", "`merge`"),
        (swapped("granularity: module", "lambda: 2"), 6, "lambda", "`scale`"),
    ],
)
def test_words_of_mergekit_are_answered_with_ours(tmp_path, text, line, key, ours):
    got = refusal(tmp_path, text)
    assert got.startswith(f":{line}: unknown key {key!r}")
    assert ours in got


def test_every_word_that_is_answered_is_unknown_where_it_is_answered():
    assert not StageRecipe.elsewhere.keys() & RecipeFile.model_fields.keys()
    assert not OF_TASK.keys() & TaskEntry.model_fields.keys()


SCALE, SIGMA, SIZE = "tasks.math.scale", "threshold of lata", "out.shard_size"


@pytest.mark.parametrize(
    ("text", "line", "subject", "expected"),
    [
        *[(swapped("0.5", value), 4, SCALE, "finite number") for value in (
            ".inf", "-.inf", ".nan", "true", "half", "", "2024-01-01", "1e999", "0x")],
        (swapped("0.5", "[1]"), 4, SCALE, "by layer: {depth: [1]}"),
        (swapped("model: math, scale: 0.5", "model: math"), 4, "scale of task 'math'", "try 0.5"),
        (swapped("{name: lata, granularity: module}", "average").replace(", scheme: linear", ""),
         5, "average takes no negative scale", "-0.25"),
        *[(swapped("granularity: module", f"threshold: {value}"), 6, SIGMA, "[-1, 1]")
          for value in ("1.01", "-1.5", ".nan", ".inf", "true", "high", "", "9" * 300)],
        (swapped("scheme: linear", "threshold: 2"), 5, SIGMA, "[-1, 1]"),
        (swapped("scheme: linear", "scheme: lineer"), 5, "scheme of lata", "'linear'?"),
        (swapped("granularity: module", "scheme: 3"), 6, "scheme of lata", "linear | log"),
        (swapped("granularity: module", "normalize_weights: yes"), 6, "of lata", "none | mean"),
        (swapped("name: lata", "name: lta"), 6, "unknown method 'lta'", "'lata'?"),
        (swapped("name: lata", "name: soup"), 6, "unknown method 'soup'", "known: "),
        (swapped("name: lata", "name: [lata]"), 6, "method.name", "text"),
        (swapped("name: lata, ", ""), 6, "name is missing in method", "name: lata"),
        (swapped("{name: lata, granularity: module}", "3"), 6, "method", "a name or a mapping"),
        (GOOD.replace("method:", "# method:"), 1, "method is missing", "method: {name: lata}"),
        (GOOD + "anchor: other\n", 7, "anchor and instruct", "give one"),
        (swapped("base: base", "base:"), 1, "base", "give a model"),
        *[(swapped("base: base", f"base: {value}"), 1, "base", "a folder")
          for value in ("['a']", "' '", '"a\\0b"', "3")],
        (swapped("base: base", "base: {modl: a}"), 1, "'modl'", "'model'?"),
        (swapped("base: base", "base: {model: a, hub: b}"), 1, "base.hub", "org/name"),
        (swapped("base: base", "base: {stack: [{model: a, blocks: [1]}]}"), 1,
         "base.stack[0].blocks", "[first, the one after the last]"),
        (swapped("base: base", "base: {stack: [{blocks: [0, 1]}]}"), 1,
         "model is missing in base.stack[0]", ""),
        (swapped("model: math", "model: 3"), 4, "tasks.math.model", "a folder"),
        ("base: b\nmethod: lata\n", 1, "tasks", "at least one; for example: "),
        ("base: b\nmethod: lata\ntasks: {}\n", 3, "tasks", "at least one; for example: "),
        ("base: b\nmethod: lata\ntasks: [math]\n", 3, "tasks", "a mapping"),
        (swapped("{model: math, scale: 0.5}", "[math]"), 4, "tasks.math", "a model or a mapping"),
        (swapped("{model: math, scale: 0.5}", "{scale: 0.5}"), 4, "model is missing", "tasks.math"),
        (swapped("math:", "ma/th:"), 4, "'ma/th'", "letters, digits and _ . + -"),
        (swapped("math:", "(target):"), 4, "'(target)'", "letters, digits and _ . + -"),
        (swapped("scale: 0.5", "over: target"), 4, "tasks.math.over", "anchor | base"),
        (GOOD + "include: 3\n", 7, "include", "a list"),
        (GOOD + "exclude: ['']\n", 7, "exclude[0]", "not empty"),
        (GOOD + "vocabulary: unite\n", 7, "vocabulary", "refuse | truncate-padding"),
        (GOOD + "allow_pickle: 1\n", 7, "allow_pickle", "true or false"),
        (GOOD + "layers: {pattern: x}\n", 7, "layers", "a list"),
        (GOOD + "layers: [{pattern: '(', module: mlp}]\n", 7, "override '('", ""),
        (GOOD + "layers: [{pattern: x, module: mpl}]\n", 7, "module 'mpl'", "'mlp'?"),
        (GOOD + "layers: [{module: mlp}]\n", 7, "pattern is missing in layers[0]", ""),
        (GOOD + "out: float16\n", 7, "out", "a mapping"),
        *[(GOOD + f"out: {{dtype: {value}}}\n", 7, "out.dtype", "bfloat16 | float16 | float32")
          for value in ("int3", "[float16]", "3")],
        *[(GOOD + f"out: {{precision: {value}}}\n", 7, "out.precision", "float32 | float64")
          for value in ("bfloat16", "[float32]")],
        *[(GOOD + f"out: {{shard_size: {value}}}\n", 7, SIZE, "such as 5GB")
          for value in ("5XB", "-1GB", "huge", "true", "", "[5GB]")],
        *[(GOOD + f"out: {{shard_size: {value}}}\n", 7, SIZE, "above 0") for value in ("0", "0.1")],
        *[(GOOD + f"seed: {value}\n", 7, "seed", expected) for value, expected in [
            ("-1", "at least 0"), ("1.5", "a whole number"), ("true", "a whole number"),
            ("x", "a whole number"), (str(2**64), f"below {2**64}"), ("", "a whole number")]],
        (GOOD + "table: 3\n", 7, "table", "a file"),
        (GOOD + "stages:\n  one: {target: a, method: passthrough, out: {dtype: x}}\n",
         8, "stages.one.out.dtype", "bfloat16 | float16"),
        (GOOD + "stages:\n  one: {anchor: a, tasks: {t: {model: b, scale: x}}, method: ties}\n",
         8, "stages.one.tasks.t.scale", "a finite number"),
        (GOOD + "stages:\n  one: {anchor: a, tasks: {t: b}, method: lata}\n", 8, "'t'", "try 0.5"),
    ],
)  # fmt: skip
def test_wrong_value(tmp_path, text, line, subject, expected):
    got = refusal(tmp_path, text)
    assert got.startswith(f":{line}: ")
    assert subject in got
    assert expected in got
    assert len(got) < 700


# --- what else may stand in one ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("FP32", "float32"), ("float64", "float64")],
)
def test_short_names_of_dtypes(tmp_path, word, dtype):
    assert load_recipe(write(tmp_path, GOOD + f"out: {{dtype: {word}}}\n")).out.dtype == dtype


@pytest.mark.parametrize("word", ["TIES", "Dare-Ties", "dare_ties", "Task-Arithmetic"])
def test_names_of_methods_ignore_case_and_hyphens(tmp_path, word):
    text = f"anchor: a\ntasks: {{m: {{model: b, scale: 1}}}}\nmethod: {word}\n"
    assert load_recipe(write(tmp_path, text)).method.name == word.lower().replace("-", "_")


def test_a_table_is_a_path_of_the_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD + "table: sub/weights.csv\n"))
    assert recipe.table == tmp_path / "sub" / "weights.csv"
    assert load_recipe(write(tmp_path, GOOD)).table is None
    again = read_recipe(Document(recipe.to_dict(), "again"), Path("/nowhere"))
    assert again.table == recipe.table


def test_names_on_the_hub_of_local_members(tmp_path):
    text = """\
base: {model: b, hub: org/base}
instruct: {model: i, hub: org/instruct@v1}
tasks:
  math: {model: m, scale: 1, hub: org/math}
  code: {model: c, scale: 1}
method: lata
"""
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.family.base == str(tmp_path / "b")
    assert dict(recipe.family.hubs) == {"base": "org/base", "anchor": "org/instruct@v1"}
    assert {n: t.hub for n, t in recipe.tasks.items()} == {"math": "org/math", "code": None}
    again = read_recipe(Document(recipe.to_dict(), "again"), Path("/nowhere"))
    assert dict(again.family.hubs) == dict(recipe.family.hubs)
    assert again.tasks["math"].hub == "org/math"
    assert again.to_dict() == recipe.to_dict()


# --- not a recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": a recipe is a mapping with tasks and a method; this is not"),
        ("# only a comment\n", ": a recipe is a mapping with tasks and a method; this is not"),
        ("just words", ":1: a recipe is a mapping with tasks and a method; this is not"),
        ("- base\n- instruct\n", ":1: a recipe is a mapping with tasks and a method; this is not"),
        ("a: 1\nb: [1, 2\nc: 3", ":3: is not YAML: "),
        ("a: 1\n\tb: 2", ":2: is not YAML: found "),
        ("a: b: c", ":1: is not YAML: mapping values are not allowed"),
        ("a: 'open", ":1: is not YAML: found unexpected end of stream"),
        ("a: 1\n---\nb: 2", ":3: begins a second document; a recipe is one document"),
        ("<<: 1", ":1: '<<' takes a mapping, or a list of mappings"),
        ("tasks: &t\n  <<: *t\n", ":1: a value contains itself"),
        ("a: *nothing", ":1: is not YAML: found undefined alias"),
        (GOOD + "base: twice\n", ":7: key 'base' occurs twice"),
        (swapped("scale: 0.5", "scale: 0.5, scale: 0.6"), ":4: key 'scale' occurs twice"),
        (GOOD + "  ? [a]\n  : 1", ": is not YAML"),
        ("? [a]\n: 1", ":1: a key must be a word"),
        ("base: &b [*b]\n", ":1: a value contains itself"),
        ("a: 1\nb: !reference [a, c]\n", ":2: tag !reference is not supported"),
        ("b: !reference {a: 1}\n", ":1: tag !reference is not supported"),
        ("b: !reference a\n", ":1: tag !reference is not supported"),
        ("!secret b: a\n", ":1: tag !secret is not supported"),
        ("b: {<<: !join {a: 1}}\n", ":1: tag !join is not supported"),
        ("b: !!python/name:os.system\n", ":1: tag !!python/name:os.system is not supported"),
        ("tasks: &t\n  math: {model: *t}\n", ":1: a value contains itself"),
        ("base: !!python/object/apply:os.system [id]\n", ":1: "),

        ("seed: !!int ''\n", ":1: cannot be read: "),
        ("seed: !!bool maybe\n", ":1: cannot be read: "),
        ("seed: !!timestamp soon\n", ":1: cannot be read: "),
        ("seed: !!float ''\n", ":1: cannot be read: "),
        ("seed: 2024-13-45\n", ":1: cannot be read: month must be in 1..12"),
        ("seed: " + "9" * 5000 + "\n", ":1: cannot be read: a number of 5,000 digits"),
        (swapped("0.5", "9" * 400), ":4: cannot be read: a number of 400 digits"),
        ("a: \x07\n", ": is not YAML: "),
        ("a: " + "[" * 3000 + "\n", ": is nested more than 100 levels deep"),
        ("a: " + "[" * 3000 + "]" * 3000 + "\n", ": is nested more than 100 levels deep"),
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
    with pytest.raises(RecipeError, match="is a folder"):
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
        ("", ": .*`layers`"),
        ("- a", ":1: .*`layers`"),
        ("layers: []", ":1: .*`layers`"),
        ("layers: odd", ":1: layers must be a list"),
        ("layers:\n  - {pattern: odd, module: mpl}", ":2: .*'mpl'; did you mean 'mlp'"),
    ],
)
def test_layers_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "names.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"^{file}{message}"):
        read_layers(file)


def test_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read: byte 0 is not UTF-8"):
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
