"""A recipe: what a user asks for. Written in YAML, it is read by `reading`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from taskvec.checkpoints.hub import hub_name, resolved
from taskvec.checkpoints.memory import MARK, Module, described
from taskvec.checkpoints.source import Source
from taskvec.errors import UsageError
from taskvec.methods.choice import MethodChoice
from taskvec.methods.method import Method
from taskvec.methods.table import Table
from taskvec.recipes.depth import Profile
from taskvec.recipes.stack import Stack

VOCABULARY = ("refuse", "truncate-padding", "by-token", "union")
NEW_TOKENS = ("copy", "drop")
OVER = ("anchor", "base")
FORMS = ("model", "lora")
RESTS = ("refuse", "drop", "save")
DEFAULT_SHARD_BYTES = 5_000_000_000


# A folder or file, a name on the hub, `stage:NAME`, layers of several models, a state dict or a
# module in memory, or a source that something else made.
Model = str | os.PathLike[str] | Stack | Mapping[str, Any] | Module | Source
STAGE = "stage:"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task of a recipe: a fine-tune, and what is done with its task vector.

    Attributes:
        model: Folder, hub name, adapter, task vector, or a model in memory.
        scale: λ; None if not given.
        parameters: Method parameters, for this task; in a checked recipe all of them. A `Profile`
            for one that differs by layer.
        profile: What λ is multiplied with tensor by tensor; None for 1 everywhere.
        over: What an adapter was trained over, `anchor` or `base`; None if not given (`anchor`).
        hub: What cards and adapters call a local model, a name on the hub.
    """

    model: Model
    scale: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile | None = None
    over: str | None = None
    hub: str | None = None

    @property
    def lowest_scale(self) -> float:
        """The smallest λ of a tensor; 0 if λ is not given."""
        return (self.scale or 0.0) * (1.0 if self.profile is None else self.profile.lowest)

    def to_dict(self) -> dict[str, Any]:
        """The task as a recipe has it, with every default filled in."""
        return {
            "model": _name_model(self.model),
            "scale": self.scale_to_dict(),
            **({} if self.over is None else {"over": self.over}),
            **({} if self.hub is None else {"hub": self.hub}),
            **self.parameters_to_dict(),
        }

    def parameters_to_dict(self) -> dict[str, Any]:
        """Parameters as a recipe has them: a mapping for one that differs by layer."""
        given = self.parameters.items()
        return {n: v.to_dict() if isinstance(v, Profile) else v for n, v in given}

    def scale_to_dict(self) -> Any:
        """λ as a recipe has it: a number, or a mapping where it differs by layer."""
        return (
            self.scale if self.profile is None else self.profile.to_dict() | {"times": self.scale}
        )


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints of one architecture, and which of their tensors are edited.

    Attributes:
        tasks: Fine-tunes by task name: a model, or a `TaskSpec` to say more of it.
        instruct: Folder that task vectors start from; `anchor` is the same under its general name.
        anchor: See `instruct`; give one of them.
        base: Folder of the model before instruction tuning; LATA needs it.
        target: Folder that is edited; default: the anchor.
        include: Shell patterns of tensor names to edit; empty for all.
        exclude: Shell patterns of tensor names to leave as they are in the target.
        layers: Overrides of the layer table, as in a recipe.
        vocabulary: What to do where members have other rows of tokens: `refuse`,
            `truncate-padding`, `by-token` or `union`.
        new_tokens: With `union`: `copy` or `drop` tokens that only tasks have.
        allow_pickle: Whether pickled weights may be read (never running code that is in them).
        hubs: What cards and adapters call a local `base`, `anchor` or `target`, by role.
    """

    tasks: Mapping[str, Any]  # each a `TaskSpec`, once the family is made
    instruct: Model | None = None
    anchor: Model | None = None
    base: Model | None = None
    target: Model | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()
    vocabulary: str = "refuse"
    new_tokens: str = "copy"
    allow_pickle: bool = False
    hubs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.anchor is not None and self.instruct is not None:
            raise UsageError("anchor and instruct are two names of one role; give one of them")
        if not self.tasks and self.target is None:
            raise UsageError("a family needs at least one task")
        tasks = {
            name: task if isinstance(task, TaskSpec) else TaskSpec(task)
            for name, task in self.tasks.items()
        }
        object.__setattr__(self, "tasks", tasks)
        choices: list[tuple[str, str, tuple[str, ...]]]
        choices = [("vocabulary", self.vocabulary, VOCABULARY)]
        choices += [("new_tokens", self.new_tokens, NEW_TOKENS)]
        choices += [(f"over of task {n!r}", t.over, OVER) for n, t in tasks.items() if t.over]
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

    @property
    def models(self) -> dict[str, Model]:
        """The model of each task."""
        return {name: task.model for name, task in self.tasks.items()}

    @property
    def published(self) -> dict[str, str]:
        """Names on the hub of local members, by path."""
        roles = {"base": self.base, "anchor": self.start, "target": self.target}
        found = {r: (model, self.hubs[r]) for r, model in roles.items() if r in self.hubs}
        found |= {n: (t.model, t.hub) for n, t in self.tasks.items() if t.hub is not None}
        return {
            _name_model(m): hub for m, hub in found.values() if isinstance(m, (str, os.PathLike))
        }

    @property
    def members(self) -> Family:
        """The family without scales and parameters: the same checkpoints, opened the same way."""
        tasks = {n: TaskSpec(t.model, over=t.over, hub=t.hub) for n, t in self.tasks.items()}
        return replace(self, tasks=tasks)

    def only(self, tasks: Collection[str]) -> Family:
        """The family with some of its tasks."""
        return replace(self, tasks={n: task for n, task in self.tasks.items() if n in tasks})


@dataclass(frozen=True, slots=True)
class Output:
    """How the result is written.

    Attributes:
        dtype: `bfloat16`, `float16`, `float32` or `float64`; None for the target's own, tensor by
            tensor.
        shard_bytes: Largest size of one file; a larger tensor gets its own file.
        precision: Arithmetic, `float32` or `float64`.
        tokenizer: Task or role whose tokenizer and chat template the result has; None: the target.
        chat_template: Chat template that takes the place of theirs.
        form: `model`, or `lora` for an adapter over the target.
        rank: Of an adapter's matrices, at the most; None to stack the factors of adapters.
        rest: What an adapter does with tensors that differ and are no linear weights: `refuse`,
            `drop` or `save` (as PEFT's `modules_to_save`).
    """

    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    precision: str = "float32"
    tokenizer: str | None = None
    chat_template: str | None = None
    form: str = FORMS[0]
    rank: int | None = None
    rest: str = RESTS[0]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe.

    Attributes:
        family: Checkpoints, and what is done with each task.
        method: How weights are decided.
        out: How the result is written.
        seed: For methods that draw random numbers; recorded in any case.
        layer_weights: What the method weighs layers by; None for 1 everywhere.
        table: Layer weights instead of the method's own, as a file or a table.
        stages: Recipes whose results this one reads as `stage:NAME`, by name, in order.
    """

    family: Family
    method: Method
    out: Output = field(default_factory=Output)
    seed: int = 0
    layer_weights: MethodChoice | None = None
    table: Path | Table | None = None
    stages: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Tasks by name."""
        return dict(self.family.tasks)

    @property
    def scales(self) -> dict[str, float]:
        """λ of the tasks that have one."""
        return {n: task.scale for n, task in self.tasks.items() if task.scale is not None}

    @property
    def parameters(self) -> dict[str, Mapping[str, Any]]:
        """Parameters of the method by task."""
        return {name: task.parameters for name, task in self.tasks.items()}

    @property
    def profiles(self) -> dict[str, Profile]:
        """What λ is multiplied with, of the tasks for which it differs by layer."""
        return {n: task.profile for n, task in self.tasks.items() if task.profile is not None}

    @property
    def published(self) -> dict[str, str]:
        """Names on the hub of local members, also those of stages, by path."""
        families = [self.family, *(stage.family for stage in self.stages.values())]
        return {path: name for family in families for path, name in family.published.items()}

    @property
    def weigher(self) -> Recipe:
        """The recipe whose method weighs the layers: of `layer_weights` if given, or this one."""
        chosen = self.layer_weights
        if chosen is None:
            return self
        recipe = replace(self, method=chosen.method, layer_weights=None)
        return recipe.with_tasks({t: {"parameters": chosen.parameters} for t in self.tasks})

    @property
    def needs_base(self) -> bool:
        """Whether the model before instruction tuning is used."""
        return self.method.needs_base or self.weigher.method.needs_base

    @property
    def needs_anchor(self) -> bool:
        """Whether task vectors are taken; if not, the task models themselves."""
        method = self.method
        return method.needs_anchor or (method.takes_anchor and self.family.start is not None)

    @property
    def needs_scan(self) -> bool:
        """Whether it rests on statistics of the weights."""
        return self.method.needs_scan or self.weigher.method.needs_scan

    def with_tasks(self, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The recipe with some fields of some tasks replaced; values by task, then by field."""
        tasks = {n: replace(task, **changes.get(n, {})) for n, task in self.tasks.items()}
        return replace(self, family=replace(self.family, tasks=tasks))

    def with_scales(self, scales: Mapping[str, float | None]) -> Recipe:
        """The recipe with another λ for some tasks."""
        return self.with_tasks({name: {"scale": scale} for name, scale in scales.items()})

    def with_models(self, family: Family) -> Recipe:
        """The recipe with the models of a family that has the same tasks."""
        tasks = {
            name: replace(self.tasks[name], model=task.model, over=task.over, hub=task.hub)
            for name, task in family.tasks.items()
        }
        return replace(self, family=replace(family, tasks=tasks))

    def __repr__(self) -> str:
        return f"<Recipe {self.method.name} of {', '.join(self.tasks) or 'no task'}>"

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default filled in, as a mapping that `read_recipe` takes."""
        family, chosen = self.family, self.layer_weights
        roles = {"base": family.base, "instruct": family.start, "target": family.edited}
        data: dict[str, Any] = {
            r: _name_model(model) for r, model in roles.items() if model is not None
        }
        for role, key in (("base", "base"), ("anchor", "instruct"), ("target", "target")):
            if role in family.hubs:
                data[key] = {"model": data[key], "hub": family.hubs[role]}
        data["tasks"] = {name: task.to_dict() for name, task in self.tasks.items()}
        data["method"] = {"name": self.method.name}
        if chosen is not None:
            data["layer_weights"] = chosen.to_dict()
        if isinstance(self.table, Path):
            data["table"] = str(self.table)
        data["include"], data["exclude"] = list(family.include), list(family.exclude)
        data["layers"] = [dict(entry) for entry in family.layers]
        data["vocabulary"], data["new_tokens"] = family.vocabulary, family.new_tokens
        data["allow_pickle"] = family.allow_pickle
        data["out"] = {"shard_size": self.out.shard_bytes, "precision": self.out.precision}
        more = {key: getattr(self.out, key) for key in ("dtype", "tokenizer", "chat_template")}
        if self.out.form == "lora":
            more |= {key: getattr(self.out, key) for key in ("form", "rank", "rest")}
        data["out"] |= {key: value for key, value in more.items() if value is not None}
        data["seed"] = self.seed
        if self.stages:
            data["stages"] = {name: _stage_to_dict(stage) for name, stage in self.stages.items()}
        return data


def _stage_to_dict(recipe: Recipe) -> dict[str, Any]:
    """As `to_dict`, without what a stage takes from the recipe that it is part of."""
    data = recipe.to_dict()
    del data["seed"], data["out"]["shard_size"]
    return data


def _name_model(model: Model) -> Any:
    """A model as a recipe names it."""
    if isinstance(model, Stack):
        return model.to_dict(_name_model)
    if isinstance(model, str) and model.startswith(STAGE):
        return model
    name = hub_name(model)
    if name is not None:
        return str(resolved(name))
    if isinstance(model, (str, os.PathLike)):
        text = os.fspath(model)
        return text if text.startswith(MARK) else str(Path(text).expanduser().absolute())
    return described(model) if isinstance(model, (Mapping, Module)) else model.where
