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

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from taskvec.checkpoints.hub import hub_name
from taskvec.checkpoints.memory import MARK
from taskvec.dtypes import FLOATS
from taskvec.errors import ParameterError, RecipeError, nearest
from taskvec.layers import override
from taskvec.methods import find_method
from taskvec.methods.choice import MethodChoice
from taskvec.methods.method import Method
from taskvec.methods.parameters import Parameter, resolve
from taskvec.recipes.depth import Profile, read_profile
from taskvec.recipes.located import Document, Key, parse_yaml
from taskvec.recipes.recipe import (
    DEFAULT_SHARD_BYTES,
    NEW_TOKENS,
    OVER,
    STAGE,
    VOCABULARY,
    Family,
    Model,
    Output,
    Recipe,
    TaskSpec,
)
from taskvec.recipes.stack import Piece, Stack

TOP = (
    "base",
    "instruct",
    "anchor",
    "target",
    "tasks",
    "method",
    "layer_weights",
    "include",
    "exclude",
    "layers",
    "vocabulary",
    "new_tokens",
    "allow_pickle",
    "out",
    "seed",
    "stages",
)
STAGE_KEYS = tuple(key for key in TOP if key not in ("stages", "seed"))
OUT = ("dtype", "shard_size", "precision")
STAGE_OUT = ("dtype", "precision")
PRECISIONS = ("float32", "float64")
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def load_recipe(path: str | os.PathLike[str], **options: Any) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: YAML file.
        **options: See `read_recipe`.

    Raises:
        RecipeError: anything wrong in it; the message has file, line and remedy.
    """
    return read_recipe(
        parse_yaml(read_text(path), str(path)), Path(path).absolute().parent, **options
    )


def read_layers(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], ...]:
    """Overrides of the layer table from the `layers` of a recipe, whatever else stands in it.

    Raises:
        RecipeError: there are none, or one is wrong.
    """
    document = parse_yaml(read_text(path), str(path))
    if not isinstance(document.data, dict) or not document.data.get("layers"):
        document.fail((), "holds no overrides; give a recipe, or a file, that has some in layers")
    return _layers(document, document.data)


def read_text(path: str | os.PathLike[str]) -> str:
    """Text of a recipe file.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not text in UTF-8") from error


def read_recipe(
    document: Document,
    folder: Path,
    *,
    needs_scales: bool = True,
    stages: Mapping[str, Recipe] | None = None,
) -> Recipe:
    """Check a recipe.

    Args:
        document: As parsed.
        folder: What relative paths are relative to.
        needs_scales: Whether a task without λ is an error; a scan does not need them.
        stages: Recipes of stages whose results this one may read; the recipe's own if None.

    Raises:
        RecipeError: anything wrong in it.
    """
    data = document.data
    if not isinstance(data, dict) or not data:
        document.fail((), "a recipe is a mapping with tasks and a method; this is not")
    is_stage = stages is not None
    document.check_keys(data, STAGE_KEYS if is_stage else TOP, ())
    stages = stages if stages is not None else _stages(document, data, folder)
    if "anchor" in data and "instruct" in data:
        document.fail(
            ("anchor",), "anchor and instruct are two names of one role; give one of them"
        )
    roles = {
        role: _model(document, (role,), data[role], folder, stages)
        for role in ("base", "instruct", "anchor", "target")
        if role in data
    }
    method, common = _method(document, data)
    tasks = _tasks(document, data, folder, method, common, needs_scales, stages)
    if not tasks and "target" not in roles:
        document.fail((), f"target is missing: {method.name} writes it")
    family = Family(
        tasks=tasks,
        base=roles.get("base"),
        instruct=roles.get("instruct"),
        anchor=roles.get("anchor"),
        target=roles.get("target"),
        include=_patterns(document, data, "include"),
        exclude=_patterns(document, data, "exclude"),
        layers=_layers(document, data),
        vocabulary=_choice(document, ("vocabulary",), data, VOCABULARY),
        new_tokens=_choice(document, ("new_tokens",), data, NEW_TOKENS),
        allow_pickle=_switch(document, data, "allow_pickle"),
    )
    return Recipe(
        family,
        method,
        _out(document, data, STAGE_OUT if is_stage else OUT),
        _seed(document, data),
        layer_weights=_layer_weights(document, data, method),
        stages={} if is_stage else stages,
    )


def _stages(document: Document, data: Mapping[str, Any], folder: Path) -> dict[str, Recipe]:
    """Earlier stages by name; each may read those before it."""
    entries = data.get("stages", {})
    if not isinstance(entries, dict):
        document.fail(("stages",), f"stages must be a mapping of recipes by name; got {entries!r}")
    found: dict[str, Recipe] = {}
    for name, entry in entries.items():
        lines = {k[2:]: line for k, line in document.lines.items() if k[:2] == ("stages", name)}
        part = Document(entry, f"{document.source}: stage {name!r}", lines)
        stage = read_recipe(part, folder, stages=dict(found))
        found[name] = replace(stage, seed=_seed(document, data))
    return found


