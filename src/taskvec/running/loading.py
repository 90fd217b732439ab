"""Models in folders, loaded as transformers has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from taskvec import documents
from taskvec.checkpoints.hub import fetch, hub_name
from taskvec.errors import CheckpointError
from taskvec.extras import require
from taskvec.layers import classify
from taskvec.running.model import without_bars
from taskvec.running.pretrained import load_module


def find_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a model, fetched from the hub if it is there.

    Raises:
        CheckpointError: there is none.
    """
    named = hub_name(model)
    folder = fetch(named)[1] if named is not None else Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model}: no such model; give a folder in Hugging Face layout")
    return folder


def load(folder: Path, where: str, kind: str, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """A model of transformers in float32, on the CPU, in evaluation mode.

    A pooler that the folder does not hold is left out, where the class can be without.

    Args:
        folder: Of the model.
        where: What messages call it.
        kind: Class of transformers, such as `AutoModel`.
        **options: For it.

    Returns:
        The module, and its parameters that the folder does not hold: they are random, though the
        same every time.

    Raises:
        CheckpointError: transformers cannot load it as that.
    """
    torch, transformers = require("torch", "train"), require("transformers", "train")
    try:
        with (
            without_bars(transformers),
            _without_warnings(transformers),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(0)
            module, info = load_module(folder, kind, **options, dtype=torch.float32)
    except CheckpointError:
        raise
    except Exception as error:  # the many model classes may raise anything
        text = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{where}: cannot be loaded as {kind}: {text}") from error
    missing = set(info["missing_keys"])
    poolers = {name for name, _ in module.named_parameters() if name.startswith("pooler.")}
    if poolers & missing and "add_pooling_layer" in signature(type(module).__init__).parameters:
        module.pooler = None  # as the class does without one
    return module.eval(), tuple(n for n, _ in module.named_parameters() if n in missing)


@contextmanager
def _without_warnings(transformers: Any) -> Iterator[None]:
    """Without the table of tensors that are missing or left over: what matters is reported here."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def tell_missing(where: str, missing: Sequence[str], notes: list[str], *, has_head: bool) -> None:
    """Note which parameters a folder does not hold.

    Args:
        where: What messages call the folder.
        missing: As `load` returned them.
        notes: Gets a line about them.
        has_head: Whether the head is the folder's.

    Raises:
        CheckpointError: the head that is asked for is among them.
    """
    heads = [name for name in missing if classify(name).module == "head"]
    if heads and has_head:
        raise CheckpointError(
            f"{where}: lacks {heads[0]!r}, without which it has no head; give the folder that was "
            "saved with its head"
        )
    if missing:
        notes.append(
            f"{where} does not hold {missing[0]!r} ({len(missing)} such): random, and does not "
            "train"
        )


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """The config of a model folder."""
    where = f"{where}: config.json"
    path = folder / "config.json"
    return documents.read_object(path, documents.CONFIG, where=where)
