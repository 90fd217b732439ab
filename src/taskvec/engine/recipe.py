r"""The recipe: what a user asks for, checked before any file is opened.

```yaml
base: llama-base                 # folder; only where the method needs it
instruct: llama-instruct         # folder that task vectors start from (or `anchor:`, the same)
target: llama-other              # folder that is edited; default: instruct
tasks:
  math: {model: llama-math, scale: 0.5}
  code: {model: llama-code, scale: 0.5, scheme: linear}      # method parameters may differ by task
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from taskvec.checkpoints.hub import hub_name, resolved
from taskvec.checkpoints.memory import MARK, Module, described
from taskvec.checkpoints.source import Source
from taskvec.dtypes import FLOATS
from taskvec.engine.located import Document, Key, parse_yaml
from taskvec.engine.stacking import Piece, Stack
from taskvec.errors import ParameterError, RecipeError, UsageError, nearest
from taskvec.layers import override
from taskvec.methods import find_method
from taskvec.methods.method import Method
from taskvec.methods.parameters import resolve
from taskvec.methods.table import Table

TOP = (
    "base",
    "instruct",
    "anchor",
    "target",
    "tasks",
    "method",
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
VOCABULARY = ("refuse", "truncate-padding", "by-token", "union")
NEW_TOKENS = ("copy", "drop")
OVER = ("anchor", "base")
OUT = ("dtype", "shard_size", "precision")
STAGE_OUT = ("dtype", "precision")
PRECISIONS = ("float32", "float64")
DEFAULT_SHARD_BYTES = 5_000_000_000
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


# A folder or file, a name on the hub, `stage:NAME`, layers of several models, a state dict or module
# in memory, or a source that something else made.
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
        parameters: Resolved parameters by task.
        out: How the result is written.
        seed: For methods that draw random numbers; recorded in any case.
        stages: Recipes whose results this one reads as `stage:NAME`, by name, in order.
        stage_tables: Tables that stages had in a merge that is repeated, by name.
    """

    family: Family
    scales: Mapping[str, float]
    method: Method
    parameters: Mapping[str, Mapping[str, Any]]
    out: Output = field(default_factory=Output)
    seed: int = 0
    stages: Mapping[str, Recipe] = field(default_factory=dict)
    stage_tables: Mapping[str, Table] = field(default_factory=dict)

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
                "scale": self.scales[task],
                **({"over": family.over[task]} if task in family.over else {}),
                **self.parameters[task],
            }
            for task, path in sorted(family.tasks.items())
        }
        data["method"] = {"name": self.method.name}
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


def _stage_dict(recipe: Recipe) -> dict[str, Any]:
    data = {k: v for k, v in recipe.to_dict().items() if k in STAGE_KEYS}
    data["out"] = {k: v for k, v in data["out"].items() if k in STAGE_OUT}
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
    tasks, scales, parameters, over = _tasks(
        document, data, folder, method, common, needs_scales, stages
    )
    if not tasks and "target" not in roles:
        document.fail((), f"target is missing: {method.name} writes it")
    family = Family(
        tasks=tasks,
        base=roles.get("base"),
        anchor=roles.get("anchor", roles.get("instruct")),
        target=roles.get("target"),
        include=_patterns(document, data, "include"),
        exclude=_patterns(document, data, "exclude"),
        layers=_layers(document, data),
        over=over,
        vocabulary=_choice(document, ("vocabulary",), data, VOCABULARY),
        new_tokens=_choice(document, ("new_tokens",), data, NEW_TOKENS),
        allow_pickle=_switch(document, data, "allow_pickle"),
    )
    return Recipe(
        family,
        scales,
        method,
        parameters,
        _out(document, data, STAGE_OUT if is_stage else OUT),
        _seed(document, data),
        {} if is_stage else stages,
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
        found[name] = read_recipe(part, folder, stages=dict(found))
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
        scale = _numeric(entry.get("scale", 1.0))
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


def _method(document: Document, data: Mapping[str, Any]) -> tuple[Method, dict[str, object]]:
    value = data.get("method")
    if value is None:
        document.fail((), "method is missing; for example: method: {name: lata}")
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        document.fail(("method",), "method must be a name or a mapping with a name")
    try:
        method = find_method(value["name"])
    except ParameterError as error:
        document.fail(("method", "name"), str(error))
    given = {k: v for k, v in value.items() if k != "name"}
    document.check_keys(given, tuple(p.name for p in method.parameters), ("method",))
    return method, given


def _tasks(
    document: Document,
    data: Mapping[str, Any],
    folder: Path,
    method: Method,
    common: Mapping[str, object],
    needs_scales: bool,
    stages: Mapping[str, Recipe],
) -> tuple[
    dict[str, Model], dict[str, float], dict[str, dict[str, str | float]], dict[str, str]
]:
    entries = data.get("tasks")
    if not method.takes_tasks:
        if entries:
            document.fail(("tasks",), f"{method.name} takes no tasks; leave them out")
        return {}, {}, {}, {}
    if not isinstance(entries, dict) or not entries:
        document.fail(
            ("tasks",),
            "tasks must name at least one; for example: tasks: {math: {model: DIR, scale: 0.5}}",
        )
    names = tuple(p.name for p in method.parameters)
    paths: dict[str, Model] = {}
    scales: dict[str, float] = {}
    parameters: dict[str, dict[str, str | float]] = {}
    over: dict[str, str] = {}
    for task, given in entries.items():
        at: Key = ("tasks", task)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", task):
            document.fail(at, f"task name {task!r} must be letters, digits and _ . + -")
        entry = {"model": given} if isinstance(given, str) else given
        if not isinstance(entry, dict) or "model" not in entry:
            document.fail(at, f"task {task!r} must be a mapping with a model; got {given!r}")
        document.check_keys(entry, ("model", "scale", "over", *names), at)
        paths[task] = _model(document, (*at, "model"), entry["model"], folder, stages)
        scale = entry.get("scale", method.default_scale)
        if scale is not None or "scale" in entry:
            scales[task] = _scale(document, (*at, "scale"), task, scale, method)
        elif needs_scales:
            document.fail(
                at, f"scale of task {task!r} is missing; {method.name} has no default λ (try 0.5)"
            )
        if "over" in entry:
            over[task] = _choice(document, (*at, "over"), entry, OVER)
        own = {k: v for k, v in entry.items() if k not in ("model", "scale", "over")}
        for place, part in ((("method",), common), (at, own)):
            for name, value in part.items():
                try:
                    resolve(method.parameters, {name: _numeric(value)}, method.name)
                except ParameterError as error:
                    document.fail((*place, name), str(error))
        merged = {k: _numeric(v) for k, v in {**common, **own}.items()}
        parameters[task] = resolve(method.parameters, merged, method.name)
    return paths, scales, parameters, over


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


def _numeric(value: object) -> object:
    """YAML 1.1 reads `1e-3` as a word; a word that is a number is meant as one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        return float(value)
    if type(value) is int and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return value


def _scale(document: Document, key: Key, task: str, value: object, method: Method) -> float:
    number = _numeric(value)
    if (
        isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not math.isfinite(number)
    ):
        document.fail(key, f"scale of task {task!r} must be a finite number; got {value!r}")
    if number < 0 and not method.takes_negative_scale:
        document.fail(
            key, f"{method.name} takes no negative scale; got {value!r} for task {task!r}"
        )
    return float(number)


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
