"""Which token each row of an embedding is for, read from the tokenizer files of a model.

No tokenizer is run. The vocabulary is in the first of these files that is there:

| file | written by |
|---|---|
| `tokenizer.json` | transformers, for every fast tokenizer |
| `vocab.json` | GPT-2 and its like; `merges.txt` beside it says nothing about rows |
| `vocab.txt` | BERT; one token a line |
| `tokenizer.model`, `spiece.model`, `spm.model` | SentencePiece, or tiktoken's lines |
| `*.tiktoken` | tiktoken: base64 of a token, a blank, its row |

Tokens that were added later are in `tokenizer.json`, in `tokenizer_config.json` under
`added_tokens_decoder`, or in `added_tokens.json`.

Tokens are compared as text. Those of tiktoken are written as byte-level BPE writes them (a blank is
`Ġ`), so that a model with `tokenizer.json` and one with tiktoken's file can be compared.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import xxhash
from pydantic import BaseModel

from taskvec import documents
from taskvec.checkpoints.schema import (
    AddedEntry,
    FastTokenizer,
    Rows,
    SpecialTokens,
    TokenizerConfig,
)
from taskvec.checkpoints.source import Source
from taskvec.errors import CheckpointError
from taskvec.extras import require
from taskvec.validation import read_as

VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
E = TypeVar("E", bound=BaseModel)
_RANKED_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
# Tokenizer classes whose rows are not the numbers of their SentencePiece pieces.
_SHIFTED = ("Pegasus", "BigBirdPegasus")
_SAVE_AGAIN = (
    "save it with tokenizer.json: transformers.AutoTokenizer.from_pretrained(DIR)"
    ".save_pretrained(DIR)"
)


@dataclass(frozen=True, slots=True)
class Added:
    """A token that was added to a vocabulary: its row, and how text is cut at it (FLAGS)."""

    row: int
    flags: Mapping[str, bool]


@dataclass(eq=False)
class Tokenizer:
    """The tokens of a model; the vocabulary is read when it is asked for.

    Attributes:
        where: Folder, for messages.
        file: Name of the file that has the vocabulary.
        digest: Of that file's content: two files that are the same need not be read.
        extra: Tokens by the smaller files.
        knows_all: Whether every token has a row here; tiktoken's special tokens may be in code.
    """

    where: str
    file: str
    digest: str
    extra: Mapping[str, Added]
    knows_all: bool
    _parse: Callable[[], tuple[dict[str, int], dict[str, Added]]]

    @cached_property
    def _parsed(self) -> tuple[dict[str, int], dict[str, Added]]:
        tokens, added = self._parse()
        for token, about in self.extra.items():
            tokens.setdefault(token, about.row)
            added.setdefault(token, about)
        return tokens, added

    @property
    def tokens(self) -> Mapping[str, int]:
        """Row by token."""
        return self._parsed[0]

    @property
    def added(self) -> Mapping[str, Added]:
        """Those of the tokens that were added, special ones among them."""
        return self._parsed[1]

    @cached_property
    def used_rows(self) -> int:
        """Number of the highest row that a token has, and 1."""
        return max(self.tokens.values(), default=-1) + 1

    def agrees(self, other: Tokenizer) -> bool:
        """Whether every token has the same row in both; the same files are not parsed."""
        if self is other:
            return True
        if self.digest == other.digest and _rows(self.extra) == _rows(other.extra):
            return True
        return self.tokens == other.tokens


def _rows(added: Mapping[str, Added]) -> dict[str, int]:
    return {token: about.row for token, about in added.items()}


def read_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer of a model; None without one of a known kind.

    Raises:
        CheckpointError: a file cannot be read or is not what its name says. A vocabulary is only
            read, and can only be found broken, when its tokens are asked for.
    """
    file = _vocabulary_file(source)
    content = _content(source, file) if file is not None else None
    if file is None or content is None:
        return None
    path = f"{source.where}/{file}"
    config = _read(TokenizerConfig, source, "tokenizer_config.json") or TokenizerConfig()
    extra = _extra(source, config)
    is_ranked = file.endswith(".tiktoken") or (
        file.endswith(".model") and _RANKED_LINE.match(content) is not None
    )
    class_name = config.tokenizer_class or ""
    if file.endswith(".model") and not is_ranked and class_name.startswith(_SHIFTED):
        raise CheckpointError(
            f"{path}: {class_name} numbers its tokens otherwise than this file; {_SAVE_AGAIN}"
        )
    sentinels = config.extra_ids if class_name.startswith("T5Tokenizer") else 0
    return Tokenizer(
        where=source.where,
        file=file,
        digest=xxhash.xxh3_128_hexdigest(content),
        extra=extra,
        knows_all=not is_ranked or bool(extra),
        _parse=partial(_parse, source, file, path, is_ranked, sentinels),
    )


