"""Loading what is to be evaluated: folders one by one, candidates of a family in one loaded model.

A candidate is a recipe that is merged in memory: its target is loaded once, the merged weights are
put into it, and it is the target again afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from taskvec.errors import UsageError
from taskvec.evaluation.evaluate import EvaluationOptions, Result, TaskSamples, check, evaluate_with
from taskvec.merging.prepare import prepare
from taskvec.methods.table import load_table
from taskvec.outputs.candidates import Bench, candidates
from taskvec.recipes.recipe import Recipe
from taskvec.running.model import Model, Stored, load, open_stored, stamp_of

Spec = str | os.PathLike[str] | Recipe  # a recipe is a candidate


class Models:
    """Evaluates folders and candidates; a context, at whose end nothing is changed in memory."""

    def __init__(self, options: EvaluationOptions) -> None:
        self.options = options
        self._stack = ExitStack()
        self._bench: tuple[Bench, Model] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def check(self, spec: Spec, prepared: Sequence[TaskSamples]) -> None:
        """Find what is wrong with a model, or what it cannot be asked, without its weights.

        Raises:
            TaskvecError: as `evaluate` would.
        """
        stored, _ = _open(spec)
        check(stored.encoder, prepared, self.options)
        if isinstance(spec, Recipe):
            prepare(spec)

    def evaluate(self, spec: Spec, prepared: Sequence[TaskSamples], name: str) -> list[Result]:
        """Results of one model, called `name`.

        Weights are not loaded if all replies were kept by an earlier run.

        Args:
            spec: A folder, a hub name, or a candidate.
            prepared: Tasks with their samples.
            name: What it is called.

        Raises:
            TaskvecError: it cannot be opened, loaded, merged, or asked what the tasks ask.
        """
        stored, stamp = _open(spec)

        def model() -> Model:
            return self.candidate(spec) if isinstance(spec, Recipe) else self._load(stored)

        return evaluate_with(model, stored.encoder, prepared, self.options, where=name, stamp=stamp)

    def candidate(self, recipe: Recipe) -> Model:
        """The loaded target of a recipe with the candidate in its parameters.

        Raises:
            TaskvecError: it cannot be opened, loaded or merged.
        """
        bench, model = self._bench_of(recipe)
        bench.put(recipe)
        return model

    def target(self, recipe: Recipe) -> Model:
        """The loaded target of a recipe as it is."""
        bench, model = self._bench_of(recipe)
        bench.restore()
        return model

    def _load(self, stored: Stored) -> Model:
        self._close()  # two models may not fit
        return load(stored, dtype=self.options.dtype, device=self.options.device)

    def _bench_of(self, recipe: Recipe) -> tuple[Bench, Model]:
        """The bench of a recipe's members, which is kept until another model is loaded."""
        members = recipe.family.members
        if self._bench is None or self._bench[0].prepared.recipe.family.members != members:
            model = self._load(_target(recipe))
            bench = self._stack.enter_context(candidates(recipe, model.module))
            self._bench = bench, model
        return self._bench

    def _close(self) -> None:
        self._stack.close()
        self._bench = None


def _open(spec: Spec) -> tuple[Stored, str]:
    """A model, or the target of a candidate, without weights; and what identifies the weights."""
    if isinstance(spec, Recipe):
        return _target(spec), _stamp(spec)
    stored = open_stored(spec)
    return stored, stored.stamp


def _target(recipe: Recipe) -> Stored:
    """The target of a candidate, without weights."""
    if recipe.stages:
        raise UsageError("a candidate cannot have stages; merge the recipe and evaluate the folder")
    target = recipe.family.edited
    if not isinstance(target, (str, os.PathLike)):
        raise UsageError("a candidate needs a target in a folder or on the hub")
    return open_stored(target)


def _stamp(recipe: Recipe) -> str:
    """What identifies the weights of a candidate; empty if a member is in memory."""
    family = recipe.family
    members = [family.base, family.start, family.edited, *family.models.values()]
    paths = [
        Path(member).expanduser() for member in members if isinstance(member, (str, os.PathLike))
    ]
    if len(paths) < sum(member is not None for member in members):
        return ""
    # What is not there is on the hub, and the recipe says its commit.
    files = sorted({stamp_of(path) for path in paths if path.exists()})
    given = load_table(recipe.table) if isinstance(recipe.table, Path) else recipe.table
    table = given.to_json() if given is not None else None
    text = json.dumps([recipe.to_dict(), files, table], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
