"""Pickled weights: `pytorch_model.bin`, its shards, or a `.bin`, `.pt`, `.pth` or `.ckpt` file.

Unpickling can run code. torch's `weights_only` unpickler builds tensors and plain containers and
refuses everything else, so nothing that is in a file is run; it is used only where pickled weights
are allowed. Files are mapped into memory, not read whole, unless torch wrote them before 1.6.

A small file can still ask for years and terabytes. So files are loaded first by a child process
with limits on its processor time and memory, and a tensor that repeats its elements (`expand`), so
that it is larger than what is stored, is refused.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from taskvec.checkpoints.folder import (
    check_index,
    identify,
    read_config,
    read_index,
    refuse_factors,
)
from taskvec.checkpoints.memory import Held, is_torch, view_of
from taskvec.checkpoints.quantised import plain
from taskvec.checkpoints.source import Source
from taskvec.errors import CheckpointError, MissingExtraError
from taskvec.extras import require

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
# Before this version, weights_only could be made to run code (CVE-2025-32434).
_SAFE_TORCH = (2, 6)
# What training leaves beside the weights.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")
# Of the child that loads files first: what a model of any size needs, as its files are mapped.
_CPU_SECONDS = 60
_MEMORY_BYTES = 2 * 2**30  # besides the files
_TRIAL = """
import resource, sys, zipfile
import torch
seconds, nbytes, paths = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
with open("/proc/self/statm") as file:
    nbytes += int(file.read().split()[0]) * resource.getpagesize()
used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
resource.setrlimit(resource.RLIMIT_CPU, (seconds + int(used) + 1,) * 2)
try:
    for path in paths:
        torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
except MemoryError:
    sys.exit(3)
except RuntimeError as error:
    sys.exit(3 if "not enough memory" in str(error) or "Cannot allocate" in str(error) else 0)
except Exception:
    pass  # the parent meets it again, and says what it is
