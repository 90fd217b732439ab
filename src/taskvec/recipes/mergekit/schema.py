"""What a mergekit configuration says, with the line of everything in it.

The schema is that of mergekit 0.1.5. A configuration lists `models`, or `slices` of layers, or
`modules` of either; a parameter may stand at a model or source, at a slice, at a module or at the
top, and the innermost one that gives a value counts. A value is a scalar, a gradient (a list over
depth), or conditions on a part of the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from taskvec.dtypes import FLOATS, float_name
from taskvec.errors import nearest
from taskvec.recipes.located import Document
from taskvec.recipes.mergekit import MARK
from taskvec.validation import Entry, Key, check, flaw

# Parameters by method: default of those of the whole merge, and of those of one input. None: there
# has no default, and the merge fails without it.
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


# The file


def _reference(value: object) -> Reference:
    if isinstance(value, dict) and "model" in value:
        if value.get("override_architecture") is not None:
            raise flaw("override_architecture is not supported", "override_architecture")
        lora = value.get("lora")
        return Reference(_path(value["model"]), None if lora is None else _path(lora))
    if not isinstance(value, str) or not value.strip():
        raise flaw("{at} must name a model; got {got}")
    model, *loras = value.split("+")
    if len(loras) > 1 or not model or loras == [""]:
        raise flaw("{at}: a model is PATH or PATH+LORA; got {got}")
    return Reference(model, loras[0] if loras else None)


def _path(value: object) -> str:
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        revision = value.get("revision")
        return str(value["path"]) + (f"@{revision}" if revision else "")
    if not isinstance(value, str):
        raise flaw(f"{{at}} must be a path or a name on the hub; got {value!r}")
    return value


def _tokenizer(value: object) -> object:
    return value if value in ("union", "base") else _reference(value)


def _blocks(value: object) -> tuple[int, int]:
    is_range = isinstance(value, list) and [type(part) for part in value] == [int, int]
    if not isinstance(value, list) or not is_range:
        raise flaw("{at} must be [first, the one after the last]; got {got}")
    return (value[0], value[1])


def _dtype(value: object) -> object:
    return float_name(value.removeprefix("torch.")) if isinstance(value, str) else value


_FLOATS = tuple(FLOATS)
Named = Annotated[Reference, BeforeValidator(_reference)]
TokenizerOf = Annotated[Reference | Literal["union", "base"], BeforeValidator(_tokenizer)]
Parameters = dict[str, Any]
Float = Literal[_FLOATS]  # type: ignore[valid-type]
Dtype = Annotated[Float, BeforeValidator(_dtype)]


class _Read(Entry, extra="allow"):
    """An entry of which mergekit ignores what it does not know."""

    unsupported: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_supported(cls, data: Any) -> Any:
        for name, what in cls.unsupported.items():
            if isinstance(data, dict) and data.get(name) is not None:
                raise flaw(f"{what} is not supported", name)
        return data

    def ignored(self, at: Key) -> Iterator[tuple[Key, str]]:
        """Keys that are not known, in it and below, with the closest that is."""
        known = tuple(type(self).model_fields)
        for key in self.model_extra or ():
            yield (*at, key), nearest(str(key), known)
        for name in known:
            value = getattr(self, name)
            parts = enumerate(value) if isinstance(value, list) else ()
            yield from (
                e for i, v in parts if isinstance(v, _Read) for e in v.ignored((*at, name, i))
            )
            if isinstance(value, _Read):
                yield from value.ignored((*at, name))


class ModelEntry(_Read):
    """A whole model that is merged."""

    model: Named
    parameters: Parameters | None = None


class SourceEntry(ModelEntry):
    """Blocks of a model that are merged."""

    layer_range: Annotated[tuple[int, int], BeforeValidator(_blocks)]


class SliceEntry(_Read):
    """Consecutive blocks of the result."""

    sources: list[SourceEntry] = Field(min_length=1)
    base_model: Named | None = None
    parameters: Parameters | None = None
    residual_weight: None = None
    unsupported: ClassVar[Mapping[str, str]] = {"residual_weight": "residual_weight"}


class ModuleEntry(_Read):
    """What is merged, for one module of a model."""

    models: list[ModelEntry] | None = None
    slices: list[SliceEntry] | None = None
    parameters: Parameters | None = None


class TokenizerEntry(_Read):
    """How the result's vocabulary is made."""

    source: TokenizerOf = "union"
    tokens: None = None
    pad_to_multiple_of: None = None
    unsupported: ClassVar[Mapping[str, str]] = {
        "tokens": "transplanting tokens (tokens)",
        "pad_to_multiple_of": "padding the vocabulary (pad_to_multiple_of)",
    }


