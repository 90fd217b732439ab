"""YAML with the line of every value, so that an error can point at it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from taskvec.errors import RecipeError, nearest

Key = tuple[str | int, ...]
MAX_VALUES = 100_000  # aliases can make few lines stand for billions
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed document.

    Attributes:
        data: Plain Python values.
        source: File name, or what stands for one in messages.
        lines: Line (from 1) of every value, by its path of keys.
        flags: Flag that gave a value, by its path of keys; see `overrides`.
    """

    data: Any
    source: str
    lines: Mapping[Key, int] = field(default_factory=dict)
    flags: Mapping[Key, str] = field(default_factory=dict)

    def fail(self, key: Key, what: str) -> NoReturn:
        """Raise `RecipeError` about the value at `key`."""
        while key and key not in self.lines and key not in self.flags:
            key = key[:-1]
        if key in self.flags:
            raise RecipeError(f"{self.flags[key]}: {what}")
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

    Anchors, aliases and merge keys (`<<`) work as in YAML 1.1.

    Raises:
        RecipeError: not YAML, a key twice in one mapping, a mapping that contains itself, or more
            than `MAX_VALUES` values.
    """
    documents = parse_documents(text, source)
    if len(documents) > 1:
        documents[1].fail((), "begins a second document; a recipe is one document")
    return documents[0]


def parse_documents(text: str, source: str) -> list[Document]:
    """Parse a file of one or more YAML documents, as `parse_yaml` does one."""
    try:
        roots = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{source}{line}: is not YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: is not YAML: {_one_line(error)}") from error
    built = itertools.count(1)
    return [_built(root, source, built) for root in roots] or [Document({}, source)]


def _built(root: yaml.Node, source: str, built: Iterator[int]) -> Document:
    """The values of a document, with their lines."""
    lines: dict[Key, int] = {}
    constructor = yaml.constructor.SafeConstructor()

    def fail(node: yaml.Node, what: str) -> NoReturn:
        raise RecipeError(f"{source}:{node.start_mark.line + 1}: {what}")

    def entries(
        node: yaml.MappingNode, above: tuple[yaml.Node, ...]
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes of a mapping by key, with those of mappings that it merges."""
        if next(built) > MAX_VALUES:
            raise RecipeError(f"{source}: holds more than {MAX_VALUES:,} values")
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                fail(key_node, "a key must be a word")
            if key_node.tag == _MERGE:
                is_list = isinstance(value_node, yaml.SequenceNode)
                for each in value_node.value if is_list else [value_node]:
                    if not isinstance(each, yaml.MappingNode):
                        fail(key_node, "'<<' takes a mapping, or a list of mappings")
                    if each in above:
                        fail(each, "a value contains itself")
                    merged = entries(each, (*above, each)) | merged
            elif key_node.value in own:
                fail(key_node, f"key {key_node.value!r} stands twice")
            else:
                own[key_node.value] = (key_node, value_node)
        return merged | own

    def build(node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> Any:
        if next(built) > MAX_VALUES:
            raise RecipeError(f"{source}: holds more than {MAX_VALUES:,} values")
        lines.setdefault(key, node.start_mark.line + 1)
        if node in above:
            fail(node, "a value contains itself")
        inner = (*above, node)
        if isinstance(node, yaml.MappingNode):
            out: dict[Any, Any] = {}
            for name, (key_node, value_node) in entries(node, inner).items():
                lines[(*key, name)] = key_node.start_mark.line + 1
                out[name] = build(value_node, (*key, name), inner)
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*key, i), inner) for i, child in enumerate(node.value)]
        try:
            return constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # as PyYAML does
            fail(node, f"cannot be read: {_one_line(error)}")

    return Document(build(root, (), ()), source, lines)
