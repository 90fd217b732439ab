"""YAML with the line of every value, so that an error can point at it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from taskvec.documents import RECIPE, compose_yaml, one_line, scalar
from taskvec.errors import RecipeError, nearest

Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed recipe.

    Attributes:
        data: Plain Python values.
        source: File name, or what stands for one in messages.
        lines: Line (from 1) of every value, by its path of keys.
    """

    data: Any
    source: str
    lines: Mapping[Key, int] = field(default_factory=dict)

    def fail(self, key: Key, what: str) -> NoReturn:
        """Raise `RecipeError` about the value at `key`."""
        while key not in self.lines and key:
            key = key[:-1]
        line = f":{self.lines[key]}" if key in self.lines else ""
        raise RecipeError(f"{self.source}{line}: {what}")

    def check_keys(self, mapping: Mapping[str, Any], known: tuple[str, ...], at: Key) -> None:
        """Raise `RecipeError` for the first key that is not known."""
        for key in mapping:
            if key not in known:
                place = f" in {'.'.join(map(str, at))}" if at else ""
                self.fail((*at, key), f"unknown key {key!r}{place}; {nearest(str(key), known)}")


def parse_yaml(text: str, source: str) -> Document:
    """Parse one YAML document.

    Raises:
        RecipeError: not YAML, a key twice in one mapping, a mapping that contains itself, or more
            or deeper values than a recipe may hold, those of aliases counted at each use.
    """
    root = compose_yaml(text, RECIPE, source, RecipeError)
    lines: dict[Key, int] = {}
    constructor = yaml.constructor.SafeConstructor()
    built = itertools.count(1)

    def build(node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> Any:
        line = node.start_mark.line + 1
        if next(built) > RECIPE.values:
            raise RecipeError(f"{source}: holds more than {RECIPE.values:,} values")
        if node in above:
            raise RecipeError(f"{source}:{line}: a value contains itself")
        if len(above) > RECIPE.depth:  # through aliases; what is written so is refused before
            raise RecipeError(f"{source}:{line}: is nested more than {RECIPE.depth} levels deep")
        lines.setdefault(key, line)
        inner = (*above, node)
        if isinstance(node, yaml.MappingNode):
            out: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise RecipeError(f"{source}:{line}: a key must be a word")
                if key_node.value in out:
                    raise RecipeError(f"{source}:{line}: key {key_node.value!r} stands twice")
                lines[(*key, key_node.value)] = line
                out[key_node.value] = build(value_node, (*key, key_node.value), inner)
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*key, i), inner) for i, child in enumerate(node.value)]
        try:
            return scalar(constructor, node)
        except ValueError as error:
            raise RecipeError(f"{source}:{line}: cannot be read: {one_line(error)}") from error

    return Document({} if root is None else build(root, (), ()), source, lines)
