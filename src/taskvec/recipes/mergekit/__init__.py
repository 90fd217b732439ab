"""Configurations of mergekit 0.1.5 as recipes."""

from __future__ import annotations

MARK = "merge_method"  # the key by which a configuration is known


def is_config(data: object) -> bool:
    """Whether a parsed file is a mergekit configuration, and not a recipe with a word of it."""
    return isinstance(data, dict) and MARK in data and not {"tasks", "method"} & data.keys()