def _vocabulary_file(source: Source) -> str | None:
    for name in VOCABULARIES:
        if name in source.files or _lies_in(source, name):
            return name
    in_folder = source.folder.glob("*.tiktoken") if source.folder is not None else ()
    ranked = {path.name for path in in_folder}
    ranked |= {name for name in source.files if name.endswith(".tiktoken")}
    return min(ranked, default=None)


def _content(source: Source, name: str) -> bytes | None:
    """A companion file of a model; None if missing."""
    if name in source.files:
        return source.files[name]
    if source.folder is None or not _lies_in(source, name):
        return None
    path = source.folder / name
    return documents.read_bytes(path, documents.TOKENIZER, of=source.folder)


def _lies_in(source: Source, name: str) -> bool:
    """Whether a model's folder has an entry of that name, of any kind."""
    return source.folder is not None and os.path.lexists(source.folder / name)


def _json_object(source: Source, name: str) -> dict[str, Any]:
    """A companion file that is a JSON object; empty if missing."""
    content = _content(source, name)
    if content is None:
        return {}
    where = f"{source.where}/{name}"
    value = documents.parse_json(content, documents.TOKENIZER, where)
    return documents.as_object(value, where)


def _read(model: type[E], source: Source, name: str) -> E | None:
    """A companion file by its schema; None if there is none."""
    content = _content(source, name)
    if content is None:
        return None
    where = f"{source.where}/{name}"
    return read_as(model, _json(content, where), where, _SAVE_AGAIN)


def _extra(source: Source, config: TokenizerConfig) -> dict[str, Added]:
    """Added tokens by the smaller files."""
    found = {e.content: _added(int(n), e) for n, e in config.added_tokens_decoder.items()}
    for_what = _read(SpecialTokens, source, "special_tokens_map.json")
    special = {token for tokens in for_what.root.values() for token in tokens} if for_what else ()
    added = _read(Rows, source, "added_tokens.json")
    for token, row in added.root.items() if added else ():
        found.setdefault(token, _added(row, AddedEntry(content=token, special=token in special)))
    return found


def _added(row: int, entry: AddedEntry) -> Added:
    flags = {flag: bool(getattr(entry, flag)) for flag in FLAGS}
    if entry.normalized is None:
        # Ordinary added tokens are looked for in normalised text, special ones as it is.
        flags["normalized"] = not entry.special
    return Added(row, flags)


def _parse(
    source: Source, file: str, path: str, is_ranked: bool, sentinels: int
) -> tuple[dict[str, int], dict[str, Added]]:
    """Tokens and, of `tokenizer.json`, added tokens of a vocabulary file."""
    content = _content(source, file)
    if content is None:
        raise CheckpointError(f"{path}: vanished while it was read; run again")
    added: dict[str, Added] = {}
    try:
        if file == "tokenizer.json":
            tokens, added = _fast(read_as(FastTokenizer, _json(content, path), path, _SAVE_AGAIN))
        elif file == "vocab.json":
            tokens = read_as(Rows, _json(content, path), path, _SAVE_AGAIN).root
        elif file == "vocab.txt":
            lines = content.decode("utf-8").removesuffix("\n").split("\n")
            tokens = {line.rstrip("\r"): row for row, line in enumerate(lines)}
        elif is_ranked:
            tokens = read_as(Rows, _ranked(content), path, _SAVE_AGAIN).root
        else:
            pieces = _pieces(content)
            tokens = {piece: row for row, piece in enumerate(pieces)}
            for i in range(sentinels):  # T5 counts them from the end
                tokens.setdefault(f"<extra_id_{i}>", len(pieces) + sentinels - 1 - i)
        if not tokens:
            raise ValueError("no tokens")
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is not a vocabulary that can be read ({str(error)[:80]}); {_SAVE_AGAIN}"
        ) from error
    return tokens, added


