"""What may stand in a recipe: keys, types and ranges, and the JSON schema of it for editors.

A new key of a recipe is a field here, with the description that editors show, the place in
`reading` that hands it on, and its line in docs/reference/recipe.md. Parameters of methods are
declared where methods are, and checked by `reading`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from taskvec.dtypes import FLOATS, float_name
from taskvec.errors import RecipeError
from taskvec.layers import override
from taskvec.methods import METHODS
from taskvec.methods.parameters import Parameter
from taskvec.recipes.recipe import DEFAULT_SHARD_BYTES, FORMS, NEW_TOKENS, OVER, RESTS, VOCABULARY
from taskvec.validation import Entry, Number, flaw

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{unit}IB": 2**power for unit, power in zip("KMGT", (10, 20, 30, 40), strict=True)}
_FLOATS = tuple(FLOATS)
_TEXT = {"type": "string", "minLength": 1}
_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 1}
_STACK = "[{model: DIR, blocks: [0, 16]}]"
_IN_TASK = "give it to the task: tasks: {math: {model: DIR, scale: 0.5}}"

# mergekit's words, and where the same is written here.
_OF_TOP = {
    "merge_method": "write `method`",
    "models": "write `tasks`: {NAME: {model: DIR, scale: 0.5}}",
    "base_model": "write `instruct` (or `anchor`): the model that task vectors start from",
    "dtype": "write it in `out`: out: {dtype: bfloat16}",
    "out_dtype": "write it in `out`: out: {dtype: bfloat16}",
    "weight": f"a task's weight is its `scale`; {_IN_TASK}",
    "scale": _IN_TASK,
    "parameters": "write parameters in `method`: method: {name: ties, density: 0.5}",
    "slices": "write a stack instead of a model: {stack: [{model: DIR, blocks: [0, 16]}]}",
    "tokenizer_source": "write `vocabulary`: by-token (base) or union",
    "tokenizer": "write `vocabulary` (by-token or union), and `tokenizer` in `out`",
    "chat_template": "write it in `out`",
}
_OF_TOP |= {
    parameter.name: "it is a parameter of the method; write it in `method`: "
    f"method: {{name: {method.name}, {parameter.name}: {parameter.default}}}"
    for method in METHODS.values()
    for parameter in method.parameters
}
OF_TASK = {
    "weight": "write `scale`",
    "lambda": "write `scale`",
    "parameters": "write parameters of the method beside `model`",
    "lora": "write the adapter as `model`",
}
OF_METHOD = {
    "weight": f"a task's weight is its `scale`; {_IN_TASK}",
    "scale": _IN_TASK,
    "lambda": f"multiply it into `scale`; {_IN_TASK}",
    "normalize": "write `merge`: mean, sum or weighted, where the method has it",
    "select_topk": "write `density`",
    "parameters": "write parameters beside `name`",
    "int8_mask": "remove it",
    "seed": "write it at the top of the recipe",
}


def _path(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise flaw("{at} must be a folder, a file or a name on the hub; got {got}")
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _patterns(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _size(value: object) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
    if match is None or match[2].upper() not in _UNITS or isinstance(value, bool):
        raise flaw("{at} must be a size such as 5GB or 500MB; got {got}")
    size = int(min(float(match[1]) * _UNITS[match[2].upper()], 2.0**63))
    if size < 1:
        raise flaw("{at} must be above 0; got {got}")
    return size


def _dtype(value: object) -> object:
    return float_name(value) if isinstance(value, str) else value


def _scale(value: object) -> object:
    if value is None or isinstance(value, list):
        hint = "; by layer: {depth: {got}}" if value else ""
        raise flaw(f"{{at}} must be a finite number; got {{got}}{hint}")
    return value


def _names(value: object) -> object:
    for name in value if isinstance(value, dict) else ():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", str(name)):
            raise flaw(f"task name {name!r} must be letters, digits and _ . + -", name)
    return value


def _blocks(value: object) -> list[int]:
    is_range = isinstance(value, list) and [type(part) for part in value] == [int, int]
    if not isinstance(value, list) or not is_range or value[0] >= value[1]:
        raise flaw("{at} must be [first, the one after the last]; got {got}")
    return value


def _hub(value: str) -> str:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", value):
        raise flaw("{at} must be a name on the hub, org/name; got {got}")
    return value


Text = Annotated[str, Field(min_length=1)]
Hub = Annotated[Text, AfterValidator(_hub)]
Patterns = Annotated[
    list[Text],
    BeforeValidator(_patterns),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}),
]
Place = Annotated[str, BeforeValidator(_path)]
Size = Annotated[
    int,
    BeforeValidator(_size),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]}),
]
Float = Literal[_FLOATS]  # type: ignore[valid-type]
Dtype = Annotated[Float, BeforeValidator(_dtype)]
Depth = Annotated[
    list[Number],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "number"}, _NUMBERS]}),
]
Over = Literal[OVER]  # type: ignore[valid-type]
Vocabulary = Literal[VOCABULARY]  # type: ignore[valid-type]
NewTokens = Literal[NEW_TOKENS]  # type: ignore[valid-type]
Form = Literal[FORMS]  # type: ignore[valid-type]
Rest = Literal[RESTS]  # type: ignore[valid-type]


class PieceEntry(Entry):
    """Consecutive blocks of one model."""

    model: Model = Field(description="where the blocks come from")
    blocks: Annotated[list[int], BeforeValidator(_blocks)] = Field(
        description="the first block, and the one after the last"
    )
    scale: Number = Field(
        default=1.0, description="factor of what each block adds to the residual stream"
    )


class StackEntry(Entry):
    """A model made of blocks of several models."""

    examples: ClassVar[Mapping[str, str]] = {"stack": _STACK}
    stack: list[PieceEntry] = Field(min_length=1, description="pieces, in the order of the blocks")


class MemberEntry(Entry):
    """A local model, and what it is called on the hub."""

    model: Place = Field(description="a folder or file")
    hub: Hub | None = Field(
        default=None, description="name of a local model in cards and adapters: org/name on the hub"
    )


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a stack" if "stack" in value else "a member"
    return "a path"


Model = Annotated[
    Annotated[Place, Tag("a path")]
    | Annotated[StackEntry, Tag("a stack")]
    | Annotated[MemberEntry, Tag("a member")],
    Discriminator(_kind),
]


class ValuesEntry(Entry):
    """Values of the tensors that a pattern fits: inside the blocks, and outside."""

    depth: Depth | None = Field(
        default=None, description="values over the blocks, first to last, interpolated linearly"
    )
    outside: Number | None = Field(default=None, description="for tensors outside the blocks")

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "number"}, _NUMBERS, handler(core)]}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if isinstance(data, list):
            return {"depth": data}
        return data if isinstance(data, dict) else {"depth": data, "outside": data}


class ByLayer(Entry):
    """A number that differs between the tensors of a task."""

    depth: Depth | None = Field(
        default=None, description="values over the blocks, first to last, interpolated linearly"
    )
    embedding: Number | None = Field(default=None, description="of embeddings outside the blocks")
    final_norm: Number | None = Field(default=None, description="of the norm after the last block")
    head: Number | None = Field(default=None, description="of the head")
    outside: Number | None = Field(default=None, description="of other tensors in no block")
    patterns: dict[str, ValuesEntry] = Field(
        default={}, description="by shell pattern of tensor names, tried before all else"
    )
    times: Number = Field(default=1.0, description="factor of every value")

    @model_validator(mode="after")
    def _some(self) -> ByLayer:
        if self.model_fields_set <= {"times"}:
            raise flaw(f"{{at}} gives no value; known: {', '.join(type(self).model_fields)}")
        return self


Scale = Annotated[
    Annotated[
        Annotated[Number, Tag("a number")] | Annotated[ByLayer, Tag("by layer")],
        Discriminator(lambda value: "by layer" if isinstance(value, dict) else "a number"),
    ]
    | None,
    BeforeValidator(_scale),
]


class TaskEntry(Entry, extra="allow"):
    """A task: a fine-tune, its λ, and parameters of the method for it alone."""

    short: ClassVar[str] = "model"
    model: Model = Field(description="the fine-tune: a model or a LoRA adapter")
    scale: Scale = Field(default=None, description="λ; negative subtracts; may differ by layer")
    over: Over | None = Field(default=None, description="which model an adapter was trained over")
    hub: Hub | None = Field(
        default=None, description="name of a local model in cards and adapters: org/name on the hub"
    )


class MethodEntry(Entry, extra="allow"):
    """A method, and its parameters for all tasks."""

    short: ClassVar[str] = "name"
    examples: ClassVar[Mapping[str, str]] = {"name": "lata"}
    name: Text = Field(description="as `taskvec methods` lists them")


class LayerEntry(Entry):
    """Names of tensors that the table of layers does not know."""

    pattern: Text = Field(description="regular expression, with groups block and expert")
    module: Text = Field(description="what part of a block, or outside the blocks, it is")
    tower: Text | None = Field(default=None, description="which tower; default: model")
    projection: Text | None = Field(default=None, description="which projection of the module")

    @model_validator(mode="after")
    def _known(self) -> LayerEntry:
        try:
            override(self.model_dump(exclude_unset=True))
        except RecipeError as error:
            raise flaw(str(error)) from error
        return self


class LayersOnly(Entry, extra="ignore"):
    """A file of which only the `layers` are read."""

    layers: list[LayerEntry] = Field(default=[])


class StageOut(Entry):
    """Numbers of the result of a stage."""

    dtype: Dtype | None = Field(default=None, description="default: the target's, tensor by tensor")
    precision: Literal["float32", "float64"] = Field(
        default="float32", description="of the arithmetic"
    )


class Out(StageOut):
    """How the result is written."""

    tokenizer: Text | None = Field(
        default=None,
        description="task or role whose tokenizer and chat template the result has, "
        "if its tokens are the target's; default: the target",
    )
    chat_template: Text | None = Field(
        default=None, description="chat template (Jinja) instead of the tokenizer's"
    )

    shard_size: Size = Field(default=DEFAULT_SHARD_BYTES, description="largest file, such as 5GB")
    form: Form = Field(
        default="model", description="a model, or a LoRA adapter over the target (`lora`)"
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="with `lora`: largest rank; default: factors of adapters are stacked",
    )
    rest: Rest = Field(
        default="refuse",
        description="with `lora`: tensors that differ and are no linear weights",
    )

    @model_validator(mode="after")
    def _of_lora(self) -> Out:
        for key in ("rank", "rest"):
            if self.form != "lora" and key in self.model_fields_set:
                raise flaw(f"{key} goes with form: lora; remove it, or write form: lora", key)
        for key in ("tokenizer", "chat_template"):
            if self.form == "lora" and key in self.model_fields_set:
                raise flaw(f"an adapter has no {key}; remove it", key)
        return self


class StageRecipe(Entry):
    """A recipe whose result others read as `stage:NAME`."""

    elsewhere: ClassVar[Mapping[str, str]] = _OF_TOP
    examples: ClassVar[Mapping[str, str]] = {"method": "{name: lata}"}

    base: Model | None = Field(default=None, description="model before instruction tuning")
    instruct: Model | None = Field(default=None, description="model that task vectors start from")
    anchor: Model | None = Field(default=None, description="the same under its general name")
    target: Model | None = Field(
        default=None, description="model that is edited; default: the anchor"
    )
    tasks: Annotated[dict[str, TaskEntry], BeforeValidator(_names)] = Field(
        default={}, description="fine-tunes by name"
    )
    method: MethodEntry = Field(description="how weights are decided; a name or a mapping")
    layer_weights: MethodEntry | None = Field(
        default=None, description="a method that gives the layer weights"
    )
    table: Place | None = Field(
        default=None,
        description="file with layer weights (CSV or JSON), instead of the method's own",
    )
    include: Patterns = Field(default=[], description="shell patterns of tensor names to edit")
    exclude: Patterns = Field(
        default=[], description="shell patterns of tensor names to leave unchanged"
    )
    layers: list[LayerEntry] = Field(
        default=[], description="overrides of the table of layer names"
    )
    vocabulary: Vocabulary = Field(
        default="refuse", description="policy if the token rows of members differ"
    )
    new_tokens: NewTokens = Field(
        default="copy", description="with `union`: copy or drop tokens that only tasks have"
    )
    allow_pickle: bool = Field(
        default=False, description="read pickled weights, without running code"
    )
    out: StageOut = Field(default=StageOut(), description="how the result is written")

    @model_validator(mode="before")
    @classmethod
    def _is_mapping(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data:
            raise flaw("a recipe is a mapping with tasks and a method; this is not")
        for role in ("base", "instruct", "anchor", "target"):
            if role in data and data[role] is None:
                raise flaw(f"{role} is empty; give a model, or remove it", role)
        if "anchor" in data and "instruct" in data:
            what = "anchor and instruct are two names of one role; give one of them"
            raise flaw(what, "anchor")
        return data


class RecipeFile(StageRecipe):
    """A recipe."""

    out: Out = Field(default=Out(), description="how the result is written")
    seed: int = Field(default=0, ge=0, lt=2**64, description="for methods that draw random numbers")
    stages: dict[str, StageRecipe] = Field(
        default={}, description="recipes whose results others read as `stage:NAME`, in order"
    )


# The schema for editors


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the methods that are installed and their parameters."""
    schema = RecipeFile.model_json_schema()
    kinds = schema["$defs"]
    by_method = [_method_schema(name, m.parameters) for name, m in sorted(METHODS.items())]
    kinds["MethodEntry"] = {"anyOf": [{"enum": sorted(METHODS)}, *by_method]}
    known = {parameter for method in METHODS.values() for parameter in method.parameters}
    task = kinds["TaskEntry"]["anyOf"][-1]
    task["properties"] |= _parameter_schemas(known)
    task["additionalProperties"] = False
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "taskvec recipe",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _method_schema(name: str, parameters: Iterable[Parameter]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": METHODS[name].summary,
        "properties": {"name": {"const": name}, **_parameter_schemas(parameters)},
        "required": ["name"],
        "additionalProperties": False,
    }


def _parameter_schemas(parameters: Iterable[Parameter]) -> dict[str, Any]:
    """Schemas by name; where methods declare a name differently, either is allowed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for parameter in sorted(parameters, key=lambda p: (p.name, p.range, str(p.default))):
        schema = _parameter_schema(parameter)
        if schema not in found.setdefault(parameter.name, []):
            found[parameter.name].append(schema)
    return {n: s[0] if len(s) == 1 else {"anyOf": s} for n, s in found.items()}


def _parameter_schema(parameter: Parameter) -> dict[str, Any]:
    about = {"description": parameter.help, "default": parameter.default}
    if parameter.choices:
        return {"enum": list(parameter.choices), **about}
    bounds = {"minimum": parameter.low, "maximum": parameter.high}
    number = {"type": "number"} | {k: v for k, v in bounds.items() if abs(v) != float("inf")}
    if not parameter.by_layer:
        return number | about
    return {"anyOf": [number, {"$ref": "#/$defs/ByLayer"}], **about}
