"""The tables of renamings that transformers publishes, asked where it is installed.

They say what a tensor of a file is called in memory, for every class and version of files that it
still reads. Only names that nothing else explains are looked up, so that neither transformers nor
torch is imported otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from taskvec.checkpoints.names import canonical


def renamings(*configs: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Gives names their canonical name in memory; None without a table for any config.

    Args:
        configs: Of models that are to be matched; the first that transformers has a table for.
    """
    for config in configs:
        if config.get("architectures") and find_spec("transformers") and find_spec("torch"):
            steps = _steps(config)
            if steps:
                return cache(lambda name, steps=steps: _renamed(name, steps))
    return None


def _renamed(name: str, steps: list[Any]) -> str:
    for step in steps:
        name, _ = step.rename_source_key(name)
    return canonical(name)


def _steps(config: Mapping[str, Any]) -> list[Any]:
    """Renamings of the model of a config in the order in which they are applied; none on failure.

    Whatever a version of transformers does otherwise than expected, names are then matched as if it
    was not installed.
    """
    try:
        tables = import_module("transformers.conversion_mapping")
        kinds = [str(config["architectures"][0]), *_model_types(config)]
        if not any(tables.get_checkpoint_conversion_mapping(kind) for kind in kinds):
            return []
        transformers, torch = import_module("transformers"), import_module("torch")
        loading = import_module("transformers.core_model_loading")
        built = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = getattr(transformers, kinds[0])(built)
        steps = tables.get_model_conversion_mapping(model, add_legacy=True)
        return [step for step in steps if isinstance(step, loading.WeightRenaming)]
    except Exception:
        return []


def _model_types(config: Mapping[str, Any]) -> list[str]:
    found = [str(config["model_type"])] if "model_type" in config else []
    for value in config.values():
        if isinstance(value, dict):
            found += _model_types(value)
    return found
