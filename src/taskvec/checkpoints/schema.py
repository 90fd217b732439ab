"""What the JSON files of a model folder must hold, as far as it is used here."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, RootModel

from taskvec.validation import Finite, Foreign, flaw

_STRICT = ConfigDict(strict=True, defer_build=True)
_MOST_ROWS = 2**24  # of tokens; arrays are made of that size


def _pattern(value: str) -> str:
    try:
        re.compile(rf"(.*\.)?({value})$")  # as it is used
    except (re.error, RecursionError, OverflowError) as error:
        raise flaw(
            f"{{at}} has {value[:80]!r}, which is not a regular expression: {error}"
        ) from error
    return value


def _number(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,8}", value):
        raise flaw(f"{{at}} has {value[:80]!r}; expected the row of a token")
    return value


def _contents(value: object) -> list[str]:
    """Special tokens: text, or mappings with their text as `content`, or a list of both."""
    entries = value if isinstance(value, list) else [] if value is None else [value]
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise flaw("{at} must be a token: text, or a mapping with content; got {got}")
    return found


def _pieces(value: object) -> object:
    """The vocabulary of a Unigram model, pieces with their scores, as row by piece."""
    if not isinstance(value, list):
        return value
    for entry in value:
        if not (isinstance(entry, list) and entry and isinstance(entry[0], str)):
            raise flaw("{at} must be a mapping, or a list of [piece, score]")
    return {entry[0]: row for row, entry in enumerate(value)}


Row = Annotated[int, Field(ge=0, lt=_MOST_ROWS)]
Contents = Annotated[list[str], BeforeValidator(_contents)]
NewToken = Annotated[tuple[str, Row, dict[str, bool]], Field(strict=False)]
Positive = Annotated[Finite, Field(gt=0)]
Numeral = Annotated[str, AfterValidator(_number)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class TextConfig(Foreign):
    """The config of a model, or of the language model inside it."""

    architectures: list[str] | None = None
    model_type: str | None = None
    tie_word_embeddings: bool | None = None


class ModelConfig(TextConfig):
    """`config.json` of a model."""

    text_config: TextConfig | None = None


class Index(Foreign):
    """The index of the shards of a model."""

    weight_map: dict[str, str]


class AdapterConfig(Foreign):
    """`adapter_config.json` of PEFT."""

    peft_type: str | None = None
    r: Positive = 8
    lora_alpha: Positive = 8
    rank_pattern: dict[Pattern, Positive] | None = None
    alpha_pattern: dict[Pattern, Positive] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    trainable_token_indices: list[Row] | dict[str, list[Row]] | None = None
    target_parameters: list[str] | None = None


class AddedEntry(Foreign):
    """A token that was added to a vocabulary, and how text is cut at it."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


class NumberedEntry(AddedEntry):
    """The same with its row."""

    id: Row


class VocabularyOf(Foreign):
    """The model in a `tokenizer.json`."""

    vocab: Annotated[dict[str, Row], BeforeValidator(_pieces), Field(min_length=1)]


class FastTokenizer(Foreign):
    """`tokenizer.json`."""

    model: VocabularyOf
    added_tokens: list[NumberedEntry] | None = None


class TokenizerConfig(Foreign):
    """`tokenizer_config.json`."""

    tokenizer_class: str | None = None
    extra_ids: Row = 100
    added_tokens_decoder: dict[Numeral, AddedEntry] = Field(default={})


class SpecialTokens(RootModel[dict[str, Contents]]):
    """`special_tokens_map.json`: tokens by what they are for."""

    model_config = _STRICT


class Rows(RootModel[dict[str, Row]]):
    """`vocab.json` and `added_tokens.json`: row by token."""

    model_config = _STRICT


class NewTokens(RootModel[list[NewToken]]):
    """Tokens that a vector has besides those of its anchor: text, row and flags."""

    model_config = _STRICT
