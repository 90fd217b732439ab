r"""The recipe: what a user asks for, checked before any file is opened.

```yaml
base: llama-base                 # folder; only where the method needs it
instruct: llama-instruct         # folder that task vectors start from (or `anchor:`, the same)
target: llama-other              # folder that is edited; default: instruct
tasks:
  math: {model: llama-math, scale: 0.5}
  code: {model: llama-code, scale: 0.5, scheme: linear}      # method parameters may differ by task
  data: {model: llama-data, scale: {depth: [0.2, 0.8], outside: 0}}      # λ may differ by layer
method: {name: lata, scheme: logarithmic}
include: ["model.layers.*"]      # shell patterns of tensor names; the rest stays the target's
exclude: ["*.embed_tokens.weight"]
stages:                          # recipes whose results others read as `stage:NAME`, unwritten
  skills: {instruct: a, tasks: {math: {model: b, scale: 0.5}}, method: task_arithmetic}
layers:                          # overrides of the table of layer names
  - {pattern: 'visual\.blocks\.(?P<block>\d+)\.attn\.', tower: vision, module: attention}
out: {dtype: bfloat16, shard_size: 5GB, precision: float32}
seed: 0
```

Relative paths are relative to the folder of the recipe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from taskvec import documents
from taskvec.checkpoints.hub import hub_name
from taskvec.checkpoints.memory import MARK
from taskvec.errors import ParameterError, RecipeError, nearest
from taskvec.methods import find_method
from taskvec.methods.choice import MethodChoice
from taskvec.methods.method import Method
from taskvec.methods.parameters import Parameter, resolve
from taskvec.recipes.depth import PLACES, Profile, Values
from taskvec.recipes.located import Document, parse_yaml
from taskvec.recipes.recipe import (
    STAGE,
    Family,
    Model,
    Output,
    Recipe,
    TaskSpec,
)
from taskvec.recipes.schema import (
    OF_METHOD,
    OF_TASK,
    ByLayer,
    LayersOnly,
    MemberEntry,
    MethodEntry,
    Out,
    RecipeFile,
    StackEntry,
    StageOut,
    StageRecipe,
    TaskEntry,
    ValuesEntry,
)
from taskvec.recipes.stack import Piece, Stack
from taskvec.validation import Key, check, numeric, unknown

_ROLES = ("base", "instruct", "anchor", "target")


def load_recipe(path: str | os.PathLike[str], *, needs_scales: bool = True) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: YAML file.
        needs_scales: See `read_recipe`.

    Raises:
        RecipeError: anything wrong in it; the message has file, line and remedy.
    """
    document = parse_yaml(read_text(path), str(path))
    return read_recipe(document, Path(path).absolute().parent, needs_scales=needs_scales)


def read_layers(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], ...]:
    """Overrides of the layer table from the `layers` of a recipe; other keys are ignored.

    Raises:
        RecipeError: they are missing, or one is wrong.
    """
    document = parse_yaml(read_text(path), str(path))
    if not isinstance(document.data, dict) or not document.data.get("layers"):
        document.fail((), "has no overrides; give a file with entries in `layers`")
    entries = check(LayersOnly, document.data, document.fail).layers
    return tuple(entry.model_dump(exclude_unset=True) for entry in entries)


def read_text(path: str | os.PathLike[str]) -> str:
    """Text of a recipe file.

    Raises:
        RecipeError: it cannot be read.
    """
    if Path(path).is_dir():
        raise RecipeError(
            f"{path}: is a folder, not a recipe file; models are given in a recipe, or by flags "
            "such as --task NAME=MODEL:SCALE"
        )
    return documents.read_text(path, documents.RECIPE, RecipeError)


