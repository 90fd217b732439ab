"""Optional dependencies: imported where used, named with the command that installs them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from taskvec.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import a module that only comes with an extra.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{module.split('.')[0]} is not installed; this needs: pip install 'taskvec[{extra}]'"
        ) from error
