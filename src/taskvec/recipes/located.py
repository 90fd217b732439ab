"""YAML with the line of every value, so that an error can point at it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import yaml

from taskvec.documents import RECIPE, compose_yaml, one_line, plain, scalar
from taskvec.errors import RecipeError

Key = tuple[str | int, ...]
_YAML = "tag:yaml.org,2002:"
_MERGE = f"{_YAML}merge"
# The only tags of mappings and lists; scalars have more, which their constructor knows.
_COLLECTIONS = (f"{_YAML}map", f"{_YAML}seq")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed document.

    Attributes:
        data: Plain Python values.
        source: File name, or what stands for one in messages.
        lines: Line (from 1) of every value, by its path of keys.
        flags: Flag that gave a value, by its path of keys; see `overrides`.
        more: Documents that follow in the same file.
    """

    data: Any
    source: str
    lines: Mapping[Key, int] = field(default_factory=dict)
    flags: Mapping[Key, str] = field(default_factory=dict)
    more: tuple[Document, ...] = ()

    def check_single(self) -> None:
        """Raise `RecipeError` if others follow in the same file."""
        for other in self.more:
            other.fail((), "begins a second document; a recipe is one document")

    def fail(self, key: Key, what: str) -> NoReturn:
        """Raise `RecipeError` about the value at `key`."""
        while key and key not in self.lines and key not in self.flags:
            key = key[:-1]
        if key in self.flags:
            raise RecipeError(f"{self.flags[key]}: {what}")
        line = f":{self.lines[key]}" if key in self.lines else ""
        raise RecipeError(f"{self.source}{line}: {what}")


def parse_yaml(text: str, source: str) -> Document:
    """Parse a file of YAML: its first document, with those that follow.

    Anchors, aliases and merge keys (`<<`) work as in YAML 1.1. Tags that are not YAML's own
    (`!reference`) say something that only another program knows, and are refused.

    Raises:
        RecipeError: not YAML, a tag that is not YAML's own, a key twice in one mapping, a mapping
            that contains itself, or more or deeper values than a recipe may hold, those of aliases
            counted at each use.
    """
    roots = compose_yaml(text, RECIPE, source, RecipeError)
    built = itertools.count(1)
    documents = [_built(root, source, built) for root in roots] or [Document({}, source)]
    return replace(documents[0], more=tuple(documents[1:]))


def _built(root: yaml.Node, source: str, built: Iterator[int]) -> Document:
    """The values of a document, with their lines."""
    lines: dict[Key, int] = {}
    constructor = yaml.constructor.SafeConstructor()

    def fail(node: yaml.Node, what: str) -> NoReturn:
        raise RecipeError(f"{source}:{node.start_mark.line + 1}: {what}")

    def check_tag(node: yaml.Node) -> None:
        is_scalar = isinstance(node, yaml.ScalarNode)
        known = node.tag.startswith(_YAML) if is_scalar else node.tag in _COLLECTIONS
        if not known or node.tag.startswith(f"{_YAML}python/"):
            tag = node.tag.replace(_YAML, "!!")
            fail(node, f"tag {plain(tag)} is not supported; write the value itself, or an alias")

    def entries(
        node: yaml.MappingNode, above: tuple[yaml.Node, ...]
    ) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes of a mapping by key, with those of mappings that it merges."""
        if next(built) > RECIPE.values:
            raise RecipeError(f"{source}: holds more than {RECIPE.values:,} values")
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                fail(key_node, "a key must be a word")
            check_tag(key_node)
            if key_node.tag == _MERGE:
                is_list = isinstance(value_node, yaml.SequenceNode)
                for each in value_node.value if is_list else [value_node]:
                    if not isinstance(each, yaml.MappingNode):
                        fail(key_node, "'<<' takes a mapping, or a list of mappings")
                    if each in above:
                        fail(each, "a value contains itself")
                    check_tag(each)
                    merged = entries(each, (*above, each)) | merged
            elif key_node.value in own:
                fail(key_node, f"key {key_node.value!r} occurs twice")
            else:
                own[key_node.value] = (key_node, value_node)
        return merged | own

    def build(node: yaml.Node, key: Key, above: tuple[yaml.Node, ...]) -> Any:
        if next(built) > RECIPE.values:
            raise RecipeError(f"{source}: holds more than {RECIPE.values:,} values")
        lines.setdefault(key, node.start_mark.line + 1)
        check_tag(node)
        if node in above:
            fail(node, "a value contains itself")
        if len(above) > RECIPE.depth:  # through aliases; what is written so is refused before
            fail(node, f"is nested more than {RECIPE.depth} levels deep")
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
            return scalar(constructor, node)
        except ValueError as error:
            fail(node, f"cannot be read: {one_line(error)}")

    return Document(build(root, (), ()), source, lines)
