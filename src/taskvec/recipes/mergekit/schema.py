"""What a mergekit configuration says, with the line of everything in it.

The schema is that of mergekit 0.1.5. A configuration lists `models`, or `slices` of layers, or
`modules` of either; a parameter may stand at a model or source, at a slice, at a module or at the
top, and the innermost one that gives a value counts. A value is a scalar, a gradient (a list over
depth), or conditions on a part of the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from taskvec.errors import nearest
from taskvec.recipes.located import Document, Key

MARK = "merge_method"  # the key by which a configuration is known
TOP = (
    MARK,
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
INNERMOST = ("model", "layer_range", "parameters")

# Parameters by method: default of those of the whole merge, and of those of one input. None: there
# is no default, and the merge fails where it is not given.
_TASK_ARITHMETIC = {"int8_mask": False, "normalize": False, "rescale": False, "lambda": 1.0}
_TIES = _TASK_ARITHMETIC | {"normalize": True}
_DARE = _TASK_ARITHMETIC | {"rescale": True}
_DELLA = _DARE | {"normalize": True}
_SPARSE: dict[str, Any] = {"weight": None, "density": 1.0}
SHARED: dict[str, dict[str, Any]] = {
    "linear": {"normalize": True},
    "slerp": {"t": None},
    "nuslerp": {"nuslerp_row_wise": False, "nuslerp_flatten": True},
    "multislerp": {"normalize_weights": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "task_arithmetic": _TASK_ARITHMETIC,
    "ties": _TIES,
    "dare_linear": _DARE,
    "dare_ties": _DARE,
    "della": _DELLA,
    "della_linear": _DARE,
    "breadcrumbs": _TASK_ARITHMETIC,
    "breadcrumbs_ties": _TASK_ARITHMETIC,
    "model_stock": {"filter_wise": False},
    "nearswap": {"t": None},
    "sce": {"int8_mask": False, "select_topk": 1.0},
    "arcee_fusion": {},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "passthrough": {},
}
OWN: dict[str, dict[str, Any]] = {
    "linear": {"weight": None},
    "nuslerp": {"weight": None},
    "multislerp": {"weight": None},
    "task_arithmetic": _SPARSE,
    "ties": _SPARSE,
    "dare_linear": _SPARSE,
    "dare_ties": _SPARSE,
    "della": _SPARSE | {"epsilon": 0.15},
    "della_linear": _SPARSE | {"epsilon": 0.15},
    "breadcrumbs": _SPARSE | {"gamma": 0.01},
    "breadcrumbs_ties": _SPARSE | {"gamma": 0.01},
    "passthrough": {"scale": 1.0},
}
METHODS = tuple(SHARED)


@dataclass(frozen=True, slots=True)
class Reference:
    """A model as a configuration names it: a path or hub name, and a LoRA over it or none."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return self.model if self.lora is None else f"{self.model}+{self.lora}"


@dataclass(frozen=True, slots=True)
class Condition:
    """Values where a name contains `part` (None: everywhere), one or a gradient over depth."""

    part: str | None
    values: tuple[Any, ...]
    key: Key