class ConfigEntry(ModuleEntry):
    """A configuration, or one of several documents that build on each other."""

    examples: ClassVar[Mapping[str, str]] = {MARK: "ties"}
    merge_method: str
    name: str | None = None
    base_model: Named | None = None
    modules: dict[str, ModuleEntry] | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: TokenizerOf | None = None
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None
    unsupported: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("experts", "gate_mode"), "building a mixture of experts (mergekit-moe)"
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get(MARK, METHODS[0]) not in METHODS:
            hint = nearest(str(data[MARK]), METHODS)
            raise flaw(f"unknown method {data[MARK]!r} of mergekit 0.1.5; {hint}", MARK)
        modules = data.get("modules") if isinstance(data, dict) else None
        if isinstance(modules, dict) and len(modules) > 1:
            names = ", ".join(map(str, modules))
            what = f"more than one module ({names}) is not supported; import one at a time"
            raise flaw(what, "modules")
        return data


@dataclass(frozen=True, slots=True)
class Ingredient:
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

    sources: tuple[Ingredient, ...]
    base: Reference | None
    parameters: Scope
    key: Key


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration.

    Attributes:
        document: As parsed, for messages.
        entry: As in the file.
        slices: What is merged; one slice of whole models for `models`.
        outer: Parameters of the module and of the top.
        ignored: Keys that mergekit does not know and ignores, with the closest known key.
    """

    document: Document
    entry: ConfigEntry
    slices: tuple[Slice, ...]
    outer: tuple[Scope, ...]
    ignored: list[tuple[Key, str]] = field(default_factory=list)

    @property
    def method(self) -> str:
        """`merge_method`."""
        return self.entry.merge_method

    @property
    def base(self) -> Reference | None:
        """`base_model`."""
        return self.entry.base_model

    @property
    def models(self) -> set[str]:
        """Every model that it names."""
        every = [self.base, *(slice_.base for slice_ in self.slices)]
        every += [source.reference for slice_ in self.slices for source in slice_.sources]
        return {reference.model for reference in every if reference is not None}

    def setting(self, name: str, source: Ingredient | None, slice_: Slice) -> Setting:
        """A parameter of one input (None: of the whole), or its default.

        Raises:
            RecipeError: it is missing and has no default, or is not a setting.
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
            for place, _ in self.ignored:
                if place[-1] == name and place[:-1] == key[: len(place) - 1]:
                    what = f"{name}{who} is at a place where mergekit does not read it"
                    self.document.fail(place, f"{what}; write it under `parameters`")
            self.document.fail(key, f"{name}{who} is missing; mergekit's {self.method} needs it")
        return (*found, Condition(None, (default,), ()))


def read_config(document: Document) -> Config:
    """Read a configuration.

    Raises:
        RecipeError: it is not a configuration, or has unsupported keys; the message has the line.
    """
    entry = check(ConfigEntry, document.data, document.fail)
    given = [key for key in ("models", "slices", "modules") if getattr(entry, key)]
    if len(given) != 1:
        document.fail((), f"exactly one of models, slices, modules must be given; got {len(given)}")
    ignored = list(entry.ignored(()))
    outer = [_scope(entry, (), entry.merge_method, ignored)]
    at: Key = ()
    module: ModuleEntry = entry
    for name, only in (entry.modules or {}).items():
        at, module = ("modules", name), only
        ignored += module.ignored(at)
        outer.insert(0, _scope(module, at, entry.merge_method, ignored))
    slices = tuple(_slices(module, at, entry.merge_method, ignored))
    return Config(document, entry, slices, tuple(outer), ignored)


def _slices(
    module: ModuleEntry, at: Key, method: str, ignored: list[tuple[Key, str]]
) -> Iterator[Slice]:
    if module.models:
        key: Key = (*at, "models")
        yield Slice(_sources(module.models, key, method, ignored), None, ((), {}), key)
    for i, entry in enumerate(module.slices or ()):
        key = (*at, "slices", i)
        sources = _sources(entry.sources, (*key, "sources"), method, ignored)
        yield Slice(sources, entry.base_model, _scope(entry, key, method, ignored), key)


def _sources(
    entries: Sequence[ModelEntry],
    at: Key,
    method: str,
    ignored: list[tuple[Key, str]],
) -> tuple[Ingredient, ...]:
    return tuple(
        Ingredient(
            entry.model,
            entry.layer_range if isinstance(entry, SourceEntry) else None,
            _scope(entry, (*at, i), method, ignored, is_own=True),
            (*at, i),
        )
        for i, entry in enumerate(entries)
    )


def _scope(
    entry: ModelEntry | SliceEntry | ModuleEntry,
    at: Key,
    method: str,
    ignored: list[tuple[Key, str]],
    *,
    is_own: bool = False,
) -> Scope:
    """Parameters of one place; those that are not read from there are noted."""
    at = (*at, "parameters")
    shared, own = SHARED[method], OWN.get(method, {})
    for name in entry.parameters or ():
        if is_own and name in shared and name not in own:
            ignored.append(((*at, name), "it is read from slices, modules and the top only"))
        elif name not in shared and name not in own:
            known = (*own, *shared)
            hint = nearest(str(name), known) if known else f"{method} takes no parameters"
            ignored.append(((*at, name), hint))
    return at, entry.parameters or {}


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