def _model(
    document: Document, key: Key, value: object, folder: Path, stages: Mapping[str, Recipe]
) -> Model:
    """A model as a recipe names it: a path, `stage:NAME`, or a stack of layers."""
    if isinstance(value, str) and value.startswith(STAGE):
        name = value.removeprefix(STAGE)
        if name not in stages:
            hint = nearest(name, list(stages)) if stages else "there is none before this"
            document.fail(key, f"{key[-1]}: unknown stage {name!r}; {hint}")
        return value
    if isinstance(value, dict) and "stack" in value:
        document.check_keys(value, ("stack",), key)
        return _stack(document, (*key, "stack"), value["stack"], folder, stages)
    return _folder(document, key, value, folder)


def _stack(
    document: Document, key: Key, value: object, folder: Path, stages: Mapping[str, Recipe]
) -> Stack:
    if not isinstance(value, list) or not value:
        document.fail(key, "stack must list pieces; for example: [{model: DIR, blocks: [0, 16]}]")
    pieces = []
    for i, entry in enumerate(value):
        at: Key = (*key, i)
        if not isinstance(entry, dict) or "model" not in entry or "blocks" not in entry:
            document.fail(at, "a piece of a stack needs model and blocks, and may have scale")
        document.check_keys(entry, ("model", "blocks", "scale"), at)
        blocks = entry["blocks"]
        is_range = isinstance(blocks, list) and len(blocks) == 2
        if not is_range or not all(type(b) is int for b in blocks) or blocks[0] >= blocks[1]:
            document.fail(
                (*at, "blocks"),
                f"blocks must be [first, the one after the last]; got {blocks!r}",
            )
        scale = numeric(entry.get("scale", 1.0))
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or not math.isfinite(cast(float, scale)):
            document.fail((*at, "scale"), f"scale must be a finite number; got {scale!r}")
        model = _model(document, (*at, "model"), entry["model"], folder, stages)
        pieces.append(Piece(model, blocks[0], blocks[1], float(cast(float, scale))))
    return Stack(tuple(pieces))


def _folder(document: Document, key: Key, value: object, folder: Path) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        document.fail(key, f"{key[-1]} must be a folder; got {value!r}")
    if hub_name(value, relative_to=folder) is not None or value.startswith(MARK):
        return value
    return str(folder / os.path.expanduser(value))  # noqa: PTH111 (leaves ~nobody)


def _layer_weights(
    document: Document, data: Mapping[str, Any], owner: Method
) -> MethodChoice | None:
    """What a method weighs layers by."""
    if data.get("layer_weights") is None:
        return None
    takes = owner.sparsifies or owner.combine is not None
    if not (takes and owner.takes_table):
        document.fail(("layer_weights",), f"{owner.name} takes no layer_weights; it makes its own")
    method, given = _method(document, data, "layer_weights")
    if not method.needs_scan or method.sparsifies:
        document.fail(("layer_weights",), f"{method.name} weighs no layers; for example: lata")
    try:
        values = {k: numeric(v) for k, v in given.items()}
        return MethodChoice(method, resolve(method.parameters, values, method.name))
    except ParameterError as error:
        document.fail(("layer_weights",), str(error))


def _method(
    document: Document, data: Mapping[str, Any], place: str = "method"
) -> tuple[Method, dict[str, object]]:
    value = data.get(place)
    if value is None:
        document.fail((), "method is missing; for example: method: {name: lata}")
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        document.fail((place,), f"{place} must be a name or a mapping with a name")
    try:
        method = find_method(value["name"])
    except ParameterError as error:
        document.fail((place, "name"), str(error))
    given = {k: v for k, v in value.items() if k != "name"}
    document.check_keys(given, tuple(p.name for p in method.parameters), (place,))
    return method, given


def _tasks(
    document: Document,
    data: Mapping[str, Any],
    folder: Path,
    method: Method,
    common: Mapping[str, object],
    needs_scales: bool,
    stages: Mapping[str, Recipe],
) -> dict[str, TaskSpec]:
    entries = data.get("tasks")
    if not method.takes_tasks:
        if entries:
            document.fail(("tasks",), f"{method.name} takes no tasks; leave them out")
        return {}
    if not isinstance(entries, dict) or not entries:
        document.fail(
            ("tasks",),
            "tasks must name at least one; for example: tasks: {math: {model: DIR, scale: 0.5}}",
        )
    names = tuple(p.name for p in method.parameters)
    of_all = {
        p.name: _parameter(document, ("method", p.name), common, p, method.name)
        for p in method.parameters
    }
    found: dict[str, TaskSpec] = {}
    for task, given in entries.items():
        at: Key = ("tasks", task)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", task):
            document.fail(at, f"task name {task!r} must be letters, digits and _ . + -")
        entry = {"model": given} if isinstance(given, str) else given
        if not isinstance(entry, dict) or "model" not in entry:
            document.fail(at, f"task {task!r} must be a mapping with a model; got {given!r}")
        document.check_keys(entry, ("model", "scale", "over", *names), at)
        scale, profile = entry.get("scale", method.default_scale), None
        if isinstance(scale, dict):
            check = partial(_scale, document, task=task, method=method)
            what = f"scale of task {task!r}"
            profile = read_profile(document, (*at, "scale"), what, scale, check)
            scale = scale.get("times", 1.0)
        if scale is not None or "scale" in entry:
            scale = _scale(document, (*at, "scale"), scale, task=task, method=method)
        elif needs_scales:
            document.fail(
                at, f"scale of task {task!r} is missing; {method.name} has no default λ (try 0.5)"
            )
        own = {
            p.name: _parameter(document, (*at, p.name), entry, p, method.name)
            for p in method.parameters
            if p.name in entry
        }
        found[task] = TaskSpec(
            _model(document, (*at, "model"), entry["model"], folder, stages),
            scale,
            of_all | own,
            profile,
            _choice(document, (*at, "over"), entry, OVER) if "over" in entry else None,
        )
    return found