"""
# Keys under which training scripts save the weights beside other things.
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "params")


def is_pickled(path: Path) -> bool:
    """Whether a path is a pickled file, or a folder whose only weights are pickled."""
    if not path.is_dir():
        return path.is_file() and path.suffix in SUFFIXES
    suffixes = {p.suffix for p in path.iterdir()}
    is_adapter = (path / "adapter_config.json").exists()
    return not is_adapter and ".safetensors" not in suffixes and not suffixes.isdisjoint(SUFFIXES)


def _weight_files(folder: Path) -> list[str]:
    """The weight files of a folder that has no safetensors; empty if it has none or too many."""
    if (folder / SINGLE).exists():  # before shards, as transformers does
        return [SINGLE]
    if (folder / INDEX).exists():
        return sorted(read_index(folder, INDEX, {p.name for p in folder.iterdir()}))
    found = [p.name for p in folder.iterdir() if p.suffix in SUFFIXES]
    found = [name for name in found if not _TRAINING.fullmatch(name)]
    return found if len(found) == 1 else []


def open_pickled(path: Path) -> Source:
    """Open a folder of pickled weights, or a single pickled file, without running what is in it.

    Args:
        path: Folder without safetensors weights, or a file.

    Raises:
        CheckpointError: no pickled weights, a damaged file, or one that holds more than weights.
        MissingExtraError: torch is not installed, or too old to be safe.
    """
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    names = _weight_files(folder) if path.is_dir() else [path.name]
    if not names:
        raise CheckpointError(
            f"{path}: holds several pickled files and no {SINGLE} or {INDEX}; name one of the files"
        )
    identities = tuple(identify(folder / name) for name in names)
    listed = read_index(folder, INDEX, set(names)) if len(names) > 1 else {}
    _try_out(tuple(folder / name for name in names), identities)
    tensors: dict[str, Any] = {}
    for name in names:
        found = _load(folder / name)
        if name in listed:
            check_index(folder, INDEX, name, listed[name], found.keys())
        tensors |= found
    refuse_factors(path, tensors)
    held = Held(
        where=str(path),
        views={name: view_of(name, tensors[name], str(path)) for name in sorted(tensors)},
        config=read_config(folder) if path.is_dir() else {},
        identity=(str(path), identities),
        folder=folder if path.is_dir() else None,
        inputs=(path,),
        place=folder,
        read_from=identities,
    )
    return plain(held)


def open_pickled_adapter(path: Path) -> Held:
    """The tensors of one pickled file of an adapter, without running what is in it.

    Raises:
        CheckpointError: a damaged file, or one that holds more than weights.
        MissingExtraError: torch is not installed, or too old to be safe.
    """
    identity = identify(path)
    _try_out((path,), (identity,))
    tensors = _load(path)
    return Held(
        where=str(path.parent),
        views={name: view_of(name, tensors[name], str(path)) for name in sorted(tensors)},
        config={},
        identity=(str(path), identity),
        folder=path.parent,
        inputs=(path.parent,),
        place=path.parent,
        read_from=(identity,),
    )


def _safe_torch() -> Any:
    torch = require("torch", "pickle")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise MissingExtraError(
            f"torch {torch.__version__} could be made to run code by a pickled file; this needs: "
            "pip install 'taskvec[pickle]'"
        )
    return torch


@cache
def _try_out(paths: Sequence[Path], identities: Sequence[object]) -> None:
    """Load files in a child process with limits, so that none can exhaust this one.

    Args:
        paths: The files.
        identities: Theirs; a file that has not changed is tried once.

    Raises:
        CheckpointError: loading exceeds the limits.
    """
    _safe_torch()
    size = sum(path.stat().st_size for path in paths)
    seconds = _CPU_SECONDS + size // 10**8
    limits = [str(seconds), str(_MEMORY_BYTES + 2 * size)]
    child = subprocess.run(
        [sys.executable, "-I", "-c", _TRIAL, *limits, *map(os.fspath, paths)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if child.returncode == 3:
        what = f"more than {_MEMORY_BYTES / 2**30:.0f} GiB of memory besides the weights"
    elif child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        what = f"more than {seconds} s or all of the memory"
    else:
        return
    raise CheckpointError(
        f"{', '.join(map(str, paths[:3]))}: needs {what} to be unpickled, which weights alone do "
        "not; convert it to safetensors where you trust it"
    )


def _load(path: Path) -> dict[str, Any]:
    """The tensors of one file, by name."""
    torch = _safe_torch()
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged or hostile file can make the unpickler raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {asked[1]}" if asked else f"{type(error).__name__}"
        raise CheckpointError(
            f"{path}: is damaged or holds more than weights ({what}); nothing in it was run; "
            "save its state dict as safetensors if you trust it"
        ) from error
    return _state_dict(path, content)


def _state_dict(path: Path, content: object) -> dict[str, Any]:
    """Tensors by name: the content itself, or what a training script put under a usual key."""
    if isinstance(content, Mapping):
        inside = [content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)]
        for found in [content, *inside]:
            if found and all(isinstance(n, str) and is_torch(t) for n, t in found.items()):
                _check_sizes(path, found)
                return dict(found)
        odd = [str(name) for name, value in content.items() if not is_torch(value)]
        got = f"{odd[0]!r} is not a tensor" if odd else "it is empty"
    else:
        got = f"it is a {type(content).__name__}"
    raise CheckpointError(
        f"{path}: is not a state dict ({got}); save the tensors by name, or under 'state_dict'"
    )


def _check_sizes(path: Path, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        is_stored = tensor.device.type == "cpu" and str(tensor.layout) == "torch.strided"
        if is_stored and tensor.nbytes > (held := tensor.untyped_storage().nbytes()):
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(tensor.shape)} repeats its elements: it "
                f"takes {tensor.nbytes:,} bytes, {held:,} are stored; save it with .contiguous()"
            )
