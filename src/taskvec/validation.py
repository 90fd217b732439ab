"""Documents that people write or exchange, as pydantic models with one-line errors.

A kind of document is a subclass of `Entry`. `check` creates one from plain data, or passes the
first error to its caller as the key of the value and one line of text; the caller knows the file,
the line and the class of the error. Users never see pydantic's messages.

pydantic takes a tenth of a second to import on a slow machine: import this module where a document
is read, not at the top of a command.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from taskvec.errors import CheckpointError, TaskvecError, nearest

Key = tuple[str | int, ...]
_SHOWN = 80  # characters of a wrong value


class Entry(BaseModel):
    """A mapping with known keys; a short form may stand for it.

    Attributes:
        short: The key whose value may stand for the whole, as a word; empty: no short form.
        elsewhere: Keys that users try here, with the place of their counterparts.
        examples: What to write for a required key.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)
    short: ClassVar[str] = ""
    elsewhere: ClassVar[Mapping[str, str]] = {}
    examples: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if cls.short and isinstance(data, str):
            data = {cls.short: data}
        if not isinstance(data, dict):
            if cls.short:
                raise flaw(f"{{at}} must be a {cls.short} or a mapping; got {{got}}")
            return data
        if cls.model_config.get("extra") == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    raise flaw(unknown(key, tuple(cls.model_fields), cls.elsewhere), key)
        for key, field in cls.model_fields.items():
            if field.is_required() and key not in data:
                example = cls.examples.get(key)
                hint = f"; for example: {key}: {example}" if example else ""
                raise flaw(f"{key} is missing{{place}}{hint}")
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        schema: dict[str, Any] = handler(core)
        if not cls.short:
            return schema
        own = handler.resolve_ref_schema(schema)["properties"][cls.short]
        return {"anyOf": [{k: v for k, v in own.items() if k != "title"}, schema]}


class Foreign(Entry):
    """A mapping that other programs write too: keys that are not known are left alone."""

    model_config = ConfigDict(extra="ignore")


def flaw(what: str, key: str | int | None = None) -> PydanticCustomError:
    """What a validator raises: a whole message.

    Args:
        what: The message; `{at}` stands for the keys to the value, `{place}` for ` in KEYS`, and
            `{got}` for the value.
        key: Which key of the value it is about.
    """
    what = what.encode(errors="backslashreplace").decode()  # half surrogate pairs
    return PydanticCustomError("taskvec", "{what}", {"what": what, "key": key})


def unknown(key: object, known: tuple[str, ...], elsewhere: Mapping[str, str]) -> str:
    """A message about a key that is not known."""
    if key in elsewhere:
        return f"unknown key {key!r}{{place}}; {elsewhere[str(key)]}"
    hint = nearest(str(key), known) if known else "no keys are allowed here"
    return f"unknown key {key!r}{{place}}; {hint}"


E = TypeVar("E", bound=BaseModel)


def check(model: type[E], data: object, fail: Callable[[Key, str], NoReturn], at: Key = ()) -> E:
    """Plain data as an entry.

    Args:
        model: The kind of document, or of a part of it.
        data: As YAML or JSON gives it.
        fail: Raises an error about the value at a key.
        at: The key of the data in their document.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error
    try:
        first = found.errors(include_url=False)[0]
    except UnicodeError:  # pydantic hands no such key on
        fail(at, "has a key with half of a surrogate pair")
    return fail(*_describe(first, data, at))


def read_as(
    model: type[E],
    data: object,
    where: str,
    remedy: str,
    error: type[TaskvecError] = CheckpointError,
) -> E:
    """Plain data as a document of a kind, where no line of a file is known.

    Args:
        model: The kind of document.
        data: As JSON gives it.
        where: What messages call the file.
        remedy: What to do if it is another kind of document, or was edited into none.
        error: Class of the errors.

    Raises:
        TaskvecError: of class `error`: a value is not what it should be.
    """

    def fail(key: Key, what: str) -> NoReturn:
        raise error(f"{where}: {what}; {remedy}")

    return check(model, data, fail)


def _describe(error: Mapping[str, Any], data: object, at: Key) -> tuple[Key, str]:
    """Key and message of one of pydantic's errors."""
    key, value = list(at), cast(Any, data)
    for part in error["loc"]:  # which also contains members of unions, which are not keys
        is_key = isinstance(value, dict) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            key.append(part)
            value = value[part]
    context = error.get("ctx", {})
    place = format_key(key)
    got = _shown(value)
    if error["type"] != "taskvec":
        expected = _expected(error["type"], context)
        return tuple(key), f"{place or 'it'} must be {expected}; got {got}"
    what = str(context["what"]).replace("{place}", f" in {place}" if place else "")
    what = what.replace("{at}", place).replace("{got}", got)
    return tuple(key if context["key"] is None else [*key, context["key"]]), what


def format_key(key: list[Any] | Key) -> str:
    """A key as text.

    >>> format_key(("layers", 0, "pattern"))
    'layers[0].pattern'
    """
    words = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return "".join(words).removeprefix(".")


_EXPECTED = (
    (r"float_.*|finite_number", "a finite number"),
    (r"int_.*", "a whole number"),
    (r"string_too_short", "text that is not empty"),
    (r"string_.*", "text"),
    (r"bool_.*", "true or false"),
    (r"(list|tuple)_.*", "a list"),
    (r"dict_.*|model_.*|union_tag_.*", "a mapping"),
    (r"too_short", "a list that is not empty"),
    (r"greater_than", "above {gt}"),
    (r"greater_than_equal", "at least {ge}"),
    (r"less_than", "below {lt}"),
    (r"less_than_equal", "at most {le}"),
)


def _expected(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        expected = str(context["expected"])
        return "in " + (" | ".join(re.findall(r"'([^']*)'", expected)) or expected)
    for pattern, text in _EXPECTED:
        if re.fullmatch(pattern, kind):
            return text.format(**context)
    return f"valid ({kind})"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of too many digits
        text = "a number of very many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def numeric(value: object) -> object:
    """YAML 1.1 reads `1e-3` as a word; a word that is a number counts as one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        return float(value)
    if type(value) is int and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return value


Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[Finite, BeforeValidator(numeric)]
