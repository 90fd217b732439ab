"""The documentation agrees with the program: recipes, links, methods, verbs, names, messages."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tests.test_readme import ROOT, Block, blocks, run_block

import taskvec
from taskvec.cli.commands import make_group
from taskvec.cli.reference import reference_page
from taskvec.dtypes import FLOATS
from taskvec.layers import _OVERRIDE_KEYS, GRANULARITIES, MODULES
from taskvec.methods import METHODS
from taskvec.methods.parameters import Parameter
from taskvec.outputs import manifest
from taskvec.recipes import reading
from taskvec.recipes.located import parse_yaml
from taskvec.recipes.recipe import Output
from taskvec.recipes.schema import LayerEntry, Out, RecipeFile, TaskEntry

DOCS = ROOT / "docs"
FRONT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in FRONT)]
# `write-a-method` is a package with tests of its own, run by tests/methods/test_plugins.py.
NOT_RUN = ("troubleshooting", "write-a-method")
HOW_TO = [p for p in sorted((DOCS / "how-to").glob("*.md")) if p.stem not in NOT_RUN]
RUN_PAGES = [
    DOCS / "quickstart.md",
    DOCS / "reference" / "python.md",
    DOCS / "concepts" / "linearised.md",
    *HOW_TO,
]
FRAGMENT = "# part of a recipe\n"
WHOLE = "instruct: a\nbase: b\ntasks:\n  t: {model: c, scale: 1}\nmethod: lata\n"
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
# Words that were used in place of plain ones; write what happens instead.
RETIRED = re.compile(
    r"\b(?:told|likewise|whatever|whoever|meant|anew|(?:is|are) none|falls? away|stands at|sees? to"
    r"|but (?:that|for)|in the place of|works? out|worked out|cannot be (?:told|meant))\b"
)
PRIVATE_PATH = re.compile(r"(?<![\w.])/(?:work|root|tmp|home|Users)/")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def all_blocks(language: str) -> Iterator[tuple[str, Block]]:
    """Blocks of one language in every page, with a name for messages."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == language:
                yield f"{name_of(page)}:{block.line}", block


