"""From a mergekit configuration to a recipe, with every place where the two mean something else.

What is said of mergekit is what version 0.1.5 does. Where it does something that its author
probably did not want, the recipe has what was wanted, unless it is to be faithful; then it has the
same formula, and only the bits of random masks differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from taskvec.dtypes import FLOATS
from taskvec.recipes.located import Document, Key
from taskvec.recipes.mergekit import methods
from taskvec.recipes.mergekit.models import fill_roles, spec_of
from taskvec.recipes.mergekit.schema import read_config, read_reference
from taskvec.recipes.mergekit.work import Note, Work
from taskvec.recipes.reading import read_recipe

_ROUNDED_ONCE = ("linear", "slerp", "passthrough")  # methods that work in float32 there too


@dataclass(frozen=True, slots=True)
class Imported:
    """A configuration as a recipe.

    Attributes:
        recipe: As `read_recipe` takes it.
        notes: What differs.
        is_faithful: Whether it gives what mergekit gives.
    """

    recipe: dict[str, Any]
    notes: tuple[Note, ...]
    is_faithful: bool

    @property
    def text(self) -> str:
        """The recipe as YAML."""
        kind = "faithfully (random masks have other bits)" if self.is_faithful else "as meant"
        body = yaml.dump(
            self.recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
        )
        return f"# Imported from mergekit, {kind}; see docs/how-to/from-mergekit.md\n{body}"


class _Dumper(yaml.SafeDumper):
    """Lists of numbers and small mappings on one line."""


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flat = all(isinstance(v, (int, float, str)) for v in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


_Dumper.add_representer(list, _list)


def convert(document: Document, folder: Path, *, faithful: bool = False) -> Imported:
    """Convert a configuration.

    Args:
        document: The configuration, as parsed.
        folder: What relative paths in it are relative to.
        faithful: Whether the recipe shall give what mergekit gives, traps included.

    Raises:
        RecipeError: something in it is not supported, told by name and line.
    """
    work = Work(read_config(document), folder, faithful)
    config = work.config
    for key, hint in config.ignored:
        theirs = f"the key {key[-1]!r} is unknown at this place and ignored in silence ({hint})"
        work.note(key, theirs, "left out")
    fill_roles(work)
    recipe = methods.convert(work)
    recipe |= _tokens(work, recipe)
    recipe |= _out(work)
    if methods.draws(recipe):
        work.note(None, "random masks are drawn without a seed", "seed 0, in the recipe")
        recipe["seed"] = 0
    if work.stages:
        recipe = {"stages": work.stages} | recipe
    read_recipe(Document(recipe, document.source), folder)  # or say what is out of range
    notes = sorted(work.notes, key=lambda note: (note.line is None, note.line or 0))
    return Imported(recipe, tuple(notes), faithful)


def relocated(imported: Imported, here: Path, there: Path) -> Imported:
    """The same for a recipe that lies in another folder.

    Relative paths of mergekit are relative to the current folder, ours to that of the recipe. What
    is not there stays as it is: it may be a name on the hub.
    """

    def moved(key: object, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: moved(k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [moved(key, v) for v in value]
        is_path = key in ("anchor", "target", "model") and isinstance(value, str)
        if not is_path or Path(value).is_absolute() or not (here / value).exists():
            return value
        return os.path.relpath(here / value, there)

    if here.resolve() == there.resolve():
        return imported
    return replace(imported, recipe=moved("", imported.recipe))


# Tokens and output


def _tokens(work: Work, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokenizer_source`, `tokenizer` and `chat_template` mean."""
    document, data = work.document, work.document.data
    if data.get("chat_template") is not None:
        if work.is_faithful:
            document.fail(("chat_template",), "chat_template is not supported; remove it")
        work.note(
            ("chat_template",),
            "writes this chat template into the tokenizer",
            "the target's stays; change tokenizer_config.json of the result",
        )
    key: Key = ("tokenizer_source",)
    source = data.get("tokenizer_source")
    if data.get("tokenizer") is not None:
        tokenizer = data["tokenizer"]
        if not isinstance(tokenizer, dict):
            document.fail(("tokenizer",), f"tokenizer must be a mapping; got {tokenizer!r}")
        for name in ("tokens", "pad_to_multiple_of"):
            if tokenizer.get(name) is not None:
                what = "transplanting tokens" if name == "tokens" else "padding the vocabulary"
                document.fail(("tokenizer", name), f"{what} ({name}) is not supported")
        for name in tokenizer:
            if name not in ("source", "tokens", "pad_to_multiple_of"):
                work.note(("tokenizer", name), f"the key {name!r} is ignored", "left out")
        key, source = ("tokenizer", "source"), tokenizer.get("source", "union")
    if source is None:
        return {}
    more: dict[str, Any] = {"vocabulary": "union" if source == "union" else "by-token"}
    if source not in ("union", "base"):
        wanted = read_reference(document, key, source)
        spec = spec_of(work, wanted)
        if spec != recipe.get("target", recipe.get("anchor")):
            if recipe["method"]["name"] != "average":
                document.fail(
                    key,
                    f"transplanting the tokenizer of {wanted}, which is not the base, is not "
                    "supported",
                )
            more["target"] = spec
    work.note(
        key,
        "a token that a model lacks gets the base's row there, or the mean of those that have it",
        f"vocabulary: {more['vocabulary']}; a task that lacks a token does not change its row",
    )
    return more


def _out(work: Work) -> dict[str, Any]:
    """What `dtype` and `out_dtype` mean."""
    data, found = work.document.data, {}
    for name in ("dtype", "out_dtype"):
        value = data.get(name)
        if value is None:
            continue
        word = str(value).removeprefix("torch.")
        if word not in FLOATS:
            known = " | ".join(FLOATS)
            work.document.fail((name,), f"{name} must be in {known}; got {value!r}")
        found[name] = word
    dtype = found.get("dtype")
    if dtype not in ("float32", "float64") and work.config.method not in _ROUNDED_ONCE:
        work.note(
            ("dtype",) if dtype else None,
            f"every difference and sum is rounded to {dtype or 'the dtype of the weights'}",
            "float32 arithmetic, rounded once; there: dtype: float32 with out_dtype",
        )
    out: dict[str, Any] = {"dtype": found["out_dtype"]} if "out_dtype" in found else {}
    if not out and dtype is not None:
        out = {"dtype": dtype}
    if dtype == "float64":
        out["precision"] = "float64"
    return {"out": out} if out else {}
