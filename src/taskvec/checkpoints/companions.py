"""The files of a model folder besides its weights: config, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from taskvec import documents
from taskvec.checkpoints.belongings import belongings, belongs
from taskvec.checkpoints.source import Source
from taskvec.dtypes import DType
from taskvec.errors import CheckpointError

# What no program reads: where it cannot be carried over, that is a warning.
_DECORATION = ("LICENSE*", "NOTICE*")
_TEMPLATES = "additional_chat_templates"
_ALL_BYTES = 2 * documents.TOKENIZER.nbytes

# What of them belongs to a tokenizer.
_OF_TOKENIZER = (
    *("tokenizer*.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "chat_template*", "tokenization_*.py"),
)


def companions(
    target: Source,
    dtype: DType | None,
    *,
    tokenizer: Source | None = None,
    chat_template: str | None = None,
) -> tuple[dict[str, bytes], list[str]]:
    """Files to write beside the weights, by relative name; and warnings about what is left out.

    Args:
        target: The member whose config, tokenizer and chat template the result has.
        dtype: Element type of the result if it is not the target's; the config then names it.
        tokenizer: Another member, whose tokenizer and chat template the result has instead.
        chat_template: Template that takes the place of theirs.

    Raises:
        CheckpointError: a file cannot be read, is a link out of the folder, or is too large.
    """
    found, warnings = _files(target.folder) if target.folder is not None else ({}, [])
    stored = _config_in(found)
    config = dict(target.config)
    if dtype is not None:
        config = with_dtype(config, dtype)
    if config != stored:
        found["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    found |= target.files
    if tokenizer is not None and tokenizer is not target:
        theirs, more = _files(tokenizer.folder) if tokenizer.folder is not None else ({}, [])
        theirs, warnings = theirs | dict(tokenizer.files), [*warnings, *more]
        found = {name: content for name, content in found.items() if not of_tokenizer(name)}
        found |= {name: content for name, content in theirs.items() if of_tokenizer(name)}
    if chat_template is not None:
        found = _with_template(found, chat_template)
    return found, warnings


def of_tokenizer(name: str) -> bool:
    """Whether a file, by its name in the folder of a model, is one of a tokenizer."""
    path = PurePosixPath(name)
    return path.parts[0] == _TEMPLATES or any(path.match(pattern) for pattern in _OF_TOKENIZER)


def _with_template(found: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files with another chat template, which older versions keep in the tokenizer's config."""
    files = {n: c for n, c in found.items() if not n.startswith(("chat_template", _TEMPLATES))}
    try:
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError:
        config = {}
    if isinstance(config, dict) and "chat_template" in config:
        config["chat_template"] = template
        files["tokenizer_config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    return files | {"chat_template.jinja": template.encode()}


def is_companion(name: str) -> bool:
    """Whether a file of a model folder, by its relative path there, belongs to its weights."""
    return belongs(name)


def _files(model: Path) -> tuple[dict[str, bytes], list[str]]:
    """Files of a model folder that belong to its weights, by relative name; and warnings."""
    if not model.is_dir():
        return {}, []
    found: dict[str, bytes] = {}
    warnings: list[str] = []
    room = _ALL_BYTES
    for name in belongings(model)[0]:
        try:
            found[name] = documents.read_bytes(model / name, documents.TOKENIZER, of=model)
        except CheckpointError as error:
            if not any(PurePosixPath(name).match(pattern) for pattern in _DECORATION):
                raise
            warnings.append(f"{name} of the target is left out of the output: {error}")
            continue
        room -= len(found[name])
        if room < 0:
            raise CheckpointError(
                f"{model}: its files besides the weights have more than {_ALL_BYTES:,} bytes; "
                "move what the model does not need out of the folder"
            )
    return found, warnings


def _config_in(found: Mapping[str, bytes]) -> Any:
    """The config as it is on disk now; None if it is not a config any more."""
    content = found.get("config.json", b"{}")
    try:
        return documents.parse_json(content, documents.CONFIG, "config.json")
    except CheckpointError:
        return None


def with_dtype(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """The config with another dtype, also in the configs of its towers; nothing if it is empty."""
    if not config:
        return {}
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    return _replaced({**config, name: None}, dtype)


def _replaced(config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            out[key] = dtype.config_name
        else:
            out[key] = _replaced(value, dtype) if isinstance(value, dict) else value
    return out