def read_recipe(document: Document, folder: Path, *, needs_scales: bool = True) -> Recipe:
    """Check a recipe.

    Args:
        document: As parsed.
        folder: What relative paths are relative to.
        needs_scales: Whether a task without λ is an error; a scan does not need them.

    Raises:
        RecipeError: anything wrong in it.
    """
    document.check_single()
    entry = check(RecipeFile, document.data, document.fail)
    stages: dict[str, Recipe] = {}
    for name, stage in entry.stages.items():
        place = _Place(document, ("stages", name), folder, dict(stages))
        stages[name] = replace(_recipe(stage, place), seed=entry.seed)
    recipe = _recipe(entry, _Place(document, (), folder, stages, needs_scales))
    return replace(recipe, seed=entry.seed, stages=stages)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a recipe, or one of its stages, is written.

    Attributes:
        document: As parsed.
        at: Key of the recipe in it.
        folder: What relative paths are relative to.
        stages: Recipes whose results it may read.
        needs_scales: See `read_recipe`.
    """

    document: Document
    at: Key
    folder: Path
    stages: Mapping[str, Recipe]
    needs_scales: bool = True

    def fail(self, key: Key, what: str) -> NoReturn:
        """Raise `RecipeError` about a value of the recipe."""
        self.document.fail((*self.at, *key), what)

    def check_keys(
        self,
        given: Mapping[str, Any],
        known: tuple[str, ...],
        at: Key,
        elsewhere: Mapping[str, str],
    ) -> None:
        """Fail for the first key that is not known."""
        for key in given:
            if key not in known:
                what = unknown(key, known, elsewhere)
                self.fail((*at, key), what.replace("{place}", f" in {'.'.join(map(str, at))}"))

    def path(self, value: str) -> str:
        """A path of the recipe."""
        return str(self.folder / os.path.expanduser(value))  # noqa: PTH111 (leaves ~nobody)


def _recipe(entry: StageRecipe, place: _Place) -> Recipe:
    """The recipe, or a stage, that an entry means."""
    method, common = _method(entry.method, place, ("method",))
    tasks = _tasks(entry, place, method, common)
    given = {role: getattr(entry, role) for role in _ROLES}
    roles = {r: _model(m, place, (r,)) for r, m in given.items() if m is not None}
    hubs = {
        "anchor" if role == "instruct" else role: member.hub
        for role, member in given.items()
        if isinstance(member, MemberEntry) and member.hub is not None
    }
    if not tasks and "target" not in roles:
        place.fail((), f"target is missing: {method.name} writes it")
    family = Family(
        tasks=tasks,
        include=tuple(entry.include),
        exclude=tuple(entry.exclude),
        layers=tuple(layer.model_dump(exclude_unset=True) for layer in entry.layers),
        vocabulary=entry.vocabulary,
        new_tokens=entry.new_tokens,
        allow_pickle=entry.allow_pickle,
        hubs=hubs,
        **roles,
    )
    return Recipe(
        family,
        method,
        _output(entry.out, place, tasks),
        layer_weights=_layer_weights(entry, place, method),
        table=None if entry.table is None else Path(place.path(entry.table)),
    )


def _output(entry: StageOut, place: _Place, tasks: Mapping[str, TaskSpec]) -> Output:
    """How the result is written."""
    if not isinstance(entry, Out):
        return Output(entry.dtype, precision=entry.precision)
    members = (*tasks, *_ROLES)
    if entry.tokenizer is not None and entry.tokenizer not in members:
        what = f"tokenizer must name a task or a role; got {entry.tokenizer!r}"
        place.fail(("out", "tokenizer"), f"{what}; {nearest(entry.tokenizer, members)}")
    return Output(
        entry.dtype, entry.shard_size, entry.precision, entry.tokenizer, entry.chat_template,
        entry.form, entry.rank, entry.rest,
    )  # fmt: skip


def _model(value: str | StackEntry | MemberEntry, place: _Place, key: Key) -> Model:
    """A model as a recipe names it: a path, `stage:NAME`, or a stack of layers."""
    if isinstance(value, StackEntry):
        pieces = []
        for i, piece in enumerate(value.stack):
            model = _model(piece.model, place, (*key, "stack", i, "model"))
            pieces.append(Piece(model, piece.blocks[0], piece.blocks[1], piece.scale))
        return Stack(tuple(pieces))
    text = value.model if isinstance(value, MemberEntry) else value
    if text.startswith(STAGE):
        name = text.removeprefix(STAGE)
        if name not in place.stages:
            hint = nearest(name, list(place.stages)) if place.stages else "none is before this"
            place.fail(key, f"{key[-1]}: unknown stage {name!r}; {hint}")
        return text
    if hub_name(text, relative_to=place.folder) is not None or text.startswith(MARK):
        return text
    return place.path(text)


def _method(entry: MethodEntry, place: _Place, at: Key) -> tuple[Method, Mapping[str, Any]]:
    """A method, and the parameters that are given for it."""
    try:
        method = find_method(entry.name)
    except ParameterError as error:
        place.fail((*at, "name"), str(error))
    given = entry.model_extra or {}
    place.check_keys(given, tuple(p.name for p in method.parameters), at, OF_METHOD)
    return method, given


def _layer_weights(entry: StageRecipe, place: _Place, owner: Method) -> MethodChoice | None:
    """What a method weighs layers by."""
    at: Key = ("layer_weights",)
    if entry.layer_weights is None:
        return None
    takes = owner.sparsifies or owner.combine is not None
    if not (takes and owner.takes_table):
        place.fail(at, f"{owner.name} takes no layer_weights; remove the key")
    method, given = _method(entry.layer_weights, place, at)
    if not method.needs_scan or method.sparsifies:
        place.fail(at, f"{method.name} gives no layer weights; for example: lata")
    try:
        values = {k: numeric(v) for k, v in given.items()}
        return MethodChoice(method, resolve(method.parameters, values, method.name))
    except ParameterError as error:
        place.fail(at, str(error))


def _tasks(
    entry: StageRecipe, place: _Place, method: Method, common: Mapping[str, Any]
) -> dict[str, TaskSpec]:
    """Tasks by name, with all parameters of the method."""
    if not method.takes_tasks:
        if entry.tasks:
            place.fail(("tasks",), f"{method.name} takes no tasks; remove them")
        return {}
    if not entry.tasks:
        example = "tasks: {math: {model: DIR, scale: 0.5}}"
        place.fail(("tasks",), f"tasks must name at least one; for example: {example}")
    known = (*TaskEntry.model_fields, *(p.name for p in method.parameters))
    of_all = {
        p.name: _parameter(common.get(p.name, p.default), place, ("method", p.name), p, method)
        for p in method.parameters
    }
    found: dict[str, TaskSpec] = {}
    for name, task in entry.tasks.items():
        at: Key = ("tasks", name)
        given = task.model_extra or {}
        place.check_keys(given, known, at, OF_TASK)
        own = {
            p.name: _parameter(given[p.name], place, (*at, p.name), p, method)
            for p in method.parameters
            if p.name in given
        }
        scale, profile = _scale(task, place, name, method)
        model = _model(task.model, place, (*at, "model"))
        hub = task.model.hub if isinstance(task.model, MemberEntry) else task.hub
        found[name] = TaskSpec(model, scale, of_all | own, profile, task.over, hub)
    return found


def _scale(
    task: TaskEntry, place: _Place, name: str, method: Method
) -> tuple[float | None, Profile | None]:
    """λ of a task, and what it is multiplied with tensor by tensor."""
    at: Key = ("tasks", name, "scale")

    def number(key: Key, value: float) -> float:
        if value < 0 and not method.takes_negative_scale:
            what = f"{method.name} takes no negative scale; got {value:g} for task {name!r}"
            place.fail(key, what)
        return value

    if task.scale is None:
        if method.default_scale is None and place.needs_scales:
            what = f"scale of task {name!r} is missing; {method.name} has no default λ (try 0.5)"
            place.fail(at[:-1], what)
        return method.default_scale, None
    if not isinstance(task.scale, ByLayer):
        return number(at, task.scale), None
    return number((*at, "times"), task.scale.times), _profile(task.scale, at, number)


def _parameter(
    value: Any, place: _Place, at: Key, parameter: Parameter, method: Method
) -> str | float | Profile:
    """A word, a number, or a profile where the number differs by layer."""

    def checked(key: Key, value: object) -> Any:
        try:
            return parameter.check(value, method.name)
        except ParameterError as error:
            place.fail(key, str(error))

    if not parameter.by_layer or not isinstance(value, dict):
        return checked(at, numeric(value))  # type: ignore[no-any-return]
    entry = check(ByLayer, value, place.document.fail, (*place.at, *at))
    return _profile(entry, at, lambda key, value: checked(key, entry.times * value))


def _profile(entry: ByLayer, at: Key, number: Callable[[Key, float], float]) -> Profile:
    """A profile as a recipe has it.

    Args:
        entry: As in the recipe.
        at: Its key.
        number: Gives the number for the one at a key, or fails.
    """

    def values(entry: ByLayer | ValuesEntry, at: Key) -> Values:
        depth = (number((*at, "depth", i), x) for i, x in enumerate(entry.depth or ()))
        outside = entry.outside
        return Values(tuple(depth), None if outside is None else number((*at, "outside"), outside))

    places = {place: getattr(entry, place) for place in PLACES}
    return Profile(
        rest=values(entry, at),
        places={p: number((*at, p), x) for p, x in places.items() if x is not None},
        patterns={p: values(e, (*at, "patterns", p)) for p, e in entry.patterns.items()},
    )
