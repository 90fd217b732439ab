"""How models are named where others read it."""

from __future__ import annotations

from pathlib import Path

from taskvec.checkpoints.memory import MARK
from taskvec.checkpoints.source import Source


def display_name(model: Source) -> str:
    """How a card names a model: never by where it lay on the machine that merged."""
    is_path = Path(model.where).is_absolute()
    return Path(model.where).name if is_path else model.where


def hub_id(model: Source) -> str:
    """How metadata that the hub reads names a model: without revision; empty for one in memory."""
    name = display_name(model)
    if name.startswith(MARK):
        return ""
    return name if Path(model.where).is_absolute() else name.partition("@")[0]
