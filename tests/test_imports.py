"""Modules import without circles, also inside a room, and a public class name means one thing.

Imports inside functions count: a circle that is only hidden is still one.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import taskvec

ROOT = Path(taskvec.__file__).parent


def modules() -> dict[str, ast.Module]:
    """Syntax tree of every module of the package, by its name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("taskvec", *path.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that a module imports, those of a package before those in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which modules of the package each module imports."""
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        targets = {
            each if each in trees else each.rpartition(".")[0] for each in imported(tree)
        } & trees.keys()
        found[name] = targets - {name}
    return found


def test_no_import_circle() -> None:
    graph = imports(modules())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"import circle: {' imports '.join(error.args[1][::-1])}") from None


def test_a_public_class_name_means_one_thing() -> None:
    where = defaultdict(list)
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(module)
    assert {name: places for name, places in where.items() if len(places) > 1} == {}


def test_a_circle_inside_a_function_counts() -> None:
    trees = {"a": ast.parse("def f():\n    import b"), "b": ast.parse("from a import f")}
    assert imports(trees) == {"a": {"b"}, "b": {"a"}}