def sections(page: Path, level: int) -> dict[str, str]:
    """Text under each heading of a level, without its backquotes."""
    parts = re.split(rf"^{'#' * level} (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {h.replace("`", ""): text for h, text in zip(parts[1::2], parts[2::2], strict=True)}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def rows(text: str) -> dict[str, list[str]]:
    """Rows of Markdown tables, by the word in backquotes in their first cell."""
    found = {}
    for line in text.splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and (named := re.match(r"`(\w+)`", cells[0])):
            found[named[1]] = cells[1:]
    return found


# Pages as text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {link}; has {anchors(file)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_wrapped_and_name_no_machine(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not PRIVATE_PATH.search(text), PRIVATE_PATH.search(text)
    for number, line in enumerate(text.splitlines(), start=1):
        assert len(line) <= 100 or line.startswith("|"), f"{name_of(page)}:{number}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=name_of)
def test_pages_use_plain_words(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in text.splitlines() if RETIRED.search(re.sub(r"`[^`]*`", "", line))]


def test_every_page_is_reached_from_the_index() -> None:
    seen, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page not in PAGES or DOCS not in page.parents:
            continue
        seen.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(page.read_text("utf-8"))]
        waiting += [(page.parent / link).resolve() for link in links if link and ":" not in link]
    assert set(DOCS.rglob("*.md")) == seen


# Recipes


def test_every_recipe_parses(tmp_path: Path) -> None:
    found = 0
    for where, block in all_blocks("yaml"):
        text = block.text
        if text.startswith(FRAGMENT):
            text = WHOLE + text
        else:
            assert block.file is not None, (
                f"{where}: begins neither with # NAME.yaml nor {FRAGMENT}"
            )
        read = reading.read_recipe(parse_yaml(text, where), tmp_path)
        assert read.scales or not read.method.takes_tasks
        found += 1
    assert found >= 10


def test_recipe_page_has_every_key() -> None:
    page = sections(DOCS / "reference" / "recipe.md", 2)
    assert set(rows(page["Top level"])) == set(RecipeFile.model_fields)
    assert set(rows(page["out"])) == set(Out.model_fields)
    assert set(rows(page["layers"])) == set(LayerEntry.model_fields) == set(_OVERRIDE_KEYS)
    assert set(rows(page["tasks.NAME"])) == set(TaskEntry.model_fields)
    parameters = {p.name for method in METHODS.values() for p in method.parameters}
    assert set(rows(page["method"])) == {"name"} | parameters
    assert all(f"`{module}`" in page["layers"] for module in MODULES)
    assert all(f"`{name}`" in rows(page["method"])["name"][-1] for name in METHODS)


def test_recipe_page_has_every_range_and_default() -> None:
    table = rows(sections(DOCS / "reference" / "recipe.md", 2)["method"])
    declared = [p for method in METHODS.values() for p in method.parameters]
    for parameter in declared:
        _, default, allowed = table[parameter.name]
        if len({p.default for p in declared if p.name == parameter.name}) == 1:
            check_parameter(default, allowed, parameter)
        else:
            assert default == "by method"  # on the method's own page
    out = rows(sections(DOCS / "reference" / "recipe.md", 2)["out"])
    assert words(out["dtype"][-1]) == set(FLOATS)
    assert words(out["precision"][-1]) == {"float32", "float64"}
    assert words(out["precision"][1]) == {Output().precision}
    size = f"{WHOLE}out: {{shard_size: {out['shard_size'][1].strip('`')}}}"
    assert reading.read_recipe(parse_yaml(size, ""), ROOT).out == Output()


def test_layers_page_has_every_granularity_module_and_override_key() -> None:
    text = (DOCS / "concepts" / "layers.md").read_text("utf-8")
    named = set(rows(text)) | set(re.findall(r"^- `(\w+)`:", text, re.MULTILINE))
    assert named == {*GRANULARITIES, *MODULES, *_OVERRIDE_KEYS}


# Methods


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def check_parameter(default: str, allowed: str, parameter: Parameter) -> None:
    expected = set(parameter.choices) if parameter.choices else {parameter.range}
    assert words(default) == {str(parameter.default)}, f"default of {parameter.name}"
    assert words(allowed) == expected, f"range of {parameter.name}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_its_parameters(name: str) -> None:
    method, page = METHODS[name], DOCS / "methods" / f"{name}.md"
    text = page.read_text("utf-8")
    assert text.startswith(f"# {name}\n")
    assert method.source in text
    table = rows(sections(page, 2)["Parameters"])
    assert set(table) == {p.name for p in method.parameters}
    for parameter in method.parameters:
        default, allowed, _ = table[parameter.name]
        check_parameter(default, allowed, parameter)
    assert ("λ is required" in text) == (method.default_scale is None)
    assert ("may be\nnegative" in text or "may be negative" in text) == method.takes_negative_scale
    assert ("**Takes a table**" in text.replace("\n", " ")) == method.takes_table


def test_there_is_no_page_of_a_method_that_is_not() -> None:
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == set(METHODS)


# Command line


def test_cli_page_is_what_the_declarations_say() -> None:
    """Write it anew with: taskvec help --markdown > docs/reference/cli.md."""
    assert (DOCS / "reference" / "cli.md").read_text("utf-8") == reference_page()


def commands() -> list[tuple[str, list[str]]]:
    """Every call of taskvec in a shell block, with its arguments."""
    found = []
    for where, block in all_blocks("shell"):
        for line in block.text.replace("\\\n", " ").splitlines():
            arguments = shlex.split(line.partition(" > ")[0])
            if arguments[:1] == ["taskvec"]:
                found.append((where, arguments[1:]))
    return found


def test_every_command_in_the_pages_is_one() -> None:
    assert len(commands()) >= 20
    group = make_group()
    for where, arguments in commands():
        verb = group.get_command(click.Context(group), arguments[0])
        assert verb is not None, f"{where}: {' '.join(arguments)}"
        try:
            verb.make_context(arguments[0], arguments[1:], resilient_parsing=False)
        except click.ClickException as error:
            pytest.fail(f"{where}: {' '.join(arguments)}\n{error.format_message()}")


# Python


def test_python_page_has_every_public_name() -> None:
    headings = sections(DOCS / "reference" / "python.md", 2)
    named = [name for heading in headings for name in heading.split(", ")]
    assert sorted(set(named) - {"Progress"}) == sorted(taskvec.__all__)


@pytest.mark.parametrize(
    "name", [n for n in taskvec.__all__ if inspect.isfunction(getattr(taskvec, n))]
)
def test_python_page_has_every_option(name: str) -> None:
    """An option is in the section of its verb, or in the list of those that verbs share."""
    page = DOCS / "reference" / "python.md"
    found = sections(page, 2)
    text = next(text for heading, text in found.items() if name in heading.split(", "))
    shared = page.read_text("utf-8").split("\n## ")[0]
    for option in inspect.signature(getattr(taskvec, name)).parameters:
        assert re.search(rf"\b{option}\b", text) or f"`{option}`" in shared, option


# Files and messages


def test_files_page_has_every_key_of_a_manifest() -> None:
    tree = ast.parse(inspect.getsource(manifest.make_manifest))
    (returned,) = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return)]
    assert isinstance(returned, ast.Dict)
    keys = {k.value for k in returned.keys if isinstance(k, ast.Constant)}
    assert set(rows(sections(DOCS / "reference" / "files.md", 2)["Manifest"])) == keys


def program_texts(*, docstrings: bool = True) -> str:
    """Every text in the program, with … for what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        alone = [node.value for node in nodes if isinstance(node, ast.Expr) and not docstrings]
        for node in nodes:
            if node in alone:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_use_plain_words() -> None:
    texts = program_texts(docstrings=False).splitlines()
    assert not [text for text in texts if RETIRED.search(text) and " " in text]


def test_messages_that_are_explained_are_in_the_program() -> None:
    texts = program_texts()
    explained = list(sections(DOCS / "how-to" / "troubleshooting.md", 3))
    assert len(explained) > 20
    for message in explained:
        pattern = ".*".join(re.escape(part.strip("'")) for part in message.split("…"))
        assert re.search(pattern, texts), message


# Pages that run


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=name_of)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    if page.parent != DOCS:  # how-to pages say that they begin where the zoo was copied to
        run_block(Block("shell", "taskvec zoo copy --to zoo", 0), tmp_path, name_of(page))
    todo = [block for block in blocks(page) if block.language != "text"]
    if page.stem == "python":  # one program, told in parts
        todo = [Block("python", "\n".join(block.text for block in todo), todo[0].line)]
    assert todo
    for block in todo:
        run_block(block, tmp_path, name_of(page))
