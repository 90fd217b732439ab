"""YAML with the line of every value, so that an error can point at it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from taskvec.errors import RecipeError, nearest

Key = tuple[str | int, ...]
MAX_VALUES = 100_000  # aliases can make few lines stand for billions


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


def _one_line(error: Exception) -> str:
    text = getattr(error, "problem", None) or str(error)
    return " ".join(text.split())[:100]


def parse_yaml(text: str, source: str) -> Document:
    """Parse one YAML document.

    Raises:
        RecipeError: not YAML, a key twice in one mapping, a mapping that contains itself, or more
            than `MAX_VALUES` values.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{source}{line}: is not YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: is not YAML: {_one_line(error)}") from error
    lines: dict[Key, int] = {}
    constructor = yaml.constructor.SafeConstructor()
    built = itertools.count(1)

    def build(node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> Any:
        if next(built) > MAX_VALUES:
            raise RecipeError(f"{source}: holds more than {MAX_VALUES:,} values")
        lines.setdefault(key, node.start_mark.line + 1)
        if node in above:
            raise RecipeError(f"{source}:{node.start_mark.line + 1}: a value contains itself")
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
            return constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # as PyYAML does
            line = node.start_mark.line + 1
            raise RecipeError(f"{source}:{line}: cannot be read: {_one_line(error)}") from error

    return Document({} if root is None else build(root, (), ()), source, lines)
