"""Models that can be asked: folders, names on the hub, modules in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.checkpoints.hub import fetch, hub_name
from taskvec.errors import CheckpointError, UsageError
from taskvec.extras import require
from taskvec.running.encoding import Encoder, make_encoder, open_encoder
from taskvec.running.pretrained import load_module

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Model:
    """A causal language model that is loaded.

    Attributes:
        module: Of torch, in evaluation mode.
        encoder: Its tokenizer and limits.
    """

    module: Any
    encoder: Encoder

    @property
    def device(self) -> Any:
        """Where its first parameter is."""
        return next(self.module.parameters()).device


@dataclass(frozen=True, slots=True)
class Stored:
    """A model in a folder, with its encoder, before its weights are loaded.

    Attributes:
        where: As the user named it.
        folder: Where it lies.
        encoder: Its tokenizer and limits.
        stamp: Changes when a file of it does; what was measured before is then not used again.
    """

    where: str
    folder: Path
    encoder: Encoder
    stamp: str


def open_stored(spec: str | os.PathLike[str]) -> Stored:
    """A model folder or a model on the hub, without its weights.

    Raises:
        CheckpointError: there is none, or it lacks a config or a tokenizer.
    """
    named = hub_name(spec)
    where = os.fspath(spec)
    folder = fetch(named)[1] if named is not None else Path(spec).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{where}: no such folder; give a model in Hugging Face layout")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{where}: is an adapter; evaluate a recipe that has it as a task, or merge it first"
        )
    return Stored(where, folder, open_encoder(folder, where), stamp_of(folder))


def stamp_of(folder: Path) -> str:
    """Digest of names, sizes and times of the files of a folder, or of one file."""
    inside = [folder] if folder.is_file() else [path for path in folder.iterdir() if path.is_file()]
    files = sorted((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in inside)
    return hashlib.sha256(json.dumps([str(folder.resolve()), files]).encode()).hexdigest()[:16]


def load(stored: Stored, *, dtype: str = "auto", device: str = "auto") -> Model:
    """Load the weights.

    Args:
        stored: The folder.
        dtype: One of `DTYPES`; `auto`: as stored on an accelerator, float32 on
            the CPU, where narrow types are slow or coarse.
        device: Such as `cpu` or `cuda:1`; `auto`: the accelerator, if there is one.

    Raises:
        CheckpointError: it is no causal language model that transformers can load, or lacks a
            parameter of one.
        UsageError: there is no such device.
    """
    torch, transformers = require("torch", "eval"), require("transformers", "eval")
    place = find_device(device)
    narrow = dtype == "auto" and place.type != "cpu"
    wanted = "auto" if narrow else getattr(torch, "float32" if dtype == "auto" else dtype)
    try:
        with without_bars(transformers), torch.random.fork_rng(devices=[]):
            module, info = load_module(stored.folder, "AutoModelForCausalLM", dtype=wanted)
    except CheckpointError:
        raise
    except Exception as error:  # the many model classes may raise anything
        text = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{stored.where}: cannot be loaded: {text}") from error
    refuse_random(module, info, stored.where)
    return Model(module.to(place).eval(), stored.encoder)


def refuse_random(module: Any, info: Mapping[str, Any], where: str) -> None:
    """Refuse a loaded module of which a parameter was not in the folder, and so is random.

    Args:
        module: As transformers loaded it.
        info: Its loading info.
        where: What messages call the folder.

    Raises:
        CheckpointError: there is such a parameter.
    """
    random = [name for name, _ in module.named_parameters() if name in info["missing_keys"]]
    if random:
        raise CheckpointError(
            f"{where}: lacks {random[0]!r} ({len(random)} such), which would be random; give a "
            f"folder that was saved as {type(module).__name__}"
        )


def wrap(module: Any, tokenizer: Any, where: str = "the module") -> Model:
    """A module in memory that can be asked; it is put into evaluation mode.

    Args:
        module: A causal language model of transformers.
        tokenizer: Its tokenizer.
        where: What messages call it.

    Raises:
        UsageError: there is no tokenizer, the module is no language model of transformers, or it
            has no weights.
    """
    if tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer: give tokenizer=")
    if not (hasattr(module, "config") and hasattr(module, "generate")):
        raise UsageError(
            f"{where} must be a causal language model of transformers; got {type(module).__name__}"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UsageError(f"{where} has parameters on the meta device, without values; load them")
    generation = getattr(module, "generation_config", None)
    info = generation.to_dict() if generation is not None else {}
    return Model(module.eval(), make_encoder(tokenizer, module.config.to_dict(), info, where))


@contextmanager
def preserve_modes(module: Any) -> Iterator[None]:
    """Put a module back into the mode, of training or evaluation, that each part of it was in."""
    parts = list(module.modules()) if hasattr(module, "modules") else []
    modes = [part.training for part in parts]
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def find_device(name: str) -> Any:
    """A torch device by name; `auto` is the accelerator, or the CPU where there is none.

    Raises:
        UsageError: it is not there.
    """
    torch = require("torch", "eval")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}; give cpu, cuda, cuda:1 …") from error
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise UsageError(f"device {name!r} is not available here; give cpu, or auto")
    return device


@contextmanager
def without_bars(transformers: Any) -> Iterator[None]:
    """Without the bars of transformers, which say how many tensors were loaded."""
    bars = transformers.utils.logging
    was_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            bars.enable_progress_bar()
