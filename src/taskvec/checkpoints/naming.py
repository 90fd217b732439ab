"""How models are named where others read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from taskvec.checkpoints.hub import hub_name
from taskvec.checkpoints.source import Source


def display_name(model: Source, published: Mapping[str, str] | None = None) -> str:
    """How text names a model: never by where it lay on the machine that merged.

    Args:
        model: Any.
        published: Names on the hub of local models, by path.
    """
    if published and model.where in published:
        return published[model.where]
    is_path = Path(model.where).is_absolute()
    return Path(model.where).name if is_path else model.where


def hub_id(model: Source, published: Mapping[str, str]) -> str:
    """The repository of a model on the hub, for metadata; empty if none is known.

    Args:
        model: Any.
        published: Names on the hub of local models, by path.
    """
    if model.where in published:
        return re.split("[@:]", published[model.where])[0]
    name = hub_name(model.where)
    return "" if name is None else name.repository