def _parameter(
    document: Document, key: Key, given: Mapping[str, object], parameter: Parameter, owner: str
) -> str | float | Profile:
    """A word, a number, or a profile where the number differs by layer."""
    value = given.get(parameter.name, parameter.default)

    def check(at: Key, value: object) -> str | float:
        try:
            return parameter.check(value, owner)
        except ParameterError as error:
            document.fail(at, str(error))

    if not parameter.by_layer or not isinstance(value, dict):
        return check(key, numeric(value))
    what = f"{parameter.name} of {owner}"
    times = _finite(document, (*key, "times"), value.get("times", 1.0), f"times in {what}")

    def number(at: Key, value: object) -> float:
        return float(check(at, times * _finite(document, at, value, what)))

    return read_profile(document, key, what, value, number)


def _choice(
    document: Document, key: Key, mapping: Mapping[str, Any], known: tuple[str, ...]
) -> str:
    """One of a few words; the first where nothing is said."""
    value = mapping.get(str(key[-1]), known[0])
    if value not in known:
        document.fail(key, f"{key[-1]} must be in {' | '.join(known)}; got {value!r}")
    return str(value)


def _switch(document: Document, data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        document.fail((key,), f"{key} must be true or false; got {value!r}")
    return value


def numeric(value: object) -> object:
    """YAML 1.1 reads `1e-3` as a word; a word that is a number is meant as one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        return float(value)
    if type(value) is int and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return value


def _finite(document: Document, key: Key, value: object, what: str) -> float:
    number = numeric(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not math.isfinite(number)
    ):
        hint = f"; by layer: {{depth: {value!r}}}" if isinstance(value, list) else ""
        document.fail(key, f"{what} must be a finite number; got {value!r}{hint}")
    return float(number)


def _scale(document: Document, key: Key, value: object, *, task: str, method: Method) -> float:
    number = _finite(document, key, value, f"scale of task {task!r}")
    if number < 0 and not method.takes_negative_scale:
        document.fail(
            key, f"{method.name} takes no negative scale; got {value!r} for task {task!r}"
        )
    return number


def _patterns(document: Document, data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = data.get(key, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(p, str) and p for p in value):
        document.fail((key,), f"{key} must be a list of name patterns; got {value!r}")
    return tuple(value)


def _layers(document: Document, data: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    value = data.get("layers", [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        document.fail(("layers",), "layers must be a list of mappings with a pattern")
    for i, entry in enumerate(value):
        try:
            override(entry)
        except RecipeError as error:
            document.fail(("layers", i), str(error))
    return tuple(value)


def _out(document: Document, data: Mapping[str, Any], known: tuple[str, ...]) -> Output:
    value = data.get("out", {})
    if not isinstance(value, dict):
        document.fail(("out",), f"out must be a mapping; got {value!r}")
    document.check_keys(value, known, ("out",))
    dtype = value.get("dtype")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in FLOATS):
        document.fail(("out", "dtype"), f"dtype must be in {' | '.join(FLOATS)}; got {dtype!r}")
    precision = value.get("precision", "float32")
    if precision not in PRECISIONS:
        document.fail(
            ("out", "precision"),
            f"precision must be in {' | '.join(PRECISIONS)}; got {precision!r}",
        )
    size = value.get("shard_size", DEFAULT_SHARD_BYTES)
    return Output(dtype, _bytes(document, ("out", "shard_size"), size), precision)


def _bytes(document: Document, key: Key, value: object) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
    if match is None or match[2].upper() not in _UNITS or isinstance(value, bool):
        document.fail(key, f"shard_size must be like 5GB or 500MB; got {value!r}")
    size = int(min(float(match[1]) * _UNITS[match[2].upper()], 2.0**63))
    if size < 1:
        document.fail(key, f"shard_size must be above 0; got {value!r}")
    return size


def _seed(document: Document, data: Mapping[str, Any]) -> int:
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        document.fail(("seed",), f"seed must be a whole number in [0, 2^64); got {seed!r}")
    return seed