Setting = tuple[Condition, ...]  # the first that fits counts; the last one always does
Scope = tuple[Key, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Source:
    """One input of a slice.

    Attributes:
        reference: Which model.
        blocks: First block and the one after the last; None for the whole model.
        parameters: Its own.
        key: Where it stands.
    """

    reference: Reference
    blocks: tuple[int, int] | None
    parameters: Scope
    key: Key


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive blocks of the result."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Scope
    key: Key


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration.

    Attributes:
        document: As parsed, for messages.
        method: `merge_method`.
        base: `base_model`.
        slices: What is merged; one slice of whole models for `models`.
        outer: Parameters of the module and of the top.
        ignored: Keys that mergekit does not know and ignores, with what was meant perhaps.
    """

    document: Document
    method: str
    base: Reference | None
    slices: tuple[Slice, ...]
    outer: tuple[Scope, ...]
    ignored: list[tuple[Key, str]] = field(default_factory=list)

    def setting(self, name: str, source: Source | None, slice_: Slice) -> Setting:
        """A parameter of one input (None: of the whole), or its default.

        Raises:
            RecipeError: it is not given and has no default, or is no setting.
        """
        scopes = [slice_.parameters, *self.outer]
        if source is not None:
            scopes.insert(0, source.parameters)
        found: list[Condition] = []
        for key, parameters in scopes:
            if name in parameters:
                for condition in _conditions(self.document, (*key, name), parameters[name]):
                    found.append(condition)
                    if condition.part is None:
                        return tuple(found)
        key = slice_.key if source is None else source.key
        default = (SHARED if source is None else OWN).get(self.method, {}).get(name)
        if default is None:
            who = "" if source is None else f" of {source.reference}"
            self.document.fail(key, f"{name}{who} is missing; mergekit's {self.method} needs it")
        return (*found, Condition(None, (default,), ()))


def is_config(data: object) -> bool:
    """Whether a parsed file is a mergekit configuration."""
    return isinstance(data, dict) and MARK in data


def read_config(document: Document) -> Config:
    """Read a configuration.

    Raises:
        RecipeError: it is none, or has what is not supported; the message has the line.
    """
    data = document.data
    if isinstance(data, dict) and ("experts" in data or "gate_mode" in data):
        key = "experts" if "experts" in data else "gate_mode"
        document.fail((key,), "building a mixture of experts (mergekit-moe) is not supported")
    if not is_config(data):
        document.fail((), f"is no mergekit configuration: it has no {MARK}")
    method = data[MARK]
    if method not in METHODS:
        known = nearest(str(method), METHODS)
        document.fail((MARK,), f"unknown method {method!r} of mergekit 0.1.5; {known}")
    ignored: list[tuple[Key, str]] = []
    base = data.get("base_model")
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        document.fail((), f"exactly one of models, slices, modules must be given; got {len(given)}")
    _note_unknown(ignored, data, TOP, ())
    outer = [_scope(document, ("parameters",), data, method, ignored)]
    at: Key = ()
    if given == ["modules"]:
        at, data = _only_module(document, data["modules"])
        _note_unknown(ignored, data, ("models", "slices", "parameters"), at)
        outer.insert(0, _scope(document, (*at, "parameters"), data, method, ignored))
    return Config(
        document,
        method,
        None if base is None else read_reference(document, ("base_model",), base),
        tuple(_slices(document, at, data, method, ignored)),
        tuple(outer),
        ignored,
    )


def _only_module(document: Document, modules: object) -> tuple[Key, Mapping[str, Any]]:
    if not isinstance(modules, dict) or not all(isinstance(m, dict) for m in modules.values()):
        document.fail(("modules",), "modules must be a mapping of mappings")
    names = list(modules)
    if len(names) > 1:
        document.fail(
            ("modules", names[1]),
            f"more than one module ({', '.join(names)}) is not supported; import one at a time",
        )
    return ("modules", names[0]), modules[names[0]]


def _slices(
    document: Document,
    at: Key,
    data: Mapping[str, Any],
    method: str,
    ignored: list[tuple[Key, str]],
) -> Iterator[Slice]:
    if data.get("models"):
        key: Key = (*at, "models")
        sources = tuple(_sources(document, key, data["models"], method, ignored, is_whole=True))
        yield Slice(sources, None, ((), {}), key)
        return
    entries = _listed(document, (*at, "slices"), data.get("slices"))
    for i, entry in enumerate(entries):
        key = (*at, "slices", i)
        if not isinstance(entry, dict) or not entry.get("sources"):
            document.fail(key, "a slice needs sources")
        known = ("sources", "base_model", "parameters", "residual_weight")
        _note_unknown(ignored, entry, known, key)
        if entry.get("residual_weight") is not None:
            document.fail((*key, "residual_weight"), "residual_weight is not supported")
        base = entry.get("base_model")
        key_of_sources = (*key, "sources")
        yield Slice(
            tuple(_sources(document, key_of_sources, entry["sources"], method, ignored)),
            None if base is None else read_reference(document, (*key, "base_model"), base),
            _scope(document, (*key, "parameters"), entry, method, ignored),
            key,
        )


def _sources(
    document: Document,
    at: Key,
    entries: object,
    method: str,
    ignored: list[tuple[Key, str]],
    *,
    is_whole: bool = False,
) -> Iterator[Source]:
    for i, entry in enumerate(_listed(document, at, entries)):
        key: Key = (*at, i)
        if not isinstance(entry, dict) or "model" not in entry:
            document.fail(key, "an input needs a model")
        known = ("model", "parameters") if is_whole else INNERMOST
        _note_unknown(ignored, entry, known, key)
        blocks: Any = None if is_whole else entry.get("layer_range")
        is_range = isinstance(blocks, list) and len(blocks) == 2
        if not is_whole and not (is_range and all(type(b) is int for b in blocks)):
            document.fail(
                (*key, "layer_range"),
                f"layer_range must be [first, the one after the last]; got {blocks!r}",
            )
        yield Source(
            read_reference(document, (*key, "model"), entry["model"]),
            None if blocks is None else (blocks[0], blocks[1]),
            _scope(document, (*key, "parameters"), entry, method, ignored, is_own=True),
            key,
        )


def _listed(document: Document, at: Key, value: object) -> list[Any]:
    if not isinstance(value, list):
        document.fail(at, f"{at[-1]} must be a list; got {value!r}")
    return value


def _scope(
    document: Document,
    at: Key,
    data: Mapping[str, Any],
    method: str,
    ignored: list[tuple[Key, str]],
    *,
    is_own: bool = False,
) -> Scope:
    """Parameters of one place; those that are not read from there are noted."""
    parameters = data.get("parameters")
    if parameters is None:
        return at, {}
    if not isinstance(parameters, dict):
        document.fail(at, f"parameters must be a mapping; got {parameters!r}")
    shared, own = SHARED[method], OWN.get(method, {})
    for name in parameters:
        if is_own and name in shared and name not in own:
            ignored.append(((*at, name), "it is read from slices, modules and the top only"))
        elif name not in shared and name not in own:
            known = (*own, *shared)
            hint = nearest(str(name), known) if known else f"{method} takes no parameters"
            ignored.append(((*at, name), hint))
    return at, parameters


def _note_unknown(
    ignored: list[tuple[Key, str]], data: Mapping[str, Any], known: tuple[str, ...], at: Key
) -> None:
    ignored += [((*at, key), nearest(str(key), known)) for key in data if key not in known]


def read_reference(document: Document, key: Key, value: object) -> Reference:
    """A model as a configuration names it.

    Raises:
        RecipeError: it names none.
    """
    if isinstance(value, dict) and "model" in value:
        if value.get("override_architecture") is not None:
            document.fail((*key, "override_architecture"), "override_architecture is not supported")
        lora = value.get("lora")
        return Reference(
            _path(document, (*key, "model"), value["model"]),
            None if lora is None else _path(document, (*key, "lora"), lora),
        )
    if not isinstance(value, str) or not value.strip():
        document.fail(key, f"must name a model; got {value!r}")
    model, *loras = value.split("+")
    if len(loras) > 1 or not model or loras == [""]:
        document.fail(key, f"a model is PATH or PATH+LORA; got {value!r}")
    return Reference(model, loras[0] if loras else None)


def _path(document: Document, key: Key, value: object) -> str:
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        revision = value.get("revision")
        return str(value["path"]) + (f"@{revision}" if revision else "")
    if not isinstance(value, str):
        document.fail(key, f"must be a path or a name on the hub; got {value!r}")
    return value


def _conditions(document: Document, key: Key, value: object) -> list[Condition]:
    """A setting as conditions in the order in which they are tried."""
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        return [c for i, each in enumerate(value) for c in _conditions(document, (*key, i), each)]
    if isinstance(value, dict):
        unknown = [k for k in value if k not in ("filter", "value")]
        if unknown or "value" not in value:
            document.fail(key, f"{key[-1]} must have value, and may have filter; got {value!r}")
        part = value.get("filter")
        if part is not None and not isinstance(part, str):
            document.fail((*key, "filter"), f"filter must be text; got {part!r}")
        part = None if part == "*" else part
        inner = _conditions(document, (*key, "value"), value["value"])
        return [Condition(part, c.values, key) for c in inner]
    values = tuple(value) if isinstance(value, list) else (value,)
    if any(isinstance(v, (list, dict)) or v is None for v in values):
        document.fail(key, f"{key[-1]} must be a value, a list of values or conditions")
    return [Condition(None, values, key)] if values else []
