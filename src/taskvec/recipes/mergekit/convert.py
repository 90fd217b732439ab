"""From a mergekit configuration to a recipe, with every place where the two mean something else.

Statements about mergekit refer to version 0.1.5. Where it does something that its author
probably did not want, the recipe has what was wanted, unless it is to be faithful; then it has the
same formula, and only the bits of random masks differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taskvec.recipes.located import Document
from taskvec.recipes.mergekit import methods
from taskvec.recipes.mergekit.models import Recipe, fill_roles, spec_of
from taskvec.recipes.mergekit.schema import Config, Reference, read_config
from taskvec.recipes.mergekit.work import Note, Work
from taskvec.recipes.reading import read_recipe
from taskvec.recipes.writing import recipe_text
from taskvec.validation import Key

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
        kind = "faithfully (random masks have other bits)" if self.is_faithful else "as intended"
        about = f"Imported from mergekit, {kind}; see docs/how-to/from-mergekit.md"
        return recipe_text(self.recipe, about)


def convert(document: Document, folder: Path, *, faithful: bool = False) -> Imported:
    """Convert a configuration.

    A file of several documents, as mergekit-multi takes them, becomes a recipe with stages.

    Args:
        document: The configuration, as parsed.
        folder: What relative paths in it are relative to.
        faithful: Whether the recipe shall give what mergekit gives, traps included.

    Raises:
        RecipeError: something in it is not supported; the message has name and line.
    """
    stages: Recipe = {}
    notes: list[Note] = []
    configs = _order([read_config(each) for each in (document, *document.more)])
    for config in configs:
        work = Work(config, folder, faithful, stages=stages, names=frozenset(stages))
        recipe = _convert(work)
        notes += work.notes
        if config is not configs[-1]:
            out = recipe.get("out", {})
            recipe |= {"out": {key: out[key] for key in ("dtype", "precision") if key in out}}
            stages[str(config.entry.name)] = recipe
    if any(methods.draws(each) for each in (*stages.values(), recipe)):
        recipe["seed"] = 0
    if stages:
        recipe = {"stages": stages} | recipe
    read_recipe(Document(recipe, document.source), folder)  # or say what is out of range
    notes = sorted(dict.fromkeys(notes), key=lambda note: (note.line is None, note.line or 0))
    return Imported(recipe, tuple(notes), faithful)


def _order(configs: list[Config]) -> list[Config]:
    """Documents after those whose results they merge; the last one is the result."""
    waiting = {str(config.entry.name): config for config in configs if config.entry.name}
    unnamed = [config for config in configs if not config.entry.name]
    if len(unnamed) > 1:
        what = "two documents have no name, so that it is not clear which is the result"
        unnamed[0].document.fail((), f"{what}; give all but the last one a name")
    found: list[Config] = []
    while waiting:
        ready = [n for n, c in waiting.items() if not (c.models - {n}) & waiting.keys()]
        if not ready:
            config = next(iter(waiting.values()))
            config.document.fail(("name",), f"documents need each other: {', '.join(waiting)}")
        found += [waiting.pop(name) for name in ready]
    return found + unnamed


def _convert(work: Work) -> Recipe:
    """The recipe of one document."""
    config = work.config
    for key, hint in config.ignored:
        theirs = f"the key {key[-1]!r} is unknown at this place and ignored in silence ({hint})"
        work.note(key, theirs, "left out")
    fill_roles(work)
    recipe = methods.convert(work)
    top, out = _tokens(work, recipe)
    out |= _template(work) | _out(work)
    recipe |= top | ({"out": out} if out else {})
    if methods.draws(recipe):
        work.note(None, "random masks are drawn without a seed", "seed 0, in the recipe")
    return recipe


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


def _tokens(work: Work, recipe: Mapping[str, Any]) -> tuple[Recipe, Recipe]:
    """What `tokenizer_source` and `tokenizer` mean: at the top of a recipe, and in `out`."""
    entry = work.config.entry
    key: Key = ("tokenizer_source",)
    source = entry.tokenizer_source
    if entry.tokenizer is not None:
        key, source = ("tokenizer", "source"), entry.tokenizer.source
    if source is None:
        return {}, {}
    top: Recipe = {"vocabulary": "union" if source == "union" else "by-token"}
    out: Recipe = {}
    if isinstance(source, Reference) and not _is_target(work, recipe, source):
        name = next((n for n, s in work.inputs.items() if s[0].reference == source), None)
        if recipe["method"]["name"] == "average":
            top["target"] = spec_of(work, source)
        elif name is None:
            what = f"the tokenizer of {source}, which is not one of the models that are merged,"
            work.document.fail(key, f"{what} is not supported")
        else:
            out["tokenizer"] = name
    work.note(
        key,
        "a token that a model lacks gets the base's row there, or the mean of those that have it",
        f"vocabulary: {top['vocabulary']}; a task that lacks a token does not change its row",
    )
    return top, out


def _is_target(work: Work, recipe: Mapping[str, Any], reference: Reference) -> bool:
    """Whether a model is the one whose rows and files the result has."""
    return bool(spec_of(work, reference) == recipe.get("target", recipe.get("anchor")))


def _template(work: Work) -> Recipe:
    """What `chat_template` means, in `out`."""
    template = work.config.entry.chat_template
    if template is None:
        return {}
    if "{" in template:  # as mergekit tells a template from the name of one
        return {"chat_template": template}
    if work.is_faithful:
        what = f"chat_template {template!r} names one of mergekit's own, which are not included"
        work.document.fail(("chat_template",), f"{what}; write the template itself, or remove it")
    work.note(
        ("chat_template",),
        f"writes its own chat template {template!r} into the tokenizer",
        "the target's stays; write the template itself in `out`",
    )
    return {}


def _out(work: Work) -> Recipe:
    """What `dtype` and `out_dtype` mean."""
    entry = work.config.entry
    dtype = entry.dtype
    if dtype not in ("float32", "float64") and work.config.method not in _ROUNDED_ONCE:
        work.note(
            ("dtype",) if dtype else None,
            f"every difference and sum is rounded to {dtype or 'the dtype of the weights'}",
            "float32 arithmetic, rounded once; there: dtype: float32 with out_dtype",
        )
    stored = entry.out_dtype or dtype
    out: Recipe = {} if stored is None else {"dtype": stored}
    return out | ({"precision": "float64"} if dtype == "float64" else {})
