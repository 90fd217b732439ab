"""A recipe: what a user asks for. Written in YAML, it is read by `reading`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskvec.checkpoints.hub import hub_name, resolved
from taskvec.checkpoints.memory import MARK, Module, described
from taskvec.checkpoints.source import Source
from taskvec.errors import UsageError
from taskvec.methods.method import Method
from taskvec.methods.table import Table
from taskvec.recipes.depth import Profile
from taskvec.recipes.stack import Stack

VOCABULARY = ("refuse", "truncate-padding", "by-token", "union")
NEW_TOKENS = ("copy", "drop")
OVER = ("anchor", "base")
DEFAULT_SHARD_BYTES = 5_000_000_000


# A folder or file, a name on the hub, `stage:NAME`, layers of several models, a state dict or a
# module in memory, or a source that something else made.
Model = str | os.PathLike[str] | Stack | Mapping[str, Any] | Module | Source
STAGE = "stage:"


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints of one architecture, and which of their tensors are meant.

    Attributes:
        tasks: Folder by task name.
        instruct: Folder that task vectors start from; `anchor` is the same under its general name.
        anchor: See `instruct`; give one of them.
        base: Folder of the model before instruction tuning; LATA needs it.
        target: Folder that is edited; default: the anchor.
        include: Shell patterns of tensor names to edit; empty for all.
        exclude: Shell patterns of tensor names to leave as they are in the target.
        layers: Overrides of the layer table, as in a recipe.
        over: What the adapter of a task was trained over, `anchor` (default) or `base`, by task.
        vocabulary: What to do where members have other rows of tokens: `refuse`,
            `truncate-padding`, `by-token` or `union`.
        new_tokens: What becomes of tokens that only tasks have under `union`: `copy` or `drop`.
        allow_pickle: Whether pickled weights may be read (never running code that is in them).
    """

    tasks: Mapping[str, Model]
    instruct: Model | None = None
    anchor: Model | None = None
    base: Model | None = None
    target: Model | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()
    over: Mapping[str, str] = field(default_factory=dict)
    vocabulary: str = "refuse"
    new_tokens: str = "copy"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.anchor is not None and self.instruct is not None:
            raise UsageError("anchor and instruct are two names of one role; give one of them")
        if not self.tasks and self.target is None:
            raise UsageError("a family needs at least one task")
        choices: list[tuple[str, str, tuple[str, ...]]]
        choices = [("vocabulary", self.vocabulary, VOCABULARY)]
        choices += [("new_tokens", self.new_tokens, NEW_TOKENS)]
        choices += [(f"over of task {task!r}", word, OVER) for task, word in self.over.items()]
        for what, got, known in choices:
            if got not in known:
                raise UsageError(f"{what} must be in {' | '.join(known)}; got {got!r}")

    @property
    def start(self) -> Model | None:
        """The model that task vectors start from."""
        return self.anchor if self.anchor is not None else self.instruct

    @property
    def edited(self) -> Model | None:
        """The model that is edited."""
        return self.target if self.target is not None else self.start


@dataclass(frozen=True, slots=True)
class Output:
    """How the result is written.

    Attributes:
        dtype: `bfloat16`, `float16`, `float32` or `float64`; None for the target's own, tensor by
            tensor.
        shard_bytes: Largest size of one file; a larger tensor gets a file of its own.
        precision: Arithmetic, `float32` or `float64`.
    """

    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    precision: str = "float32"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe.

    Attributes:
        family: Checkpoints.
        scales: λ by task; every task has one, unless the method has no default and a table is not
            wanted.
        method: How weights are decided.
        parameters: Resolved parameters by task; a `Profile` for one that differs by layer.
        out: How the result is written.
        seed: For methods that draw random numbers; recorded in any case.
        weighing: A recipe of the same family whose table the method weighs layers by.
        stages: Recipes whose results this one reads as `stage:NAME`, by name, in order.
        stage_tables: Tables that stages had in a merge that is repeated, by name.
        profiles: What λ of a task is multiplied with tensor by tensor, where that differs.
    """

    family: Family
    scales: Mapping[str, float]
    method: Method
    parameters: Mapping[str, Mapping[str, Any]]
    out: Output = field(default_factory=Output)
    seed: int = 0
    weighing: Recipe | None = None
    stages: Mapping[str, Recipe] = field(default_factory=dict)
    stage_tables: Mapping[str, Table] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    @property
    def needs_base(self) -> bool:
        """Whether the model before instruction tuning is used."""
        return self.method.needs_base or (self.weighing is not None and self.weighing.needs_base)

    @property
    def needs_anchor(self) -> bool:
        """Whether task vectors are taken; if not, the task models themselves."""
        method = self.method
        return method.needs_anchor or (method.takes_anchor and self.family.start is not None)

    @property
    def needs_scan(self) -> bool:
        """Whether it rests on statistics of the weights."""
        return self.method.needs_scan or (self.weighing is not None and self.weighing.needs_scan)

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default filled in, as a mapping that `read_recipe` takes."""
        family = self.family
        data: dict[str, Any] = {}
        for role, path in (
            ("base", family.base),
            ("instruct", family.start),
            ("target", family.edited),
        ):
            if path is not None:
                data[role] = _said(path)
        data["tasks"] = {
            task: {
                "model": _said(path),
                "scale": self.scale_of(task),
                **({"over": family.over[task]} if task in family.over else {}),
                **self.parameters_of(task),
            }
            for task, path in sorted(family.tasks.items())
        }
        data["method"] = {"name": self.method.name}
        if self.weighing is not None:
            common = next(iter(self.weighing.parameters.values()))
            data["layer_weights"] = {"name": self.weighing.method.name, **common}
        data["include"], data["exclude"] = list(family.include), list(family.exclude)
        data["layers"] = [dict(entry) for entry in family.layers]
        data["vocabulary"], data["new_tokens"] = family.vocabulary, family.new_tokens
        data["allow_pickle"] = family.allow_pickle
        data["out"] = {"shard_size": self.out.shard_bytes, "precision": self.out.precision}
        if self.out.dtype is not None:
            data["out"]["dtype"] = self.out.dtype
        data["seed"] = self.seed
        if self.stages:
            data["stages"] = {name: _stage_dict(stage) for name, stage in self.stages.items()}
        return data

    def scale_of(self, task: str) -> Any:
        """λ of a task as a recipe has it: a number, or a mapping where it differs by layer."""
        if task not in self.profiles:
            return self.scales[task]
        return self.profiles[task].to_dict() | {"times": self.scales[task]}

    def parameters_of(self, task: str) -> dict[str, Any]:
        """Parameters of a task as a recipe has them: a mapping for one that differs by layer."""
        given = self.parameters[task].items()
        return {name: v.to_dict() if isinstance(v, Profile) else v for name, v in given}


def _stage_dict(recipe: Recipe) -> dict[str, Any]:
    """As `to_dict`, without what a stage takes from the recipe that it is part of."""
    data = recipe.to_dict()
    del data["seed"], data["out"]["shard_size"]
    return data


def _said(model: Model) -> Any:
    """A model as a recipe names it."""
    if isinstance(model, Stack):
        return model.to_dict(_said)
    if isinstance(model, str) and model.startswith(STAGE):
        return model
    name = hub_name(model)
    if name is not None:
        return str(resolved(name))
    if isinstance(model, (str, os.PathLike)):
        text = os.fspath(model)
        return text if text.startswith(MARK) else str(Path(text).expanduser().absolute())
    return described(model) if isinstance(model, (Mapping, Module)) else model.where