def _json(content: bytes, path: str) -> Any:
    return documents.parse_json(content, documents.TOKENIZER, path)


def _fast(data: FastTokenizer) -> tuple[dict[str, int], dict[str, Added]]:
    """The content of `tokenizer.json`; an added token that the vocabulary has keeps that row."""
    tokens, added = dict(data.model.vocab), {}
    for entry in data.added_tokens or ():
        row = tokens.setdefault(entry.content, entry.id)
        added[entry.content] = _added(row, entry)
    return tokens, added


def _ranked(content: bytes) -> dict[str, int]:
    """The lines of a file of tiktoken."""
    visible = _visible_bytes()
    tokens = {}
    for line in content.splitlines():
        if line.strip():
            encoded, row = line.split()
            token = base64.b64decode(encoded, validate=True)
            tokens[token.decode("latin-1").translate(visible)] = int(row)
    return tokens


def _visible_bytes() -> dict[int, str]:
    """How byte-level BPE writes each byte: itself if it can be seen, else a letter from U+0100 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {
        byte: chr(256 + i) for i, byte in enumerate(hidden)
    }


def _pieces(model: bytes) -> list[str]:
    """The pieces of a SentencePiece model in their order."""
    sentencepiece = require("sentencepiece", "sentencepiece")
    found = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [found.id_to_piece(i) for i in range(found.get_piece_size())]


def next_row(source: Source, tokenizer: Tokenizer) -> int:
    """The row of a token that is appended: the number that `tokenizers` gives it when it loads.

    Raises:
        CheckpointError: there is no `tokenizer.json`, or its rows have gaps, so that an appended
            token would get the row of another.
    """
    drop = "or leave the new tokens out with new_tokens: drop"
    if tokenizer.file != "tokenizer.json":
        raise CheckpointError(
            f"{source.where}: new tokens cannot be put into {tokenizer.file}; {_SAVE_AGAIN}, {drop}"
        )
    size = len(_json_object(source, tokenizer.file)["model"]["vocab"])
    last = max((about.row for about in tokenizer.added.values()), default=-1)
    row = last + 1 if last >= size else size
    if row != tokenizer.used_rows:
        raise CheckpointError(
            f"{source.where}/{tokenizer.file}: a token that is appended would get row {row}, but "
            f"rows up to {tokenizer.used_rows - 1} are taken; {_SAVE_AGAIN}, {drop}"
        )
    return row


def with_added_tokens(
    source: Source, tokenizer: Tokenizer, new: Mapping[str, Added]
) -> dict[str, bytes]:
    """The tokenizer files of a model with tokens appended, those that change.

    Args:
        source: Model that has a `tokenizer.json`.
        tokenizer: Its tokenizer.
        new: Row and flags of each new token; rows follow one another from `next_row` on.
    """
    main = _json_object(source, "tokenizer.json")
    entries = list(main.get("added_tokens") or ())
    known = read_as(FastTokenizer, main, f"{source.where}/{tokenizer.file}", _SAVE_AGAIN)
    there = _fast(known)[0]
    late = {token: about for token, about in tokenizer.extra.items() if token not in there}
    for token, about in sorted((late | dict(new)).items(), key=lambda item: item[1].row):
        entries.append({"id": about.row, "content": token, **about.flags})
    files = {"tokenizer.json": main | {"added_tokens": entries}}
    config = _json_object(source, "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        decoder = {str(about.row): {"content": t, **about.flags} for t, about in new.items()}
        decoder = config["added_tokens_decoder"] | decoder
        files["tokenizer_config.json"] = config | {"added_tokens_decoder": decoder}
    listed = _json_object(source, "added_tokens.json")
    if listed:
        files["added_tokens.json"] = listed | _rows(new)
    return {
        name: json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"
        for name, data in files.items()
    }
