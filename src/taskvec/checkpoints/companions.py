"""The files of a model folder besides its weights: config, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskvec.checkpoints.belongings import belongings, belongs
from taskvec.checkpoints.source import Source
from taskvec.dtypes import DType
from taskvec.errors import CheckpointError


def companions(target: Source, dtype: DType | None) -> dict[str, bytes]:
    """Files to write beside the weights, by relative name.

    Args:
        target: The member whose config, tokenizer and chat template the result has.
        dtype: Element type of the result where it is not the target's own; the config then says so.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = _files(target.folder) if target.folder is not None else {}
    stored = _config_in(found)
    config = dict(target.config)
    if dtype is not None:
        config = with_dtype(config, dtype)
    if config != stored:
        found["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    return found | dict(target.files)


def is_companion(name: str) -> bool:
    """Whether a file of a model folder, by its relative path there, belongs to its weights."""
    return belongs(name)


def _files(model: Path) -> dict[str, bytes]:
    """Files of a model folder that belong to its weights, by relative name."""
    return {name: _content(model / name) for name in belongings(model)[0]}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _config_in(found: Mapping[str, bytes]) -> Any:
    """The config as it is there now; None if it became something that is none."""
    try:
        return json.loads(found.get("config.json", b"{}"))
    except ValueError:
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
